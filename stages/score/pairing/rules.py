"""The pairing rules: one prompt's answers in, the pairs that a rule makes of them out.

A rule is pure. It chooses among the pairs that may be made at all (`Pool.may`), which `stages.score.pairing.choice` has
found by the options that all rules share. It sees answers by falling reward, equal ones by id, and draws by hashes of
ids: its result is blind to the order in which answers came, and, but for `correct_wrong`, to a constant added to every
reward. Rules that measure gaps in units of the reward (`all_above`, `gap_band`, `statistical`) are not blind to a
factor; a reward with ``scale: zscore`` has the same unit in every round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from stages.score.config import Strategy
from stages.seeds import hashed_seed
from stages.vocab import Fate

Couple = tuple[int, int]
"""The places of a chosen and a rejected answer in a `Pool`; the chosen one's is the smaller."""

_ROUNDING = 1e-9  # of a place among sorted gaps: 0.1 * 30 is a little more than 3


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a prompt makes no pair."""

    fate: Fate
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Pool:
    """One prompt's different usable answers, best first.

    Attributes:
        ids: response ids, by falling reward; of equal rewards, the smaller id first.
        rewards: after the length penalty.
        unpenalised: before it.
        may: the pairs that may be made, at least one, sorted; each has a gap above 0.
        seed: of this prompt in this round.
    """

    ids: Sequence[str]
    rewards: Sequence[float]
    unpenalised: Sequence[float]
    may: Sequence[Couple]
    seed: int

    def gap(self, couple: Couple) -> float:
        """How much more reward the chosen answer has."""
        return self.rewards[couple[0]] - self.rewards[couple[1]]

    def lot(self, *what: object) -> int:
        """A draw for something, uniform in [0, 2**62); ids, never places, may be part of it."""
        return hashed_seed(self.seed, *what)


def best_worst(pool: Pool) -> list[Couple]:
    """The widest gap: the best answer against the worst, where these two may be paired.

    Source: best of n against worst of n, as RLHFlow pairs (arXiv:2405.07863).
    """

    def width(couple: Couple) -> tuple[float, int, float, int]:
        chosen, rejected = couple
        return -pool.gap(couple), chosen, pool.rewards[rejected], rejected

    return [min(pool.may, key=width)]


def all_above(pool: Pool, *, tau: float, eta: float) -> list[Couple] | Drop:
    """RS-DPO: every pair with ``sigmoid((R_chosen - R_rejected) / tau) > eta``, strictly (arXiv:2402.10038)."""
    found = [couple for couple in pool.may if 1 / (1 + math.exp(-pool.gap(couple) / tau)) > eta]
    if found:
        return found
    widest, least = max(map(pool.gap, pool.may)), tau * math.log(eta / (1 - eta))
    return Drop("no_pair_by_rule", f"the widest gap is {widest:.6g}, not above {least:.6g} = tau * logit(eta)")


def best_random(pool: Pool) -> list[Couple]:
    """The best answer against one drawn among the others that it may be paired with."""
    return [min(_of_the_best(pool), key=lambda couple: pool.lot("best_random", pool.ids[couple[1]]))]


def best_second(pool: Pool) -> list[Couple]:
    """The best answer against the next best that it may be paired with."""
    return [min(pool.may)]


def top_bottom(pool: Pool, *, k: int) -> list[Couple] | Drop:
    """Each of the `k` best answers against each of the `k` worst; of fewer than 2k, of each half.

    ``max_pairs: 1`` makes it one draw from the top against one from the bottom.
    """
    k = min(k, len(pool.ids) // 2)
    found = [(chosen, rejected) for chosen, rejected in pool.may if chosen < k and rejected >= len(pool.ids) - k]
    return found or Drop("no_pair_by_rule", f"none of the {k} best may be paired with one of the {k} worst")


def gap_band(pool: Pool, *, low: float, high: float, unit: Literal["reward", "quantile"]) -> list[Couple] | Drop:
    """Every pair whose gap lies in ``[low, high]``.

    In quantiles, low and high are shares of the sorted gaps between all of the prompt's own answers (those with equal
    rewards aside); the bounds are gaps that occur, so that a factor on all rewards changes nothing. They are the
    prompt's own and not the round's, since a prompt with close answers has its hard pairs, too, and since a shard sees
    itself alone, whatever its size; for a band that is the same for all prompts, write it in units of the reward.
    """
    if unit == "quantile":
        rewards = pool.rewards
        gaps = sorted(
            gap for at, best in enumerate(rewards) for other in rewards[at + 1 :] if (gap := best - other) > 0
        )
        first = math.ceil(low * (len(gaps) - 1) - _ROUNDING)
        last = math.floor(high * (len(gaps) - 1) + _ROUNDING)
        least, most = gaps[first], gaps[last]
    else:
        least, most = low, high
    found = [couple for couple in pool.may if least <= pool.gap(couple) <= most]
    if found:
        return found
    near, far = min(map(pool.gap, pool.may)), max(map(pool.gap, pool.may))
    return Drop("no_pair_by_rule", f"gaps from {near:.6g} to {far:.6g}, none from {least:.6g} to {most:.6g}")


def correct_wrong(pool: Pool, *, correct_at: float, num_pairs: int) -> list[Couple] | Drop:
    """`num_pairs` pairs of a right and a wrong answer, each of both used as often as any other, give or take one.

    Right is a reward of `correct_at` or more before the length penalty. As in Iterative RPO (arXiv:2404.19733), right
    and wrong answers are gone through in a drawn order, again from the start when one kind runs out; ours is that no
    pair is made twice. Where an option forbids pairs, these are passed over.
    """
    drawn = sorted(range(len(pool.ids)), key=lambda at: pool.lot("correct_wrong", pool.ids[at]))
    right = [at for at in drawn if pool.unpenalised[at] >= correct_at]
    wrong = [at for at in drawn if pool.unpenalised[at] < correct_at]
    may, found = set(pool.may), []
    if right and wrong:
        cycle = math.lcm(len(right), len(wrong))  # afterwards the same pairs would meet: one answer is passed over
        for turn in range(len(right) * len(wrong)):
            couple = right[turn % len(right)], wrong[(turn + turn // cycle) % len(wrong)]
            if couple in may:
                found.append(couple)
            if len(found) == num_pairs:
                break
    return found or Drop(
        "no_pair_by_rule", f"{len(right)} right and {len(wrong)} wrong answers at {correct_at:g}, none to be paired"
    )


def mean_minus_2sd(pool: Pool) -> list[Couple]:
    """The best answer against the one nearest to the mean reward less two standard deviations (arXiv:2502.16825).

    Of two equally near, the worse one. Mean and (population) deviation are those of the prompt's different answers.
    They are worked out on distances from the best reward, which a constant added to all rewards leaves alone.
    """
    below = [pool.rewards[0] - reward for reward in pool.rewards]
    mean = math.fsum(below) / len(below)
    deviation = math.sqrt(math.fsum((distance - mean) ** 2 for distance in below) / len(below))

    def off(couple: Couple) -> tuple[float, float, int]:
        distance = below[couple[1]]
        return abs(distance - (mean + 2 * deviation)), -distance, couple[1]

    return [min(_of_the_best(pool), key=off)]


def statistical(
    pool: Pool, *, beta: float, num_accepted: int, ranking: Literal["first_round", "tournament"]
) -> list[Couple] | Drop:
    """RSO: answers drawn as from the optimal policy, then paired at random (arXiv:2309.06657).

    An answer is accepted with probability ``exp((R - R_max) / beta)``, `R_max` over those not accepted yet; passes over
    the rest follow until `num_accepted` are there (its algorithm 1; 8 of 64 in the paper, which means many more
    candidates than accepted ones). ``first_round`` pairs the accepted ones two by two; ``tournament`` goes on with the
    winners. Ours: answers are gone through in a drawn order, an odd one goes to the next round unpaired, and a pair
    that may not be made is left out.
    """
    drawn = sorted(range(len(pool.ids)), key=lambda at: pool.lot("order", pool.ids[at]))
    playing = _accepted(pool, drawn, beta, num_accepted)
    playing.sort(key=lambda at: pool.lot("pairing", pool.ids[at]))
    may, found = set(pool.may), []
    while len(playing) > 1:
        games = [(min(one, other), max(one, other)) for one, other in zip(playing[::2], playing[1::2], strict=False)]
        found += [game for game in games if game in may]
        if ranking == "first_round":
            break
        playing = [winner for winner, _ in games] + playing[len(games) * 2 :]
    return sorted(found) or Drop("no_pair_by_rule", "no two of the accepted answers that met may be paired")


def _accepted(pool: Pool, drawn: Sequence[int], beta: float, num_accepted: int) -> list[int]:
    """The best of those left is accepted in every pass, since a draw is below 1: there are at most as many passes."""
    accepted: list[int] = []
    left = list(drawn)
    for turn in range(len(drawn)):
        greatest = max((pool.rewards[at] for at in left), default=0.0)
        for at in list(left):
            if len(accepted) == num_accepted:
                return accepted
            if pool.lot("accept", turn, pool.ids[at]) / 2**62 < math.exp((pool.rewards[at] - greatest) / beta):
                accepted.append(at)
                left.remove(at)
    return accepted


def _of_the_best(pool: Pool) -> list[Couple]:
    """The pairs of the best answer that may be paired at all."""
    return [couple for couple in pool.may if couple[0] == pool.may[0][0]]


RULES: dict[Strategy, Callable[..., list[Couple] | Drop]] = {
    "best_worst": best_worst,
    "all_above": all_above,
    "best_random": best_random,
    "best_second": best_second,
    "top_bottom": top_bottom,
    "gap_band": gap_band,
    "correct_wrong": correct_wrong,
    "mean_minus_2sd": mean_minus_2sd,
    "statistical": statistical,
}
"""Every strategy that makes pairs; each takes its own settings of `stages.score.config.OWN_SETTINGS` by name."""

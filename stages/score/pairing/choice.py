"""From one prompt's scored answers to its pairs or its group, by a config, or to the reason for none.

Pure, and blind to the order of the answers: equal texts are one answer, equal rewards make no pair, ties are broken by
id. The options that all rules share are here; the rules themselves are in `stages.score.pairing.rules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.score.config import PairConfig
from stages.score.pairing.rules import RULES, Couple, Drop, Pool


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """What pairing knows of an answer.

    Attributes:
        response_id: what it is joined and ordered by.
        text: its text, or a number that stands for it: equal where the texts are.
        reward: None where it, or another reward that is needed, could not be had.
        truncated: whether it ended at max_new_tokens.
        num_tokens: of the answer, stop token included.
        main_rewards: each single one, in one order for all answers and turned so that more is better; only agreement
            looks at them.
    """

    response_id: str
    text: str | int
    reward: float | None
    truncated: bool
    num_tokens: int = 1
    main_rewards: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers by id, with their rewards after the length penalty."""

    chosen_id: str
    rejected_id: str
    score_chosen: float
    score_rejected: float

    @property
    def margin(self) -> float:
        """Above 0."""
        return self.score_chosen - self.score_rejected


@dataclass(frozen=True, slots=True)
class Group:
    """All different usable answers of a prompt, best first, with their rewards after the length penalty."""

    response_ids: tuple[str, ...]
    rewards: tuple[float, ...]


Choice = list[Pair] | Group | Drop
"""What becomes of a prompt: at least one pair, a group, or the reason for neither."""


def valid_answers(answers: Sequence[ScoredAnswer], config: PairConfig) -> list[ScoredAnswer]:
    """The answers that pairing may use: scored, and ended by themselves unless ``truncated: keep``."""
    keeps = config.truncated == "keep"
    return [answer for answer in answers if answer.reward is not None and (keeps or not answer.truncated)]


def choose(answers: Sequence[ScoredAnswer], config: PairConfig, *, seed: int) -> Choice:
    """The pairs, or the group, that `config` makes of one prompt's answers, or the first reason why there is none.

    Args:
        answers: at least one, in any order.
        config: the strategy and its options.
        seed: of this prompt in this round; only strategies and caps that draw look at it.
    """
    distinct = _distinct(answers, config)
    if isinstance(distinct, Drop):
        return distinct
    penalty = config.length_penalty
    worth = [(answer.reward - penalty * answer.num_tokens, answer) for answer in distinct]  # type: ignore[operator]
    worth.sort(key=lambda found: (-found[0], found[1].response_id))
    rewards, ranked = [reward for reward, _ in worth], [answer for _, answer in worth]
    if rewards[0] == rewards[-1]:
        return Drop("tied", f"{len(ranked)} different answers, one reward: {rewards[0]:.6g}")
    if config.strategy == "groups":
        return Group(tuple(answer.response_id for answer in ranked), tuple(rewards))
    may = _may(ranked, rewards, config)
    if isinstance(may, Drop):
        return may
    ids, unpenalised = [answer.response_id for answer in ranked], [answer.reward for answer in ranked]
    pool = Pool(ids, rewards, unpenalised, may, seed)  # type: ignore[arg-type]
    found = RULES[config.strategy](pool, **config.own)
    if isinstance(found, Drop):
        return found
    return [Pair(ids[i], ids[j], rewards[i], rewards[j]) for i, j in _capped(pool, found, config.max_pairs)]


def _distinct(answers: Sequence[ScoredAnswer], config: PairConfig) -> list[ScoredAnswer] | Drop:
    """The usable answers, of each text the one with the smallest id; at least two."""
    valid = valid_answers(answers, config)
    if len(valid) < 2:
        num_scored = sum(answer.reward is not None for answer in answers)
        if not num_scored:
            return Drop("score_error", f"none of {len(answers)} answers has a finite reward")
        if not valid:
            return Drop("all_truncated", f"all {num_scored} answers ended at max_new_tokens")
        return Drop("too_few_valid", f"1 of {len(answers)} answers is usable")
    distinct: dict[str | int, ScoredAnswer] = {}
    for answer in valid:
        found = distinct.setdefault(answer.text, answer)
        if answer.response_id < found.response_id:
            distinct[answer.text] = answer
    if len(distinct) < 2:
        return Drop("duplicate_answers", f"{len(valid)} answers, one text")
    return list(distinct.values())


def _may(ranked: Sequence[ScoredAnswer], rewards: Sequence[float], config: PairConfig) -> list[Couple] | Drop:
    """The pairs that may be made at all, by agreement, least margin and length, in this order; at least one."""
    places, least = range(len(ranked)), config.min_margin
    may = [(i, j) for i in places for j in places[i + 1 :] if rewards[i] > rewards[j]]
    if config.agreement:
        num_before = len(may)
        may = [(i, j) for i, j in may if _agree(ranked[i].main_rewards, ranked[j].main_rewards)]
        if not may:
            return Drop("disagreement", f"the single rewards agree on none of {num_before} pairs")
    if least:
        widest = max(rewards[i] - rewards[j] for i, j in may)
        if widest < least:
            return Drop("gap_too_small", f"{widest:.6g} < {least:g}")
        may = [(i, j) for i, j in may if rewards[i] - rewards[j] >= least]
    if (ratio := config.max_length_ratio) is not None:
        num_before, tokens = len(may), [answer.num_tokens for answer in ranked]
        may = [(i, j) for i, j in may if max(tokens[i], tokens[j]) <= ratio * min(tokens[i], tokens[j])]
        if not may:
            return Drop("no_pair_by_rule", f"each of {num_before} pairs differs in length by more than {ratio:g} times")
    return may


def _agree(chosen: Sequence[float], rejected: Sequence[float]) -> bool:
    return all(better > worse for better, worse in zip(chosen, rejected, strict=True))


def _capped(pool: Pool, couples: list[Couple], max_pairs: int | None) -> list[Couple]:
    """At most `max_pairs` of a strategy's pairs, drawn, in the order in which they came."""
    if max_pairs is None or len(couples) <= max_pairs:
        return couples
    drawn = sorted(couples, key=lambda couple: pool.lot("cap", pool.ids[couple[0]], pool.ids[couple[1]]))
    kept = set(drawn[:max_pairs])
    return [couple for couple in couples if couple in kept]

"""The gate between rounds: whether a round's result takes the place of the policy before it.

In go figures of evaluations, out comes a verdict; nothing is sampled, read or written here. A result is promoted if it
keeps every limit of the config's section ``gate``; each limit is one `Check`, so that a report can show all of them.
What no evaluation tells fails no check, nor does what too few prompts tell; the verdict says so. What is not a number
fails, and so does a reward of role holdout that lacks more values than ``score.max_error_share`` allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline import student_t
from pipeline.figures import Figures
from pipeline.sections import GateConfig
from stages.protocols import Weights

Decision = Literal["promote", "hold", "roll_back"]

FEWEST_PROMPTS = 8
"""In common, for a mean difference or a win rate to be judged: of fewer, even Student's t goes by a few odd answers."""

_RIVALS = {"before": "the policy before", "first": "the first policy"}


@dataclass(frozen=True, slots=True)
class Check:
    """One figure beside its limit.

    Attributes:
        name: of the limit in the config.
        got: the figure; NaN where it could not be judged.
        kept: whether it keeps the limit.
        told: the figure in words.
    """

    name: str
    limit: float
    got: float
    kept: bool
    told: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a round's result.

    Attributes:
        result: the policy that the round made; None where its update was ended without one.
        standing: the policy that the run stands behind from now on.
    """

    decision: Decision
    reason: str
    result: Weights | None
    standing: Weights
    checks: Sequence[Check] = ()

    def figures(self) -> Figures:
        """For the round's report; what is not finite is null there, as JSON has no word for it."""
        checks = [asdict(check) | {"got": check.got if math.isfinite(check.got) else None} for check in self.checks]
        return {"standing_round": self.standing.round, "checks": checks}


@dataclass(frozen=True, slots=True)
class Rivals:
    """What a round's result is judged against.

    Attributes:
        before: the policy that the run stands behind now.
        best: the best policy so far, see `best_round`.
        first: the first policy's evaluation.
    """

    before: Weights
    best: Weights
    first: Figures


# ---- checks ---------------------------------------------------------------------------------------------------------


def checks(config: GateConfig, figures: Figures, first: Figures) -> list[Check]:
    """Every limit that is set, beside the figure that it is about; those whose figure is not known are left out.

    Args:
        figures: the result's evaluation.
        first: the first policy's.
    """
    limits = config.limits
    return [check for name, limit in limits.items() for check in _FIGURES[name](name, limit, figures, first)]


def _kl(name: str, limit: float, figures: Figures, first: Figures) -> Iterator[Check]:
    if (kl := figures.get("kl")) is not None:
        yield Check(name, limit, kl, kl <= limit, f"{kl:.2f} nats an answer from the first policy")


def _reward(name: str, limit: float, figures: Figures, first: Figures) -> Iterator[Check]:
    for rival, against in figures.get("against", {}).items():
        yield from _drop(name, limit, "the reward", rival, against["reward"])


def _holdout(name: str, limit: float, figures: Figures, first: Figures) -> Iterator[Check]:
    for rival, against in figures.get("against", {}).items():
        for reward, found in against["holdout"].items():
            if found["num"] < against["least_holdout"]:
                told = f"{reward} is known on {found['num']} prompts and needs {against['least_holdout']}"
                yield Check(name, limit, math.nan, False, f"{told}, against {_RIVALS[rival]}")
            else:
                yield from _drop(name, limit, reward, rival, found)


def _drop(name: str, limit: float, reward: str, rival: str, found: Mapping[str, Any]) -> Iterator[Check]:
    """A mean difference in standard errors, counted downwards; as many as are as unlikely where the error is known."""
    if found["num"] < FEWEST_PROMPTS:
        yield _unjudged(name, limit, reward, rival, found)
        return
    mean, error = found["mean"], found["se"]
    if error:
        got = student_t.as_normal(-mean / error, df=found["num"] - 1)
    else:
        got = math.copysign(math.inf, -mean) if mean else 0.0
    word = "fell" if mean < 0 else "rose"
    told = f"{reward} {word} by {abs(mean):.3g} ± {error:.2g} against {_RIVALS[rival]}"
    yield Check(name, limit, got, got <= limit, told)


def _unjudged(name: str, limit: float, what: str, rival: str, found: Mapping[str, Any]) -> Check:
    told = f"{what} against {_RIVALS[rival]} is not judged on {found['num']} prompts, {FEWEST_PROMPTS} at least"
    return Check(name, limit, math.nan, True, told)


def _win_rate(name: str, limit: float, figures: Figures, first: Figures) -> Iterator[Check]:
    against = figures.get("against", {})
    rival = "before" if "before" in against else "first"
    if rival not in against:
        return
    found = against[rival]["win_rate"]
    if found["num"] < FEWEST_PROMPTS:
        yield _unjudged(name, limit, "the win rate", rival, found)
    else:
        rate, high = found["mean"], found["high"]
        told = f"win rate {100 * rate:.1f}%, at most {100 * high:.1f}%, against {_RIVALS[rival]}"
        yield Check(name, limit, high, high >= limit, told)


def _length(name: str, limit: float, figures: Figures, first: Figures) -> Iterator[Check]:
    ours, theirs = figures.get("length"), first.get("length")
    if ours is not None and theirs:
        ratio = ours / theirs
        told = f"answers of {ours:.1f} tokens, {ratio:.2f} times the first policy's {theirs:.1f}"
        yield Check(name, limit, ratio, ratio <= limit, told)


def _repetition(name: str, limit: float, figures: Figures, first: Figures) -> Iterator[Check]:
    ours, theirs = figures.get("repetition"), first.get("repetition")
    if ours is not None and theirs is not None:
        told = f"{100 * ours:.1f}% of the 4-grams said before, {100 * theirs:.1f}% by the first policy"
        yield Check(name, limit, ours - theirs, ours - theirs <= limit, told)


def _texts(name: str, limit: float, figures: Figures, first: Figures) -> Iterator[Check]:
    ours, theirs = figures.get("texts_nll"), first.get("texts_nll")
    if ours is not None and theirs is not None:
        told = f"given texts at {ours:.3f} nats a token, {theirs:.3f} to the first policy"
        yield Check(name, limit, ours - theirs, ours - theirs <= limit, told)


_FIGURES = {
    "max_kl": _kl,
    "max_reward_drop": _reward,
    "max_holdout_drop": _holdout,
    "min_win_rate": _win_rate,
    "max_length_ratio": _length,
    "max_repetition": _repetition,
    "max_texts_nll": _texts,
}


# ---- the verdict ----------------------------------------------------------------------------------------------------


def ungated(result: Weights, why: str) -> Verdict:
    """A result that is promoted because nothing judges it."""
    return Verdict("promote", f"every result is promoted: {why}", result, result)


def verdict(config: GateConfig, figures: Figures, result: Weights, rivals: Rivals) -> Verdict:
    """Promote a result that keeps every limit; else hold it, or roll back.

    Args:
        figures: the result's evaluation.
    """
    found = checks(config, figures, rivals.first)
    broken = [check for check in found if not check.kept]
    if not broken:
        unjudged = [check.told for check in found if math.isnan(check.got)]
        return Verdict("promote", "; ".join([_told(figures), *unjudged]), result, result, found)
    reason = "; ".join(f"{check.told} (gate.{check.name} {check.limit:g})" for check in broken)
    return refused(config, reason, result, rivals, found)


def refused(
    config: GateConfig | None, reason: str, result: Weights | None, rivals: Rivals, found: Sequence[Check] = ()
) -> Verdict:
    """What becomes of a result that is not let through; with no gate it is held."""
    on_fail = config.on_fail if config is not None else "hold"
    decision: Decision = "roll_back" if on_fail == "roll_back" and rivals.best != rivals.before else "hold"
    standing = rivals.best if decision == "roll_back" else rivals.before
    stands = f"the policy of round {standing.round}" if standing.round else "the first policy"
    after = f"{stands} stands, and the run ends" if on_fail == "stop" else f"rounds go on from {stands}"
    return Verdict(decision, f"{reason}; {after}", result, standing, found)


def _told(figures: Figures) -> str:
    """Why a result was promoted: how it stands against the policy whose place it takes."""
    against = figures.get("against", {})
    rival = "before" if "before" in against else "first"
    if rival not in against:
        return "every limit is kept"
    found = against[rival]
    parts = [f"reward {_interval(found['reward'])}"]
    if (rate := found["win_rate"]["mean"]) is not None:
        parts.append(f"win rate {100 * rate:.1f}%")
    parts += [f"{name} {_interval(difference)}" for name, difference in found["holdout"].items()]
    return f"{', '.join(parts)} against {_RIVALS[rival]}"


def _interval(found: Mapping[str, Any]) -> str:
    """A mean difference with its 95% interval: ``+0.31 [+0.22, +0.40]``."""
    if found["mean"] is None:
        return "not known"
    ends = f" [{found['low']:+.3g}, {found['high']:+.3g}]" if found["se"] is not None else ""
    return f"{found['mean']:+.3g}{ends}"


def is_promoted(report: Mapping[str, Any]) -> bool:
    """Whether a round's result took its place; so did the first policy, which the report of round 0 is about."""
    return not report["round"] or report.get("decision") == "promote"


def best_round(reports: Sequence[Mapping[str, Any]]) -> int:
    """The round whose promoted result is the best so far; 0 for the first policy.

    The best has the highest reward of role holdout, the first one that the config names; where it names none, the
    highest reward. All are measured by the same one, and a round without its value is not the best. Of equals it is the
    earliest.

    Args:
        reports: of the settled rounds, and of the evaluation before the first.
    """
    allowed = [report for report in reports if report.get("evaluate") and is_promoted(report)]
    if not allowed:
        return 0
    measure = next(iter(allowed[0]["evaluate"].get("holdout", {})), None)
    values = {
        report["round"]: report["evaluate"].get("holdout", {}).get(measure) if measure else report["evaluate"]["reward"]
        for report in allowed
    }
    ranked = [(value, -number) for number, value in values.items() if value is not None]
    return -max(ranked)[1] if ranked else 0

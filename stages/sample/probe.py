"""Did an engine take new weights? Judged from log-probs of a few answers that were sampled before.

Comes in: what the engine says of those answers now (`e`), and what the trainer says of them under the new weights (`n`)
and under the old ones (`o`); all are sums over an answer's tokens, in nats, at temperature 1. Goes out: a verdict with
its figures. Pure: knows neither engine nor trainer.

Why an engine is asked at all: a change of weights in a running engine can fail in silence. vLLM on a CPU keeps the old
head of a model with tied embeddings, every later sample then comes from a policy that nobody trained, and neither an
error nor a checksum tells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FLOAT32_TOLERANCE, FLOAT32_LEAST = 1e-4, 1e-5
"""Nats a token by which an engine in float32 may differ from the trainer on equal weights: at most, and at least where
a smaller difference was measured."""

VerdictKind = Literal["proved", "not distinguishable", "failed"]

_NOISE_FACTOR = 3
_VISIBLE_GAPS = 2
_CLEAR_GAPS = 8
_NEARER_SHARE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Answers that an engine is asked about, and what the trainer says of them.

    Attributes:
        prompt_token_ids, response_token_ids: one list an answer; no answer is empty.
        new: the answers' log-probs under the weights that the engine is to take.
        old: those under the weights that it held before.
        tolerance: nats a token; see `judge`.
    """

    prompt_token_ids: Sequence[Sequence[int]]
    response_token_ids: Sequence[Sequence[int]]
    new: Sequence[float]
    old: Sequence[float]
    tolerance: float = FLOAT32_TOLERANCE

    def judge(self, engine: Sequence[float]) -> Verdict:
        """See `judge`; `engine` has one log-prob an answer."""
        lengths = [len(ids) for ids in self.response_token_ids]
        return judge(engine, self.new, self.old, lengths, tolerance=self.tolerance)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What `judge` found. Every field can go into a JSON file as it is.

    Attributes:
        kind: see `judge`.
        gap: mean ``|e - n|``, nats a token; None where a log-prob is not finite.
        change: mean ``|n - o|``, nats a token; None likewise.
        tolerance: the largest `gap` that passes, nats a token.
        num_answers: answers that were judged.
        nearer: share of them with e nearer to n than to o; None without answers, or like `gap`.
        num_clear: answers that the update moved by 8 gaps or more.
        clear_nearer: `nearer` among these; None where there are none.
    """

    kind: VerdictKind
    gap: float | None
    change: float | None
    tolerance: float
    num_answers: int
    nearer: float | None
    num_clear: int
    clear_nearer: float | None

    def __str__(self) -> str:
        if self.gap is None or self.change is None:
            return f"{self.kind}: some of the {self.num_answers} log-probs are not finite"
        nearer = "" if self.nearer is None else f", and nearer to them on {self.nearer:.1%}"
        return (
            f"{self.kind}: the engine is {self.gap:.2g} nats a token from the new weights{nearer} of "
            f"{self.num_answers} answers (tolerance {self.tolerance:.2g}; the update changed {self.change:.2g})"
        )


def judge(
    engine: Sequence[float],
    new: Sequence[float],
    old: Sequence[float],
    num_tokens: Sequence[int],
    *,
    tolerance: float,
) -> Verdict:
    """Whether an engine samples from the new weights.

    ``gap`` is the sum of ``|e - n|`` over the sum of tokens, ``change`` that of ``|n - o|``. The kind is

    - ``failed`` where a log-prob is not finite, or the gap exceeds the tolerance;
    - ``not distinguishable`` where the change is less than two gaps: old and new weights would look alike here;
    - ``proved`` where e is nearer to n than to o for at least 95% of the answers.

    Otherwise too many answers look old. Rounding alone can do that to answers that the update hardly moved, and a sound
    engine must not be stopped for it: the 95% are asked again of the answers that the update moved by 8 gaps or more
    a token (normal noise puts one in 1,500 of these on the wrong side). Kept there, the verdict is ``proved``; missed,
    ``failed``; without any such answer, ``not distinguishable``.

    Args:
        engine, new, old: sums over an answer's tokens, in nats at temperature 1.
        num_tokens: of each answer.
        tolerance: nats a token: `FLOAT32_TOLERANCE`, or `measured_tolerance` in another dtype.
    """
    answers = list(zip(engine, new, old, num_tokens, strict=True))
    if not all(map(math.isfinite, (*engine, *new, *old))):
        return Verdict(
            kind="failed",
            gap=None,
            change=None,
            tolerance=tolerance,
            num_answers=len(answers),
            nearer=None,
            num_clear=0,
            clear_nearer=None,
        )
    total = max(1, sum(num_tokens))
    gap = sum(abs(e - n) for e, n, _, _ in answers) / total
    change = sum(abs(n - o) for _, n, o, _ in answers) / total
    is_nearer = [abs(e - n) < abs(e - o) for e, n, o, _ in answers]
    is_clear = [abs(n - o) > 0 and abs(n - o) >= _CLEAR_GAPS * gap * length for _, n, o, length in answers]
    nearer = _share(is_nearer)
    clear_nearer = _share([near for near, clear in zip(is_nearer, is_clear, strict=True) if clear])
    kind: VerdictKind
    if gap > tolerance:
        kind = "failed"
    elif change == 0 or change < _VISIBLE_GAPS * gap:
        kind = "not distinguishable"
    elif nearer is not None and nearer >= _NEARER_SHARE:
        kind = "proved"
    elif clear_nearer is None:
        kind = "not distinguishable"
    else:
        kind = "proved" if clear_nearer >= _NEARER_SHARE else "failed"
    return Verdict(
        kind=kind,
        gap=gap,
        change=change,
        tolerance=tolerance,
        num_answers=len(answers),
        nearer=nearer,
        num_clear=sum(is_clear),
        clear_nearer=clear_nearer,
    )


def measured_tolerance(engine: Sequence[float], trainer: Sequence[float], num_tokens: Sequence[int]) -> float:
    """Three times the mean ``|e - n|`` on equal weights, in nats a token; never below float32's tolerance.

    A dtype such as bfloat16 has no tolerance of its own: how far two programs are apart in it depends on the model.
    """
    gap = sum(abs(e - n) for e, n in zip(engine, trainer, strict=True)) / max(1, sum(num_tokens))
    assert math.isfinite(gap), "log-probs on equal weights are finite"
    return max(FLOAT32_TOLERANCE, _NOISE_FACTOR * gap)


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None

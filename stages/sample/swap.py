"""Giving an engine new weights, and proof that it samples from them.

Comes in: an engine, the weights that it is to take, and a probe. Goes out: a report of what was tried, how long each
part took, and what the probe said. Does not know vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

from stages.errors import StageError
from stages.protocols import Loading, Sampler, Weights
from stages.sample.probe import Probe, Verdict


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way in which the weights were taken, and what the probe said of it; None without a probe."""

    loading: Loading
    verdict: Verdict | None
    probe_s: float


@dataclass(frozen=True, slots=True)
class SwapReport:
    """What `take` did; ready for JSON through `dataclasses.asdict`.

    Attributes:
        attempts: one, or two where the first failed its probe and the engine was restarted.
    """

    attempts: tuple[Attempt, ...]

    @property
    def verdict(self) -> Verdict | None:
        """The last one, which the engine is used on."""
        return self.attempts[-1].verdict

    @property
    def seconds(self) -> float:
        return sum(attempt.loading.seconds + attempt.probe_s for attempt in self.attempts)


def take(engine: Sampler, weights: Weights, probe: Probe | None) -> SwapReport:
    """Load the weights, in place where the engine can, and prove it; where the probe fails, restart and prove again.

    Args:
        probe: None: nothing is proved.

    Raises:
        StageError: if an engine that was started on the weights' own folder fails the probe too: then the folder, or
            the trainer's log-probs, are not those of one policy.
    """
    attempts = [_attempt(engine, weights, probe, afresh=False)]
    if _failed(attempts[-1]) and attempts[-1].loading.way != "started":
        attempts.append(_attempt(engine, weights, probe, afresh=True))
    if _failed(attempts[-1]):
        raise StageError(
            f"sample: {weights.path}",
            wanted="an engine, started anew on this folder, whose log-probs are those of the trainer",
            got="\n".join(f"{attempt.loading.way}: {attempt.verdict}" for attempt in attempts),
            fix="compare the folder with the trainer's weights; with another dtype, measure the tolerance in it",
        )
    return SwapReport(tuple(attempts))


def _attempt(engine: Sampler, weights: Weights, probe: Probe | None, *, afresh: bool) -> Attempt:
    loading = engine.load(weights, afresh=afresh)
    if probe is None:
        return Attempt(loading, None, 0.0)
    began = perf_counter()
    verdict = probe.judge(engine.logps(probe.prompt_token_ids, probe.response_token_ids))
    return Attempt(loading, verdict, perf_counter() - began)


def _failed(attempt: Attempt) -> bool:
    return attempt.verdict is not None and attempt.verdict.kind == "failed"

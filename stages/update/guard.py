"""Whether an optimizer step is taken: numbers that are not finite, a loss that jumps, a policy that runs away.

A step that is not taken leaves weights and moments as they were, and goes on with the next batch. The judgement goes by
figures of the global batch alone, so that all ranks come to the same one without asking each other.

Lengths cannot run away here: an update trains on answers that were sampled before it. They are the gate's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from stages.update.config import GuardConfig

CLOSING_ROWS = 8  # that are scored once more after the last step
WINDOW = 32  # losses of the latest steps taken that a loss is compared with
FEWEST = 8  # of them, before any loss counts as a jump
_FINITE = ("loss", "logps/chosen", "logps/rejected", "log_ratios/chosen", "log_ratios/rejected")
_NORMAL = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
_LEAST_SPREAD = 0.1  # of the median, where losses hardly differ
_LEAST_OF_FIRST = (
    0.05  # of the first losses: where most are near 0, a few hard pairs make a batch's many times the median
)


@dataclass(frozen=True, slots=True)
class SkippedStep:
    """A step that was not taken: its number, counted from 1, why, and the ids of the batch's pairs or groups."""

    step: int
    reason: str
    ids: list[str]


@dataclass(slots=True)
class Guard:
    """What was judged so far in one update.

    Attributes:
        losses: of the latest steps taken.
        first_level: the median size of the losses of the first `FEWEST` steps taken; 0 until then.
        num_taken: steps.
        skipped: the steps that were not taken.
        in_a_row: steps skipped since the last one taken.
        reason: why the last step was skipped; None where it was taken.
    """

    config: GuardConfig
    losses: list[float] = field(default_factory=list)
    first_level: float = 0.0
    num_taken: int = 0
    skipped: list[SkippedStep] = field(default_factory=list)
    in_a_row: int = 0
    reason: str | None = None

    def why_not(self, metrics: Mapping[str, float]) -> str | None:
        """Why a step with these metrics is not taken, in words; None where it is, if its gradient is finite."""
        for name in _FINITE:
            if name in metrics and not math.isfinite(metrics[name]):
                return f"{name} is {metrics[name]}"
        kl, limit = divergence(metrics), self.config.max_kl
        if limit is not None and kl is not None and kl > limit:
            return f"the policy is {kl:.4g} nats an answer from its reference; max_kl is {limit:g}"
        return self._jump(metrics["loss"])

    def _jump(self, loss: float) -> str | None:
        """Whether a loss stands out of the latest ones, upwards, by their median and median absolute deviation."""
        limit = self.config.max_loss_jump
        if limit is None or len(self.losses) < FEWEST:
            return None
        middle = median(self.losses)
        spread = _NORMAL * median(abs(found - middle) for found in self.losses)
        far = (loss - middle) / max(spread, _LEAST_SPREAD * abs(middle), _LEAST_OF_FIRST * self.first_level, 1e-6)
        if far <= limit:
            return None
        return f"the loss jumps from {middle:.4g} to {loss:.4g}, by {far:.3g} deviations; max_loss_jump is {limit:g}"

    def note(self, step: int, loss: float, reason: str | None, ids: Sequence[str]) -> None:
        """Count a step, numbered from 1: taken, or skipped for a reason, with the ids of its pairs or groups."""
        self.reason = reason
        if reason is None:
            self.losses = [*self.losses, loss][-WINDOW:]
            self.num_taken, self.in_a_row = self.num_taken + 1, 0
            if self.num_taken == FEWEST:
                self.first_level = median(map(abs, self.losses))
        else:
            self.skipped.append(SkippedStep(step, reason, list(ids)))
            self.in_a_row += 1

    def why_over(self, *, steps_left: int) -> str | None:
        """Why the update ends without a policy, in words; None while it goes on or ends well."""
        if not self.in_a_row:
            return None
        if self.in_a_row >= self.config.max_skipped:
            return f"{self.in_a_row} steps in a row were skipped, the last since {self.reason}"
        if not steps_left and not self.num_taken:
            return f"none of {len(self.skipped)} steps could be taken, the last since {self.reason}"
        return None

    def why_broken(self, logps: Mapping[str, float], references: Sequence[Mapping[str, float]]) -> str | None:
        """Why a policy is not to be kept, from its log-probs of some answers, and the references'; None where it is."""
        known = references[0] if references else logps
        gap, limit = sum(known[key] - logp for key, logp in logps.items()) / len(logps), self.config.max_kl
        if not math.isfinite(gap):
            return "log-probs are not finite after the last step"
        if limit is not None and gap > limit:
            return f"the policy is {gap:.4g} nats an answer from its reference after the last step; max_kl is {limit:g}"
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain values."""
        return {
            "losses": list(self.losses),
            "first_level": self.first_level,
            "num_taken": self.num_taken,
            "skipped": [asdict(step) for step in self.skipped],
            "in_a_row": self.in_a_row,
        }

    @classmethod
    def restored(cls, config: GuardConfig, state: Mapping[str, Any]) -> Guard:
        """That of a checkpoint, from its `state`."""
        skipped = [SkippedStep(**step) for step in state["skipped"]]
        return cls(config, list(state["losses"]), state["first_level"], state["num_taken"], skipped, state["in_a_row"])


def divergence(metrics: Mapping[str, float]) -> float | None:
    """How far the policy is from its reference on the step's answers, in nats an answer; None without a reference.

    Of answers that the reference sampled, the mean of log reference - log policy estimates KL(reference || policy).
    """
    sides = [metrics[name] for name in ("log_ratios/chosen", "log_ratios/rejected") if name in metrics]
    return -sum(sides) / len(sides) if sides else None

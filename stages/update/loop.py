"""The optimizer steps of one update: all of them, or those after a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from stages.update import checkpoint
from stages.update.checkpoint import Checkpoints, Resumed, StepMetrics
from stages.update.metrics import UpdateSummary
from stages.update.objectives.base import Loss
from stages.update.rows import Row
from stages.update.step import Stepper

LN2 = math.log(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """What all ranks run together.

    Attributes:
        rows: all pairs, or all groups.
        batches: the numbers of the rows behind each step.
        own_reference: the place of the reference whose weights are held before the first step; None if none's are.
        checkpoints: where they are kept; None: nowhere.
        stepping: called before every step that is made.
        on_step: called on rank 0 with every step's metrics, those of the steps before a checkpoint first.
    """

    stepper: Stepper
    rows: Sequence[Row]
    batches: Sequence[Sequence[int]]
    own_reference: int | None
    checkpoints: Checkpoints | None
    stepping: Callable[[], None]
    on_step: Callable[[StepMetrics], None] | None

    def run(self, resumed: Resumed | None) -> UpdateSummary:
        """Make every step, or those that are left."""
        steps: list[StepMetrics] = []
        for metrics in resumed.steps if resumed is not None else ():
            self._tell(steps, metrics)
        for step in range(len(steps), len(self.batches)):
            self.stepping()
            batch = [self.rows[i] for i in self.batches[step]]
            self._tell(steps, self.stepper(step, batch, own_reference=self.own_reference if step == 0 else None))
            if step == 0 and self._begins_at_ln2():
                assert steps[0]["loss"] == float(torch.tensor(LN2)), f"the first loss is {steps[0]['loss']!r}, not ln 2"
            if self.checkpoints is not None and len(steps) < len(self.batches):
                self._keep(self.checkpoints, steps)
        return UpdateSummary(
            len(steps),
            len(self.rows),
            steps[0],
            steps[-1],
            self.stepper.gate_floor,
            resumed_at=len(resumed.steps) if resumed is not None else None,
        )

    def _tell(self, steps: list[StepMetrics], metrics: StepMetrics) -> None:
        steps.append(metrics)
        if self.on_step is not None and dist.get_rank() == 0:
            self.on_step(metrics)

    def _keep(self, checkpoints: Checkpoints, steps: list[StepMetrics]) -> None:
        """Write a checkpoint, if one is due."""
        if checkpoint.is_due(checkpoints, len(steps), self.stepper.device):
            checkpoint.write(checkpoints, self.stepper, steps)

    def _begins_at_ln2(self) -> bool:
        """Whether the policy was the only reference, and the loss is ln 2 there."""
        if self.own_reference is None or self.stepper.forward.num_references != 1:
            return False
        return starts_at_ln2(self.stepper.losses)


def starts_at_ln2(losses: Sequence[Loss]) -> bool:
    """Whether the loss is ln 2 where the policy is the only reference."""
    alone = losses[0]
    return len(losses) == 1 and alone.weight == 1 and alone.objective.starts_at_ln2(alone.params)

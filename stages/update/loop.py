"""The optimizer steps of one update: all of them, or those after a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from stages.faults import fault_point
from stages.update import checkpoint
from stages.update.checkpoint import Checkpoints, Resumed, StepMetrics
from stages.update.deadly_steps import StepJournal
from stages.update.guard import SkippedStep
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
        journal: of the steps that are made; None: none is kept.
        deadly: the steps that are passed over, since they killed their ranks, with the reasons.
        stepping: called before every step that is made.
        on_step: called on rank 0 with every step's metrics, those of the steps before a checkpoint first.
        on_skip: called on rank 0, before that, for every step that the guard did not take.
    """

    stepper: Stepper
    rows: Sequence[Row]
    batches: Sequence[Sequence[int]]
    own_reference: int | None
    checkpoints: Checkpoints | None
    journal: StepJournal | None
    deadly: Mapping[int, str]
    stepping: Callable[[], None]
    on_step: Callable[[StepMetrics], None] | None
    on_skip: Callable[[SkippedStep], None] | None

    def run(self, resumed: Resumed | None) -> UpdateSummary:
        """Make every step, or those that are left, until the guard ends the update."""
        steps: list[StepMetrics] = []
        guard, ended = self.stepper.guard, None
        for skipped in guard.skipped:
            self._tell_skip(skipped)
        for metrics in resumed.steps if resumed is not None else ():
            self._tell(steps, metrics)
        for step in range(len(steps), len(self.batches)):
            if step in self.deadly:
                self._pass_over(step, steps)
            else:
                self._note_begin(step)
                self.stepping()
                self._make(step, steps)
                self._note_end(step)
            fault_point("update.middle", [f"rank-{dist.get_rank()}"])
            if ended := guard.why_over(steps_left=len(self.batches) - step - 1):
                break
            if self.checkpoints is not None and len(steps) < len(self.batches):
                self._keep(self.checkpoints, steps)
        taken = [metrics for metrics in steps if not metrics.get("skipped")]
        return UpdateSummary(
            len(self.batches),
            len(self.rows),
            taken[0] if taken else {},
            taken[-1] if taken else {},
            self.stepper.gate_floor,
            num_skipped=len(guard.skipped),
            ended=ended,
            resumed_at=len(resumed.steps) if resumed is not None else None,
        )

    def _make(self, step: int, steps: list[StepMetrics]) -> None:
        """Make one step, or find that it is not to be taken."""
        guard, batch = self.stepper.guard, [self.rows[i] for i in self.batches[step]]
        is_first = not guard.num_taken
        metrics = self.stepper(step, batch, own_reference=self.own_reference if is_first else None)
        if guard.reason is not None:
            self._tell_skip(guard.skipped[-1])
        elif is_first and self._begins_at_ln2():
            assert metrics["loss"] == float(torch.tensor(LN2)), f"the first loss is {metrics['loss']!r}, not ln 2"
        self._tell(steps, metrics)

    def _pass_over(self, step: int, steps: list[StepMetrics]) -> None:
        """Leave a step out, as if the guard had not taken it; nothing of its batch is computed."""
        ids = [self.rows[i].row_id for i in self.batches[step]]
        self.stepper.guard.note(step + 1, math.nan, self.deadly[step], ids)
        self._tell_skip(self.stepper.guard.skipped[-1])
        self._tell(steps, {"step": step + 1, "steps": len(self.batches), "skipped": 1.0})

    def _note_begin(self, step: int) -> None:
        if self.journal is not None and dist.get_rank() == 0:
            self.journal.begins(step)
        fault_point("update.step", [f"rank-{dist.get_rank()}/step-{step + 1}."])

    def _note_end(self, step: int) -> None:
        if self.journal is not None and dist.get_rank() == 0:
            self.journal.survived(step)

    def _tell_skip(self, skipped: SkippedStep) -> None:
        if self.on_skip is not None and dist.get_rank() == 0:
            self.on_skip(skipped)

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

"""One optimizer step on one global batch: what each rank runs forward and backward, and what it divides by.

A step that the guard does not take has its gradient made NaN: the optimizer under every ZeRO stage then leaves weights
and moments alone, on all ranks together, and clears what it had gathered.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from stages.errors import StageError
from stages.update import deepspeed_engine
from stages.update.batching import deal
from stages.update.config import UpdateConfig
from stages.update.forward import Forward
from stages.update.guard import Guard
from stages.update.loads import row_load
from stages.update.metrics import StepMetrics
from stages.update.objectives.base import Loss
from stages.update.rows import Row
from stages.update.schedule import learning_rate_at
from stages.update.skipping import Skipping
from stages.update.value_head import ValueHead


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepper:
    """What the optimizer steps of one update have in common.

    Attributes:
        losses: the objectives, whose weighted sum is the loss.
        gate_floor: nats a sequence; None where no objective has a gate.
        num_steps: of the whole update.
        forward_size: rows a forward pass.
        skipping: whether a step leaves out backwards that push nothing.
        guard: whether a step is taken.
    """

    config: UpdateConfig
    engine: Any
    device: torch.device
    losses: Sequence[Loss]
    gate_floor: float | None
    forward: Forward
    value_head: ValueHead | None
    num_steps: int
    forward_size: int
    skipping: Skipping
    guard: Guard

    def __call__(self, step: int, batch: Sequence[Row], *, own_reference: int | None) -> dict[str, float]:
        """Step number `step`, counted from 0, if the guard lets it; its metrics, over all ranks."""
        started = time.monotonic()
        rate = learning_rate_at(step, self.num_steps, self.config)
        deepspeed_engine.set_learning_rate(self.engine, rate)
        losses = [loss.at(step if self.value_head is None else self.value_head.num_steps) for loss in self.losses]
        counts = {"pairs": len(batch), "tokens": sum(row.num_chosen_tokens for row in batch)}
        beta = next((loss.beta for loss in losses if loss.beta is not None), 1.0)
        metrics = StepMetrics(beta=beta, gate_floor=self.gate_floor or 0.0, counts=counts)
        skips = self.skipping.now(at_reference=own_reference is not None)
        for part in self._parts(batch, skips):
            # Every rank runs as many forwards and backwards as any other.
            self._backward(part or [_shortest(batch)], len(part), losses, metrics, own_reference, skips)
        found = metrics.over_all_ranks(self.device)
        head_norm = None if self.value_head is None else float(self.value_head.reduce())
        reason = self.guard.why_not(found)
        if reason is None and head_norm is not None and not math.isfinite(head_norm):
            reason = f"the value head's gradient is {head_norm}"
        if reason is not None:
            self._spoil(batch)
        self.engine.step()
        grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
        if reason is None and not math.isfinite(grad_norm):
            reason = "the gradient is not finite"
        if self.value_head is not None:
            self.value_head.step(skipped=reason is not None)
        self.guard.note(step + 1, found["loss"], reason, [row.row_id for row in batch])
        if reason is not None:
            return self._told(step, rate, started, {k: v for k, v in found.items() if math.isfinite(v)}, skipped=1.0)
        self.skipping.active_share = found.get("rejected_pushed")
        return self._told(step, rate, started, found, skips=float(skips), grad_norm=grad_norm)

    def _told(
        self, step: int, rate: float, started: float, found: Mapping[str, float], **more: float
    ) -> dict[str, float]:
        """The step's metrics with its place and its time."""
        place = {"step": step + 1, "steps": self.num_steps}
        return {**place, **found, **more, "learning_rate": rate, "step_s": time.monotonic() - started}

    def _spoil(self, batch: Sequence[Row]) -> None:
        """Make the gradient NaN, so that no rank takes the step."""
        scored = self.forward.scored([_shortest(batch)], skips=False)
        (scored.logps_N.sum() * math.nan).backward()
        scored.backward()

    def _parts(self, batch: Sequence[Row], skips: bool) -> list[list[Row]]:
        """This rank's rows, a list for each forward."""
        share = (self.skipping.active_share or 0.0) if skips else None
        dealt = deal(
            [row_load(row, shares=self.forward.shares, pushed_share=share) for row in batch],
            world_size=dist.get_world_size(),
            max_rows=self.forward_size,
            max_tokens=self.config.max_tokens_per_batch,
        )
        return [[batch[i] for i in part] for part in dealt[dist.get_rank()]]

    def _backward(
        self,
        rows: Sequence[Row],
        num_rows: int,
        losses: Sequence[Loss],
        metrics: StepMetrics,
        own_reference: int | None,
        skips: bool,
    ) -> None:
        """Forward and backward of one micro-batch.

        Args:
            num_rows: 0 where the row is a dummy, whose loss then weighs nothing.
        """
        scored = self.forward.scored(rows, skips=skips)
        tensors = self.forward.tensors(rows, scored, own_reference=own_reference)
        terms = [term for loss in losses for term in loss(tensors)]
        shares = [(term.loss_B * term.weight_B).sum() / metrics.counts[term.normaliser] for term in terms]
        # DeepSpeed averages over the ranks; the loss is a mean over the global batch.
        real = 1.0 if num_rows else 0.0
        (torch.stack(shares).sum() * dist.get_world_size() * real).backward()
        scored.backward()
        metrics.add(tensors, rows, terms, num_rows=num_rows)
        metrics.add_work(scored, rows, num_rows=num_rows)


def _shortest(batch: Sequence[Row]) -> Row:
    return min(batch, key=lambda row: len(row.prompt_token_ids) + sum(len(answer.token_ids) for answer in row.answers))


def refuse_nonfinite(values: torch.Tensor, what: str, *, step: int, config: UpdateConfig) -> None:
    """Check that an update has not diverged.

    Raises:
        StageError: if a value is NaN or infinite.
    """
    if not torch.isfinite(values).all():
        raise StageError(
            f"update, step {step + 1}",
            wanted=f"a finite {what}",
            got="NaN or infinity",
            fix=f"lower update.learning_rate (now {config.learning_rate:g}); the last policy stands",
        )

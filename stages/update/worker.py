"""The trainer: one rank's part of a policy that is scored and updated, on torch.distributed and DeepSpeed, without Ray.

The reference log-probs come from here too. While the weights *are* the reference's (every micro-batch before the first
optimizer step of a round whose reference is its start), they are the forward's own, detached: the log-ratio is 0 and
the loss ln 2 to the last bit, whatever the layout. Later steps use the table made by `logps` before the first step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stages.protocols import Moments, Weights
from stages.update import checkpoint, deepspeed_engine
from stages.update.batching import deal, global_batches
from stages.update.checkpoint import Checkpoints, Resumed
from stages.update.config import FLOAT32_GATE_FLOOR, UpdateConfig
from stages.update.deadly_steps import StepJournal
from stages.update.forward import Forward, refuse_without_auxiliary
from stages.update.gate_floor import NUM_ANSWERS, measured_gate_floor
from stages.update.guard import CLOSING_ROWS, Guard, SkippedStep
from stages.update.holder import Holder
from stages.update.loads import answer_load
from stages.update.loop import Loop
from stages.update.metrics import UpdateSummary
from stages.update.randomness import seed_rank
from stages.update.rows import AnswerRow, Row, answers_of, rows_a_forward, streams_of
from stages.update.scoring import Scoring
from stages.update.skipping import Skipping
from stages.update.step import Stepper
from stages.update.value_head import ValueHead, new_value_head

_log = logging.getLogger(__name__)


class Trainer:
    """One rank of the training group; every method is called on all ranks together.

    Args:
        config: how to update.
        dtype: the policy's, ``float32`` or ``bfloat16``; under bfloat16 the optimizer holds float32 masters.
        pad_token: for the published tokenizer, where the model's names none.
        num_threads: CPU threads of this rank where it has no GPU.
    """

    def __init__(self, config: UpdateConfig, *, dtype: str, pad_token: str | None, num_threads: int) -> None:
        self.config, self.dtype = config, dtype
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        if not on_gpu:
            torch.set_num_threads(num_threads)
        self._holder = Holder(config, dtype=dtype, device=self.device, pad_token=pad_token)
        self._value_head: ValueHead | None = None
        self._told: str | None = None  # the last reason against sharing prompts

    # ---- weights ----------------------------------------------------------------------------------------------------

    @property
    def _engine(self) -> Any:
        return self._holder.engine

    def configure(self, config: UpdateConfig) -> None:
        """Update as `config` says, from the next `load` on; ranks and device stay."""
        self._holder.configure(config)
        self.config = config

    def load(self, weights: Weights) -> None:
        """Hold these weights; where there is a float32 master, from that. See `Holder.load`."""
        self._holder.load(weights)
        self._value_head = None

    def rest(self) -> None:
        """Let go of the device's memory for others. See `Holder.rest`."""
        self._value_head = None
        self._holder.rest()

    def save(self, folder: Path, *, round: int) -> Weights:
        """Write the policy as `Holder.save` says, and a value head that the update trained to ``folder/value_head``."""
        result = self._holder.save(folder, round=round)
        if self._value_head is not None and self.rank == 0:
            self._value_head.save(folder / "value_head")
        return result

    def save_moments(self, folder: Path) -> Moments:
        """Write AdamW's moments. See `Holder.save_moments`."""
        return self._holder.save_moments(folder)

    # ---- log-probs --------------------------------------------------------------------------------------------------

    def logps(self, answers: Sequence[AnswerRow], *, progress: Callable[[int], None] | None = None) -> dict[str, float]:
        """Log-prob of every answer by response id, complete on every rank; each rank computes its part.

        Returns:
            Sums over the answer's tokens, in nats, at temperature 1.
        """
        scoring = self._scoring(answers)
        dealt = deal(
            [answer_load(answer, shares=scoring.shares) for answer in answers],
            world_size=self.world_size,
            max_rows=2 * self.config.micro_batch_size,
            max_tokens=self.config.max_tokens_per_batch,
        )
        mine: dict[str, float] = {}
        for part in dealt[self.rank]:
            rows = [answers[i] for i in part]
            with torch.no_grad():
                found = scoring(rows or [answers[0]]).logps_N.tolist()
            mine |= {row.response_id: logp for row, logp in zip(rows, found, strict=False)}
            if progress is not None:
                progress(len(mine) * self.world_size)
        return self._everyones(mine)

    def _scoring(self, answers: Sequence[AnswerRow], *, wants_states: bool = False) -> Scoring:
        """Forwards for some answers: prompts are shared where that is exact, and the reason is told where it is not."""
        reason = self._holder.sharing.why_apart(answers)
        if reason is not None and reason != self._told and self.rank == 0:
            _log.warning("every answer is computed with a prompt of its own (%s)", reason)
        self._told = reason
        return Scoring(self._engine, self.device, shares=reason is None, wants_states=wants_states)

    def everyone(self, flag: bool) -> bool:
        """Whether it is so on every rank: what all of them go by, whatever each sees of a shared disk."""
        flags: list[Any] = [None] * self.world_size
        dist.all_gather_object(flags, flag)
        return all(flags)

    def _everyones(self, mine: dict[str, float]) -> dict[str, float]:
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, mine)
        return {key: value for part in parts for key, value in part.items()}

    # ---- the update -------------------------------------------------------------------------------------------------

    def update(
        self,
        rows: Sequence[Row],
        references: Sequence[Mapping[str, float]],
        *,
        own_reference: int | None,
        seed: int,
        on_step: Callable[[dict[str, float]], None] | None = None,
        on_skip: Callable[[SkippedStep], None] | None = None,
        value_head: Path | None = None,
        moments: Moments | None = None,
        checkpoints: Checkpoints | None = None,
        journal: StepJournal | None = None,
    ) -> UpdateSummary:
        """Every epoch over `rows` under the configured objectives, from the newest checkpoint where there is one.

        Args:
            rows: all pairs, or all groups; the same on every rank.
            references: for each reference, log-probs by response id.
            own_reference: the place of the reference whose weights are held now; None if none's are.
            seed: of the shuffle.
            on_step: called on rank 0 after every optimizer step with the step's metrics, and before the first one with
                those of each step that a checkpoint knows.
            on_skip: called on rank 0, before that, for a step that the guard did not take.
            value_head: a saved one to go on from, where the objectives need one; None: a new one.
            moments: saved ones of AdamW to go on with; None: new ones.
            checkpoints: of this update; None: it is not kept before its end.
            journal: of this update's steps, by which those that kill their ranks are passed over; None: none are.
        """
        config = self.config
        batches = list(
            global_batches(len(rows), size=config.global_batch_size, num_epochs=config.num_train_epochs, seed=seed)
        )
        found = checkpoint.newest_of(checkpoints)
        resumed = self._holder.resume(found) if found is not None else None
        if resumed is None:
            self._holder.take_moments(moments)
        stepper = self._stepper(rows, references, len(batches), value_head, resumed)
        if resumed is None:
            seed_rank(seed, 0, self.rank)
        else:
            checkpoint.restore_random_numbers(resumed, seed=seed)
        loop = Loop(
            stepper=stepper,
            rows=rows,
            batches=batches,
            own_reference=own_reference,
            checkpoints=checkpoints,
            journal=journal,
            deadly=self._deadly_steps(journal),
            stepping=self._holder.stepping,
            on_step=on_step,
            on_skip=on_skip,
        )
        summary = loop.run(resumed)
        if summary.ended is None:  # no later step sees what the last one did
            ended = stepper.guard.why_broken(self.logps(answers_of(rows[:CLOSING_ROWS])), references)
            summary = replace(summary, ended=ended)
        return summary

    def _deadly_steps(self, journal: StepJournal | None) -> dict[int, str]:
        """What rank 0 reads of the journal, on every rank."""
        found: list[Any] = [journal.new_group() if journal is not None and self.rank == 0 else {}]
        dist.broadcast_object_list(found, src=0)
        return dict(found[0])

    def _stepper(
        self,
        rows: Sequence[Row],
        references: Sequence[Mapping[str, float]],
        num_steps: int,
        value_head: Path | None,
        resumed: Resumed | None,
    ) -> Stepper:
        config = self.config
        if "auxiliary" in config.needs:
            refuse_without_auxiliary(rows)
        gated = any(loss.gated for loss in config.losses())
        gate_floor = None
        if gated:
            gate_floor = self._gate_floor(rows) if resumed is None else resumed.gate_floor
        losses = config.losses(gate_floor=gate_floor)
        self._value_head = new_value_head(losses, deepspeed_engine.model_of(self._engine), self.device)
        if self._value_head is not None and resumed is not None:
            checkpoint.restore_value_head(resumed, self._value_head)
        elif self._value_head is not None and value_head is not None:
            self._value_head.restore(value_head)
        scoring = self._scoring([*answers_of(rows), *streams_of(rows)], wants_states=self._value_head is not None)
        return Stepper(
            config=config,
            engine=self._engine,
            device=self.device,
            losses=losses,
            gate_floor=gate_floor,
            forward=Forward(scoring, self.device, references, needs=config.needs, value_head=self._value_head),
            value_head=self._value_head,
            num_steps=num_steps,
            forward_size=rows_a_forward(rows, micro_batch_size=config.micro_batch_size),
            guard=Guard(config.guard) if resumed is None else Guard.restored(config.guard, resumed.guard),
            skipping=Skipping(
                allowed=gated and scoring.shares and config.skip_inactive and not config.gradient_checkpointing,
                active_share=resumed.active_share if resumed is not None else None,
            ),
        )

    def _gate_floor(self, rows: Sequence[Row]) -> float:
        if self.config.gate_floor is not None:
            return self.config.gate_floor
        if self.dtype == "float32":
            return FLOAT32_GATE_FLOOR
        answers = answers_of(rows[:NUM_ANSWERS])
        return measured_gate_floor(self._scoring(answers), answers, forward_size=2 * self.config.micro_batch_size)

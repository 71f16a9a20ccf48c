"""The trainer: one rank's part of a policy that is scored and updated, on torch.distributed and DeepSpeed, without Ray.

The reference log-probs come from here too. While the weights *are* the reference's (every micro-batch before the first
optimizer step of a round whose reference is its start), they are the forward's own, detached: the log-ratio is 0 and
the loss ln 2 to the last bit, whatever the layout. Later steps use the table made by `logps` before the first step.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from stages.faults import fault_point
from stages.protocols import Moments, Weights
from stages.update import deepspeed_engine
from stages.update.allocation import give_back_freed_memory, keep_freed_memory
from stages.update.batching import deal, global_batches
from stages.update.config import FLOAT32_GATE_FLOOR, UpdateConfig
from stages.update.exactness import Sharing
from stages.update.forward import Forward, refuse_without_auxiliary
from stages.update.loads import answer_load
from stages.update.lora import add_adapters, merged_policy, save_adapters
from stages.update.metrics import UpdateSummary
from stages.update.model import load_policy, publish_policy, read_weights, state_of
from stages.update.objectives.base import Loss
from stages.update.rows import AnswerRow, Row, answers_of, rows_a_forward, streams_of
from stages.update.scoring import Scoring
from stages.update.skipping import Skipping
from stages.update.step import Stepper, refuse_nonfinite
from stages.update.value_head import ValueHead, hidden_width
from stages.weights import refuse_changed_weights, weights_sha256

_log = logging.getLogger(__name__)
LN2 = math.log(2)
_NEW = "new"  # moments of 0, before any step
_MOMENTS_FILE = "moments.safetensors"
_GATE_SAMPLE = 32  # answers whose log-probs are measured in two layouts


class Trainer:
    """One rank of the training group; every method is called on all ranks together.

    Args:
        config: how to update.
        dtype: the policy's, ``float32`` or ``bfloat16``; under bfloat16 the optimizer holds float32 masters.
        pad_token: for the published tokenizer, where the model's names none.
        num_threads: CPU threads of this rank where it has no GPU.
    """

    def __init__(self, config: UpdateConfig, *, dtype: str, pad_token: str | None, num_threads: int) -> None:
        self.config, self.dtype, self._pad_token = config, dtype, pad_token
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        if not on_gpu:
            torch.set_num_threads(num_threads)
            keep_freed_memory()
        self._engine: Any = None
        self._held: str | None = None  # the identity of the weights in the engine; None once a step has changed them
        self._origin: Weights | None = None  # where they came from, with the tokenizer
        self._moments: str | None = _NEW  # what names the moments in the engine's optimizer; None: steps were made
        self._num_steps = 0
        self._value_head: ValueHead | None = None
        self._sharing: Sharing
        self._told: str | None = None  # the last reason against sharing prompts

    # ---- weights ----------------------------------------------------------------------------------------------------

    def configure(self, config: UpdateConfig) -> None:
        """Update as `config` says, from the next `load` on; ranks and device stay."""
        if deepspeed_engine.engine_settings(config) != deepspeed_engine.engine_settings(self.config):
            self._held = None
        self.config = config

    def load(self, weights: Weights) -> None:
        """Hold these weights; where there is a float32 master, from that.

        Weights that are held already, since an update has just made them, are not read again.
        """
        if self._held != weights.identity:
            self._held = None
            if self.rank == 0:
                weights.refuse_changed()
            self._stop()
            model = load_policy(weights.path, dtype=self.dtype)
            if self.config.lora is not None:
                add_adapters(model, self.config.lora, round=weights.round)
            model = model.to(self.device)
            self._engine = deepspeed_engine.start_engine(model, self.config, dtype=self.dtype, device=self.device)
            self._sharing = Sharing(self._engine, self.device, dtype=self.dtype)
            if weights.master is not None and self.config.lora is None:
                deepspeed_engine.set_float32_state(self._engine, read_weights(weights.master))
            self._held, self._moments = weights.identity, _NEW
        self._origin, self._num_steps, self._value_head = weights, 0, None

    def rest(self) -> None:
        """Let go of the device's memory for others: model and optimizer go, and the next `load` reads weights again.

        Nothing is lost by it: between two jobs a trainer holds nothing but weights that were published, or given.
        """
        self._stop()
        self._held, self._origin, self._num_steps, self._value_head = None, None, 0, None
        gc.collect()  # a stopped engine is held by cycles
        give_back_freed_memory()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _stop(self) -> None:
        if self._engine is not None:
            deepspeed_engine.stop_engine(self._engine)
            self._engine = None

    def save(self, folder: Path, *, round: int) -> Weights:
        """Write policy and tokenizer to ``folder/policy``, and a float32 master to ``folder/master`` if one is needed.

        A value head that the update trained goes to ``folder/value_head``, adapters to ``folder/adapter``, with the
        policy then the start with them merged. Rank 0 writes; trained weights are gathered on all.

        Returns:
            What was written, on every rank; `round` is the round that made it.
        """
        assert self._engine is not None and self._origin is not None
        lora = self.config.lora
        state = (deepspeed_engine.float32_state if lora is None else deepspeed_engine.trained_state)(self._engine)
        for tensor in state.values():
            refuse_nonfinite(tensor, "policy", step=self._num_steps - 1, config=self.config)
        written: list[Any] = [None]
        if self.rank == 0:
            model = deepspeed_engine.model_of(self._engine)
            if lora is not None:
                start = self._origin.master or self._origin.path
                save_adapters(model, folder / "adapter", state, base=start)
                model = merged_policy(start, state, lora)
                state = state_of(model)
            written[0] = publish_policy(
                model, folder, state, dtype=self.dtype, origin=self._origin, pad_token=self._pad_token, round=round
            )
            if self._value_head is not None:
                self._value_head.save(folder / "value_head")
        dist.broadcast_object_list(written, src=0)
        result: Weights = written[0]
        if lora is not None:  # a sum rounds: only weights that are read again are those that were written
            self.load(result)
        self._held = result.identity
        return result

    def save_moments(self, folder: Path) -> Moments:
        """Write AdamW's moments in float32. Rank 0 writes; they are gathered on all, one at a time."""
        kept, written = {}, [""]
        for name, value in deepspeed_engine.moments(self._engine):
            if self.rank == 0:
                kept[name] = value.detach().cpu().clone()
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(kept, folder / _MOMENTS_FILE)
            written = [weights_sha256(folder)]
        dist.broadcast_object_list(written, src=0)
        self._moments = written[0]
        return Moments(folder, written[0])

    def _take_moments(self, moments: Moments | None) -> None:
        """Have AdamW go on with saved moments, or anew; those that it holds already are not read again.

        Raises:
            StageError: if the folder no longer holds them.
        """
        if self._moments == (_NEW if moments is None else moments.sha256):
            return
        if moments is None:
            deepspeed_engine.reset_moments(self._engine)
            return
        if self.rank == 0:
            refuse_changed_weights(moments.path, moments.sha256)
        deepspeed_engine.set_moments(self._engine, load_file(moments.path / _MOMENTS_FILE))

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

    def measured_gate_floor(self, answers: Sequence[AnswerRow]) -> float:
        """Three times the mean absolute difference between two layouts of some answers, in nats a sequence.

        Never below float32's floor: a few short answers may agree by chance.
        """
        rows, size = list(answers[:_GATE_SAMPLE]), 2 * self.config.micro_batch_size
        scoring = self._scoring(answers)
        with torch.no_grad():
            together = torch.cat([scoring(rows[i : i + size]).logps_N for i in range(0, len(rows), size)])
            alone = torch.cat([scoring([row]).logps_N for row in rows])
        return max(FLOAT32_GATE_FLOOR, 3 * (together - alone).abs().mean().item())

    def _scoring(self, answers: Sequence[AnswerRow], *, wants_states: bool = False) -> Scoring:
        """Forwards for some answers: prompts are shared where that is exact, and the reason is told where it is not."""
        reason = self._sharing.why_apart(answers)
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
        value_head: Path | None = None,
        moments: Moments | None = None,
    ) -> UpdateSummary:
        """Every epoch over `rows` under the configured objectives.

        Args:
            rows: all pairs, or all groups; the same on every rank.
            references: for each reference, log-probs by response id.
            own_reference: the place of the reference whose weights are held now; None if none's are.
            seed: of the shuffle.
            on_step: called on rank 0 after every optimizer step with the step's metrics.
            value_head: a saved one to go on from, where the objectives need one; None: a new one.
            moments: saved ones of AdamW to go on with; None: new ones.
        """
        self._take_moments(moments)
        batches = [
            [rows[i] for i in batch]
            for batch in global_batches(
                len(rows), size=self.config.global_batch_size, num_epochs=self.config.num_train_epochs, seed=seed
            )
        ]
        stepper = self._stepper(rows, references, len(batches), value_head)
        at_ln2 = own_reference is not None and len(references) == 1 and _starts_at_ln2(stepper.losses)
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        for step, batch in enumerate(batches):
            self._num_steps += 1
            self._held = self._moments = None  # before it: a step that is refused may have changed the weights
            last = stepper(step, batch, own_reference=own_reference if step == 0 else None)
            first = first or last
            if at_ln2 and step == 0:
                assert last["loss"] == float(torch.tensor(LN2)), f"the first loss is {last['loss']!r}, not ln 2"
            if on_step is not None and self.rank == 0:
                on_step(last)
            fault_point("update.middle", [f"rank-{self.rank}"])
        return UpdateSummary(len(batches), len(rows), first, last, stepper.gate_floor)

    def _stepper(
        self,
        rows: Sequence[Row],
        references: Sequence[Mapping[str, float]],
        num_steps: int,
        value_head: Path | None,
    ) -> Stepper:
        config = self.config
        if "auxiliary" in config.needs:
            refuse_without_auxiliary(rows)
        gate_floor = self._gate_floor(rows) if any(loss.gated for loss in config.losses()) else None
        losses = config.losses(gate_floor=gate_floor)
        self._value_head = self._start_value_head(losses, value_head)
        scoring = self._scoring([*answers_of(rows), *streams_of(rows)], wants_states=self._value_head is not None)
        gated = any(loss.gated for loss in losses)
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
            skipping=Skipping(
                allowed=gated and scoring.shares and config.skip_inactive and not config.gradient_checkpointing
            ),
        )

    def _start_value_head(self, losses: Sequence[Loss], saved: Path | None) -> ValueHead | None:
        """The value head that the objectives need, if one does; its learning rate is the first such objective's."""
        rate = next((loss.params.value_learning_rate for loss in losses if "value" in loss.objective.needs), None)
        if rate is None:
            return None
        width = hidden_width(deepspeed_engine.model_of(self._engine))
        head = ValueHead(width, learning_rate=rate, device=self.device)
        if saved is not None:
            head.restore(saved)
        return head

    def _gate_floor(self, rows: Sequence[Row]) -> float:
        if self.config.gate_floor is not None:
            return self.config.gate_floor
        if self.dtype == "float32":
            return FLOAT32_GATE_FLOOR
        floor = [self.measured_gate_floor(answers_of(rows[:_GATE_SAMPLE]))]
        dist.broadcast_object_list(floor, src=0)
        return floor[0]


def _starts_at_ln2(losses: Sequence[Loss]) -> bool:
    """Whether the loss is ln 2 where the policy is the only reference."""
    alone = losses[0]
    return len(losses) == 1 and alone.weight == 1 and alone.objective.starts_at_ln2(alone.params)

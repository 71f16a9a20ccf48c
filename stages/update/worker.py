"""The trainer: one rank's part of a policy that is scored and updated, on torch.distributed and DeepSpeed, without Ray.

The reference log-probs come from here too. While the weights *are* the reference's (every micro-batch before the first
optimizer step of a round whose reference is its start), they are the forward's own, detached: the log-ratio is 0 and
the loss ln 2 to the last bit, whatever the layout. Later steps use the table made by `logps` before the first step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stages.errors import StageError
from stages.protocols import Weights
from stages.update import deepspeed_engine
from stages.update.batching import deal, global_batches, num_steps, token_batch
from stages.update.config import FLOAT32_GATE_FLOOR, UpdateConfig
from stages.update.logps import answer_logps
from stages.update.metrics import StepMetrics, UpdateSummary
from stages.update.model import copy_tokenizer, load_policy, read_weights, save_policy
from stages.update.objectives.base import Loss, Pairs
from stages.update.rows import AnswerRow, PairRow, answers_of
from stages.update.schedule import learning_rate_at

LN2 = math.log(2)
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
        self._engine: Any = None
        self._weights: Weights | None = None
        self._num_steps = 0

    # ---- weights ----------------------------------------------------------------------------------------------------

    def configure(self, config: UpdateConfig) -> None:
        """Update as `config` says, from the next `load` on; ranks and device stay."""
        if config != self.config:
            self.config, self._weights = config, None

    def load(self, weights: Weights) -> None:
        """Hold these weights, with a fresh optimizer; where there is a float32 master, from that."""
        if self._weights == weights and self._num_steps == 0:
            return
        if self.rank == 0:
            weights.refuse_changed()
        if self._engine is not None:
            deepspeed_engine.stop_engine(self._engine)
            self._engine = None
        model = load_policy(weights.path, dtype=self.dtype).to(self.device)
        self._engine = deepspeed_engine.start_engine(model, self.config, dtype=self.dtype, device=self.device)
        if weights.master is not None:
            deepspeed_engine.set_float32_state(self._engine, read_weights(weights.master))
        self._weights, self._num_steps = weights, 0

    def save(self, folder: Path) -> None:
        """Write policy and tokenizer to ``folder/policy``, and a float32 master to ``folder/master`` if one is needed.

        Rank 0 writes; the weights are gathered on all.
        """
        assert self._engine is not None and self._weights is not None
        state = deepspeed_engine.float32_state(self._engine)
        for tensor in state.values():
            self._refuse_nonfinite(tensor, self._num_steps - 1, "policy")
        if self.rank == 0:
            targets = {"policy": self.dtype} | ({} if self.dtype == "float32" else {"master": "float32"})
            for name, dtype in targets.items():
                (folder / name).mkdir(parents=True, exist_ok=True)
                save_policy(deepspeed_engine.model_of(self._engine), folder / name, state, dtype=dtype)
                copy_tokenizer(self._weights.path, folder / name, pad_token=self._pad_token)
        dist.barrier()

    # ---- log-probs --------------------------------------------------------------------------------------------------

    def logps(self, answers: Sequence[AnswerRow], *, progress: Callable[[int], None] | None = None) -> dict[str, float]:
        """Log-prob of every answer by response id, complete on every rank; each rank computes its part.

        Returns:
            Sums over the answer's tokens, in nats, at temperature 1.
        """
        order = sorted(range(len(answers)), key=lambda i: len(answers[i].prompt_token_ids) + len(answers[i].token_ids))
        mine: dict[str, float] = {}
        size = 2 * self.config.micro_batch_size
        for part in deal(order, rank=self.rank, world_size=self.world_size, micro_batch_size=size):
            rows = [answers[i] for i in part]
            for row, logp in zip(rows, self._score(rows or [answers[0]]).tolist(), strict=False):
                mine[row.response_id] = logp
            if progress is not None:
                progress(len(mine) * self.world_size)
        return self._everyones(mine)

    def measured_gate_floor(self, answers: Sequence[AnswerRow]) -> float:
        """Three times the mean absolute difference between two layouts of some answers, in nats a sequence.

        Never below float32's floor: a few short answers may agree by chance.
        """
        rows, size = list(answers[:_GATE_SAMPLE]), 2 * self.config.micro_batch_size
        together = torch.cat([self._score(rows[i : i + size]) for i in range(0, len(rows), size)])
        alone = torch.cat([self._score([row]) for row in rows])
        return max(FLOAT32_GATE_FLOOR, 3 * (together - alone).abs().mean().item())

    def _score(self, rows: Sequence[AnswerRow]) -> torch.Tensor:
        batch = token_batch([row.prompt_token_ids for row in rows], [row.token_ids for row in rows])
        with torch.no_grad():
            return answer_logps(self._engine, batch, self.device)

    def _everyones(self, mine: dict[str, float]) -> dict[str, float]:
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, mine)
        return {key: value for part in parts for key, value in part.items()}

    # ---- the update -------------------------------------------------------------------------------------------------

    def update(
        self,
        rows: Sequence[PairRow],
        references: Sequence[Mapping[str, float]],
        *,
        from_reference: bool,
        seed: int,
        on_step: Callable[[dict[str, float]], None] | None = None,
    ) -> UpdateSummary:
        """Every epoch over `rows` under the configured objective.

        Args:
            rows: all pairs, the same on every rank.
            references: for each reference, log-probs by response id.
            from_reference: whether the weights now held are the (only) reference's.
            seed: of the shuffle.
            on_step: called on rank 0 after every optimizer step with the step's metrics.
        """
        config = self.config
        total = num_steps(len(rows), size=config.global_batch_size, num_epochs=config.num_train_epochs)
        gate_floor = self._gate_floor(rows) if any(loss.gated for loss in config.losses()) else None
        losses = config.losses(gate_floor=gate_floor)
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        batches = global_batches(
            len(rows), size=config.global_batch_size, num_epochs=config.num_train_epochs, seed=seed
        )
        for step, batch in enumerate(batches):
            own_reference = from_reference and step == 0
            last = self._step([rows[i] for i in batch], references, losses, gate_floor, own_reference, step, total)
            first = first or last
            if own_reference and len(losses) == 1 and losses[0].objective.starts_at_ln2(losses[0].params):
                assert last["loss"] == float(torch.tensor(LN2)), f"the first loss is {last['loss']!r}, not ln 2"
            if on_step is not None and self.rank == 0:
                on_step(last)
        return UpdateSummary(total, len(rows), first, last, gate_floor)

    def _gate_floor(self, rows: Sequence[PairRow]) -> float:
        if self.config.gate_floor is not None:
            return self.config.gate_floor
        if self.dtype == "float32":
            return FLOAT32_GATE_FLOOR
        floor = [self.measured_gate_floor(answers_of(rows[:_GATE_SAMPLE]))]
        dist.broadcast_object_list(floor, src=0)
        return floor[0]

    def _step(
        self,
        batch: Sequence[PairRow],
        references: Sequence[Mapping[str, float]],
        losses: Sequence[Loss],
        gate_floor: float | None,
        own_reference: bool,
        step: int,
        total: int,
    ) -> dict[str, float]:
        """One optimizer step on one global batch; its metrics, over all ranks."""
        started = time.monotonic()
        rate = learning_rate_at(step, total, self.config)
        deepspeed_engine.set_learning_rate(self._engine, rate)
        metrics = StepMetrics(
            beta=next((loss.beta for loss in losses if loss.beta is not None), 1.0), gate_floor=gate_floor or 0.0
        )
        counts = {"pairs": len(batch), "tokens": sum(len(row.chosen_token_ids) for row in batch)}
        parts = deal(
            range(len(batch)),
            rank=self.rank,
            world_size=self.world_size,
            micro_batch_size=self.config.micro_batch_size,
        )
        for part in parts:
            rows = [batch[i] for i in part]
            pairs = self._pairs(rows or [batch[0]], references, own_reference)
            self._refuse_nonfinite(torch.cat([pairs.chosen_B, pairs.rejected_B]), step, "log-probs")
            terms = [term for loss in losses for term in loss(pairs)]
            real = 1.0 if rows else 0.0
            shares = [(term.loss_B * term.weight_B).sum() / counts[term.normaliser] for term in terms]
            # DeepSpeed averages over the ranks; the loss is a mean over the global batch.
            self._engine.backward(torch.stack(shares).sum() * self.world_size * real)
            if rows:
                metrics.add(pairs, torch.stack([(term.loss_B * term.weight_B).detach() for term in terms]).sum(0))
        self._engine.step()
        self._num_steps += 1
        grad_norm = float(self._engine.get_global_grad_norm() or 0.0)
        self._refuse_nonfinite(torch.tensor(grad_norm), step, "gradient")
        return {
            "step": step + 1,
            "steps": total,
            **metrics.over_all_ranks(self.device),
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "step_s": time.monotonic() - started,
        }

    def _pairs(self, rows: Sequence[PairRow], references: Sequence[Mapping[str, float]], own_reference: bool) -> Pairs:
        """Log-probs of some pairs: one forward over chosen and rejected answers together."""
        chosen, rejected = [r.chosen_token_ids for r in rows], [r.rejected_token_ids for r in rows]
        batch = token_batch([r.prompt_token_ids for r in rows] * 2, chosen + rejected)
        logps_N = answer_logps(self._engine, batch, self.device)
        chosen_B, rejected_B = logps_N.chunk(2)
        if own_reference:
            ref_chosen_RB, ref_rejected_RB = chosen_B.detach()[None], rejected_B.detach()[None]
        else:
            ref_chosen_RB = self._tensor([[ref[row.chosen_id] for row in rows] for ref in references])
            ref_rejected_RB = self._tensor([[ref[row.rejected_id] for row in rows] for ref in references])
        lengths = [self._tensor([len(ids) for ids in answers]) for answers in (chosen, rejected)]
        return Pairs(chosen_B, rejected_B, ref_chosen_RB, ref_rejected_RB, *lengths)

    def _refuse_nonfinite(self, values: torch.Tensor, step: int, what: str) -> None:
        if not torch.isfinite(values).all():
            raise StageError(
                f"update, step {step + 1}",
                wanted=f"a finite {what}",
                got="NaN or infinity",
                fix=f"lower update.learning_rate (now {self.config.learning_rate:g}); the last policy stands",
            )

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

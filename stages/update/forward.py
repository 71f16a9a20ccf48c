"""Rows through the engine: one forward over all answers of a micro-batch, and what an objective takes out of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from stages.errors import StageError
from stages.update import deepspeed_engine
from stages.update.batching import token_batch
from stages.update.logps import answer_logps
from stages.update.objectives.base import Groups, Need, Pairs
from stages.update.rows import AnswerRow, GroupRow, PairRow, Row
from stages.update.value_head import ValueHead, final_hidden_states


class Forward:
    """One rank's forward passes with gradients.

    Args:
        references: for each reference, log-probs by response id.
        needs: what the objectives need beside log-probs.
        value_head: where they need one.
    """

    def __init__(
        self,
        engine: Any,
        device: torch.device,
        references: Sequence[Mapping[str, float]],
        *,
        needs: Collection[Need],
        value_head: ValueHead | None,
    ) -> None:
        self._engine, self._device, self._references = engine, device, references
        self._needs, self._value_head = needs, value_head

    def __call__(self, rows: Sequence[Row], *, own_reference: int | None) -> Pairs | Groups:
        """The tensors of some rows, all pairs or all groups.

        Args:
            own_reference: the reference whose weights the engine holds now; its log-probs are the forward's own.
        """
        groups = [row for row in rows if isinstance(row, GroupRow)]
        if groups:
            return self._groups(groups, own_reference)
        return self._pairs([row for row in rows if isinstance(row, PairRow)], own_reference)

    def _pairs(self, rows: Sequence[PairRow], own_reference: int | None) -> Pairs:
        chosen, rejected = (list(side) for side in zip(*(row.answers for row in rows), strict=True))
        streams = [row.stream for row in rows] if "stream" in self._needs else []
        drawn = [answer for answer in streams if answer is not None]
        with self._watched() as seen:
            logps_N = self._logps([*chosen, *rejected, *drawn])
        chosen_B, rejected_B, drawn_S = logps_N.split([len(rows), len(rows), len(drawn)])
        more: dict[str, torch.Tensor] = {}
        if "auxiliary" in self._needs:
            more["aux_chosen_B"] = self._tensor([row.aux_chosen for row in rows])
            more["aux_rejected_B"] = self._tensor([row.aux_rejected for row in rows])
        if self._value_head is not None:
            last = torch.tensor([len(row.prompt_token_ids) - 1 for row in rows], device=self._device)
            more["value_B"] = self._value_head(seen[0][torch.arange(len(rows), device=self._device), last])
        if "stream" in self._needs:
            has_B = torch.tensor([answer is not None for answer in streams], device=self._device)
            more["stream_logp_B"] = torch.zeros_like(chosen_B).masked_scatter(has_B, drawn_S)
            more["stream_len_B"] = self._tensor([0 if answer is None else len(answer.token_ids) for answer in streams])
        return Pairs(
            chosen_B,
            rejected_B,
            self._reference_logps(chosen, chosen_B, own_reference),
            self._reference_logps(rejected, rejected_B, own_reference),
            self._tensor([len(answer.token_ids) for answer in chosen]),
            self._tensor([len(answer.token_ids) for answer in rejected]),
            **more,
        )

    def _watched(self) -> AbstractContextManager[list[torch.Tensor]]:
        """Gets the hidden states that the value head reads, where there is one."""
        if self._value_head is None:
            return nullcontext([])
        return final_hidden_states(deepspeed_engine.model_of(self._engine))

    def _groups(self, rows: Sequence[GroupRow], own_reference: int | None) -> Groups:
        answers = [answer for row in rows for answer in row.answers]
        most = max(row.num_answers for row in rows)
        mask_GK = torch.tensor([[k < row.num_answers for k in range(most)] for row in rows], device=self._device)

        def placed(values_N: torch.Tensor) -> torch.Tensor:
            return torch.zeros(mask_GK.shape, device=self._device).masked_scatter(mask_GK, values_N)

        logps_N = self._logps(answers)
        ref_logps_RN = self._reference_logps(answers, logps_N, own_reference)
        nothing = torch.zeros(0, *mask_GK.shape, device=self._device)
        return Groups(
            placed(logps_N),
            torch.stack([placed(logps) for logps in ref_logps_RN]) if self._references else nothing,
            placed(self._tensor([len(answer.token_ids) for answer in answers])),
            placed(self._tensor([reward for row in rows for reward in row.rewards])),
            mask_GK,
        )

    def _logps(self, answers: Sequence[AnswerRow]) -> torch.Tensor:
        batch = token_batch([answer.prompt_token_ids for answer in answers], [answer.token_ids for answer in answers])
        return answer_logps(self._engine, batch, self._device)

    def _reference_logps(
        self, answers: Sequence[AnswerRow], logps_N: torch.Tensor, own_reference: int | None
    ) -> torch.Tensor:
        """Shape [R, N]."""
        tables = [
            logps_N.detach()
            if place == own_reference
            else self._tensor([table[answer.response_id] for answer in answers])
            for place, table in enumerate(self._references)
        ]
        return torch.stack(tables) if tables else torch.zeros(0, len(answers), device=self._device)

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)


def policy_logps(batch: Pairs | Groups) -> torch.Tensor:
    """All log-probs under the policy in a micro-batch, in one dimension."""
    if isinstance(batch, Groups):
        return batch.logp_GK[batch.mask_GK]
    parts = (batch.chosen_B, batch.rejected_B, batch.stream_logp_B)
    return torch.cat([part for part in parts if part is not None])


def refuse_without_auxiliary(rows: Sequence[Row]) -> None:
    """Check that both answers of every pair have auxiliary rewards.

    Raises:
        StageError: naming the first pair whose answers have none.
    """
    for row in rows:
        if isinstance(row, PairRow) and (row.aux_chosen is None or row.aux_rejected is None):
            raise StageError(
                f"update: pair {row.pair_id}",
                wanted="an auxiliary reward for both answers, since the objective trains on them",
                got="none",
                fix="give score.rewards an entry with role: auxiliary, and make the pairs again",
            )

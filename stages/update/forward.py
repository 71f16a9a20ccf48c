"""A micro-batch as an objective takes it: which answers are scored, and the tensors made of their log-probs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from stages.errors import StageError
from stages.update.objectives.base import Groups, Need, Pairs
from stages.update.rows import AnswerRow, GroupRow, PairRow, Row
from stages.update.scoring import Scored, Scoring
from stages.update.value_head import ValueHead


class Forward:
    """One rank's forward passes with gradients.

    Args:
        references: for each reference, log-probs by response id.
        needs: what the objectives need beside log-probs.
        value_head: where they need one.
    """

    def __init__(
        self,
        scoring: Scoring,
        device: torch.device,
        references: Sequence[Mapping[str, float]],
        *,
        needs: Collection[Need],
        value_head: ValueHead | None,
    ) -> None:
        self._scoring, self._device, self._references = scoring, device, references
        self._needs, self._value_head = needs, value_head

    @property
    def shares(self) -> bool:
        """Whether answers share their prompt's forward."""
        return self._scoring.shares

    @property
    def num_references(self) -> int:
        return len(self._references)

    def scored(self, rows: Sequence[Row], *, skips: bool) -> Scored:
        """The answers of some rows, all pairs or all groups: of pairs the chosen ones, the rejected, and the streams'.

        Args:
            skips: whether the rejected answers of pairs are likely to get no gradient.
        """
        if isinstance(rows[0], GroupRow):
            return self._scoring([answer for row in rows for answer in row.answers])
        chosen, rejected, drawn = self._parts(rows)
        return self._scoring([*chosen, *rejected, *drawn], likely_skipped=rejected_places(rows) if skips else ())

    def tensors(self, rows: Sequence[Row], scored: Scored, *, own_reference: int | None) -> Pairs | Groups:
        """What an objective takes.

        Args:
            own_reference: the reference whose weights the engine holds now; its log-probs are the forward's own.
        """
        groups = [row for row in rows if isinstance(row, GroupRow)]
        return self._groups(groups, scored, own_reference) if groups else self._pairs(rows, scored, own_reference)

    def _parts(self, rows: Sequence[Row]) -> tuple[list[AnswerRow], list[AnswerRow], list[AnswerRow]]:
        chosen, rejected = (list(side) for side in zip(*(row.answers for row in rows), strict=True))
        streams = [row.stream for row in rows if isinstance(row, PairRow)] if "stream" in self._needs else []
        return chosen, rejected, [answer for answer in streams if answer is not None]

    def _pairs(self, mixed: Sequence[Row], scored: Scored, own_reference: int | None) -> Pairs:
        rows = [row for row in mixed if isinstance(row, PairRow)]
        chosen, rejected, drawn = self._parts(rows)
        chosen_B, rejected_B, drawn_S = scored.logps_N.split([len(rows), len(rows), len(drawn)])
        more: dict[str, torch.Tensor] = {}
        if "auxiliary" in self._needs:
            more["aux_chosen_B"] = self._tensor([row.aux_chosen for row in rows])
            more["aux_rejected_B"] = self._tensor([row.aux_rejected for row in rows])
        if self._value_head is not None:
            assert scored.states_NH is not None
            more["value_B"] = self._value_head(scored.states_NH[: len(rows)])
        if "stream" in self._needs:
            streams = [row.stream for row in rows]
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

    def _groups(self, rows: Sequence[GroupRow], scored: Scored, own_reference: int | None) -> Groups:
        answers = [answer for row in rows for answer in row.answers]
        most = max(row.num_answers for row in rows)
        mask_GK = torch.tensor([[k < row.num_answers for k in range(most)] for row in rows], device=self._device)

        def placed(values_N: torch.Tensor) -> torch.Tensor:
            return torch.zeros(mask_GK.shape, device=self._device).masked_scatter(mask_GK, values_N)

        ref_logps_RN = self._reference_logps(answers, scored.logps_N, own_reference)
        nothing = torch.zeros(0, *mask_GK.shape, device=self._device)
        return Groups(
            placed(scored.logps_N),
            torch.stack([placed(logps) for logps in ref_logps_RN]) if self._references else nothing,
            placed(self._tensor([len(answer.token_ids) for answer in answers])),
            placed(self._tensor([reward for row in rows for reward in row.rewards])),
            mask_GK,
        )

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


def rejected_places(rows: Sequence[Row]) -> range:
    """Where the rejected answers of pairs stand in what `Forward.scored` gives."""
    return range(len(rows), 2 * len(rows))


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

"""The metrics of an optimizer step, under TRL's names where it has one, over the rows of all ranks.

``rewards/…`` are beta times log-ratios (of log-probs, where there is no reference), so that ``rewards/margins`` is
plain DPO's margin under any objective; ``margins/objective`` is the objective's own. Of several references the first is
shown. Of a group, the answer with the highest reward is shown as the chosen one, that with the lowest as the rejected.

- ``log_ratios/chosen``, ``log_ratios/rejected``: means in nats an answer, and ``/p10``, ``/p50``, ``/p90``, quantiles.
- ``rejected_active``: the share of rejected answers above their reference by more than the gate's floor (those MinorDPO
  still pushes down). ``gate_noise``: the share whose log-ratio is not 0 but within the floor.
- ``agreement``: of the pairs whose answers have different rewards, the share that the objective's margin puts in the
  rewards' order. Of groups: the same over all pairs of answers, by their log-ratios.
- ``tokens/real``: of prompts and answers put through the layers, a shared prompt once, and what is run twice twice;
  ``tokens/processed``: with padding and dummy rows; ``tokens/backward``: the real ones that a backward goes through.
- ``rejected_pushed``: the share of the rejected answers, by tokens, that got a gradient; ``skips``: 1 where the step
  scored them without a graph first.
- ``value/mean``, ``value/error``: the value head's estimate, and how far it is from the answers' auxiliary rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.distributed as dist

from stages.update.objectives.base import Groups, Pairs, Term
from stages.update.rows import GroupRow, PairRow, Row
from stages.update.scoring import Scored

_QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
_SPREAD = ("log_ratios/chosen", "log_ratios/rejected")
_TOTALS = ("num_pairs", "num_groups", "num_tokens", "tokens/real", "tokens/processed", "tokens/backward")
_ORDERED, _COMPARED = "in the rewards' order", "with different rewards"  # whose ratio is the agreement
_PUSHED, _PUSHABLE = "rejected tokens with a gradient", "rejected tokens"  # whose ratio is `rejected_pushed`


@dataclass(frozen=True, slots=True)
class UpdateSummary:
    """An update as figures.

    Attributes:
        num_steps: of the whole update, those that were skipped among them.
        num_pairs: pairs or groups trained on.
        first, last: metrics of the first and the last step taken; empty where none was.
        gate_floor: the gate's, in nats a sequence.
        num_skipped: steps that the guard did not take.
        ended: why it ended before its last step, without a policy to keep; None where it did not.
        resumed_at: the step whose checkpoint it went on from; None where it was made in one go.
    """

    num_steps: int
    num_pairs: int
    first: dict[str, float]
    last: dict[str, float]
    gate_floor: float | None
    num_skipped: int = 0
    ended: str | None = None
    resumed_at: int | None = None


def _contrast(pairs: Pairs, *, beta: float, gate_floor: float) -> dict[str, torch.Tensor]:
    """What is shown of each pair of answers."""
    chosen_B, rejected_B = pairs.chosen_B.detach(), pairs.rejected_B.detach()
    r_w, r_l, against_reference = chosen_B.double(), rejected_B.double(), {}
    if len(pairs.ref_chosen_RB):
        r_w = (chosen_B - pairs.ref_chosen_RB[0]).double()
        r_l = (rejected_B - pairs.ref_rejected_RB[0]).double()
        against_reference = {
            "rejected_active": r_l > gate_floor,
            "gate_noise": (r_l != 0) & (r_l.abs() <= gate_floor),
            "log_ratios/chosen": r_w,
            "log_ratios/rejected": r_l,
        }
    return {
        "rewards/chosen": beta * r_w,
        "rewards/rejected": beta * r_l,
        "rewards/margins": beta * (r_w - r_l),
        "rewards/accuracies": r_w > r_l,
        "logps/chosen": chosen_B,
        "logps/rejected": rejected_B,
        **against_reference,
        "lengths/chosen": pairs.chosen_len_B,
        "lengths/rejected": pairs.rejected_len_B,
    }


def _of_pairs(pairs: Pairs, rows: Sequence[PairRow], margin_B: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What is shown of pairs besides."""
    columns = {"num_pairs": torch.ones_like(pairs.chosen_B), "num_tokens": pairs.chosen_len_B + pairs.rejected_len_B}
    if margin_B is not None:
        gap_B = torch.tensor([_gap(row) for row in rows], dtype=torch.float64, device=margin_B.device)
        columns[_ORDERED] = (gap_B != 0) & (gap_B.sign() == margin_B.sign())
        columns[_COMPARED] = gap_B != 0
    if pairs.value_B is not None:
        value_B = pairs.value_B.detach()
        columns["value/mean"] = value_B
        if pairs.aux_chosen_B is not None and pairs.aux_rejected_B is not None:
            both_2B = torch.stack([pairs.aux_chosen_B, pairs.aux_rejected_B])
            columns["value/error"] = (both_2B - value_B).abs().mean(0)
    return columns


def _gap(row: PairRow) -> float:
    """Reward of the chosen answer less that of the rejected one; 0 where pairs came without."""
    return 0.0 if row.score_chosen is None or row.score_rejected is None else row.score_chosen - row.score_rejected


def _objective_margin(terms: Sequence[Term]) -> torch.Tensor | None:
    """The objective's margin of each row, of several the weighted sum; None where none has one."""
    found = [(term.weight_B, term.logit_B) for term in terms if term.logit_B is not None]
    if not found:
        return None
    if len(found) == 1:
        return found[0][1].detach()
    return torch.stack([(weight_B * logit_B).detach() for weight_B, logit_B in found]).sum(0)


def _ends(groups: Groups, rows: Sequence[GroupRow]) -> Pairs:
    """The best answer of each group against its worst one."""
    device = groups.logp_GK.device
    every = torch.arange(len(rows), device=device)
    best = torch.tensor([row.best for row in rows], device=device)
    worst = torch.tensor([row.worst for row in rows], device=device)
    return Pairs(
        groups.logp_GK[every, best],
        groups.logp_GK[every, worst],
        groups.ref_logp_RGK[:, every, best],
        groups.ref_logp_RGK[:, every, worst],
        groups.len_GK[every, best],
        groups.len_GK[every, worst],
    )


def _of_groups(groups: Groups) -> dict[str, torch.Tensor]:
    """What is shown of groups besides."""
    r_GK = groups.logp_GK.detach()
    if len(groups.ref_logp_RGK):
        r_GK = r_GK - groups.ref_logp_RGK[0]
    likelier_GKK = r_GK[:, :, None] > r_GK[:, None, :]
    better_GKK = groups.rewards_GK[:, :, None] > groups.rewards_GK[:, None, :]
    better_GKK &= groups.mask_GK[:, :, None] & groups.mask_GK[:, None, :]
    return {
        "num_groups": torch.ones_like(groups.len_GK[:, 0]),
        "num_tokens": groups.len_GK.sum(-1),
        _ORDERED: (better_GKK & likelier_GKK).sum((1, 2)),
        _COMPARED: better_GKK.sum((1, 2)),
    }


@dataclass(slots=True)
class StepMetrics:
    """Sums over this rank's rows, in float64; `over_all_ranks` makes them means."""

    beta: float
    gate_floor: float
    counts: dict[str, int]
    _sums: dict[str, torch.Tensor] = field(default_factory=dict)
    _spread: list[torch.Tensor] = field(default_factory=list)

    def add(self, batch: Pairs | Groups, rows: Sequence[Row], terms: Sequence[Term], *, num_rows: int) -> None:
        """Add a micro-batch; of a dummy row only the names count.

        Args:
            num_rows: rows that are real, all or none.
        """
        margin_B = _objective_margin(terms)
        if isinstance(batch, Groups):
            of_groups = cast(Sequence[GroupRow], rows)
            pairs, besides = _ends(batch, of_groups), _of_groups(batch)
        else:
            pairs, besides = batch, _of_pairs(batch, cast(Sequence[PairRow], rows), margin_B)
        columns = {"loss": self._loss(terms), **_contrast(pairs, beta=self.beta, gate_floor=self.gate_floor), **besides}
        if margin_B is not None:
            columns["margins/objective"] = margin_B
        self._sum({name: column[:num_rows].double().sum() for name, column in columns.items()})
        if all(name in columns for name in _SPREAD):
            self._spread.append(torch.stack([columns[name][:num_rows] for name in _SPREAD]))

    def add_work(self, scored: Scored, rows: Sequence[Row], *, num_rows: int) -> None:
        """Add a micro-batch's tokens, once its backward is done; `num_rows` as for `add`."""
        real = 1.0 if num_rows else 0.0
        found = {
            "tokens/real": real * scored.tokens.real,
            "tokens/processed": scored.tokens.processed,
            "tokens/backward": real * scored.tokens.backward,
        }
        if isinstance(rows[0], PairRow):
            assert scored.logps_N.grad is not None
            pushed = (scored.logps_N.grad[len(rows) : 2 * len(rows)] != 0).tolist()
            lengths = [len(row.answers[1].token_ids) for row in rows]
            found[_PUSHED] = sum(length for length, is_pushed in zip(lengths, pushed, strict=True) if is_pushed)
            found[_PUSHABLE] = real * sum(lengths)
        self._sum({name: torch.tensor(float(value), dtype=torch.float64) for name, value in found.items()})

    def _sum(self, columns: Mapping[str, torch.Tensor]) -> None:
        for name, value in zip(columns, torch.stack(list(columns.values())).cpu(), strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + value

    def _loss(self, terms: Sequence[Term]) -> torch.Tensor:
        """What each row adds to the loss, times the rows of the global batch."""
        parts = [
            (term.loss_B * term.weight_B).detach().double() * (self.counts["pairs"] / self.counts[term.normaliser])
            for term in terms
        ]
        return torch.stack(parts).sum(0)

    def over_all_ranks(self, device: torch.device) -> dict[str, float]:
        """The metrics of the global batch; a call that all ranks make together."""
        totals = torch.stack(list(self._sums.values())).to(device)
        dist.all_reduce(totals)
        found = dict(zip(self._sums, totals.tolist(), strict=True))
        ordered, compared = found.pop(_ORDERED, 0.0), found.pop(_COMPARED, 0.0)
        pushed, pushable = found.pop(_PUSHED, 0.0), found.pop(_PUSHABLE, 0.0)
        kept = {name: found.pop(name) for name in _TOTALS if name in found}
        metrics = {name: value / self.counts["pairs"] for name, value in found.items()}
        if compared:
            metrics["agreement"] = ordered / compared
        if pushable:
            metrics["rejected_pushed"] = pushed / pushable
        return metrics | self._quantiles(device) | kept

    def _quantiles(self, device: torch.device) -> dict[str, float]:
        """Quantiles over the global batch of what has a spread."""
        if not self._spread:
            return {}
        mine = torch.cat(self._spread, dim=1)
        most = self.counts["pairs"]  # one rank may hold all of them
        padded = torch.full((len(_SPREAD), most), torch.nan, dtype=torch.float64, device=device)
        padded[:, : mine.shape[1]] = mine
        parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, padded)
        values = torch.cat(parts, dim=1)
        known = values[:, ~values[0].isnan()]
        if not known.numel():
            return {}
        levels = torch.tensor(list(_QUANTILES.values()), dtype=torch.float64, device=device)
        found = torch.quantile(known, levels, dim=1).T.tolist()
        return {
            f"{name}/{level}": value
            for name, row in zip(_SPREAD, found, strict=True)
            for level, value in zip(_QUANTILES, row, strict=True)
        }

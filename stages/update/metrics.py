"""The metrics of an optimizer step, under TRL's names, as means over the pairs of all ranks.

Besides TRL's: ``rejected_active``, the share of rejected answers above their reference by more than the gate's floor
(those MinorDPO still pushes down), and ``gate_noise``, the share whose log-ratio is not 0 but within the floor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from stages.update.objectives.base import Pairs

_NAMES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "rejected_active",
    "gate_noise",
)


@dataclass(frozen=True, slots=True)
class UpdateSummary:
    """An update as figures: steps made, pairs trained on, the first and the last step's metrics, the gate's floor."""

    num_steps: int
    num_pairs: int
    first: dict[str, float]
    last: dict[str, float]
    gate_floor: float | None


@dataclass(slots=True)
class StepMetrics:
    """Sums over this rank's pairs, in float64; `over_all_ranks` makes them means."""

    beta: float
    gate_floor: float
    _sums: torch.Tensor = field(default_factory=lambda: torch.zeros(len(_NAMES), dtype=torch.float64))
    _num_pairs: int = 0
    _num_tokens: float = 0.0

    def add(self, pairs: Pairs, loss_B: torch.Tensor) -> None:
        """Add some pairs; with several references, the first one's log-ratios are shown."""
        r_w = (pairs.chosen_B - pairs.ref_chosen_RB[0]).detach().double()
        r_l = (pairs.rejected_B - pairs.ref_rejected_RB[0]).detach().double()
        columns = (
            loss_B,
            self.beta * r_w,
            self.beta * r_l,
            self.beta * (r_w - r_l),
            r_w > r_l,
            pairs.chosen_B.detach(),
            pairs.rejected_B.detach(),
            r_l > self.gate_floor,
            (r_l != 0) & (r_l.abs() <= self.gate_floor),
        )
        self._sums += torch.stack([column.double().sum() for column in columns]).cpu()
        self._num_pairs += len(loss_B)
        self._num_tokens += float((pairs.chosen_len_B + pairs.rejected_len_B).sum())

    def over_all_ranks(self, device: torch.device) -> dict[str, float]:
        """Means over the pairs of all ranks, and the numbers of pairs and answer tokens."""
        counts = torch.tensor([self._num_pairs, self._num_tokens], dtype=torch.float64)
        totals = torch.cat([self._sums, counts]).to(device)
        dist.all_reduce(totals)
        *sums, num_pairs, num_tokens = totals.tolist()
        means = {name: value / num_pairs for name, value in zip(_NAMES, sums, strict=True)}
        return means | {"num_pairs": num_pairs, "num_tokens": num_tokens}

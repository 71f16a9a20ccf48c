"""What an objective takes and gives: tensors of summed log-probs in, loss terms with their normaliser out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from stages.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Pairs:
    """B pairs under the policy and R references; float32, in nats, summed over each answer's tokens.

    Attributes:
        chosen_B, rejected_B: log-probs under the policy.
        ref_chosen_RB, ref_rejected_RB: log-probs under each reference.
        chosen_len_B, rejected_len_B: answer tokens, the stop token included.
    """

    chosen_B: Tensor
    rejected_B: Tensor
    ref_chosen_RB: Tensor
    ref_rejected_RB: Tensor
    chosen_len_B: Tensor
    rejected_len_B: Tensor

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """``r_w`` and ``r_l``, each [B], against the only reference."""
        assert self.ref_chosen_RB.shape[0] == 1, "an objective of one reference was given several"
        return self.chosen_B - self.ref_chosen_RB[0], self.rejected_B - self.ref_rejected_RB[0]


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a loss: a value and a weight a row, and what the sum is divided by over the *global* batch."""

    loss_B: Tensor
    weight_B: Tensor
    normaliser: Literal["pairs", "tokens"]


@dataclass(frozen=True, slots=True)
class Objective:
    """A registered objective.

    Attributes:
        name: the word in ``update.loss_type``.
        loss: ``loss(batch, params) -> terms``.
        params: the class that checks ``beta`` and ``loss_params``.
        gated: whether it has a kink at the rejected answer's log-ratio 0, and so a ``gate_floor``.
    """

    name: str
    loss: Callable[[Pairs, Any], list[Term]]
    params: type[Settings]
    gated: bool = False

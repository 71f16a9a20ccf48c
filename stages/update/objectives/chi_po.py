"""chi-PO: DPO with a link that also regularises by the chi-squared divergence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from stages.settings import Settings
from stages.update.objectives.base import Objective, Pairs, Term, term

if TYPE_CHECKING:
    from torch import Tensor


class ChiPOParams(Settings):
    """chi-PO's parameters."""

    beta: float = Field(0.05, gt=0, description="strength of the pull towards the reference")
    r_max: float = Field(1.0, gt=0, description="the largest reward; the loss is flat beyond differences of twice that")


def clipped(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` within its bounds; its slope is 1 up to and on a bound and 0 beyond. NaN stays NaN."""
    import torch

    return torch.where(x > high, torch.full_like(x, high), torch.where(x < low, torch.full_like(x, low), x))


def chi_po(batch: Pairs, params: ChiPOParams) -> list[Term]:
    """chi-PO loss a pair, shape [B]  (arXiv:2407.13399, after several sources that agree).

        -log sigmoid(clip(beta * phi(r_w) - beta * phi(r_l), -2 R_max, 2 R_max)),   phi(r) = exp(r) + r

    Log-ratios are sums over tokens: phi is of the ratio of two probabilities, which a mean is not. A pair beyond the
    clip feels no push at all. [ours] Inside exp alone r is clipped to [-88, 20], which float32 holds.
    """
    from torch.nn.functional import logsigmoid

    phi_w, phi_l = (clipped(r, -88.0, 20.0).exp() + r for r in batch.log_ratios())
    h_B = clipped(params.beta * (phi_w - phi_l), -2 * params.r_max, 2 * params.r_max)
    return [term(-logsigmoid(h_B), logit_B=h_B)]


OBJECTIVE = Objective("chi_po", chi_po, ChiPOParams, starts_at_ln2=lambda _: True)

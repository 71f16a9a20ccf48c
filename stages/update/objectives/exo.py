"""EXO on groups: the reverse KL from the rewards' distribution over K answers to the policy's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from stages.update.objectives.base import Groups, LogRatioParams, Objective, Term, term

if TYPE_CHECKING:
    from torch import Tensor


class EXOParams(LogRatioParams):
    """EXO's parameters; `beta` is the paper's beta_pi."""

    beta: float = Field(0.5, gt=0, description="the policy's: log-ratios are multiplied by it")
    beta_r: float = Field(0.5, gt=0, description="the rewards' temperature, in reward units")


def exo(batch: Groups, params: EXOParams) -> list[Term]:
    """EXO loss a group of K answers, shape [G]  (arXiv:2402.00856).

        sum_i p_i * (log p_i - log q_i),   p = softmax(beta_pi * r),   q = softmax(R / beta_r)

    Sum and softmax go over the group's answers. R is in reward units and enters by differences alone: a constant added
    to a group's rewards changes nothing.
    [ours] K may differ by group: padding is taken out before any arithmetic, so that not even a NaN in it is felt.
    """
    import torch

    assert batch.ref_logp_RGK.shape[0] == 1, "exo takes one reference"
    answer_GK = batch.mask_GK
    nothing_GK = torch.zeros_like(batch.logp_GK)
    r_GK = torch.where(answer_GK, batch.logp_GK - batch.ref_logp_RGK[0], nothing_GK)
    if params.logps == "mean":
        r_GK = r_GK / torch.where(answer_GK, batch.len_GK, torch.ones_like(nothing_GK))
    log_p_GK = _log_softmax(params.beta * r_GK, answer_GK)
    log_q_GK = _log_softmax(torch.where(answer_GK, batch.rewards_GK, nothing_GK) / params.beta_r, answer_GK)
    p_GK = torch.where(answer_GK, log_p_GK.exp(), nothing_GK)
    return [term((p_GK * (log_p_GK - log_q_GK)).sum(-1))]


def _log_softmax(scores_GK: Tensor, answer_GK: Tensor) -> Tensor:
    """Log-softmax over each group's answers; 0 where there is none."""
    import torch

    masked_GK = torch.where(answer_GK, scores_GK, torch.full_like(scores_GK, -torch.inf))
    return torch.where(answer_GK, masked_GK.log_softmax(-1), torch.zeros_like(scores_GK))


OBJECTIVE = Objective("exo", exo, EXOParams, rows="groups")

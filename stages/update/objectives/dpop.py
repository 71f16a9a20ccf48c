"""DPO-Positive (Smaug): DPO that also punishes a chosen answer for falling below the reference."""

from __future__ import annotations

from pydantic import Field

from stages.update.objectives.base import LogRatioParams, Objective, Pairs, Term, term


class DPOPParams(LogRatioParams):
    """DPO-Positive's parameters."""

    beta: float = Field(0.3, gt=0, description="strength of the pull towards the reference")
    dpop_lambda: float = Field(50.0, ge=0, description="weight of the penalty, beside log-ratios of weight 1")


def dpop(batch: Pairs, params: DPOPParams) -> list[Term]:
    """DPO-Positive loss a pair, shape [B]  (arXiv:2402.13228, after several sources that agree).

        -log sigmoid(beta * [r_w - r_l - lambda * max(0, -r_w)])

    It floors the chosen answer where MinorDPO floors the rejected one. [ours] The penalty is written out and has no
    slope at r_w = 0, where every pair stands in a round's first step.
    """
    import torch
    from torch.nn.functional import logsigmoid

    r_w, r_l = batch.log_ratios(params.logps)
    fallen_B = torch.where(r_w < 0, -r_w, torch.zeros_like(r_w))
    h_B = params.beta * (r_w - r_l - params.dpop_lambda * fallen_B)
    return [term(-logsigmoid(h_B), logit_B=h_B)]


OBJECTIVE = Objective("dpop", dpop, DPOPParams, starts_at_ln2=lambda _: True)

"""DPO, with optional label smoothing."""

from __future__ import annotations

from pydantic import Field

from stages.update.objectives.base import LogRatioParams, Objective, Pairs, Term, term


class DPOParams(LogRatioParams):
    """DPO's parameters."""

    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs taken to be labelled the wrong way")


def dpo(batch: Pairs, params: DPOParams) -> list[Term]:
    """DPO loss a pair, shape [B]  (arXiv:2305.18290, equation 7).

        -(1 - e) * log sigmoid(h) - e * log sigmoid(-h),   h = beta * (r_w - r_l)

    With ``logps: mean`` it is TRL's ``sigmoid_norm``.
    """
    from torch.nn.functional import logsigmoid

    r_w, r_l = batch.log_ratios(params.logps)
    h_B = params.beta * (r_w - r_l)
    loss_B = -(1 - params.label_smoothing) * logsigmoid(h_B) - params.label_smoothing * logsigmoid(-h_B)
    return [term(loss_B, logit_B=h_B)]


OBJECTIVE = Objective("dpo", dpo, DPOParams, starts_at_ln2=lambda params: params.label_smoothing == 0)

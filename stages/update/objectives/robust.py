"""Robust DPO: an unbiased estimate of DPO's loss where a known share of the labels is wrong."""

from __future__ import annotations

from pydantic import Field

from stages.update.objectives.base import LogRatioParams, Objective, Pairs, Term, term


class RobustParams(LogRatioParams):
    """Robust DPO's parameters."""

    label_smoothing: float = Field(0.1, ge=0, lt=0.5, description="share of pairs taken to be labelled the wrong way")


def robust(batch: Pairs, params: RobustParams) -> list[Term]:
    """Robust DPO loss a pair, shape [B]  (arXiv:2403.00409; TRL's ``robust``).

        [-(1 - e) * log sigmoid(h) + e * log sigmoid(-h)] / (1 - 2 e),   h = beta * (r_w - r_l)

    It has no lower bound for e > 0. TRL's own default for e is 0, which is DPO; here it is 0.1.
    """
    from torch.nn.functional import logsigmoid

    r_w, r_l = batch.log_ratios(params.logps)
    h_B = params.beta * (r_w - r_l)
    e = params.label_smoothing
    loss_B = (-(1 - e) * logsigmoid(h_B) + e * logsigmoid(-h_B)) / (1 - 2 * e)
    return [term(loss_B, logit_B=h_B)]


OBJECTIVE = Objective("robust", robust, RobustParams, starts_at_ln2=lambda params: params.label_smoothing == 0)

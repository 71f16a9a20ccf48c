"""RPO, Regularised PO: DPO and the chosen answer's negative log-likelihood."""

from __future__ import annotations

from pydantic import Field

from stages.settings import Settings
from stages.update.objectives.base import Objective, Pairs, Term, term


class RPOParams(Settings):
    """RPO's parameters."""

    beta: float = Field(0.01, gt=0, description="strength of the pull towards the reference")
    eta: float = Field(0.005, ge=0, description="weight of the likelihood term; 0.2 goes with sft_average and beta 0.5")
    sft_average: bool = Field(False, description="the likelihood's mean over tokens times eta, and not times beta")


def rpo(batch: Pairs, params: RPOParams) -> list[Term]:
    """RPO loss a pair, shape [B]  (arXiv:2405.16436).

        -log sigmoid(beta * (r_w - r_l)) - beta * eta * log policy(y_w),   in nats, summed over tokens
        -log sigmoid(beta * (r_w - r_l)) - eta * log policy(y_w) / |y_w|   with `sft_average`

    The first is the paper's loss, the second the one of its appendix and of its released training script. Neither is
    the sum of `dpo` and `sft`, whose likelihood term is a mean over the tokens of the whole batch.
    """
    from torch.nn.functional import logsigmoid

    r_w, r_l = batch.log_ratios()
    h_B = params.beta * (r_w - r_l)
    logp_B, _ = batch.policy_logps("mean" if params.sft_average else "sum")
    weight = params.eta * (1.0 if params.sft_average else params.beta)
    return [term(-logsigmoid(h_B), logit_B=h_B), term(-weight * logp_B)]


OBJECTIVE = Objective("rpo", rpo, RPOParams, starts_at_ln2=lambda params: params.eta == 0)

"""SimPO: the mean log-prob of a token is the reward, with a margin and without a reference."""

from __future__ import annotations

from pydantic import Field

from stages.settings import Settings
from stages.update.objectives.base import Objective, Pairs, Term, term


class SimPOParams(Settings):
    """SimPO's parameters."""

    beta: float = Field(2.0, gt=0, description="scale of the mean log-probs; there is no reference to be pulled to")
    gamma: float = Field(1.0, ge=0, description="the margin that beta times the difference is to exceed")


def simpo(batch: Pairs, params: SimPOParams) -> list[Term]:
    """SimPO loss a pair, shape [B]  (arXiv:2405.14734; ``simpo`` of TRL's experimental CPO, without its CPO term).

        -log sigmoid(beta * (log policy(y_w) / |y_w| - log policy(y_l) / |y_l|) - gamma)

    `logit_B` leaves the margin out: it is positive where the chosen answer is the likelier one.
    """
    from torch.nn.functional import logsigmoid

    logp_w, logp_l = batch.policy_logps("mean")
    h_B = params.beta * (logp_w - logp_l)
    return [term(-logsigmoid(h_B - params.gamma), logit_B=h_B)]


OBJECTIVE = Objective("simpo", simpo, SimPOParams, references=(0, 0))

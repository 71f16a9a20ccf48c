"""SPPO with hard labels: each log-ratio is regressed onto a win, or a loss, of its own."""

from __future__ import annotations

from pydantic import Field

from stages.settings import Settings
from stages.update.objectives.base import Objective, Pairs, Term, term


class SPPOParams(Settings):
    """SPPO's parameters."""

    beta: float = Field(0.001, gt=0, description="log-ratios are drawn to plus and minus 1 / (2 beta) nats")


def sppo(batch: Pairs, params: SPPOParams) -> list[Term]:
    """SPPO loss a pair, shape [B]  (arXiv:2405.00675, equation 4.7, with a winning probability of 1 and 0).

        [(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2] / 2,   in nats squared, summed over tokens

    TRL's ``sppo_hard`` is twice that.
    """
    r_w, r_l = batch.log_ratios()
    target = 1 / (2 * params.beta)
    loss_B = ((r_w - target) ** 2 + (r_l + target) ** 2) / 2
    return [term(loss_B, logit_B=params.beta * (r_w - r_l))]


OBJECTIVE = Objective("sppo", sppo, SPPOParams)

"""EXO on pairs: the reverse KL from a nearly certain label to the policy's preference."""

from __future__ import annotations

import math

from pydantic import Field

from stages.update.objectives.base import LogRatioParams, Objective, Pairs, Term, term


class EXOPairParams(LogRatioParams):
    """Pairwise EXO's parameters."""

    label_smoothing: float = Field(1e-3, gt=0, lt=0.5, description="the probability that the label is wrong")


def exo_pair(batch: Pairs, params: EXOPairParams) -> list[Term]:
    """Pairwise EXO loss, shape [B]  (arXiv:2402.00856, equation 16; TRL's ``exo_pair``).

    sigmoid(h) * (log sigmoid(h) - log(1 - e)) + sigmoid(-h) * (log sigmoid(-h) - log e),   h = beta * (r_w - r_l)
    """
    from torch.nn.functional import logsigmoid

    r_w, r_l = batch.log_ratios(params.logps)
    h_B = params.beta * (r_w - r_l)
    e = params.label_smoothing
    right_B = h_B.sigmoid() * (logsigmoid(h_B) - math.log1p(-e))
    wrong_B = (-h_B).sigmoid() * (logsigmoid(-h_B) - math.log(e))
    return [term(right_B + wrong_B, logit_B=h_B)]


OBJECTIVE = Objective("exo_pair", exo_pair, EXOPairParams)

"""IPO: the log-ratios' difference is regressed onto a fixed margin."""

from __future__ import annotations

from pydantic import Field

from stages.update.objectives.base import Logps, LogRatioParams, Objective, Pairs, Term, term


class IPOParams(LogRatioParams):
    """IPO's parameters; `beta` is the paper's tau."""

    logps: Logps = Field(
        "mean", description="log-ratios in nats a sequence, or their mean over the tokens; beta does not carry over"
    )


def ipo(batch: Pairs, params: IPOParams) -> list[Term]:
    """IPO loss a pair, shape [B]  (arXiv:2310.12036, equation 17; TRL's ``ipo``).

        (r_w - r_l - 1 / (2 beta))^2,   r averaged over the answer's tokens

    The average is TRL's, agreed with the authors, and the default; the equation itself is ``logps: sum``.
    """
    r_w, r_l = batch.log_ratios(params.logps)
    h_B = r_w - r_l
    return [term((h_B - 1 / (2 * params.beta)) ** 2, logit_B=h_B)]


OBJECTIVE = Objective("ipo", ipo, IPOParams)

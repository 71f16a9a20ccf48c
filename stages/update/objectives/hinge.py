"""The hinge loss of RSO and SLiC: a pair that is apart far enough is left alone."""

from __future__ import annotations

from stages.update.objectives.base import LogRatioParams, Objective, Pairs, Term, term


class HingeParams(LogRatioParams):
    """The hinge's parameters; ``1 / beta`` is its margin in nats."""


def hinge(batch: Pairs, params: HingeParams) -> list[Term]:
    """Hinge loss a pair, shape [B]  (arXiv:2309.06657, after SLiC, arXiv:2305.10425; TRL's ``hinge``).

    max(0, 1 - h),   h = beta * (r_w - r_l); the slope at h = 1 is 0
    """
    import torch

    r_w, r_l = batch.log_ratios(params.logps)
    h_B = params.beta * (r_w - r_l)
    return [term(torch.where(h_B >= 1, torch.zeros_like(h_B), 1 - h_B), logit_B=h_B)]


OBJECTIVE = Objective("hinge", hinge, HingeParams)

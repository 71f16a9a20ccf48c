"""NCA on pairs: the chosen answer is raised for itself, not only against the rejected one."""

from __future__ import annotations

from pydantic import Field

from stages.settings import Settings
from stages.update.objectives.base import Objective, Pairs, Term, term


class NCAPairParams(Settings):
    """Pairwise NCA's parameters."""

    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")


def nca_pair(batch: Pairs, params: NCAPairParams) -> list[Term]:
    """Pairwise NCA loss, shape [B]  (arXiv:2402.05369; TRL's ``nca_pair``).

    -log sigmoid(s_w) - log sigmoid(-s_w) / 2 - log sigmoid(-s_l) / 2,   s = beta * r, r in nats, summed over tokens
    """
    from torch.nn.functional import logsigmoid

    s_w, s_l = (params.beta * r for r in batch.log_ratios())
    loss_B = -logsigmoid(s_w) - logsigmoid(-s_w) / 2 - logsigmoid(-s_l) / 2
    return [term(loss_B, logit_B=s_w - s_l)]


OBJECTIVE = Objective("nca_pair", nca_pair, NCAPairParams)

"""MPO, Maximum PO: chosen answers likelier than rejected ones, and answers drawn from the reference kept likely."""

from __future__ import annotations

from pydantic import Field

from stages.settings import Settings
from stages.update.objectives.base import Logps, Objective, Pairs, Term, term


class MPOParams(Settings):
    """Maximum PO's parameters."""

    mpo_lambda: float = Field(0.1, ge=0, description="weight of the likelihood of answers drawn from the reference")
    logps: Logps = Field("mean", description="log-probs in nats a sequence, or their mean over the tokens")


def mpo(batch: Pairs, params: MPOParams) -> list[Term]:
    """Maximum PO loss a pair, shape [B]  ([ours]: it follows the abstract of arXiv:2312.16430).

        -sigmoid(logp(y_w) - logp(y_l)) - lambda * logp(y_s),   y_s drawn from the reference, logp a mean over tokens

    Only the abstract could be read: this is not the paper's verified formula. The last term is 0 for a pair without an
    answer y_s, and such a pair still counts in the mean.
    """
    import torch

    assert batch.stream_logp_B is not None and batch.stream_len_B is not None, "mpo needs answers of the reference"
    logp_w, logp_l = batch.policy_logps(params.logps)
    h_B = logp_w - logp_l
    found_B = batch.stream_len_B > 0
    stream_B = torch.where(found_B, batch.stream_logp_B, torch.zeros_like(h_B))
    if params.logps == "mean":
        stream_B = stream_B / torch.where(found_B, batch.stream_len_B, torch.ones_like(h_B))
    return [term(-h_B.sigmoid(), logit_B=h_B), term(-params.mpo_lambda * stream_B)]


OBJECTIVE = Objective("mpo", mpo, MPOParams, references=(0, 0), needs=frozenset({"stream"}))

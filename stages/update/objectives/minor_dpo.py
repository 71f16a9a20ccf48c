"""MinorDPO: DPO that stops pushing a rejected answer once it is no likelier than under the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from stages.update.objectives.base import LogRatioParams, Objective, Pairs, Term, term

if TYPE_CHECKING:
    from torch import Tensor


class MinorDPOParams(LogRatioParams):
    """MinorDPO's parameters."""

    gate_floor: float = Field(0.0, ge=0, description="nats a sequence; a log-ratio up to this counts as rounding noise")


def gate(log_ratio_B: Tensor, floor: float) -> Tensor:
    """``r if r > floor else 0``, shape [B]; its slope is 1 above the floor and 0 up to it.

    Written out, because the slopes of clamp, relu and maximum at their bound differ, and clamp's between torch
    releases. At r = 0, where every pair stands in a round's first step, the gate is closed.
    """
    import torch

    # In this order NaN stays NaN, for the guard to see; asked whether it is above the floor, it would close the gate.
    return torch.where(log_ratio_B <= floor, torch.zeros_like(log_ratio_B), log_ratio_B)


def minor_dpo(batch: Pairs, params: MinorDPOParams) -> list[Term]:
    """MinorDPO loss a pair, shape [B]  (arXiv:2408.09834).

        -log sigmoid(beta * [r_w - gate(r_l)]),   r(y) = log policy(y) - log reference(y), in nats, summed

    Where r_l > floor it is DPO, loss and gradient. Elsewhere the rejected answer gets no gradient at all. With
    ``logps: mean`` the gate is still one of sums, since the floor is in nats a sequence; means are taken after it.
    """
    from torch.nn.functional import logsigmoid

    r_w, r_l = batch.log_ratios()
    r_w, r_l = batch.of_answers(r_w, gate(r_l, params.gate_floor), params.logps)
    h_B = params.beta * (r_w - r_l)
    return [term(-logsigmoid(h_B), logit_B=h_B)]


OBJECTIVE = Objective("minor_dpo", minor_dpo, MinorDPOParams, gated=True, starts_at_ln2=lambda _: True)

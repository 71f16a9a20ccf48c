"""MRPO, Multi-Reference PO: a pairwise objective against the mixture of several references."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from stages.errors import ConfigError
from stages.update.objectives.base import BasedParams, Objective, Pairs, Term

if TYPE_CHECKING:
    from torch import Tensor

_NO_CONFIDENCE = 1e-6  # nats; where no reference prefers an answer, the first one alone counts


class MRPOParams(BasedParams):
    """Multi-Reference PO's parameters."""

    eta: float = Field(0.1, ge=0, lt=1, description="how far, as a share of its log-probs, others may leave the first")
    weights: Literal["as_published", "corrected"] = Field(
        "corrected",
        description="a reference's share by its own confidence, or, as the released code has it, by others'",
    )

    @field_validator("base")
    @classmethod
    def _one_reference(cls, name: str) -> str:
        from stages.update.objectives.registry import find_objective

        if find_objective(name, key="base").references != (1, 1):
            wanted = "a pairwise objective that takes one reference"
            raise ConfigError("base", wanted=wanted, got=name, fix="for example dpo")
        return name


def mrpo(batch: Pairs, params: MRPOParams) -> list[Term]:
    """The base's terms, each [B], against the references' mixture  (arXiv:2405.16388 and its released code).

    The mixture is ``log pi~`` of `mixture`, in nats a sequence.
    """
    assert batch.ref_chosen_RB.shape[0] >= 2, "mrpo takes at least two references"
    chosen_B, rejected_B = mixture(batch.ref_chosen_RB, batch.ref_rejected_RB, eta=params.eta, weights=params.weights)
    return params.base_loss()(replace(batch, ref_chosen_RB=chosen_B[None], ref_rejected_RB=rejected_B[None]))


def mixture(chosen_RB: Tensor, rejected_RB: Tensor, *, eta: float, weights: str) -> tuple[Tensor, Tensor]:
    """Log-probs of the chosen and the rejected answers under the references' harmonic mixture, each [B].

        log pi~(y) = -logsumexp_k(log a_k - log pi_k(y)),   a_k = |c_k| / (sum_j |c_j| + 1e-6),   a_0 = 1 - the others'
        c_k = log pi_k(y_w) - log pi_k(y_l), the confidence of reference k in the pair, in nats

    Reference 0 is the initial policy; the others' log-probs are first clipped to near it, the confidences are not.

    [ours] For two references the released code lets the confidence in one weigh the other; `as_published` keeps that,
    and for R references takes for a_k the mean confidence in all others, ``(1 - a_k) / (R - 1)``. More than two
    references are ours altogether.
    """
    log_a_RB = _shares(chosen_RB, rejected_RB, weights).log()
    chosen_RB, rejected_RB = _near_the_first(chosen_RB, rejected_RB, eta)
    return -(log_a_RB - chosen_RB).logsumexp(0), -(log_a_RB - rejected_RB).logsumexp(0)


def _shares(chosen_RB: Tensor, rejected_RB: Tensor, weights: str) -> Tensor:
    """Every reference's share in the mixture, [R, B], from log-probs that are not clipped."""
    import torch

    confidence_RB = (chosen_RB - rejected_RB).abs()
    # As 1 less the others', the first one's share could round to below 0, which has no logarithm.
    confidence_RB = torch.cat([confidence_RB[:1] + _NO_CONFIDENCE, confidence_RB[1:]])
    share_RB = confidence_RB / confidence_RB.sum(0)
    return share_RB if weights == "corrected" else (1 - share_RB) / (len(share_RB) - 1)


def _near_the_first(chosen_RB: Tensor, rejected_RB: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Log-probs of all references, no further from the first one's than a share of them.

    The share is `eta`, split over both answers: with b the mean of a reference's and the first one's log-prob, the
    chosen answer has ``eta * |b_w| / (|b_w| + |b_l|)`` of it and the rejected answer the rest.
    """
    import torch

    b_w, b_l = ((logps + logps[:1]).abs() / 2 for logps in (chosen_RB, rejected_RB))
    eta_w = eta * b_w / (b_w + b_l).clamp(min=torch.finfo(b_w.dtype).tiny)
    near = []
    for logps, eta_RB in ((chosen_RB, eta_w), (rejected_RB, eta - eta_w)):
        first_B = logps[:1]
        near.append(torch.minimum(torch.maximum(logps, first_B * (1 + eta_RB)), first_B * (1 - eta_RB)))
    return near[0], near[1]


OBJECTIVE = Objective("mrpo", mrpo, MRPOParams, references=(2, None))

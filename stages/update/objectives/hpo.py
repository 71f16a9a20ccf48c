"""HPO, Hybrid PO: a pairwise objective, and a pull towards answers with higher auxiliary rewards than expected."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from stages.update.objectives.base import BasedParams, Objective, Pairs, Term, term

if TYPE_CHECKING:
    from torch import Tensor

_MAX_EXPONENT = 5.0


class HPOParams(BasedParams):
    """Hybrid PO's parameters."""

    gamma: float = Field(0.5, ge=0, description="weight of the actor term")
    beta_rl: float = Field(0.2, gt=0, description="temperature of the advantage, in reward units")
    tau: float = Field(0.7, gt=0, lt=1, description="the expectile that the value head estimates; 0.5 is the mean")
    value_weight: float = Field(0.1, ge=0, description="weight of the value head's loss")
    value_learning_rate: float = Field(1e-4, gt=0, description="the value head's own, in AdamW")
    warmup_steps: int = Field(100, ge=0, description="optimizer steps of the run without the actor term")


def hpo(batch: Pairs, params: HPOParams) -> list[Term]:
    """Hybrid PO loss a pair: the base's terms, the actor's and the value head's, each [B]  (arXiv:2405.17956).

        base + gamma * mean over y_w, y_l of -exp(clip((R(y) - V(x)) / beta_rl, -5, 5)) * log policy(y) / |y|
             + value_weight * mean over y_w, y_l of abs(tau - 1[u < 0]) * u^2,   u = R(y) - V(x)

    R is the weighted sum of an answer's auxiliary rewards and V the value head's estimate of it from the prompt. V is a
    constant in the actor term, so that only the last term trains the head.

    [ours] The pairwise base in place of the paper's, the bounds of the exponent, and the head's own learning rate.
    """
    assert batch.aux_chosen_B is not None and batch.aux_rejected_B is not None, "hpo needs auxiliary rewards"
    assert batch.value_B is not None, "hpo needs a value head"
    terms = params.base_loss()(batch)
    logp_w, logp_l = batch.policy_logps("mean")
    u_w, u_l = batch.aux_chosen_B - batch.value_B, batch.aux_rejected_B - batch.value_B
    actor_B = (_actor(u_w, logp_w, params.beta_rl) + _actor(u_l, logp_l, params.beta_rl)) / 2
    value_B = (_expectile(u_w, params.tau) + _expectile(u_l, params.tau)) / 2
    return [*terms, term(params.gamma * actor_B), term(params.value_weight * value_B)]


def _actor(u_B: Tensor, logp_B: Tensor, beta_rl: float) -> Tensor:
    return -(u_B.detach() / beta_rl).clamp(-_MAX_EXPONENT, _MAX_EXPONENT).exp() * logp_B


def _expectile(u_B: Tensor, tau: float) -> Tensor:
    return (tau - (u_B < 0).to(u_B.dtype)).abs() * u_B**2


def at_step(params: HPOParams, step: int) -> HPOParams:
    """The value head learns alone first: without the actor term while it does."""
    return params.model_copy(update={"gamma": 0.0}) if step < params.warmup_steps else params


OBJECTIVE = Objective(
    "hpo", hpo, HPOParams, references=None, needs=frozenset({"auxiliary", "value"}), params_at=at_step
)

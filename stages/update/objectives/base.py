"""What an objective takes and gives: tensors of summed log-probs in, loss terms with their normaliser out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from stages.errors import ConfigError
from stages.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

Logps = Literal["sum", "mean"]
"""How the log-probs of an answer's tokens become one number."""

Need = Literal["auxiliary", "value", "stream"]
"""What an objective may need beside log-probs: auxiliary rewards, a value head, answers drawn from the reference.

One that needs a value head has the head's ``value_learning_rate`` among its parameters.
"""


@dataclass(frozen=True, slots=True)
class Pairs:
    """B pairs under the policy and R references; float32, log-probs in nats, summed over each answer's tokens.

    Attributes:
        chosen_B, rejected_B: log-probs under the policy.
        ref_chosen_RB, ref_rejected_RB: log-probs under each reference.
        chosen_len_B, rejected_len_B: answer tokens, the stop token included.
        aux_chosen_B, aux_rejected_B: weighted sum of the answers' auxiliary rewards, where the objective needs them.
        value_B: the value head's estimate of that sum for the prompt, in reward units, where it is needed.
        stream_logp_B, stream_len_B: an answer to the same prompt drawn from the reference, where it is needed; length 0
            where there is none.
    """

    chosen_B: Tensor
    rejected_B: Tensor
    ref_chosen_RB: Tensor
    ref_rejected_RB: Tensor
    chosen_len_B: Tensor
    rejected_len_B: Tensor
    aux_chosen_B: Tensor | None = None
    aux_rejected_B: Tensor | None = None
    value_B: Tensor | None = None
    stream_logp_B: Tensor | None = None
    stream_len_B: Tensor | None = None

    def log_ratios(self, logps: Logps = "sum") -> tuple[Tensor, Tensor]:
        """``r_w`` and ``r_l``, each [B], against the only reference; in nats a sequence, or (``mean``) a token."""
        assert self.ref_chosen_RB.shape[0] == 1, "an objective of one reference was given none or several"
        return self.of_answers(self.chosen_B - self.ref_chosen_RB[0], self.rejected_B - self.ref_rejected_RB[0], logps)

    def policy_logps(self, logps: Logps) -> tuple[Tensor, Tensor]:
        """The policy's log-probs of the chosen and the rejected answers, in nats a sequence, or (``mean``) a token."""
        return self.of_answers(self.chosen_B, self.rejected_B, logps)

    def of_answers(self, sum_w: Tensor, sum_l: Tensor, logps: Logps) -> tuple[Tensor, Tensor]:
        """Sums over the tokens of the chosen and the rejected answers as they are, or divided by their lengths."""
        if logps == "sum":
            return sum_w, sum_l
        return sum_w / self.chosen_len_B, sum_l / self.rejected_len_B


@dataclass(frozen=True, slots=True)
class Groups:
    """G groups of up to K answers to one prompt each; units as in `Pairs`.

    Attributes:
        logp_GK, ref_logp_RGK: log-probs under the policy, and under each reference; 0 where there is no answer.
        len_GK: answer tokens.
        rewards_GK: rewards; 0 where there is no answer.
        mask_GK: True for answers, False for the padding of smaller groups.
    """

    logp_GK: Tensor
    ref_logp_RGK: Tensor
    len_GK: Tensor
    rewards_GK: Tensor
    mask_GK: Tensor


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a loss: a value and a weight a row, and what the sum is divided by over the *global* batch.

    Attributes:
        loss_B: the loss a row (a pair or a group).
        weight_B: what each row's loss is multiplied by.
        normaliser: ``pairs``: rows of the global batch; ``tokens``: tokens of their chosen answers.
        logit_B: the number by whose sign the objective takes the chosen answer for the better one, where it has one.
    """

    loss_B: Tensor
    weight_B: Tensor
    normaliser: Literal["pairs", "tokens"]
    logit_B: Tensor | None = None


def term(loss_B: Tensor, *, normaliser: Literal["pairs", "tokens"] = "pairs", logit_B: Tensor | None = None) -> Term:
    """A term whose rows all count alike."""
    import torch

    return Term(loss_B, torch.ones_like(loss_B), normaliser, logit_B)


class LogRatioParams(Settings):
    """Parameters of an objective of the log-ratios' difference."""

    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    logps: Logps = Field(
        "sum", description="log-ratios in nats a sequence, or their mean over the tokens; beta does not carry over"
    )


class BasedParams(Settings):
    """Parameters of an objective that builds on a pairwise one."""

    base: str = Field("dpo", description="the pairwise objective under this one")
    base_params: dict[str, Any] = Field({}, description="its parameters")

    @field_validator("base")
    @classmethod
    def _pairwise(cls, name: str) -> str:
        from stages.update.objectives.registry import find_objective

        found = find_objective(name, key="base")
        if found.rows != "pairs" or issubclass(found.params, BasedParams) or found.needs:
            wanted = "a pairwise objective that neither builds on another nor needs more than log-probs"
            raise ConfigError("base", wanted=wanted, got=name, fix="for example dpo")
        return name

    @model_validator(mode="after")
    def _known_base_params(self) -> BasedParams:
        self.base_loss()
        return self

    def base_loss(self) -> Loss:
        """The pairwise objective under this one, with its parameters."""
        from stages.update.objectives.registry import find_loss

        return find_loss(self.base, self.base_params, key="base_params")


@dataclass(frozen=True, slots=True)
class Objective:
    """A registered objective.

    Attributes:
        name: the word in ``update.loss_type``.
        loss: ``loss(batch, params) -> terms``, a pure function.
        params: the class that checks ``beta`` and ``loss_params``.
        rows: what a row of its batch is: `Pairs` or `Groups`.
        references: the least and the most references whose log-probs it takes (most None: any number), or None where
            its base decides.
        needs: what it needs beside log-probs.
        gated: whether it has a kink at the rejected answer's log-ratio 0, and so the parameter ``gate_floor``.
        starts_at_ln2: whether, with such parameters, the loss is ln 2 where the policy is the reference.
        params_at: ``params_at(params, step) -> params``, its parameters at an optimizer step, where they change. Steps
            are counted from 0: over the run where it needs a value head, else over the round.
    """

    name: str
    loss: Callable[[Any, Any], list[Term]]
    params: type[Settings]
    rows: Literal["pairs", "groups"] = "pairs"
    references: tuple[int, int | None] | None = (1, 1)
    needs: frozenset[Need] = frozenset()
    gated: bool = False
    starts_at_ln2: Callable[[Any], bool] = lambda _: False
    params_at: Callable[[Any, int], Any] | None = None

    def __post_init__(self) -> None:
        if "value" in self.needs and "value_learning_rate" not in self.params.model_fields:
            raise ConfigError(
                f"objective {self.name}",
                wanted="the value head's value_learning_rate among its parameters, since it needs one",
                got=f"{self.params.__name__} without it",
                fix="add the field, for example value_learning_rate: float = 1e-4",
            )


@dataclass(frozen=True, slots=True)
class Loss:
    """An objective with its parameters and its weight in the sum."""

    objective: Objective
    params: Any
    weight: float = 1.0

    def __call__(self, batch: Pairs | Groups) -> list[Term]:
        return [replace(part, weight_B=self.weight * part.weight_B) for part in self.objective.loss(batch, self.params)]

    def at(self, step: int) -> Loss:
        """Itself with the parameters that it has at an optimizer step."""
        change = self.objective.params_at
        return self if change is None else replace(self, params=change(self.params, step))

    @property
    def base(self) -> Loss | None:
        """The pairwise objective under this one, where it builds on one."""
        return self.params.base_loss() if isinstance(self.params, BasedParams) else None

    @property
    def beta(self) -> float | None:
        """The strength of the pull towards the reference, where the objective or its base has one."""
        return self.base.beta if self.base is not None else getattr(self.params, "beta", None)

    @property
    def gated(self) -> bool:
        return self.objective.gated or (self.base is not None and self.base.gated)

    @property
    def references(self) -> tuple[int, int | None]:
        """The least and the most references whose log-probs it takes."""
        found = self.objective.references or (self.base.references if self.base is not None else None)
        assert found is not None, "an objective without references of its own has a base"
        return found

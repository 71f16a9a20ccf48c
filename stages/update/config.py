"""The update's settings, under ``update`` in a config."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from stages.errors import ConfigError
from stages.settings import Settings, where
from stages.update.objectives.registry import OBJECTIVES

FLOAT32_GATE_FLOOR = 1e-3  # nats a sequence; layouts of equal float32 weights differ by up to 4e-5


class UpdateConfig(Settings):
    """How pairs become a better policy."""

    loss_type: str = "minor_dpo"
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    loss_params: dict[str, float] = Field({}, description="the objective's further parameters, by name")
    gate_floor: float | None = Field(
        None, ge=0, description="nats a sequence; null: 1e-3 in float32, measured in bfloat16"
    )
    learning_rate: float = Field(5e-7, gt=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the round's steps over which the rate rises")
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    global_batch_size: int = Field(64, ge=1, description="pairs behind one optimizer step over all workers")
    num_train_epochs: int = Field(1, ge=1)
    micro_batch_size: int = where(8, ge=1, description="pairs a forward pass, a worker")
    workers: int = where(1, ge=1, description="Ray Train workers")
    zero_stage: Literal[0, 1, 2, 3] = where(
        2, description="DeepSpeed ZeRO stage: workers share out nothing, optimizer state, gradients too, weights too"
    )
    gradient_checkpointing: bool = where(
        False, description="compute activations again in the backward pass: less memory, about a third more time"
    )
    device: Literal["auto", "cpu", "cuda"] = where("auto", description="auto: a GPU a worker, where there are GPUs")

    @model_validator(mode="after")
    def _known_objective(self) -> UpdateConfig:
        if self.loss_type not in OBJECTIVES:
            near = difflib.get_close_matches(self.loss_type, OBJECTIVES, n=1) or list(OBJECTIVES)[:1]
            raise ConfigError(
                "loss_type",
                wanted=f"one of {', '.join(OBJECTIVES)}",
                got=repr(self.loss_type),
                fix=f"did you mean {near[0]}?",
            )
        try:
            self.objective_params(gate_floor=0.0)
        except ValidationError as error:
            first = error.errors()[0]
            known = sorted(set(OBJECTIVES[self.loss_type].params.model_fields) - {"beta", "gate_floor"})
            raise ConfigError(
                f"loss_params.{'.'.join(map(str, first['loc']))}",
                wanted=f"a parameter of {self.loss_type} ({', '.join(known) or 'it has none'}), within its range",
                got=f"{first['input']!r}: {first['msg']}",
                fix="change or remove it",
            ) from error
        return self

    def objective_params(self, *, gate_floor: float) -> Any:
        """The objective's own parameter record; `gate_floor` enters where the objective has a gate."""
        objective = OBJECTIVES[self.loss_type]
        gated = {"gate_floor": gate_floor} if objective.gated else {}
        return objective.params.model_validate({"beta": self.beta} | self.loss_params | gated)

"""The update's settings, under ``update`` in a config."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from stages.errors import ConfigError
from stages.settings import Settings, where
from stages.update.objectives.base import Loss, Need
from stages.update.objectives.registry import find_loss

CHUNK_BYTES = 32 * 2**20  # of logits that are computed at a time
KEPT_BYTES = 128 * 2**20  # of float32 probabilities that one forward keeps for its backward pass
FLOAT32_GATE_FLOOR = 1e-3  # nats a sequence; layouts of equal float32 weights differ by up to 4e-5


class LoraConfig(Settings):
    """Adapters of low rank in the place of all weights; without dropout, as every update here."""

    r: int = Field(16, ge=1, description="rank of the adapters")
    alpha: float = Field(32.0, gt=0, description="their product counts alpha / r times")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        min_length=1,
        description="which linear maps get one: all but the output embedding, or a list of names such as q_proj",
    )


class GuardConfig(Settings):
    """Which optimizer steps are skipped, besides those whose loss or gradient is not finite; null is no limit."""

    max_loss_jump: float | None = Field(
        20.0,
        gt=0,
        description="deviations by which a step's loss may stand above the median of the last 32: 1.48 times their "
        "median absolute deviation, at least a tenth of the median and a twentieth of the first losses",
    )
    max_kl: float | None = Field(
        200.0, gt=0, description="nats an answer by which the policy may be from its reference, on the step's answers"
    )
    max_skipped: int = Field(
        5, ge=1, description="steps skipped one after another that end the round without a new policy"
    )


class UpdateConfig(Settings):
    """How pairs become a better policy."""

    loss_type: str | tuple[str, ...] = Field(
        "minor_dpo", min_length=1, description="an objective, or a list of them, whose weighted sum is the loss"
    )
    loss_weights: tuple[float, ...] | None = Field(
        None, description="one for each of a list's objectives; null: 1 each"
    )
    beta: float | None = Field(
        None, gt=0, description="strength of the pull towards the reference; null: the objective's own default"
    )
    loss_params: dict[str, Any] = Field(
        {}, description="further parameters, by name; of several objectives, by objective and name"
    )
    gate_floor: float | None = Field(
        None, ge=0, description="of MinorDPO's inner gate, nats a sequence; null: 1e-3 in float32, measured in bfloat16"
    )
    reference_logps: Literal["trainer", "engine"] = Field(
        "trainer",
        description="whose log-probs count under a reference that sampled the answers: the trainer's, by a pass of its "
        "own, or those that the engine stored, once some were compared with the trainer's",
    )
    learning_rate: float = Field(5e-7, gt=0, description="AdamW's, at its highest")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        "linear",
        description="how the rate falls after the warm-up, to 0 after the round's last step; constant: not at all",
    )
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the round's steps over which the rate rises")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradients' mean")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of the squared gradients' mean")
    keep_optimizer: bool = Field(
        False, description="go on with AdamW's moments of the round before, where it kept them too; false: new ones"
    )
    lora: LoraConfig | None = Field(
        None,
        description="train adapters, new ones each round, and publish the policy with them merged; null: all weights",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    guard: GuardConfig = GuardConfig()
    global_batch_size: int = Field(64, ge=1, description="pairs behind one optimizer step over all workers")
    num_train_epochs: int = Field(1, ge=1, description="times that a round goes through its pairs")
    micro_batch_size: int = where(8, ge=1, description="pairs a forward pass, a worker")
    max_tokens_per_batch: int = where(
        4096, ge=1, description="tokens a forward pass, a worker, where it holds more than one pair"
    )
    skip_inactive: bool = where(
        True, description="leave out the backward of rejected answers that get no gradient, where that saves time"
    )
    workers: int = where(1, ge=1, description="Ray Train workers")
    zero_stage: Literal[0, 1, 2, 3] = where(
        2, description="DeepSpeed ZeRO stage: workers share out nothing, optimizer state, gradients too, weights too"
    )
    offload_optimizer: bool = where(
        False,
        description="keep AdamW's moments and the float32 masters in the machine's memory, and step there: room on a "
        "GPU; builds DeepSpeed's CPU Adam on first use, a minute or two. In bfloat16 forwards of a step then add up in "
        "bfloat16",
    )
    gradient_checkpointing: bool = where(
        False, description="compute activations again in the backward pass: less memory, about a third more time"
    )
    num_threads: int | None = where(
        None, ge=1, description="a worker's CPU threads where it has no GPU; null: its share of all cores"
    )
    checkpoint_minutes: float | None = where(
        10.0, gt=0, description="time after which an update that goes on is written down, to resume there; null: never"
    )
    checkpoint_steps: int | None = where(
        None, ge=1, description="optimizer steps after which it is written down too; null: by time alone"
    )
    device: Literal["auto", "cpu", "cuda"] = where("auto", description="auto: a GPU a worker, where there are GPUs")

    @model_validator(mode="after")
    def _known_objectives(self) -> UpdateConfig:
        names, weights = self.loss_types, self.loss_weights
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError("loss_type", wanted="every objective once", got=f"{twice} twice", fix="use loss_weights")
        if weights is not None and len(weights) != len(names):
            wanted = f"{len(names)} numbers, one for each of {', '.join(names)}"
            raise ConfigError(
                "loss_weights", wanted=wanted, got=str(len(weights)), fix=f"for example {[1.0] * len(names)}"
            )
        losses = self.losses()
        if len({loss.objective.rows for loss in losses}) > 1:
            raise ConfigError(
                "loss_type",
                wanted="objectives of pairs, or objectives of groups",
                got=", ".join(f"{loss.objective.name} of {loss.objective.rows}" for loss in losses),
                fix="train on one kind in a round; rounds may differ",
            )
        least, most = self.num_references
        if most is not None and least > most:
            raise ConfigError(
                "loss_type",
                wanted="objectives that take the same number of references",
                got=", ".join(names),
                fix="put the one of a single reference under the other: loss_params.base",
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ConfigError(
                "offload_optimizer",
                wanted="false with zero_stage 0, under which no rank parts weights and optimizer",
                got="true",
                fix="--set update.zero_stage=2, or --set update.offload_optimizer=false",
            )
        if self.lora is not None and self.keep_optimizer:
            raise ConfigError(
                "keep_optimizer",
                wanted="false with lora, since each round trains new adapters",
                got="true",
                fix="--set update.keep_optimizer=false, or --set update.lora=null",
            )
        if self.beta is not None and all(loss.beta is None for loss in losses):
            wanted = f"null, since {', '.join(names)} has no beta"
            raise ConfigError("beta", wanted=wanted, got=str(self.beta), fix="leave it out")
        return self

    @property
    def loss_types(self) -> tuple[str, ...]:
        """The objectives' names."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type

    def losses(self, *, gate_floor: float | None = None) -> list[Loss]:
        """The objectives with their parameters and weights; `gate_floor` enters those that have a gate.

        Raises:
            ConfigError: for an unknown objective or parameter.
        """
        names = self.loss_types
        given = self.loss_params if len(names) > 1 else {names[0]: self.loss_params}
        for name, params in given.items():
            if name not in names or not isinstance(params, dict):
                raise ConfigError(
                    f"loss_params.{name}",
                    wanted=f"parameters by objective, under {' and '.join(names)}",
                    got=repr(params),
                    fix=f"for example loss_params: {{{names[0]}: {{…}}}}",
                )
        return [
            find_loss(
                name,
                given.get(name, {}),
                beta=self.beta,
                gate_floor=gate_floor,
                weight=weight,
                key="loss_params" if len(names) == 1 else f"loss_params.{name}",
            )
            for name, weight in zip(names, self.loss_weights or [1.0] * len(names), strict=True)
        ]

    @property
    def rows(self) -> Literal["pairs", "groups"]:
        """What it trains on."""
        return self.losses()[0].objective.rows

    @property
    def needs(self) -> frozenset[Need]:
        """What the objectives need beside log-probs."""
        return frozenset[Need]().union(*(loss.objective.needs for loss in self.losses()))

    @property
    def num_references(self) -> tuple[int, int | None]:
        """The least and the most references whose log-probs the objectives take; None: any number.

        An objective that takes none goes with any number that the others take.
        """
        bounds = [loss.references for loss in self.losses() if loss.references != (0, 0)]
        most = [high for _, high in bounds if high is not None]
        return max((low for low, _ in bounds), default=0), min(most, default=None) if bounds else 0

    @property
    def told(self) -> str:
        """The objectives in words."""
        weights = self.loss_weights or (1.0,) * len(self.loss_types)
        parts = zip(self.loss_types, weights, strict=True)
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in parts)

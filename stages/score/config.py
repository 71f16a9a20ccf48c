"""The settings of scoring (``score``) and pairing (``pair``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.errors import ConfigError
from stages.settings import Settings, where

_TAKEN = ("conversation", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message")


def check_template_kwargs(options: Mapping[str, Any]) -> None:
    """Refuse what is not a chat template's to decide.

    Raises:
        ConfigError: naming it.
    """
    taken = [name for name in options if name in _TAKEN or name.startswith("return_")]
    if taken:
        raise ConfigError(
            "chat_template_kwargs",
            wanted="variables of the chat template, such as enable_thinking",
            got=repr(taken[0]),
            fix="leave it out: how a chat is rendered and tokenised is fixed",
        )


class _Reward(Settings):
    name: str | None = Field(None, description="in tables and reports; null: from the path or the function")
    weight: float = Field(
        1.0, description="of this reward in the sum of the main ones, which makes pairs, or of the auxiliary ones"
    )
    role: Literal["main", "auxiliary", "holdout"] = Field(
        "main",
        description="main: makes the pairs; auxiliary: beside the pairs, for objectives that use it; "
        "holdout: reported, never trained on",
    )
    scale: Literal["none", "zscore"] = Field(
        "none", description="zscore: less its mean over the round's answers, by its standard deviation, then weighted"
    )

    @model_validator(mode="after")
    def _only_summed_ones_are_weighted(self) -> Self:
        if self.role != "main" and self.scale != "none":
            self._refuse("scale", "none", "only the main rewards are standardised")
        if self.role == "holdout" and self.weight != 1.0:
            self._refuse("weight", "1.0", "a holdout reward enters no sum")
        return self

    def _refuse(self, key: str, neutral: str, why: str) -> None:
        raise ConfigError(
            key,
            wanted=f"{neutral} for a reward of role {self.role}: {why}",
            got=str(getattr(self, key)),
            fix=f"leave {key} out, or make the role main",
        )


class ModelReward(_Reward):
    """A Hugging Face sequence classifier with one score."""

    type: Literal["model"]
    path: str = Field(description="a folder, a hub name, or embedded:reverse-judge")
    pad_token: str | None = Field(None, description="where the tokenizer names none")
    chat_template_kwargs: dict[str, Any] = Field({}, description="variables of this model's own chat template")
    text_pair: bool = Field(
        False, description="prompt and answer as two segments, as encoders such as DeBERTa learn it"
    )
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_tokens: int = where(8192, ge=1, description="padded tokens a forward pass, at most")

    @model_validator(mode="after")
    def _known_names(self) -> ModelReward:
        check_template_kwargs(self.chat_template_kwargs)
        return self


class FunctionReward(_Reward):
    """A Python function of TRL's shape: ``f(prompts, completions, **columns) -> list[float]``."""

    type: Literal["function"]
    target: str = Field(pattern=r"^[\w.]+:\w+$", description="module:function")


RewardConfig = Annotated[ModelReward | FunctionReward, Field(discriminator="type")]


class ScoreConfig(Settings):
    """Which rewards an answer gets."""

    rewards: tuple[RewardConfig, ...] = Field(min_length=1)
    max_error_share: float = Field(0.01, ge=0, le=1, description="more answers without a finite reward stop the run")


def reward_names(score: ScoreConfig | None) -> list[str]:
    """What each reward is called in tables and reports: its name, else its function, else its folder's last part."""
    return [
        reward.name
        or (
            reward.target.rpartition(":")[2] if reward.type == "function" else reward.path.rstrip("/").split("/")[-1]
        ).removeprefix("embedded:")
        for reward in (score.rewards if score else ())
    ]


class PairConfig(Settings):
    """How scored answers become pairs."""

    strategy: Literal["best_worst"] = Field("best_worst", description="highest against lowest reward")
    min_margin: float = Field(0.0, ge=0, description="in units of the reward; a smaller gap makes no pair")
    truncated: Literal["drop", "keep"] = Field("drop", description="answers that ended at max_new_tokens")

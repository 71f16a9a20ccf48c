"""The sections of a config that belong to no stage: the run, the policy, what is read, evaluated, let through."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.addresses import SCHEMES, is_address
from stages.errors import ConfigError
from stages.score.config import check_template_kwargs
from stages.settings import Settings, where

COLUMN_ROLES = ("prompt", "messages", "answer")
PAIR_ROLES = ("prompt", "messages", "chosen", "rejected", "score_chosen", "score_rejected")


NAME = r"^[A-Za-z0-9][\w.-]*$"
"""What a run may be called."""


class RunSection(Settings):
    """Name, place and seed of a run."""

    name: str = Field(
        pattern=NAME,
        description="of the run's folder; two files of one name would share a run",
        json_schema_extra={"filled_in": "the config file's name, without its ending"},
    )
    dir: str = where(
        "runs", min_length=1, description="where run folders lie: a folder, or an address such as s3://bucket/runs"
    )
    seed: int = Field(0, ge=0, description="of every draw: which prompts, which answers, in which order")
    ignore_auto_map: bool = where(
        False,
        description="load a model whose config names code of its own (auto_map) by transformers' own class; that code "
        "is never run. False: such a model is refused",
    )
    modules: Path | None = where(
        None,
        description="where your own modules (rewards, objectives) and files of rubrics lie; null: beside the config. "
        "A run's own config.yaml names the folder, so that it can be run and forked from there",
    )
    keep: int = where(
        2, ge=1, description="rounds whose weights and optimizer states `prefloop clean` leaves, beside the best's"
    )
    tensorboard: bool = where(
        True, description="curves of metrics and evaluations for TensorBoard, in the run's folder"
    )
    trackers: tuple[Literal["wandb", "mlflow"], ...] = where(
        (), description="who else gets these points; each is an extra: .venv/bin/pip install -e '.[wandb]'"
    )

    @model_validator(mode="after")
    def _known_scheme(self) -> RunSection:
        if is_address(self.dir) and self.dir.partition("://")[0] not in SCHEMES:
            raise ConfigError(
                "dir",
                wanted=f"a folder, or an address that begins with {', '.join(f'{known}://' for known in SCHEMES)}",
                got=self.dir,
                fix="for example s3://bucket/runs",
            )
        return self


class PolicyConfig(Settings):
    """The policy to align."""

    path: str = Field(min_length=1, description="a Hugging Face folder, a hub name, or embedded:reverse")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="in which it is sampled, trained and published; in bfloat16 with a float32 master"
    )
    pad_token: str | None = Field(None, description="where the tokenizer names none")
    shapes: dict[str, Any] | None = where(
        None,
        description="what its config.json says, for `prefloop plan` where the model is not here: model_type, "
        "hidden_size, num_hidden_layers and so on",
    )


class PromptsConfig(Settings):
    """What the policy is asked in training."""

    path: str = Field(
        description="a JSONL, JSON, Parquet or Arrow file, a folder saved by datasets or with data files, a dataset of "
        "the hub (org/name), or embedded:…"
    )
    config: str | None = Field(None, description="of a dataset with several")
    split: str | None = Field(None, description="of a dataset with several")
    per_round: int = Field(512, ge=1, description="prompts a round")
    shard_size: int = Field(64, ge=1, description="prompts behind one unit of work")
    columns: dict[str, str] = Field({}, description="role (prompt, messages, answer) to column, where names differ")
    to_chat: bool = Field(False, description="a plain text becomes a chat of one user message")
    system: str | None = Field(None, description="system message put before a chat that has none")
    chat_template_kwargs: dict[str, Any] = Field({}, description="variables of the chat template: {enable_thinking: …}")

    @model_validator(mode="after")
    def _known_names(self) -> PromptsConfig:
        check_template_kwargs(self.chat_template_kwargs)
        return _check_roles(self)


class PairsConfig(Settings):
    """Ready pairs to train on, in the place of prompts, sampling and scoring."""

    path: str = Field(description="a file or folder as for prompts.path, with chosen and rejected answers")
    config: str | None = Field(None, description="as prompts.config")
    split: str | None = Field(None, description="as prompts.split")
    columns: dict[str, str] = Field(
        {},
        description="role (prompt, messages, chosen, rejected, score_chosen, score_rejected) to column, where names "
        "differ",
    )
    max_length: int | None = Field(None, ge=2, description="tokens of prompt and answer; null: the model's context")
    system: str | None = Field(None, description="as prompts.system")
    chat_template_kwargs: dict[str, Any] = Field({}, description="as prompts.chat_template_kwargs")
    to_chat: bool = Field(False, description="as prompts.to_chat")

    @model_validator(mode="after")
    def _known_roles(self) -> PairsConfig:
        return _check_roles(self, PAIR_ROLES)


class TextsConfig(Settings):
    """Texts whose likelihood is watched: a policy that games its reward forgets how real text reads."""

    path: str = Field(description="as prompts.path")
    config: str | None = Field(None, description="as prompts.config")
    split: str | None = Field(None, description="as prompts.split")
    column: str = Field("text", description="of the texts")
    num_texts: int = Field(128, ge=1, description="drawn by the run's seed")
    max_length: int | None = Field(None, ge=2, description="tokens a text is cut to; null: the model's context")


class EvaluateConfig(Settings):
    """What the policy is asked to see whether it got better."""

    path: str | None = Field(None, description="as prompts.path; null: held out from the training prompts")
    config: str | None = Field(None, description="as prompts.config")
    split: str | None = Field(None, description="as prompts.split")
    holdout: float | None = Field(None, gt=0, lt=1, description="share of the training prompts that is held out")
    num_prompts: int = Field(512, ge=1, description="held-out prompts that are asked, at most")
    columns: dict[str, str] = Field({}, description="as prompts.columns, which holds where this is empty")
    kl: bool = Field(True, description="estimate the divergence from the first policy, on the same answers")
    texts: TextsConfig | None = None

    @model_validator(mode="after")
    def _one_source(self) -> EvaluateConfig:
        if (self.path is None) == (self.holdout is None):
            got = "neither" if self.path is None else "both"
            raise ConfigError("path", wanted="either path or holdout", got=got, fix="for example holdout: 0.1 alone")
        if self.path is None and (self.config or self.split):
            got = f"{self.config or self.split!r} with holdout"
            raise ConfigError("path", wanted="a path, to take config and split of", got=got, fix="see prompts.split")
        return _check_roles(self)


def _check_roles(section: Any, roles: Sequence[str] = COLUMN_ROLES) -> Any:
    unknown = [role for role in section.columns if role not in roles]
    if unknown:
        raise ConfigError(
            "columns",
            wanted=f"roles among {', '.join(roles)}",
            got=repr(unknown[0]),
            fix="write role: column, for example {prompt: question}",
        )
    return section


class StopConfig(Settings):
    """When to stop before the last round; looked at after each round, on the held-out prompts' figures."""

    patience: int | None = Field(None, ge=1, description="rounds without a new best mean reward")
    max_kl: float | None = Field(None, gt=0, description="nats an answer, from the first policy (evaluate.kl)")
    max_hours: float | None = Field(None, gt=0, description="hours of the settled rounds, of each its last attempt")


class GateConfig(Settings):
    """When a round's result takes the place of the policy before it: it must keep every limit; null is no limit.

    All figures are of held-out prompts; differences are paired by prompt.
    """

    max_kl: float | None = Field(20.0, gt=0, description="nats an answer, from the first policy (evaluate.kl)")
    max_reward_drop: float | None = Field(
        2.0, gt=0, description="standard errors by which the reward may fall, below the first policy or the one before"
    )
    max_holdout_drop: float | None = Field(
        2.0, gt=0, description="as max_reward_drop, of each reward of role holdout, which training never sees"
    )
    min_win_rate: float | None = Field(
        0.5, gt=0, lt=1, description="against the policy before; only a 95% interval that lies below it all fails"
    )
    max_length_ratio: float | None = Field(2.0, gt=1, description="mean tokens an answer, over the first policy's")
    max_repetition: float | None = Field(
        0.2, gt=0, lt=1, description="share of an answer's 4-grams of tokens said before, above the first policy's"
    )
    max_texts_nll: float | None = Field(
        0.25, gt=0, description="nats a token by which evaluate.texts may become less likely than to the first policy"
    )
    on_fail: Literal["hold", "roll_back", "stop"] = Field(
        "hold",
        description="hold: the next round starts again from the policy before; roll_back: from the best so far; stop: "
        "as hold, and no further round",
    )

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        named = {name: getattr(self, name) for name in type(self).model_fields if name != "on_fail"}
        return {name: limit for name, limit in named.items() if limit is not None}

"""The config of a run: a checked, frozen record.

Every section's class stands beside the stage that it configures; this file puts them together, and refuses settings
that do not go together. `pipeline.config_file` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.config import ClusterConfig
from stages.errors import ConfigError
from stages.sample.config import SampleConfig
from stages.score.config import PairConfig, RewardConfig, ScoreConfig, check_template_kwargs
from stages.settings import Settings, where
from stages.update.config import UpdateConfig

COLUMN_ROLES = ("prompt", "messages", "answer")
PAIR_ROLES = ("prompt", "messages", "chosen", "rejected", "score_chosen", "score_rejected")


MAX_ROUNDS = 100_000
NAME = r"^[A-Za-z0-9][\w.-]*$"
"""What a run may be called."""


class RunSection(Settings):
    """Name, place and seed of a run."""

    name: str = Field(pattern=NAME, description="of the run's folder")
    dir: Path = where(Path("runs"), description="where run folders lie")
    seed: int = Field(0, ge=0)
    tensorboard: bool = where(
        True, description="curves of metrics and evaluations for TensorBoard, in the run's folder"
    )


class PolicyConfig(Settings):
    """The policy to align."""

    path: str = Field(min_length=1, description="a Hugging Face folder, a hub name, or embedded:reverse")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    pad_token: str | None = Field(None, description="where the tokenizer names none")


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
    columns: dict[str, str] = Field({}, description="role (see pipeline.pair_files) to column, where names differ")
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
    num_prompts: int = Field(512, ge=1)
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


ROUND_SECTIONS = ("reference", "prompts", "pairs", "sample", "score", "pair", "update")
"""What an entry of a list of rounds may override."""


class Config(Settings):
    """A whole run."""

    run: RunSection
    policy: PolicyConfig
    reference: Literal["round_start", "initial", "previous"] = "round_start"
    rounds: int | tuple[dict[str, Any], ...] = Field(
        3, description="how many, or a list whose entries override sections for their round"
    )
    prompts: PromptsConfig | None = None
    pairs: PairsConfig | None = None
    sample: SampleConfig = SampleConfig()
    score: ScoreConfig | None = None
    pair: PairConfig = PairConfig()
    update: UpdateConfig = UpdateConfig()
    evaluate: EvaluateConfig | None = None
    stop_when: StopConfig = Field(default=StopConfig(), json_schema_extra={"where": True})
    cluster: ClusterConfig = Field(default=ClusterConfig(), json_schema_extra={"where": True})

    @field_validator("rounds", mode="before")
    @classmethod
    def _number_or_list(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ROUNDS:
            return value
        if isinstance(value, (list, tuple)) and all(entry is None or isinstance(entry, dict) for entry in value):
            return tuple(entry or {} for entry in value)
        raise ConfigError(
            "rounds",
            wanted="a number of rounds, or a list of overrides, one entry a round",
            got=repr(value),
            fix="for example rounds: 3, or rounds: [{}, {update: {learning_rate: 1.0e-7}}]",
        )

    @model_validator(mode="after")
    def _across(self) -> Config:
        check_across(self)
        return self

    def folder(self) -> Path:
        """The run's folder, as an absolute path."""
        return (self.run.dir / self.run.name).absolute()

    @property
    def num_rounds(self) -> int:
        """How many rounds the config asks for."""
        return self.rounds if isinstance(self.rounds, int) else len(self.rounds)

    def every_round(self) -> list[Config]:
        """The configs that hold in some round: of each entry where `rounds` is a list, else this one."""
        if isinstance(self.rounds, int) or not self.rounds:
            return [self]
        return [self.for_round(number) for number in range(1, len(self.rounds) + 1)]

    @property
    def rewards(self) -> tuple[RewardConfig, ...]:
        """The rewards, if there are any."""
        return self.score.rewards if self.score is not None else ()

    @property
    def num_engines(self) -> int:
        """The engines that are needed: none where pairs are ready and nothing is evaluated."""
        return self.sample.engines if self.pairs is None or self.evaluate is not None else 0

    def for_round(self, number: int) -> Config:
        """The config of one round: its entry's overrides applied, where `rounds` is a list.

        Rounds beyond the list go on with its last entry; round 0, the evaluation before the first, has none.
        """
        if isinstance(self.rounds, int) or not self.rounds or number < 1:
            return self
        values = merged(self.model_dump(exclude_unset=True), entry_of(self.rounds, number))
        return Config.model_validate(values | {"rounds": 1})


def entry_of(rounds: Any, number: int) -> dict[str, Any]:
    """What a round overrides: its entry where `rounds` is a list, whose last one holds beyond it too."""
    if not isinstance(rounds, (list, tuple)) or not rounds or number < 1:
        return {}
    return rounds[min(number, len(rounds)) - 1] or {}


def merged(under: Any, over: Any) -> Any:
    """`over` laid upon `under`, sections field by field."""
    if isinstance(under, dict) and isinstance(over, dict):
        return under | {key: merged(under.get(key), value) for key, value in over.items()}
    return over


def reward_names(score: ScoreConfig | None) -> list[str]:
    """What each reward is called in tables and reports: its name, else its function, else its folder's last part."""
    return [
        reward.name
        or (
            reward.target.rpartition(":")[2] if reward.type == "function" else reward.path.rstrip("/").split("/")[-1]
        ).removeprefix("embedded:")
        for reward in (score.rewards if score else ())
    ]


def costs(score: ScoreConfig | None) -> frozenset[str]:
    """The names of the rewards that count the other way round: their weight is below 0."""
    return frozenset(
        name
        for name, reward in zip(reward_names(score), score.rewards if score else (), strict=True)
        if reward.weight < 0
    )


def check_across(config: Config) -> None:
    """Refuse what single sections cannot see.

    Raises:
        ConfigError: with the first two settings that do not go together.
    """
    if config.pairs is None:
        _check_on_policy(config)
    else:
        _check_offline(config)
    if config.sample.max_model_len is not None and config.sample.max_new_tokens >= config.sample.max_model_len:
        raise ConfigError(
            "sample.max_new_tokens",
            wanted=f"less than sample.max_model_len {config.sample.max_model_len}, so that a prompt fits beside it",
            got=str(config.sample.max_new_tokens),
            fix=f"at most {config.sample.max_model_len - 1}",
        )
    if config.score is not None:
        _check_rewards(config.score)
    stop, evaluate = config.stop_when, config.evaluate
    if (stop.patience or stop.max_kl) and (evaluate is None or (stop.max_kl and not evaluate.kl)):
        key = "patience" if stop.patience else "max_kl"
        raise ConfigError(
            f"stop_when.{key}",
            wanted="an evaluation to look at" + (" with kl: true" if stop.max_kl and evaluate else ""),
            got="none" if evaluate is None else "evaluate.kl false",
            fix="add evaluate: {holdout: 0.1}" if evaluate is None else "--set evaluate.kl=true",
        )


def _check_on_policy(config: Config) -> None:
    for key in ("prompts", "score"):
        if getattr(config, key) is None:
            raise ConfigError(
                key,
                wanted="prompts and score, or pairs to train on as they are",
                got=f"no {key}",
                fix="prompts: {path: prompts.jsonl}" if key == "prompts" else "score: {rewards: [...]}",
            )
    if config.sample.num_generations < 2:
        raise ConfigError(
            "sample.num_generations", wanted="2 or more answers a prompt, to choose from", got="1", fix="8 is usual"
        )
    config.pair.refuse_idle(config.sample.num_generations)


def _check_offline(config: Config) -> None:
    if config.prompts is not None:
        raise ConfigError(
            "pairs", wanted="pairs, or prompts to sample pairs from", got="both", fix="--set prompts=null"
        )
    if isinstance(config.rounds, int) and config.rounds > 1:
        raise ConfigError(
            "rounds",
            wanted="1 with ready pairs: nothing new is sampled between rounds",
            got=str(config.rounds),
            fix="--set rounds=1, and update.num_train_epochs for more passes",
        )
    if config.evaluate is not None and (config.evaluate.path is None or config.score is None):
        raise ConfigError(
            "evaluate",
            wanted="evaluate.path and score.rewards, to sample and judge answers to held-out prompts",
            got="evaluate.holdout, but no prompts" if config.evaluate.path is None else "no score",
            fix="--set evaluate=null, or name both",
        )


def _check_rewards(score: ScoreConfig) -> None:
    names = reward_names(score)
    if not any(reward.role == "main" for reward in score.rewards):
        raise ConfigError(
            "score.rewards",
            wanted="at least one reward of role main, which makes the pairs",
            got="none",
            fix="leave the role of one of them out",
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(
            "score.rewards", wanted="a name of its own for each reward", got=f"{twice} twice", fix="add name: to one"
        )

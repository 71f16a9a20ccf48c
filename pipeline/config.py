"""The config of a run: YAML and overrides in, a checked, frozen record out.

Every section's class stands beside the stage that it configures; this file puts them together, reads them, and turns
pydantic's findings into errors with the nearest known key.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from cluster.config import ClusterConfig
from stages.errors import ConfigError
from stages.sample.config import SampleConfig
from stages.score.config import PairConfig, ScoreConfig
from stages.settings import Settings, where
from stages.update.config import UpdateConfig

COLUMN_ROLES = ("prompt", "messages", "answer")
_TAGS = ("model", "function")  # of the rewards' union


class RunSection(Settings):
    """Name, place and seed of a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="of the run's folder")
    dir: Path = where(Path("runs"), description="where run folders lie")
    seed: int = Field(0, ge=0)
    tensorboard: bool = where(
        True, description="curves of metrics and evaluations for TensorBoard, in the run's folder"
    )


class PolicyConfig(Settings):
    """The policy to align."""

    path: str = Field(description="a Hugging Face folder, a hub name, or embedded:reverse")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    pad_token: str | None = Field(None, description="where the tokenizer names none")


class PromptsConfig(Settings):
    """What the policy is asked in training."""

    path: str = Field(description="a JSONL, JSON, Parquet or Arrow file, a folder saved by datasets, or embedded:…")
    per_round: int = Field(512, ge=1, description="prompts a round")
    shard_size: int = Field(64, ge=1, description="prompts behind one unit of work")
    columns: dict[str, str] = Field({}, description="role (prompt, messages, answer) to column, where names differ")
    system: str | None = Field(None, description="system message put before a chat that has none")

    @model_validator(mode="after")
    def _known_roles(self) -> PromptsConfig:
        return _check_roles(self)


class EvaluateConfig(Settings):
    """What the policy is asked to see whether it got better."""

    path: str | None = Field(None, description="as prompts.path; null: held out from the training prompts")
    holdout: float | None = Field(None, gt=0, lt=1, description="share of the training prompts that is held out")
    num_prompts: int = Field(512, ge=1)
    columns: dict[str, str] = Field({}, description="as prompts.columns, which holds where this is empty")

    @model_validator(mode="after")
    def _one_source(self) -> EvaluateConfig:
        if (self.path is None) == (self.holdout is None):
            got = "neither" if self.path is None else "both"
            raise ConfigError("path", wanted="either path or holdout", got=got, fix="for example holdout: 0.1 alone")
        return _check_roles(self)


def _check_roles(section: Any) -> Any:
    unknown = [role for role in section.columns if role not in COLUMN_ROLES]
    if unknown:
        raise ConfigError(
            "columns",
            wanted=f"roles among {', '.join(COLUMN_ROLES)}",
            got=repr(unknown[0]),
            fix="write role: column, for example {prompt: question}",
        )
    return section


class Config(Settings):
    """A whole run."""

    run: RunSection
    policy: PolicyConfig
    reference: Literal["round_start", "initial", "previous"] = "round_start"
    rounds: int = Field(3, ge=1)
    prompts: PromptsConfig
    sample: SampleConfig = SampleConfig()
    score: ScoreConfig
    pair: PairConfig = PairConfig()
    update: UpdateConfig = UpdateConfig()
    evaluate: EvaluateConfig | None = None
    cluster: ClusterConfig = Field(default=ClusterConfig(), json_schema_extra={"where": True})

    @model_validator(mode="after")
    def _across(self) -> Config:
        sample, names = self.sample, reward_names(self.score)
        if sample.num_generations < 2:
            raise ConfigError(
                "sample.num_generations", wanted="2 or more answers a prompt, to choose from", got="1", fix="8 is usual"
            )
        if not any(reward.role == "main" for reward in self.score.rewards):
            raise ConfigError(
                "score.rewards",
                wanted="at least one reward of role main, which makes the pairs",
                got="none",
                fix="leave the role of one of them out",
            )
        if sample.max_model_len is not None and sample.max_new_tokens >= sample.max_model_len:
            raise ConfigError(
                "sample.max_new_tokens",
                wanted=f"less than sample.max_model_len {sample.max_model_len}, so that a prompt fits beside it",
                got=str(sample.max_new_tokens),
                fix=f"at most {sample.max_model_len - 1}",
            )
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(
                "score.rewards",
                wanted="a name of its own for each reward",
                got=f"{twice} twice",
                fix="add name: to one",
            )
        return self

    def folder(self) -> Path:
        """The run's folder, as an absolute path."""
        return (self.run.dir / self.run.name).absolute()


def reward_names(score: ScoreConfig) -> list[str]:
    """What each reward is called in tables and reports: its name, else its function, else its folder's last part."""
    return [
        reward.name
        or (
            reward.target.rpartition(":")[2] if reward.type == "function" else reward.path.rstrip("/").split("/")[-1]
        ).removeprefix("embedded:")
        for reward in score.rewards
    ]


def load_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply ``section.key=value`` overrides.

    Raises:
        ConfigError: if the file cannot be read, a key is unknown, or a value is not allowed.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(file.name, [f.name for f in file.parent.glob("*.yaml")], n=1)
        hint = f"did you mean {file.parent / near[0]}?" if near else "configs/quickstart.yaml is one to start from"
        raise ConfigError(str(file), wanted="a YAML file", got="no such file", fix=hint) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        message = " ".join(str(error).split())
        raise ConfigError(str(file), wanted="readable YAML", got=message, fix="mend the file there") from None
    if not isinstance(values, dict):
        raise ConfigError(
            str(file),
            wanted="sections such as run:, policy:, prompts:",
            got=type(values).__name__,
            fix="see configs/quickstart.yaml",
        )
    for override in overrides:
        _apply(values, override)
    values.setdefault("run", {})
    if isinstance(values["run"], dict):
        values["run"].setdefault("name", file.stem)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _readable(error, file) from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(
            f"--set {override}", wanted="key=value", got=override, fix="for example --set sample.temperature=0.8"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}", wanted="a YAML value", got=str(error), fix="quote the value") from None
    target: Any = values
    *parents, last = key.split(".")
    try:
        for name in parents:
            target = target[int(name)] if isinstance(target, list) else target.setdefault(name, {})
        if isinstance(target, list):
            target[int(last)] = value
        else:
            target[last] = value
    except (TypeError, ValueError, IndexError, AttributeError):
        raise ConfigError(
            f"--set {override}",
            wanted=f"{key} to name a field",
            got=f"a path through something that is no section or list at {name if parents else last!r}",
            fix="list entries are numbered from 0, for example --set score.rewards.0.weight=0.5",
        ) from None


def _readable(error: ValidationError, file: Path) -> ConfigError:
    """The first finding in a reader's words, and how many more there are."""
    findings = error.errors()
    first = findings[0]
    loc = first["loc"]
    # After a list's index pydantic names the member of the union that it took.
    parts = [str(part) for i, part in enumerate(loc) if not (i and isinstance(loc[i - 1], int) and part in _TAGS)]
    key = ".".join(parts)
    more = f" ({len(findings) - 1} more after this one)" if len(findings) > 1 else ""
    got = repr(first["input"]) if not isinstance(first["input"], (dict, BaseModel)) else "this section"
    if first["type"] == "extra_forbidden":
        known = _fields_at(first["loc"][:-1])
        near = difflib.get_close_matches(parts[-1], known, n=1, cutoff=0.5)
        prefix = "".join(f"{part}." for part in parts[:-1])
        fix = f"did you mean {prefix}{near[0]}?" if near else "remove it, or use one of the keys above"
        wanted = f"one of {', '.join(known)}"
        return ConfigError(f"{file}: {key}", wanted=wanted, got=f"the unknown key {parts[-1]!r}", fix=fix + more)
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        name = ".".join([*parts, inner.where])
        return ConfigError(f"{file}: {name}", wanted=inner.wanted, got=inner.got, fix=inner.fix + more)
    message = first["msg"]
    if first["type"] == "missing":
        return ConfigError(f"{file}: {key}", wanted="a value", got="nothing", fix=f"add it, or --set {key}=…{more}")
    where = f"{file}: {key}" if key else str(file)
    return ConfigError(where, wanted=message, got=got, fix=f"change it in the file, or with --set{more}")


def _fields_at(loc: tuple[int | str, ...]) -> list[str]:
    """The field names of the record that a pydantic location points into."""
    kinds: list[Any] = [Config]
    for part in loc:
        found = [k.model_fields[part].annotation for k in kinds if isinstance(part, str) and part in k.model_fields]
        kinds = _records(found) if found else kinds
    return sorted({name for kind in kinds for name in kind.model_fields})


def _records(annotations: Sequence[Any]) -> list[type[BaseModel]]:
    """The record classes inside some annotations (unions and lists looked through)."""
    out = []
    for annotation in annotations:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            out.append(annotation)
        elif isinstance(annotation, types.UnionType) or typing.get_args(annotation):
            out.extend(_records(typing.get_args(annotation)))
    return out

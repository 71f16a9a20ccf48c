"""Reading a config: YAML and ``section.key=value`` overrides in, a `Config` out, pydantic's findings in plain words."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import ROUND_SECTIONS, Config
from stages.errors import ConfigError

_TAGS = ("model", "function")  # of the rewards' union


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
        config = Config.model_validate(values)
    except ValidationError as error:
        raise _readable(error, file) from None
    _check_rounds(config, file)
    return config


def _check_rounds(config: Config, file: Path) -> None:
    """Refuse entries of a list of rounds that cannot be applied."""
    for number, entry in enumerate(() if isinstance(config.rounds, int) else config.rounds, start=1):
        where = f"rounds.{number - 1}"
        for key in entry:
            if key not in ROUND_SECTIONS:
                near = difflib.get_close_matches(key, ROUND_SECTIONS, n=1)
                hint = f"did you mean {near[0]}?" if near else "write sections, for example {update: {beta: 0.05}}"
                wanted = f"overrides of {', '.join(ROUND_SECTIONS)}"
                raise ConfigError(f"{file}: {where}", wanted=wanted, got=repr(key), fix=hint)
        try:
            config.for_round(number)
        except ValidationError as error:
            raise _readable(error, file, under=where) from None


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


def _readable(error: ValidationError, file: Path, *, under: str = "") -> ConfigError:
    """The first finding in a reader's words, and how many more there are; `under` names a round's entry."""
    findings = error.errors()
    first = findings[0]
    loc = first["loc"]
    # After a list's index pydantic names the member of the union that it took.
    parts = [str(part) for i, part in enumerate(loc) if not (i and isinstance(loc[i - 1], int) and part in _TAGS)]
    parts = [under, *parts] if under else parts
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
        name = ".".join(parts if parts and parts[-1] == inner.where else [*parts, inner.where])
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

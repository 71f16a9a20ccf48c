"""Reading a config: YAML and ``section.key=value`` overrides in, a `Config` out, pydantic's findings in plain words."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import ROUND_SECTIONS, Config
from pipeline.own_modules import importable, name_own_modules
from pipeline.secret_words import refuse_secrets
from pipeline.sections import NAME
from stages.errors import ConfigError
from stages.score.config import REWARD_TYPES


def load_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply ``section.key=value`` overrides; it knows where modules that it names lie.

    Raises:
        ConfigError: if the file cannot be read, a key is unknown, or a value is not allowed.
    """
    values = _read(file)
    for override in overrides:
        _apply(values, override)
    refuse_secrets(values, file=str(file))
    run = values.setdefault("run", {})
    if isinstance(run, dict) and "name" not in run:
        run["name"] = file.stem
        if not re.match(NAME, file.stem):
            name = re.sub(r"\W+", "-", file.stem).strip("-") or "mine"
            raise ConfigError(
                f"{file}: run.name",
                wanted=_FORMS["name"],
                got=f"{file.stem!r}, after the file",
                fix=f"--set run.name={name}, or another name for the file",
            )
    named = run.get("modules") if isinstance(run, dict) else None
    folder = Path(named) if isinstance(named, str) else file.absolute().parent
    with importable(folder):
        try:
            config = Config.model_validate(values)
        except ValidationError as error:
            raise _readable(error, file) from None
        rounds = _checked_rounds(config, file)
    if not name_own_modules([config, *rounds]):
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"modules": folder})})


class _Loader(yaml.SafeLoader):
    """YAML in which no key of a section may stand twice: the later one would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, yaml.Node] = {}
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                first, again = seen[name].start_mark.line + 1, key.start_mark
                problem = f"the key {name!r} stands here and in line {first}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=again)
            seen[name] = key
        return super().construct_mapping(node, deep)


def _read(file: Path) -> dict[str, Any]:
    """A file's sections, as plain values."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        near = difflib.get_close_matches(file.name, [f.name for f in file.parent.glob("*.yaml")], n=1)
        hint = f"did you mean {file.parent / near[0]}?" if near else "configs/quickstart.yaml is one to start from"
        raise ConfigError(str(file), wanted="a YAML file", got="no such file", fix=hint) from None
    except OSError as error:
        got = error.strerror or str(error)
        raise ConfigError(str(file), wanted="a YAML file", got=got, fix="name a file that you may read") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        got = f"the byte 0x{error.object[error.start]:02x} in line {line}"
        raise ConfigError(str(file), wanted="text in UTF-8", got=got, fix="save the file as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(str(file), wanted="YAML", got=_first_finding(error), fix="mend the file there") from None
    except RecursionError:
        got = "values inside values, too deep to read"
        raise ConfigError(str(file), wanted="YAML", got=got, fix="see configs/quickstart.yaml") from None
    if not isinstance(values, dict):
        raise ConfigError(
            str(file),
            wanted="sections such as run:, policy:, prompts:",
            got="nothing" if values is None else "a list" if isinstance(values, list) else f"only {values!r}",
            fix="see configs/quickstart.yaml",
        )
    return values


def _first_finding(error: yaml.YAMLError) -> str:
    """What YAML's reader says, with the line, without its excerpt."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    told = ", ".join(part for part in (error.context, error.problem) if part)  # type: ignore[attr-defined]
    return f"{told} (line {mark.line + 1}, column {mark.column + 1})"


def _checked_rounds(config: Config, file: Path) -> list[Config]:
    """The config of each round with settings of its own.

    Raises:
        ConfigError: for what cannot hold in single rounds: entries of a list of rounds, numbers by round.
    """
    entries = () if isinstance(config.rounds, int) else config.rounds
    for number, entry in enumerate(entries, start=1):
        for key in entry:
            if key not in ROUND_SECTIONS:
                near = difflib.get_close_matches(key, ROUND_SECTIONS, n=1)
                hint = f"did you mean {near[0]}?" if near else "write sections, for example {update: {beta: 0.05}}"
                wanted = f"overrides of {', '.join(ROUND_SECTIONS)}"
                raise ConfigError(f"{file}: rounds.{number - 1}", wanted=wanted, got=repr(key), fix=hint)
    found = []
    for number in range(1, config.num_entries + 1):
        under = f"rounds.{number - 1}" if number <= len(entries) and entries[number - 1] else f"round {number}"
        try:
            found.append(config.for_round(number))
        except ValidationError as error:
            raise _readable(error, file, under=under) from None
        except ConfigError as error:
            where = f"{file}: {under}.{error.where}"
            raise ConfigError(where, wanted=error.wanted, got=error.got, fix=error.fix) from None
    return found


def _apply(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(
            f"--set {override}", wanted="key=value", got=override, fix="for example --set sample.temperature=0.8"
        )
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        got = _first_finding(error) if isinstance(error, yaml.YAMLError) else "values inside values, too deep to read"
        raise ConfigError(
            f"--set {key}", wanted="a YAML value", got=got, fix=f"put quotes around it: --set '{key}=\"…\"'"
        ) from None
    target: Any = values
    *parents, last = key.split(".")
    try:
        for name in parents:
            target = target[_index(name)] if isinstance(target, list) else target.setdefault(name, {})
        if isinstance(target, list):
            target[_index(last)] = value
        else:
            target[last] = value
    except (TypeError, ValueError, IndexError, AttributeError):
        raise ConfigError(
            f"--set {override}",
            wanted=f"{key} to name a field",
            got=f"a path through something that is no section or list at {name if parents else last!r}",
            fix="list entries are numbered from 0, for example --set score.rewards.0.weight=0.5",
        ) from None


def _index(name: str) -> int:
    if not name.isdecimal():
        raise ValueError(name)
    return int(name)


def _readable(error: ValidationError, file: Path, *, under: str = "") -> ConfigError:
    """The first finding in a reader's words, and how many more there are; `under` names a round's entry."""
    findings = error.errors()
    first = findings[0]
    loc = first["loc"]
    # After a list's index pydantic names the member of the union that it took.
    parts = [
        str(part) for i, part in enumerate(loc) if not (i and isinstance(loc[i - 1], int) and part in REWARD_TYPES)
    ]
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
    if first["type"] == "missing":
        return ConfigError(f"{file}: {key}", wanted="a value", got="nothing", fix=f"add it, or --set {key}=…{more}")
    where, change = (f"{file}: {key}", f"--set {key}=…") if key else (str(file), "--set")
    known = re.findall(r"'([^']+)'", first["ctx"]["expected"]) if first["type"] == "literal_error" else []
    near = difflib.get_close_matches(str(first["input"]), known, n=1, cutoff=0.5)
    fix = (f"did you mean {near[0]}? " if near else "") + f"change it in the file, or with {change}{more}"
    return ConfigError(where, wanted=_in_words(first), got=got, fix=fix)


_FORMS = {
    "name": "letters, digits, dots, underscores and hyphens, a letter or digit first: it names a folder",
    "target": "module:function",
}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "tuple": "a list",
    "dict": "keys with values",
    "model": "a section of keys with values",
}


def _in_words(finding: Any) -> str:
    """What pydantic wanted."""
    kind, context = finding["type"], finding.get("ctx", {})
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    signs = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    if kind in bounds:
        bound = bounds[kind]
        return f"{signs[bound]} {context[bound]:g}"
    if kind == "literal_error":
        return str(context["expected"])
    if kind.startswith("union_tag"):
        return f"type: {' or '.join(REWARD_TYPES)}"
    if kind == "too_short":
        return f"at least {context['min_length']} in the list"
    if kind == "string_too_short":
        return "text that is not empty"
    if kind == "string_pattern_mismatch":
        return _FORMS[finding["loc"][-1]]
    return _KINDS.get(kind.partition("_")[0], finding["msg"])


def _fields_at(loc: tuple[int | str, ...]) -> list[str]:
    """The field names of the record that a pydantic location points into."""
    kinds: list[Any] = [Config]
    for at, part in enumerate(loc):
        if at and isinstance(loc[at - 1], int) and part in REWARD_TYPES:  # not a field: the member of the union
            kinds = [kind for kind in kinds if part in typing.get_args(kind.model_fields["type"].annotation)]
            continue
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

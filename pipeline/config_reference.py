"""The page ``docs/configuration.md``: every key of a config, read from the classes that check it.

In come the classes alone, out comes Markdown. ``python -m pipeline.config_reference`` writes the page anew; a test
compares it with what is checked in, and refuses a key without a description.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.config import ROUND_SECTIONS, Config
from stages.score.config import OWN_SETTINGS
from stages.update.objectives.registry import OBJECTIVES

PAGE = Path("docs/configuration.md")

_INTRODUCTION = """\
# Configuration

Every key of a config, with what may stand there, its default and its meaning. This page is made from the classes that
check a config (`make configuration`), so it says what the program does.

- A config is one YAML file. `configs/quickstart.yaml` is one to start from.
- Any key can be set on the command line: `--set sample.temperature=0.8`. Entries of a list are numbered from 0:
  `--set score.rewards.0.weight=0.5`.
- An unknown key is refused, with the nearest known one.
- **required** means that there is no default. `null` takes a value away.
- *leaves results alone* marks what says where or how fast a run works: it changes last digits at most, and may be
  changed at any time. Another key may be part of what a result is; what was made under another value of it is then not
  used again, and the run says which fields differ.

**By round.** Where `rounds` is a list, an entry may override the keys that are marked *by round*. Under these keys a
list in the place of a number has one number for each round, and the last one goes on:
`update: {beta: [0.01, 0.1, 1.0]}`.
"""

_WORDS = {int: "whole number", float: "number", int | float: "number", bool: "true or false", str: "text", Path: "path"}
_BOUNDS = (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than"))


def written() -> str:
    """The whole page."""
    parts = [_INTRODUCTION, "## Top level\n", _top_level()]
    for name, field in Config.model_fields.items():
        if records_in(field.annotation):
            parts.extend(_section(name, field, depth=2))
    parts.extend(_objectives())
    return "\n".join(parts)


def undescribed() -> list[str]:
    """Keys without a description, by class: there should be none."""
    kinds = [*all_records(Config), *(objective.params for objective in OBJECTIVES.values())]
    return sorted(
        {
            f"{kind.__module__}.{kind.__name__}.{name}"
            for kind in kinds
            for name, field in kind.model_fields.items()
            if not field.description and not records_in(field.annotation)
        }
    )


def records_in(annotation: Any) -> list[type[BaseModel]]:
    """The record classes inside an annotation (unions and lists looked through)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in typing.get_args(annotation) for kind in records_in(part)]


def all_records(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A record class and all that stand in it."""
    yield kind
    for field in kind.model_fields.values():
        for inner in records_in(field.annotation):
            yield from all_records(inner)


def _section(key: str, field: FieldInfo, *, depth: int) -> Iterator[str]:
    """A section under its dotted key, and the sections in it."""
    kinds = records_in(field.annotation)
    yield f"{'#' * depth} `{key}`\n"
    about = [field.description, *_notes(key, field, kinds)]
    yield "\n\n".join(part for part in about if part) + "\n"
    if len(kinds) == 1:
        yield from _fields(key, kinds[0].model_fields, depth=depth)
        return
    shared = {name: found for name, found in kinds[0].model_fields.items() if _in_all(name, kinds)}
    yield _table(shared)
    for kind in kinds:
        (word,) = typing.get_args(kind.model_fields["type"].annotation)
        yield f"{'#' * (depth + 1)} `{key}` of `type: {word}`\n\n{_about(kind)}\n"
        yield _table({name: found for name, found in kind.model_fields.items() if name not in shared})


def _fields(key: str, fields: Mapping[str, FieldInfo], *, depth: int) -> Iterator[str]:
    yield _table(_leaves(fields))
    if key == "pair":
        yield _strategies()
    for name, field in fields.items():
        if records_in(field.annotation):
            yield from _section(f"{key}.{name}", field, depth=depth + 1)


def _notes(key: str, field: FieldInfo, kinds: Sequence[type[BaseModel]]) -> Iterator[str]:
    if len(kinds) == 1:
        yield _about(kinds[0])
    else:
        yield "A list. What every entry may have:"
    if field.is_required() and _filled_in(field) is None:
        yield "Required."
    elif field.default is None:
        yield "Left out by default: `null`."
    if key in ROUND_SECTIONS:
        yield "*By round.*"
    if _leaves_results_alone(field):
        yield "*All of it leaves results alone.*"


def _objectives() -> Iterator[str]:
    yield (
        "## `update.loss_params` by objective\n\n`update.beta` reaches the objective's own `beta`, and "
        "`update.gate_floor` its `gate_floor`. [Objectives](objectives.md) has the formulas, and says when to choose "
        "which.\n"
    )
    for name, objective in OBJECTIVES.items():
        if objective.params.model_fields:
            yield f"### `{name}`\n\n{_table(objective.params.model_fields)}"


def _strategies() -> str:
    """What each pairing strategy takes for itself."""
    lines = ["The defaults that come with a strategy:\n", "| strategy | its own settings |", "|---|---|"]
    for strategy, own in OWN_SETTINGS.items():
        told = ", ".join(
            f"`{name}` " + ("**required**" if value is None else f"{value}") for name, value in own.items()
        )
        lines.append(f"| `{strategy}` | {told or 'none'} |")
    return "\n".join(lines) + "\n"


def _top_level() -> str:
    """The keys that are no section, by name those of which rounds may differ."""
    leaves = _leaves(Config.model_fields)
    named = ", ".join(f"`{name}`" for name in leaves if name in ROUND_SECTIONS)
    return f"{_table(leaves)}\n*By round:* {named}.\n"


def _table(fields: Mapping[str, FieldInfo]) -> str:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{name}` | {_value(field)} | {_default(field)} | {_meaning(field)} |" for name, field in fields.items()
    ]
    return "\n".join(lines) + "\n"


def _leaves(fields: Mapping[str, FieldInfo]) -> dict[str, FieldInfo]:
    return {name: field for name, field in fields.items() if not records_in(field.annotation)}


def _in_all(name: str, kinds: Sequence[type[BaseModel]]) -> bool:
    """Whether all records have a field of this name with the same meaning."""
    told = {kind.model_fields[name].description if name in kind.model_fields else None for kind in kinds}
    return len(told) == 1 and None not in told


def _value(field: FieldInfo) -> str:
    words = [_in_words(field.annotation), *_bounds(field)]
    return ", ".join(words).replace("|", "\\|")


def _in_words(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "`null`"
    if origin is typing.Literal:
        return ", ".join(f"`{word}`" for word in inner)
    if origin in (typing.Union, types.UnionType) and annotation not in _WORDS:
        return " or ".join(dict.fromkeys(_in_words(part) for part in inner))
    if origin is tuple:
        return f"list of {_in_words(inner[0])}{'s' * (inner[0] in _WORDS)}"
    if origin is dict:
        return "keys with values" if inner[1] is Any else f"keys, each with a {_in_words(inner[1])}"
    return _WORDS.get(annotation, "keys with values")


def _bounds(field: FieldInfo) -> Iterator[str]:
    for sign, word in _BOUNDS:
        for bound in (getattr(found, sign, None) for found in field.metadata):
            if bound is not None:
                yield f"{word} {bound:g}"
    for found in field.metadata:
        if getattr(found, "min_length", None):
            yield "not empty"
        if pattern := getattr(found, "pattern", None):
            yield f"of the form `{pattern}`"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return _filled_in(field) or "**required**"
    default = field.get_default(call_default_factory=True)
    assert default is not PydanticUndefined, "a field that is not required has a default"
    if default is None:
        return "`null`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"`{list(default)}`"
    return f"`{default}`"


def _meaning(field: FieldInfo) -> str:
    told = (field.description or "").replace("|", "\\|")
    return f"{told} (*leaves results alone*)" if _leaves_results_alone(field) else told


def _filled_in(field: FieldInfo) -> str | None:
    """What the reader of config files puts in the place of a field that the class requires, in words."""
    extra = field.json_schema_extra
    return str(extra["filled_in"]) if isinstance(extra, Mapping) and "filled_in" in extra else None


def _leaves_results_alone(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, Mapping) and bool(extra.get("where"))


def _about(kind: type[BaseModel]) -> str:
    return re.sub(r"``(.+?)``", r"`\1`", inspect.cleandoc(kind.__doc__ or ""))


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")

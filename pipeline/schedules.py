"""Numbers that differ by round: ``beta: [0.01, 0.1, 1.0]`` in the place of one number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from stages.errors import ConfigError


def numbers_by_round(kind: type[BaseModel], values: dict[str, Any], sections: Sequence[str]) -> dict[str, Any]:
    """A config's plain values with every list in a number's place moved to ``schedules``, under its dotted name.

    Args:
        kind: the config's class.
        sections: the fields of which rounds may differ.

    Raises:
        ConfigError: for an empty list, or a field that is scheduled twice.
    """
    schedules = dict(values.get("schedules") or {})
    for key in schedules:
        if key.partition(".")[0] not in sections:
            raise ConfigError(
                f"schedules.{key}",
                wanted=f"a number under {', '.join(sections)}",
                got=repr(key),
                fix="other fields hold for the whole run",
            )
    moved: dict[str, Any] = {}
    for name in sections:
        field = kind.model_fields[name]
        values = values | {name: _moved(values[name], field.annotation, name, moved)} if name in values else values
    if twice := sorted(schedules.keys() & moved.keys()):
        raise ConfigError(
            f"schedules.{twice[0]}", wanted="one list of numbers", got="another in the field itself", fix="remove one"
        )
    if not schedules and not moved:
        return values
    return values | {"schedules": schedules | moved}


def _moved(value: Any, annotation: Any, key: str, moved: dict[str, Any]) -> Any:
    """`value` with its lists in the place of numbers replaced by their first, the lists put into `moved`."""
    if isinstance(value, dict):
        records = [kind for kind in _kinds(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        fields = {name: field.annotation for kind in records for name, field in kind.model_fields.items()}
        inner = {name: float if not records else fields.get(name) for name in value}
        return {name: _moved(part, inner[name], f"{key}.{name}", moved) for name, part in value.items()}
    if not isinstance(value, (list, tuple)) or not {int, float}.intersection(_kinds(annotation)):
        return value
    if not value or not all(isinstance(part, (int, float)) and not isinstance(part, bool) for part in value):
        raise ConfigError(
            key, wanted="a number, or a list of numbers, one a round", got=repr(list(value)), fix="[0.01, 0.1, 1.0]"
        )
    moved[key] = tuple(value)
    return value[0]


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types in an annotation, those of unions; not those of collections' items."""
    arguments = get_args(annotation)
    if not arguments or getattr(annotation, "__origin__", None) in (tuple, list, dict):
        yield annotation
        return
    for part in arguments:
        yield from _kinds(part)

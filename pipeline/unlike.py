"""In what two settings differ, or a finished folder and what it would be made from now: the fields, in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts import MANIFEST
from pipeline.config import Config
from pipeline.files import read_json
from pipeline.fingerprints import differing_fields


def claim(folder: Path) -> dict[str, Any]:
    file = folder / "fingerprint.json"
    return read_json(file) if file.exists() else {}


def unlike(folder: Path, wanted: Mapping[str, Any]) -> str:
    """In which field a finished table was made from something else; nothing where it was not."""
    if not (folder / MANIFEST).exists():
        return "not finished"
    return differences(claim(folder), wanted)


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first fields that differ, of those that are wanted, with both values where these are short."""
    there, now = ({key: values.get(key) for key in wanted} for values in (found, wanted))
    fields = differing_fields(there, now)
    told = [changed(name, _at(there, name), _at(now, name)) for name in fields[:2]]
    return ", ".join(told) + (f" and {len(fields) - 2} more" if len(fields) > 2 else "")


def _at(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[int(part)] if isinstance(values, list) and int(part) < len(values) else values
        values = values.get(part) if isinstance(values, dict) else values
    return values


def changed(name: str, before: Any, now: Any) -> str:
    texts = [str(value) for value in (before, now)]
    return f"{name}: {texts[0]} -> {texts[1]}" if all(len(text) <= 24 for text in texts) else name


def differ(old: Config, new: Config, name: str) -> bool:
    return bool(getattr(old, name) != getattr(new, name))

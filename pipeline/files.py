"""Files put in place whole: written under another name, synced, renamed."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.errors import InputError
from stages.faults import fault_point


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A scratch file that takes `target`'s place, synced, when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield scratch
        sync(scratch)
        fault_point("file.written", [target])
        scratch.replace(target)
        fault_point("file.placed", [target])
    finally:
        scratch.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content is on its disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(target: Path, value: Any) -> None:
    """Put a JSON file in place whole."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(target: Path, text: str) -> None:
    """Put a text file in place whole."""
    with replacing(target) as scratch:
        scratch.write_text(text, encoding="utf-8")


def read_json(file: Path) -> Any:
    """A JSON file's content.

    Raises:
        InputError: if it is no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(str(file), wanted="JSON", got=str(error), fix="restore the file") from None

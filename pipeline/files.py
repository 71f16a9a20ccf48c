"""Files put in place whole: written under another name, synced, renamed; and those that vouch for themselves."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import mirror
from stages.errors import ContractError, InputError
from stages.faults import fault_point

_CHECK = "check"  # a file's hash of itself


@contextmanager
def replacing(target: Path, *, once: bool = False) -> Iterator[Path]:
    """A scratch file that takes `target`'s place, synced, when the block ends well; in a run's store first.

    Raises:
        AlreadyThere: with `once`, if the store has one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield scratch
        sync(scratch)
        fault_point("file.written", [target])
        with mirror.publishing(scratch, target, once=once):
            place(scratch, target)
        fault_point("file.placed", [target])
    finally:
        scratch.unlink(missing_ok=True)


def place(scratch: Path, target: Path) -> None:
    """Give a file, folder or link that is whole its name, which then stays even where the power fails."""
    scratch.replace(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems sync files alone
            raise
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk; nothing where there is none."""
    for found in (*path.rglob("*"), path):
        if found.exists():
            sync(found)


def keep_tree(path: Path) -> None:
    """Have a file, or a folder with all that is in it, on the disk and in the run's store."""
    sync_tree(path)
    for found in (*path.rglob("*"), path):
        if found.is_file():
            mirror.keep(found)


def write_json(target: Path, value: Any, *, once: bool = False) -> None:
    """Put a JSON file in place whole; see `replacing`."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n", once=once)


def write_text(target: Path, text: str, *, once: bool = False) -> None:
    """Put a text file in place whole; see `replacing`."""
    with replacing(target, once=once) as scratch:
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


def write_vouched(target: Path, value: Mapping[str, Any], *, once: bool = False) -> None:
    """Put a JSON object in place whole, with a hash of itself by which `read_vouched` knows it; see `replacing`."""
    write_json(target, {**value, _CHECK: _hash(value)}, once=once)


def read_vouched(file: Path, wanted: str, *, fix: str) -> dict[str, Any]:
    """What `write_vouched` put there.

    Args:
        wanted: what the file is, in words.
        fix: what to do about one that was changed.

    Raises:
        ContractError: if it is not as it was written.
    """
    try:
        found = read_json(file)
    except InputError:
        found = None
    if not isinstance(found, dict) or found.pop(_CHECK, None) != _hash_as_read(found):
        raise ContractError(
            str(file), wanted=f"{wanted}, as published", got="one that was changed, or not written by this run", fix=fix
        )
    return found


def read_unvouched(file: Path) -> dict[str, Any] | None:
    """A JSON object that has no hash of itself, as earlier versions wrote it; None for anything else."""
    try:
        found = read_json(file)
    except InputError:
        return None
    return found if isinstance(found, dict) and _CHECK not in found else None


def _hash(value: Mapping[str, Any]) -> str:
    return _hash_as_read(json.loads(json.dumps(value)))  # keys in the order that they have when they are read again


def _hash_as_read(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

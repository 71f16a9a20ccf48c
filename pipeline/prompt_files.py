"""The rows of a dataset as people have it: a file, a folder, or a name on the hub.

Comes in: a path, or ``org/name``. Goes out: rows as dicts, each with the place it stands at, for errors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files import place, sync
from stages.errors import InputError
from stages.weights import file_sha256

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
"""Endings of the files that `read_rows` reads."""


def source_sha256(path: Path) -> str:
    """A hash of a file's bytes, or of all files in a folder with their names."""
    if path.is_file():
        return file_sha256(path)
    lines = [f"{file_sha256(f)}  {f.relative_to(path)}\n" for f in sorted(path.rglob("*")) if f.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a dataset with several is meant, by the names that the hub gives them."""

    config: str | None = None
    split: str | None = None


WHOLE = Part()


def read_rows(path: Path, *, key: str, part: Part = WHOLE) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with the place it stands at.

    Raises:
        InputError: for a file of another kind, or a line that cannot be read.
    """
    if path.is_dir():
        yield from _numbered(path, _readable(path, key, _folder_rows(path, key, part)))
    elif part != WHOLE:
        raise InputError(
            f"{key}: {path}",
            wanted="a folder or a dataset of the hub, to take a split or config of",
            got="a file",
            fix=f"--set {_section(key)}.split=null --set {_section(key)}.config=null",
        )
    elif path.suffix == ".jsonl":
        yield from _json_lines(path, key)
    elif path.suffix == ".json":
        yield from _numbered(path, _json_list(path, key))
    elif path.suffix in SUFFIXES:
        yield from _numbered(path, _arrow_rows(path, key, path.suffix.removeprefix(".")))
    else:
        raise InputError(
            f"{key}: {path}",
            wanted="a .jsonl, .json, .parquet or .arrow file, or a folder saved by datasets",
            got=f"a file ending in {path.suffix or 'nothing'}",
            fix="convert it, for example with datasets.load_dataset(…).to_json(…)",
        )


def _numbered(path: Path, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", row


def _readable(path: Path, key: str, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A folder's rows; its files are opened as they are reached."""
    try:
        yield from rows
    except InputError:
        raise
    except Exception as error:  # datasets' readers raise nearly anything for a broken file
        raise InputError(
            f"{key}: {path}",
            wanted="a folder of files that can be read",
            got=_first_line(error),
            fix="name a single file in it, to be told the line",
        ) from None


def _json_lines(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            row = _json(line, f"{key}: {where}", wanted="a JSON object", fix="mend the line")
            if not isinstance(row, dict):
                raise InputError(f"{key}: {where}", wanted="a JSON object", got=kind_of(row), fix='write {"prompt": …}')
            yield where, row


def _json_list(path: Path, key: str) -> list[dict[str, Any]]:
    fix = "mend the file there; a file of JSON lines ends in .jsonl"
    rows = _json(path.read_bytes(), f"{key}: {path}", wanted="JSON", fix=fix)
    other = next((n for n, row in enumerate(rows) if not isinstance(row, dict)), None) if isinstance(rows, list) else 0
    if other is not None:
        raise InputError(
            f"{key}: {path}",
            wanted="a JSON list of objects",
            got=f"{kind_of(rows[other])} as entry {other + 1}" if isinstance(rows, list) else kind_of(rows),
            fix="one object a prompt, or rename a file of JSON lines to .jsonl",
        )
    return rows  # type: ignore[no-any-return]


def _json(content: bytes, where: str, *, wanted: str, fix: str) -> Any:
    try:
        value = json.loads(content.decode("utf-8-sig"))
        if b"\\ud" in content.lower():  # only so may half a surrogate pair come in, which no table can hold
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeDecodeError as error:
        got = f"the byte 0x{error.object[error.start]:02x} (byte {error.start + 1}), which is no UTF-8"
    except UnicodeEncodeError as error:
        got = f"\\u{ord(error.object[error.start]):04x} alone, half of a character outside the basic plane"
    except json.JSONDecodeError as error:
        got = f"{error.msg} (character {error.pos + 1})"
    except RecursionError:
        got = "values inside values, too deep to read"
    except ValueError as error:
        got = str(error).partition(";")[0]
    raise InputError(where, wanted=wanted, got=got, fix=fix)


_KINDS = {"NoneType": "null", "bool": "true or false", "int": "a number", "float": "a number"}
_KINDS |= {"str": "text", "list": "a list", "dict": "an object"}


def kind_of(value: Any) -> str:
    """What a value of a row is, in words."""
    return _KINDS.get(type(value).__name__, type(value).__name__)


def _arrow_rows(path: Path, key: str, kind: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    try:
        if kind == "parquet" and not pq.read_metadata(path).num_rows:
            return
        yield from load_dataset(kind, data_files=str(path), split="train", streaming=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"{key}: {path}", wanted=f"a readable {kind} file", got=str(error), fix="write the file again"
        ) from None


def _folder_rows(path: Path, key: str, part: Part) -> Iterable[dict[str, Any]]:
    """Of a folder saved by datasets, else of the data files in it (a downloaded repository)."""
    from datasets import load_dataset, load_from_disk

    saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    if saved and part.config is not None:
        raise InputError(
            f"{key}: {path}",
            wanted="a dataset with several configs",
            got="a folder saved by datasets, which is one config",
            fix=f"--set {_section(key)}.config=null",
        )
    try:
        found = load_from_disk(str(path)) if saved else load_dataset(str(path), part.config, streaming=True)
    except Exception as error:  # datasets' readers raise nearly anything for a broken file
        raise InputError(
            f"{key}: {path}",
            wanted="a folder saved by datasets, or one with data files",
            got="no row in its files" if isinstance(error, StopIteration) else _first_line(error),
            fix="name a file in it instead",
        ) from None
    return _one_split(found, f"{key}: {path}", _section(key), part)


def on_hub(name: str) -> bool:
    """Whether a name is ``org/name`` on the hub rather than a path, perhaps a mistyped one."""
    first, slash, rest = name.partition("/")
    return (
        bool(first.strip(".~") and slash and rest)
        and "/" not in rest
        and not (Path(first).exists() or Path(rest).suffix in (*SUFFIXES, ".csv", ".txt"))
    )


def fetch_dataset(name: str, folder: Path, *, key: str, part: Part) -> Path:
    """A dataset of the hub as one Parquet file under `folder`.

    Raises:
        InputError: if it cannot be reached, or has several splits and none is named.
    """
    from datasets import load_dataset

    try:
        found = load_dataset(name, part.config)
    except Exception as error:  # offline, gated, unknown, several configs: all end the same way
        raise InputError(
            f"{key}: {name}",
            wanted="a file or folder, or a dataset on the hub that can be reached",
            got=f"no such path here, and from the hub {_first_line(error)}",
            fix="download it beforehand where there is a network, dataset.save_to_disk(folder), and give the folder",
        ) from error
    rows = _one_split(found, f"{key}: {name}", _section(key), part)
    called = hashlib.sha256(json.dumps([name, part.config, part.split]).encode()).hexdigest()[:12]
    file = folder / f"{name.replace('/', '--')}-{called}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}")
    rows.to_parquet(str(scratch))
    sync(scratch)
    place(scratch, file)
    return file


def _one_split(found: Any, where: str, section: str, part: Part) -> Any:
    if not isinstance(found, Mapping):
        if part.split is None:
            return found
        found = {str(found.split): found}
    split = part.split if part.split is not None or len(found) > 1 else next(iter(found))
    if split not in found:
        raise InputError(
            where,
            wanted=f"the split {split!r}" if split else "one split",
            got=f"the splits {', '.join(found)}",
            fix=f"--set {section}.split={next(iter(found))}",
        )
    return found[split]


def _section(key: str) -> str:
    return key.removesuffix(".path")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"

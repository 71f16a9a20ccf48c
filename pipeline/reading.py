"""A run as its folder tells it, without Ray or a model: its rounds, its config, and rows of its tables by filter.

Only what is published counts. Files that a person has removed since are passed over, so that a run whose large tables
are gone can still be looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import yaml
from pydantic import ValidationError

from pipeline.config import merged, overrides_of
from pipeline.schedule import asked_rounds, reason_to_stop
from pipeline.sections import GateConfig, StopConfig
from pipeline.watched_files import WatchedFiles
from stages.errors import InputError

_ROUND = re.compile("round-([0-9]{4,})")

FILE = "__filename"
"""A column that `rows` can give besides the table's own: the path of the part in which the row lies."""


def round_folders(folder: Path) -> dict[int, Path]:
    """The folder of each round by its number, 0 for the evaluation before the first.

    Raises:
        InputError: if the folder holds no run.
    """
    found = rounds_in(folder)
    if not found:
        raise InputError(
            str(folder),
            wanted="the folder of a run",
            got="no round in it" if folder.is_dir() else "no such folder",
            fix="runs lie in runs/NAME by default",
        )
    return found


def rounds_in(folder: Path) -> dict[int, Path]:
    """As `round_folders`; empty where there is none. Folders that a person put there under other names are none."""
    named = ((_ROUND.fullmatch(path.name), path) for path in folder.glob("round-*"))
    return dict(sorted((int(name[1]), path) for name, path in named if name))


def run_settings(folder: Path) -> dict[str, Any]:
    """The config of a run as plain values; empty until the run's first round is settled.

    Raises:
        InputError: if it is no YAML.
    """
    file = folder / "config.yaml"
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {} if file.exists() else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            str(file), wanted="readable YAML", got=" ".join(str(error).split()), fix="restore the file"
        ) from None


def round_settings(settings: Mapping[str, Any], round: int) -> dict[str, Any]:
    """The config with the round's own overrides in it."""
    return merged(dict(settings), overrides_of(settings, round))


def num_rounds(folder: Path, settings: Mapping[str, Any]) -> int | None:
    """The config's rounds, those added later, and those of watched files; None where there is no config yet."""
    rounds = settings.get("rounds")
    if rounds is None:
        return None
    configured = len(rounds) if isinstance(rounds, list) else rounds
    return asked_rounds(folder, configured) + WatchedFiles(folder / "watched.json").num_taken()


def reason_stopped(folder: Path, settings: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> str | None:
    """Why no round follows the settled ones, though the config asks for more; None where one does, or none is asked.

    Args:
        settings: see `run_settings`.
        reports: of the settled rounds in order, the evaluation before the first round among them.
    """
    asked = num_rounds(folder, settings)
    if asked is None or sum(report["round"] > 0 for report in reports) >= asked:
        return None
    stop, gate = settings.get("stop_when") or {}, settings.get("gate")
    try:
        known = StopConfig.model_validate(stop), GateConfig.model_validate(gate) if gate is not None else None
    except ValidationError:  # of a release with other limits
        return None
    return reason_to_stop(*known, reports)


def prompt_pools(folder: Path) -> list[Path]:
    """Where the prompts lie that the rounds drew from: ``prompts``, and those of rounds with prompts of their own."""
    return [folder / "prompts", *sorted(folder.glob("prompts-[0-9]*"))]


def published_files(stage: Path) -> list[Path]:
    """The published parts of a stage's folder that are still there, in order."""
    files = (stage / f"{entry.stem}.parquet" for entry in sorted((stage / "_shards").glob("part-*.json")))
    return [file for file in files if file.exists()]


def rows(
    files: Sequence[Path],
    *,
    where: ds.Expression | None = None,
    columns: Iterable[str] | Mapping[str, ds.Expression] | None = None,
) -> list[dict[str, Any]]:
    """The rows of some parts that `where` lets through, in order.

    Args:
        columns: by name, or what to make of them under new names.

    Raises:
        InputError: if a part cannot be read, or has no such column.
    """
    if not files:
        return []
    wanted = dict(columns) if isinstance(columns, Mapping) else list(columns) if columns else None
    try:
        table = ds.dataset(list(map(str, files))).to_table(filter=where, columns=wanted)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(files[0].parent, error) from None
    return table.to_pylist()


def footer(file: Path) -> pq.FileMetaData:
    """What a part says of its rows and columns; the rows are not read.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        return pq.read_metadata(file)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from None


def _unreadable(place: Path, error: Exception) -> InputError:
    return InputError(
        str(place),
        wanted="parts that can be read, as they were published",
        got=str(error).partition("\n")[0],
        fix="restore the file, or run the config again, which names the damaged part",
    )

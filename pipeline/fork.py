"""A run of another config that goes on from what a run has, as far as both agree; that run is left as it is.

What stays is linked, or copied where links cannot be; `pipeline.reuse` says what. Tables and weights are replaced,
never written into, so that links do no harm to the run they come from.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.console import Console
from pipeline.lineage import Lineage, read_records, write_records
from pipeline.own_modules import importable
from pipeline.reading import round_folders, run_settings
from pipeline.reuse import STAGES, Comparison, Reuse, Reused
from pipeline.reuse_reasons import Reasons
from pipeline.run_folder import write_config
from pipeline.schedule import asked_rounds
from pipeline.sources import find_sources
from pipeline.watched_files import WatchedFiles
from stages.errors import InputError, StageError

_CONFIG = "config.yaml"


def fork(run: Path, overrides: Sequence[str], *, name: str, config_file: Path | None, dry_run: bool) -> None:
    """Say what a new run takes over from the run in a folder, and start it.

    Args:
        overrides: what is other, as ``section.key=value``.
        name: of the new run, beside the other one.
        config_file: in the place of the run's own config.
        dry_run: only say it.

    Raises:
        PrefloopError: for anything a user can mend.
    """
    run = run.absolute()
    round_folders(run)
    file = config_file or run / _CONFIG
    if not (run / _CONFIG).exists():
        raise InputError(
            str(run / _CONFIG),
            wanted="the config of a run with a settled round",
            got="no such file",
            fix="let a round finish, then fork",
        )
    added = [] if config_file is not None else _added_rounds(run, overrides)
    sets = [*added, *overrides, f"run.dir={run.parent}", f"run.name={name}"]
    new = load_config(file, sets)  # first, so that of two modules of one name its own is imported
    if new.folder().exists():
        raise StageError(
            str(new.folder()), wanted="a new run", got="a folder of this name", fix="another name: --name NAME"
        )
    with importable(new.run.modules):
        old = load_config(run / _CONFIG)
        found = Comparison(Reasons(run, old, new, find_sources(new))).reuse()
    show(found, new)
    if dry_run:
        return
    take_over(run, new, found)
    Console().text(f"\n{new.folder()} goes on from there; to carry on: prefloop run {new.folder() / _CONFIG}\n")
    from pipeline.start import run as run_config

    run_config(file, sets)


def _added_rounds(run: Path, overrides: Sequence[str]) -> list[str]:
    """Rounds that were added to the run are its fork's too, where nothing else is said."""
    configured = run_settings(run)["rounds"]
    if isinstance(configured, list) or any(override.partition("=")[0] == "rounds" for override in overrides):
        return []
    asked = asked_rounds(run, configured)
    return [f"rounds={asked}"] if asked != configured else []


# ---- what is told ---------------------------------------------------------------------------------------------------


def show(found: Reuse, config: Config) -> None:
    """Print what stays and what is made again, and why."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for column in ("", "stages", "", "why"):
        table.add_column(column)
    for number, stages, stays, why in _grouped(found.stages):
        table.add_row(f"round {number}" if number else "before", stages, "reused" if stays else "made again", why)
    known = max((found.round for found in found.stages), default=0)
    if config.num_rounds > known:
        first, last = known + 1, config.num_rounds
        table.add_row(f"round {first}" if first == last else f"rounds {first} to {last}", "all", "new", "")
    Console().table(table)


def _grouped(stages: Sequence[Reused]) -> Iterator[tuple[int, str, bool, str]]:
    """Stages of a round that follow one another with the same lot, as one row."""
    rows: list[tuple[int, list[str], bool, str]] = []
    for found in stages:
        if rows and rows[-1][0] == found.round and rows[-1][2:] == (found.stays, found.why):
            rows[-1][1].append(found.stage)
        else:
            rows.append((found.round, [found.stage], found.stays, found.why))
    for number, names, stays, why in rows:
        yield number, ", ".join(names), stays, why


# ---- what is done ---------------------------------------------------------------------------------------------------


def take_over(run: Path, config: Config, found: Reuse) -> None:
    """Make the new run's folder, with all that stays; it is there whole, or not at all."""
    folder = config.folder()
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        for name in found.inputs:
            _link(run / name, scratch / name)
        for number, round_folder in round_folders(run).items():
            for stage in found.staying(number):
                for pattern in STAGES[stage]:
                    for source in round_folder.glob(pattern):
                        _link(source, scratch / round_folder.name / source.name)
        if found.num_settled:
            _settled(run, scratch, found.num_settled)
        write_config(config, scratch)
        scratch.rename(folder)
    except OSError as error:
        raise StageError(
            str(folder), wanted="a folder to write in", got=error.strerror or str(error), fix="--set run.dir=…"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _settled(run: Path, scratch: Path, count: int) -> None:
    """What the run knows of its settled rounds: lineage, watched files with their prompts, curves."""
    kept = Lineage.read(run / "run.json").rounds[:count]
    write_records(scratch / "run.json", read_records(run / "run.json")[: len(kept)])
    if (watched := run / "watched.json").exists():
        WatchedFiles(watched).keep_until(count, scratch / watched.name)
    for pool in run.glob("prompts-[0-9]*"):
        if int(pool.name.removeprefix("prompts-")) <= count:
            _link(pool, scratch / pool.name)
    if (curves := run / "tensorboard").is_dir():  # copied: a reader may have them open, and names must not change
        shutil.copytree(curves, scratch / curves.name)


def _link(source: Path, target: Path) -> None:
    """A file, or all files of a folder but unfinished ones, by hard links; copied onto another disk.

    Lines of JSON are copied: alone of all files they are written into.
    """
    for file in [source] if source.is_file() else sorted(source.rglob("*")):
        if file.is_dir() or file.name.startswith("."):
            continue
        place = target if source.is_file() else target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            if file.suffix == ".jsonl":
                shutil.copy2(file, place)
            else:
                os.link(file, place)
        except OSError:
            shutil.copy2(file, place)

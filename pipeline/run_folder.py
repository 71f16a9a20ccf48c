"""The run's folder before anything runs in it: held by one process, a place for logs, the config as understood.

A run at an address has a working folder on this node, which follows the address: see `pipeline.mirror`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from pipeline.addresses import is_address, working_folder
from pipeline.config import Config
from pipeline.console import Console
from pipeline.files import write_text
from pipeline.lease import LEASE_S, Lease, is_leased
from pipeline.mirror import mirror_of, mirrored, obtain_records
from pipeline.store import Store
from stages.errors import InputError, StageError


def write_config(config: Config, folder: Path) -> None:
    """Keep the config, as it was understood, in a run's folder."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_text(folder / "config.yaml", text)


@contextmanager
def following(config: Config) -> Iterator[Path]:
    """A config's run folder, which follows its address for the length of the block, where it lies at one."""
    folder, address = config.folder(), config.address()
    if address is None:
        yield folder
        return
    with mirrored(folder, address):
        obtain_records(folder)
        yield folder


@contextmanager
def run_at(place: str, *, tables: bool = False, to_change: bool = False) -> Iterator[Path]:
    """The folder of a run that a command names: itself, or a copy of what lies at an address, for the block's length.

    Args:
        tables: whether the rows of its tables are read.
        to_change: whether the run is changed; else the copy is apart from the one that a run works in.

    Raises:
        InputError: if there is no run at an address.
    """
    if not is_address(place):
        yield Path(place)
        return
    folder = working_folder(place, "working" if to_change else "reading")
    with mirrored(folder, place.rstrip("/")):
        obtain_records(folder, tables=tables, prune=not to_change)
        if not any(folder.glob("round-*")):
            raise InputError(
                place, wanted="a run's address", got="no round there", fix="a run lies at run.dir/run.name"
            )
        yield folder


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the folder for one process; of a run at an address, that address.

    Raises:
        StageError: if another process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")  # not to change its time before it is held
    except OSError as error:
        raise _not_writable(folder, error) from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StageError(
                str(folder),
                wanted="a run folder that nobody else is working in",
                got="another prefloop run holds it",
                fix="wait for it to end, or give this run another name: --set run.name=…",
            ) from None
        os.utime(file.fileno())  # `pipeline.live` reads there when the run was taken up
        if (found := mirror_of(folder)) is None:
            yield
            return
        # A renewal that is not answered must fail in time to be tried again.
        store = Store(found.store.address, patience_s=LEASE_S / 6)
        with Lease(store, tell=lambda text: Console().line("", "lease", text)).held():
            obtain_records(folder, prune=True)
            yield


def is_held(folder: Path) -> bool:
    """Whether a process works on the run in `folder` now."""
    if (found := mirror_of(folder)) is not None:
        return is_leased(found.store)
    if not (folder / ".lock").exists():
        return False
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def next_log_dir(folder: Path) -> Path:
    """``logs/attempt-K`` for the next K.

    Raises:
        StageError: if it cannot be made.
    """
    names = [path.name.removeprefix("attempt-") for path in (folder / "logs").glob("attempt-*")]
    taken = [int(name) for name in names if name.isdecimal()]
    log_dir = folder / "logs" / f"attempt-{max(taken, default=0) + 1}"
    try:
        log_dir.mkdir(parents=True)
    except OSError as error:
        raise _not_writable(log_dir, error) from None
    return log_dir


def _not_writable(folder: Path, error: OSError) -> StageError:
    return StageError(
        str(folder),
        wanted="a folder to write in",
        got=error.strerror or str(error),
        fix="name another place, by --set run.dir=… or --out, or remove what is in the way",
    )

"""The run's folder before anything runs in it: held by one process, a place for logs, the config as understood."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from pipeline.config import Config
from pipeline.files import write_text
from stages.errors import StageError


def write_config(config: Config) -> None:
    """Keep the config, as it was understood, in the run's folder."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_text(config.folder() / "config.yaml", text)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the folder for one process.

    Raises:
        StageError: if another process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
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
        yield


def is_held(folder: Path) -> bool:
    """Whether a process works on the run in `folder` now."""
    if not (folder / ".lock").exists():
        return False
    with (folder / ".lock").open("w") as file:
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

"""A folder that gives a run one round for each file of prompts that appears in it.

Files are taken in the order of their times, each once; one that has changed since counts as another. Which round took
which file is kept in ``watched.json`` in the run's folder. A file called ``STOP`` ends the run, once the files that are
there by then are taken. Write a file elsewhere and rename it into the folder, or give it another name until it is
whole: names that begin with a dot, and endings that no reader knows, are left alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.files import read_vouched, write_vouched
from pipeline.prompt_files import SUFFIXES
from stages.errors import ConfigError, InputError

STOP = "STOP"
_POLL_S = 0.5
_SETTLED_S = 1.0  # a file that did not change for this long is whole


@dataclass(frozen=True, slots=True)
class WatchedFiles:
    """The run's file that says what became of each file, and the folder to look for more, if any."""

    ledger: Path
    folder: Path | None = None

    def file_of(self, round: int) -> Path | None:
        """The file that a round took."""
        return next((Path(entry["file"]) for entry in self._entries() if entry["round"] == round), None)

    def is_as_taken(self, round: int) -> bool:
        """Whether the file that a round took is still there and did not change."""
        taken = next(entry for entry in self._entries() if entry["round"] == round)
        return _changed_ns(Path(taken["file"])) == taken["changed_ns"]

    def num_taken(self, *, among: int | None = None) -> int:
        """How many rounds took a file; `among`: only of the first so many."""
        rounds = [entry["round"] for entry in self._entries() if entry["round"] is not None]
        return sum(among is None or number <= among for number in rounds)

    def take(self, file: Path, *, round: int) -> None:
        """Note that a round takes a file."""
        self._note({"file": str(file), "round": round, "changed_ns": _changed_ns(file)})

    def refuse(self, file: Path, reason: str) -> None:
        """Note that a file cannot be used; no round has it."""
        rounds = [entry for entry in self._entries() if entry["file"] == str(file) and entry["round"]]
        taken = max(
            rounds, key=lambda entry: entry["round"], default=None
        )  # earlier ones had the file before it changed
        changed_ns = taken["changed_ns"] if taken else _changed_ns(file)
        self._note({"file": str(file), "round": None, "changed_ns": changed_ns, "reason": reason})

    def next_file(self) -> Path | None:
        """The next new file, waited for; None at ``STOP``, or where no folder is watched.

        Raises:
            InputError: if the folder is gone.
        """
        while self.folder is not None:
            stopped_ns, found = _changed_ns(self.folder / STOP), self._new(self.folder)
            whole_ns = time.time_ns() - int(_SETTLED_S * 1e9)
            if found and found[0][0] <= whole_ns:
                return found[0][1]
            if stopped_ns is not None and not (found and found[0][0] <= stopped_ns):
                return None
            time.sleep(_POLL_S)
        return None

    def _new(self, folder: Path) -> list[tuple[int, Path]]:
        """The files that no round has, each after the time of its last change, oldest first."""
        taken = {(entry["file"], entry["changed_ns"]) for entry in self._entries()}
        try:
            files = [file for file in folder.iterdir() if file.suffix in SUFFIXES and not file.name.startswith(".")]
        except FileNotFoundError:
            raise InputError(
                f"--watch {folder}",
                wanted="a folder",
                got="none of this name any more",
                fix=f"mkdir {folder}, and the same command carries on",
            ) from None
        found = [(changed_ns, file) for file in files if (changed_ns := _changed_ns(file)) is not None]
        return sorted((changed_ns, file) for changed_ns, file in found if (str(file), changed_ns) not in taken)

    def keep_until(self, round: int, ledger: Path) -> None:
        """Write what the rounds up to one took to another file."""
        write_vouched(ledger, {"files": [entry for entry in self._entries() if 0 < (entry["round"] or 0) <= round]})

    def _entries(self) -> list[dict[str, Any]]:
        if not self.ledger.exists():
            return []
        fix = "restore it, or start a run of another name"
        return read_vouched(self.ledger, "which round took which watched file", fix=fix)["files"]  # type: ignore[no-any-return]

    def _note(self, entry: dict[str, Any]) -> None:
        same = (entry["file"], entry["changed_ns"])
        others = [found for found in self._entries() if (found["file"], found["changed_ns"]) != same]
        write_vouched(self.ledger, {"files": [*others, entry]})


def _changed_ns(file: Path) -> int | None:
    """When a file was changed last; None if it is not there any more."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def refuse_watched(config: Config, folder: Path) -> None:
    """Check that there is a folder, and a config that can use what appears in it.

    Raises:
        PrefloopError: if not.
    """
    where = f"--watch {folder}"
    if config.prompts is None:
        raise ConfigError(
            where, wanted="a config with prompts, to say how the files are read", got="pairs", fix="leave --watch out"
        )
    if not folder.is_dir():
        got = "a file" if folder.exists() else "none of this name"
        fix = "name the folder it lies in" if folder.exists() else f"mkdir {folder}"
        raise InputError(where, wanted="a folder", got=got, fix=fix)

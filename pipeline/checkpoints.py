"""A round's checkpoints: its unfinished update, written down so that it goes on from there.

``ROUND/checkpoint/step-NNNNNN/`` holds the state after that step (`stages.update.checkpoint` says what is in it). It
counts once its manifest is there, written last: the update's fingerprint, every file with its sha256, and a hash of
both, so that no changed bit goes unseen. What is not whole is told and passed over, never read. The last two stay while
the update goes on; all go once its policy is published.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster.notices import Saving
from pipeline.artifacts import MANIFEST
from pipeline.files import keep_tree, read_vouched, write_vouched
from pipeline.fingerprints import differing_fields
from pipeline.mirror import fetch, keep, obtain, remove
from stages.errors import ContractError, StageError
from stages.update.config import UpdateConfig
from stages.weights import file_sha256

_log = logging.getLogger(__name__)
_KEPT = 2
_ASKED = "asked"  # there while somebody waits for a checkpoint, whatever the clock says
_LOOK_S = 5.0  # between two looks for it in a run's store
MOST_AT_ONCE = _KEPT + 1
"""Checkpoints of an update on disk while one is being written."""


class CheckpointFolder:
    """An update's checkpoints, as `stages.update.checkpoint.Checkpoints` has it.

    Args:
        round_folder: of the round.
        fingerprint: of the update.
        config: says when one is due.
    """

    def __init__(self, round_folder: Path, fingerprint: Mapping[str, Any], config: UpdateConfig) -> None:
        self._folder, self._fingerprint = _folder(round_folder), fingerprint
        self._minutes, self._steps = config.checkpoint_minutes, config.checkpoint_steps
        self._trusted: list[Path] = []  # the whole ones, oldest first
        self._last, self._looked = time.monotonic(), -math.inf

    def newest(self) -> Path | None:
        """The newest whole one of this very update; one that is damaged, or another update's, is told."""
        obtain(self._folder)
        for folder in sorted(self._folder.glob("step-*"), reverse=True):
            if not (folder / MANIFEST).exists():
                continue  # its writer was killed
            reason = self._why_not(folder)
            if reason is None:
                self._trusted = [folder]
                return folder
            _log.warning("no way on from checkpoint %s: %s", folder, reason)
        return None

    def bring(self, folder: Path) -> None:
        """Have one on this node that rank 0 found."""
        obtain(folder)

    def is_due(self, step: int) -> bool:
        """Whether one is wanted, after so many steps."""
        if time.monotonic() - self._looked >= _LOOK_S:
            self._looked = time.monotonic()
            _look(self._folder / _ASKED)
        if (self._folder / _ASKED).exists():
            return True
        by_step = self._steps is not None and step % self._steps == 0
        return by_step or (self._minutes is not None and time.monotonic() - self._last >= 60 * self._minutes)

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """The folder to write one to, published when the block ends; without room for it the update goes on."""
        folder = self._folder / f"step-{step:06d}"
        _remove(folder)
        try:
            yield folder
            self._publish(folder)
        except OSError as error:
            _log.warning("no checkpoint after step %d, the update goes on: %s", step, error)
            _remove(folder)
        self._last = time.monotonic()
        _take_back(self._folder / _ASKED)

    def _publish(self, folder: Path) -> None:
        files = sorted(folder.iterdir())
        for file in files:
            keep_tree(file)
        manifest = {"fingerprint": self._fingerprint, "files": {file.name: file_sha256(file) for file in files}}
        write_vouched(folder / MANIFEST, manifest)
        self._trusted = [*self._trusted, folder][-_KEPT:]
        for other in self._folder.glob("step-*"):
            if other not in self._trusted:
                _remove(other)

    def _why_not(self, folder: Path) -> str | None:
        """Why a published one does not count; None: it does."""
        try:
            manifest = read_vouched(folder / MANIFEST, "a checkpoint's manifest", fix="delete its folder")
        except ContractError:
            return f"{MANIFEST} is damaged"
        if fields := differing_fields(manifest["fingerprint"], self._fingerprint):
            return f"it is of another update, by {', '.join(fields)}"
        there = {file.name for file in folder.iterdir()} - {MANIFEST}
        if odd := sorted(there ^ manifest["files"].keys()):
            return f"{odd[0]} is {'not its own' if odd[0] in there else 'missing'}"
        damaged = (name for name, wanted in manifest["files"].items() if file_sha256(folder / name) != wanted)
        name = next(damaged, None)
        return None if name is None else f"{name} is damaged"


def drop_checkpoints(round_folder: Path) -> None:
    """Remove those of a round whose policy is published."""
    _remove(_folder(round_folder))


def asking(round_folder: Path) -> Saving:
    """How a round's update is asked for a checkpoint; nobody has asked yet."""
    asked = _folder(round_folder) / _ASKED
    remove(asked)

    def ask() -> None:
        asked.parent.mkdir(exist_ok=True)
        asked.touch()
        with suppress(StageError):  # rank 0 may be on this node
            keep(asked)

    def is_asked() -> bool:
        _look(asked)
        return asked.exists()

    return Saving(ask, is_asked)


def _look(asked: Path) -> None:
    """Have here what another node asked, or no longer asks."""
    with suppress(StageError):  # a store that does not answer may do so in time
        fetch(asked)


def _take_back(asked: Path) -> None:
    if asked.exists():
        with suppress(StageError):
            remove(asked)
        asked.unlink(missing_ok=True)


def _folder(round_folder: Path) -> Path:
    return round_folder / "checkpoint"


def _remove(folder: Path) -> None:
    """The manifest first, so that a folder of which a part is left never counts."""
    with suppress(OSError):
        remove(folder / MANIFEST)
    with suppress(OSError):
        remove(folder)
    shutil.rmtree(folder, ignore_errors=True)

"""A run at an address: the store has the truth, and every node a working folder that follows it.

What is published is put on the store before it gets its name in the working folder, in the order in which it is
published: nothing stands on the store that vouches for what is not there yet, and what a node has, the store has. What
is read is brought first, unless the copy here has the tag that the store names. For a folder that lies at no address
all of this does nothing.

Which folder follows which address stands in an environment variable, so that a run's workers know it too. Logs
stay on the node that writes them.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.store import Found, Store, opened
from stages.protocols import Weights

_VARIABLE = "PREFLOOP_MIRROR"  # FOLDER=ADDRESS
_TAGS = ".tags"  # in the working folder: the store's tag of every file that is as it is there
_STAYS = "logs/"
_AT_ONCE = 8  # requests
_TOLD = (".json", ".jsonl", ".yaml", ".txt")


class AlreadyThere(Exception):
    """Another has published a file that is published once."""


@dataclass(frozen=True, slots=True)
class Mirror:
    """A working folder and its store."""

    root: Path
    store: Store

    def key(self, path: Path) -> str:
        found = path.absolute().relative_to(self.root).as_posix()
        return "" if found == "." else found

    # ---- to the store -----------------------------------------------------------------------------------------------

    def upload(self, content: Path, target: Path, *, once: bool = False) -> str:
        """Put a file's content where `target` is on the store; its tag.

        Raises:
            AlreadyThere: with `once`, if there is one.
        """
        key = self.key(target)
        self._tag_file(key).unlink(missing_ok=True)
        tag = self.store.create(key, content) if once else self.store.put(key, content)
        if tag is None:
            raise AlreadyThere(key)
        return tag

    def note(self, target: Path, tag: str) -> None:
        """The copy here is the store's."""
        file = self._tag_file(self.key(target))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(tag, encoding="utf-8")

    def remove(self, path: Path) -> None:
        """Remove a file or a folder from the store: what vouches for others first, a folder's claim last."""
        key = self.key(path)
        found = [key] if self.store.find(key) else list(self.store.list(key))
        self.store.delete(sorted(found, key=_order))

    # ---- from the store ---------------------------------------------------------------------------------------------

    def fetch(self, file: Path, *, anew: bool = False) -> None:
        """Have a file here as it is on the store; none if there is none."""
        key, found = self.key(file), self.store.find(self.key(file))
        if found is None:
            self._forget(key)
        elif anew or not self._has(key, found):
            self._bring(key, found)

    def bring(self, folder: Path, wanted: Callable[[str, dict[str, Found]], bool], *, prune: bool) -> None:
        """Have the files of a folder here as they are on the store.

        Args:
            wanted: says of a key, given all of them, whether to bring it.
            prune: remove those that were brought once and are not on the store any more.
        """
        below = self.key(folder)
        there = {key: found for key, found in self.store.list(below).items() if not _is_ours(key)}
        lacking = [key for key, found in there.items() if wanted(key, there) and not self._has(key, found)]
        if lacking:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(self._bring, lacking, map(there.get, lacking)))
        if prune:
            tags = self.root / _TAGS / below
            noted = (file.relative_to(self.root / _TAGS).as_posix() for file in tags.rglob("*") if file.is_file())
            for key in [key for key in noted if key not in there]:
                self._forget(key)

    def _has(self, key: str, found: Found) -> bool:
        file = self._tag_file(key)
        return file.exists() and file.read_text(encoding="utf-8") == found.tag and (self.root / key).exists()

    def _bring(self, key: str, found: Found | None) -> None:
        target = self.root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            tag = self.store.get(key, scratch, found)
            if tag is None:
                self._forget(key)
                return
            self._tag_file(key).unlink(missing_ok=True)
            scratch.replace(target)
            self.note(target, tag)
        finally:
            scratch.unlink(missing_ok=True)

    def _forget(self, key: str) -> None:
        """Remove a copy of what is gone from the store; what was never there stays."""
        tag = self._tag_file(key)
        if tag.exists():
            (self.root / key).unlink(missing_ok=True)
            tag.unlink(missing_ok=True)

    def _tag_file(self, key: str) -> Path:
        return self.root / _TAGS / key


def _order(key: str) -> tuple[int, str]:
    name = key.rpartition("/")[2]
    if name == "manifest.json":
        return 0, key
    return (3 if name == "fingerprint.json" else 1 if "/_shards/" in key else 2), key


def _is_ours(key: str) -> bool:
    """Whether a key is a matter of the store's folder itself, such as the lease."""
    return key.startswith(".")


# ---- which folder lies where ----------------------------------------------------------------------------------------


@contextmanager
def mirrored(folder: Path, address: str) -> Iterator[Mirror]:
    """Have a working folder follow an address, for this process and those that it starts, within the block."""
    before, os.environ[_VARIABLE] = os.environ.get(_VARIABLE), f"{folder}={address}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield Mirror(folder, opened(address))
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before


def worker_variables() -> dict[str, str]:
    """What workers on other nodes need in their environment."""
    return {_VARIABLE: os.environ[_VARIABLE]} if _VARIABLE in os.environ else {}


def mirror_of(path: Path) -> Mirror | None:
    """The mirror that a path lies in, where it lies in one."""
    folder, _, address = os.environ.get(_VARIABLE, "").partition("=")
    if not folder or not path.absolute().is_relative_to(folder):
        return None
    found = Mirror(Path(folder), opened(address))
    key = found.key(path)
    return None if key.startswith(_STAYS) or _is_ours(key) else found


# ---- what is done on a path, wherever it lies -----------------------------------------------------------------------


@contextmanager
def publishing(scratch: Path, target: Path, *, once: bool) -> Iterator[None]:
    """Put a file on the store; in the block it gets its name here.

    Raises:
        AlreadyThere: with `once`, if the store has one.
    """
    found = mirror_of(target)
    if found is None:
        yield
        return
    tag = found.upload(scratch, target, once=once)
    yield
    found.note(target, tag)


def keep(file: Path) -> None:
    """Put a file on the store that was written under its own name."""
    if (found := mirror_of(file)) is not None:
        found.note(file, found.upload(file, file))


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; nothing where there is none."""
    if (found := mirror_of(path)) is not None:
        found.remove(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fetch(file: Path, *, anew: bool = False) -> None:
    """Have a file here as it is on the store; `anew`: whatever the copy here is."""
    if (found := mirror_of(file)) is not None:
        found.fetch(file, anew=anew)


def obtain(folder: Path) -> None:
    """Have a folder here with all that is in it."""
    if (found := mirror_of(folder)) is not None:
        found.bring(folder, lambda _key, _there: True, prune=True)


def obtain_weights(weights: Weights) -> None:
    """Have a policy here, with its float32 master."""
    for folder in filter(None, (weights.path, weights.master)):
        obtain(folder)


def obtain_records(folder: Path, *, tables: bool = False, prune: bool = False) -> None:
    """Have here what tells of a run: all but weights, their configs and tokenizers, and, unless asked for, tables."""
    if (found := mirror_of(folder)) is not None:
        found.bring(folder, partial(_is_record, tables=tables), prune=prune)


def _is_record(key: str, there: dict[str, Found], *, tables: bool) -> bool:
    folder, _, name = key.rpartition("/")
    if key.endswith(".parquet"):
        return tables
    if not key.endswith(_TOLD):
        return False
    return name == "manifest.json" or not any(f"{folder}/{other}" in there for other in ("config.json", "numbers.json"))


def place_of(folder: Path) -> str:
    """Where a run lies: its address, or the folder itself."""
    found = mirror_of(folder)
    return found.store.address if found is not None else str(folder)


def sizes(folder: Path) -> dict[str, int]:
    """The files of a folder itself by name, with their lengths in bytes."""
    if (found := mirror_of(folder)) is None:
        return {file.name: file.stat().st_size for file in folder.glob("*") if file.is_file()}
    below = found.key(folder)
    named = {key.removeprefix(f"{below}/"): each.bytes for key, each in found.store.list(below).items()}
    return {name: size for name, size in named.items() if "/" not in name}

"""What servers have answered, kept by what was asked: a shard that is scored again asks nothing twice.

One SQLite file, so that several scorers of a machine share it, and a kill at any time loses at most what was under way.
Nothing else is kept of a question than its hash.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.errors import StageError

_FILE = "answers.sqlite"
_WAIT_S = 60.0  # for another scorer's write
_AT_ONCE = 500  # keys in one query; SQLite has a limit


class Cache:
    """Answers by key; safe to use from several threads, and from several processes of one machine.

    Args:
        folder: made if need be; on one of this machine's disks, since SQLite's journal needs its locks.

    Raises:
        StageError: if there is something else, or nothing can be written.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._lock = folder / _FILE, threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(self._file, timeout=_WAIT_S, check_same_thread=False, isolation_level=None)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=NORMAL")
            self._base.execute("CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            raise self._refuse(error) from error

    def found(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """What is known of some keys."""
        out: dict[bytes, Any] = {}
        with self._lock:
            for start in range(0, len(keys), _AT_ONCE):
                some = keys[start : start + _AT_ONCE]
                asked = f"SELECT key, value FROM answers WHERE key IN ({', '.join('?' * len(some))})"
                try:
                    out |= {key: json.loads(value) for key, value in self._base.execute(asked, some)}
                except sqlite3.Error as error:
                    raise self._refuse(error) from error
        return out

    def keep(self, answers: Mapping[bytes, Any]) -> None:
        """Answers as plain JSON values; on the disk before this returns."""
        rows = [(key, json.dumps(value)) for key, value in answers.items()]
        with self._lock:
            try:
                self._base.execute("BEGIN IMMEDIATE")
                self._base.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
                self._base.execute("COMMIT")
            except sqlite3.Error as error:
                if self._base.in_transaction:
                    self._base.execute("ROLLBACK")
                raise self._refuse(error) from error

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()

    def _refuse(self, error: Exception) -> StageError:
        return StageError(
            str(self._file),
            wanted="a file that keeps what reward servers answered",
            got=f"{type(error).__name__}: {error}",
            fix="delete it (what it held is asked again), or name a folder on a local disk: --set score.cache=FOLDER",
        )


def key_of(*parts: Any) -> bytes:
    """A hash of plain JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).digest()

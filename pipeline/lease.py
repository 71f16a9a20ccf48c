"""One writer of a run at an address: who holds its lease renews it, and who finds it unrenewed takes it over.

The lease is a file on the store, created and changed only by puts with a condition, so that of two who ask at once one
gets it. No clock is compared with another's to take one: whoever finds a lease watches for its whole time whether it is
renewed. A holder that is known to be dead, a process of this very machine, is not waited for. Only `is_leased`, which
gives no right to write, goes by the holder's clock, since its caller does not wait.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.store import Store
from stages.errors import StageError

LEASE = ".lease.json"
LEASE_S = 60.0
_RENEWALS = 4  # in a lease's time


class Lease:
    """The right to write at an address.

    Args:
        store: of the run.
        seconds: after which one that was not renewed is anybody's.
        tell: told that a lease is watched, and whose it is.
    """

    def __init__(self, store: Store, *, seconds: float = LEASE_S, tell: Callable[[str], object] = print) -> None:
        self._store, self._seconds, self._tell = store, float(seconds), tell
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(), "id": uuid.uuid4().hex}
        self._tag = ""
        self._ended, self.lost = threading.Event(), ""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold it for the length of the block, renewed by a thread.

        Raises:
            StageError: if another holds it, or, in the block, if another has taken it.
        """
        self._store.refuse_unconditional()
        self._take()
        renewing = threading.Thread(target=self._renew, name="lease", daemon=True)
        renewing.start()
        try:
            yield
        except KeyboardInterrupt:
            if self.lost:
                raise self._refusal(self.lost) from None
            raise
        finally:
            self._ended.set()
            renewing.join()
            if not self.lost:
                with suppress(StageError):  # it ends by itself
                    self._store.swap(LEASE, self._content(released=True), self._tag)

    def _take(self) -> None:
        while not self._tag:
            self._tag = self._store.create(LEASE, self._content()) or ""
            holder, found = ({}, "") if self._tag else read_lease(self._store)
            if not found:  # it is held now, or was removed meanwhile
                continue
            if holder["id"] == self._me["id"]:  # a put that was done, and tried again
                self._tag = found
                return
            if not holder["released"] and not _is_dead(holder):
                self._watch(holder, found)
            self._tag = self._store.swap(LEASE, self._content(), found) or ""

    def _watch(self, holder: dict[str, Any], tag: str) -> None:
        """Wait for a lease's time to pass.

        Raises:
            StageError: as soon as it is renewed.
        """
        told, seconds = told_holder(holder), holder["seconds"]
        self._tell(f"{told} held this run; waiting {seconds:g} s to see whether it still does")
        until = time.monotonic() + seconds
        while (left_s := until - time.monotonic()) > 0:
            time.sleep(min(left_s, seconds / 2 / _RENEWALS))
            now, found = read_lease(self._store)
            if found != tag and not now["released"]:
                raise self._refusal(f"{told_holder(now)} holds it, and goes on renewing its lease")
            if found != tag:
                return

    def _renew(self) -> None:
        """Until the end; what cannot be renewed within its time is lost, and the process is interrupted."""
        renewed = time.monotonic()
        while not self._ended.wait(self._seconds / _RENEWALS):
            began, tag = time.monotonic(), None
            with suppress(Exception):  # a store that does not answer, or answers wrongly, may do better in time
                tag = self._store.swap(LEASE, self._content(), self._tag)
                if tag is None:
                    holder, found = read_lease(self._store)
                    if holder["id"] == self._me["id"]:  # a put that was done, and tried again
                        tag = found
                    elif not found:
                        self.lost = "its lease was removed, so that another may work on it too"
                    else:
                        self.lost = f"{told_holder(holder)} has taken it over, since its lease was not renewed in time"
            if tag is not None:
                self._tag, renewed = tag, began
            elif time.monotonic() - renewed > self._seconds:
                self.lost = self.lost or f"its lease could not be renewed within {self._seconds:g} s"
            if self.lost:
                os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C: whatever the main thread waits for ends
                return

    def _content(self, *, released: bool = False) -> bytes:
        state = {"seconds": self._seconds, "released": released, "renewal": uuid.uuid4().hex, "time": time.time()}
        return json.dumps(self._me | state).encode()

    def _refusal(self, got: str) -> StageError:
        return StageError(
            self._store.address,
            wanted="a run that no other process works on",
            got=got,
            fix="wait for it to end, or give this run another name: --set run.name=…",
        )


def read_lease(store: Store) -> tuple[dict[str, Any], str]:
    """Who holds a run's lease, or held it last, and its tag.

    Raises:
        StageError: if the file is not as a lease is.
    """
    found = store.read(LEASE)
    holder: Any
    try:
        holder = json.loads(found[0]) if found is not None else _NOBODY
    except ValueError:
        holder = None
    if not isinstance(holder, dict) or any(type(holder.get(key)) is not type(_NOBODY[key]) for key in _NOBODY):
        raise StageError(
            f"{store.address}/{LEASE}", wanted="a lease", got="something else", fix="delete the file, and run again"
        )
    return holder, found[1] if found is not None else ""


_NOBODY = {"released": True, "id": "", "host": "", "machine": "", "pid": 0, "seconds": 0.0, "time": 0.0}
"""What a lease says, where there is none."""


def is_leased(store: Store) -> bool:
    """Whether somebody holds the run, as far as can be told without watching, and if clocks agree."""
    holder, _ = read_lease(store)
    return not holder["released"] and time.time() - holder["time"] < holder["seconds"] and not _is_dead(holder)


def told_holder(holder: dict[str, Any]) -> str:
    """A holder in words."""
    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder["time"]))
    return f"process {holder['pid']} on {holder['host']} (renewed {at})"


def _machine() -> str:
    """What tells this machine, since it was started, and its process ids from any others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    processes = Path("/proc/self/ns/pid")
    return f"{boot.read_text().strip()} {os.readlink(processes)}" if boot.exists() and processes.exists() else ""


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether a holder was a process of this machine and has ended; False where that cannot be told."""
    if not holder["machine"] or holder["machine"] != _machine():
        return False
    if holder["pid"] == os.getpid():
        return False
    return not Path(f"/proc/{holder['pid']}").exists()

"""Notices that something will be taken away soon: a SIGTERM to this process, a node that Ray drains.

Machines that can be taken away (spot instances, Slurm's preemption, Kubernetes' evictions) give a notice first. What is
under way may then be saved: a SIGTERM asks for that, waits until it is so, at most for a time, and then interrupts as
Ctrl-C does. A second one interrupts at once.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from cluster.errors import TakenAway

_log = logging.getLogger(__name__)
_LOOK_S = 0.1
_LOOK_AT_NODES_S = 2.0


@dataclass(frozen=True, slots=True)
class Saving:
    """Something under way that can be saved.

    Attributes:
        ask: has it saved soon.
        is_asked: whether that is still to be done.
    """

    ask: Callable[[], None]
    is_asked: Callable[[], bool]


class Notices:
    """What this process has notice of.

    Args:
        grace_s: how long what is under way may take to be saved.
        on_leaving: is told of every node that Ray begins to drain, by its id.

    Attributes:
        leaving: the nodes that Ray drains, by their ids.
    """

    def __init__(self, grace_s: float, on_leaving: Callable[[str], object] = lambda _: None) -> None:
        self.leaving: frozenset[str] = frozenset()
        self._grace_s, self._on_leaving = grace_s, on_leaving
        self._saving: Saving | None = None
        self._waiter: threading.Thread | None = None
        self._ends = False  # since a SIGTERM came
        self._over = threading.Event()  # nothing is to be interrupted any more

    @contextmanager
    def taken(self, *, of_nodes: bool) -> Iterator[None]:
        """Take notices for the length of the block; call it in the main thread, with Ray up.

        Args:
            of_nodes: those of nodes too.

        Raises:
            TakenAway: in the block, after a SIGTERM.
        """
        before = signal.signal(signal.SIGTERM, self._tell)
        watcher = threading.Thread(target=self._watch_nodes, name="node-watch", daemon=True)
        if of_nodes:
            watcher.start()
        try:
            yield
        except (KeyboardInterrupt, SystemError):  # Ray, where it waits, makes one of these of whatever is raised
            if self._ends:
                raise TakenAway from None
            raise
        finally:
            self._over.set()
            for thread in (watcher if of_nodes else None, self._waiter):
                if thread is not None:
                    thread.join()
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def saved(self, saving: Saving) -> Iterator[None]:
        """What is under way for the length of the block."""
        self._saving = saving
        try:
            yield
        finally:
            self._saving = None

    def _tell(self, _number: int, _frame: FrameType | None) -> None:
        if self._over.is_set():
            return
        if self._saving is None or self._waiter is not None:
            self._ends = True
            self._over.set()
            raise TakenAway
        self._waiter = threading.Thread(target=self._interrupt_once_saved, args=(self._saving,), name="notice")
        self._waiter.start()

    def _interrupt_once_saved(self, saving: Saving) -> None:
        saved, until = threading.Event(), time.monotonic() + self._grace_s
        # Apart, since a store that does not answer may keep it longer than there is time.
        threading.Thread(target=self._save, args=(saving, saved), name="saving", daemon=True).start()
        while self._saving is saving and not saved.is_set() and time.monotonic() < until:
            if self._over.wait(_LOOK_S):
                return
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _save(self, saving: Saving, saved: threading.Event) -> None:
        with _told():
            saving.ask()
            while saving.is_asked() and not self._over.wait(_LOOK_S):
                pass
        saved.set()

    def _watch_nodes(self) -> None:
        while not self._over.wait(_LOOK_AT_NODES_S):
            with _told():
                found = frozenset(_draining())
                new, self.leaving = found - self.leaving, found
                for node in sorted(new):
                    self._on_leaving(node)
                    if (saving := self._saving) is not None:
                        saving.ask()


@contextmanager
def _told() -> Iterator[None]:
    """Has whatever goes wrong in a thread told in the driver's log: the run does not depend on it."""
    try:
        yield
    except Exception:
        _log.exception("a notice could not be followed")


def _draining() -> dict[str, int]:
    """The nodes that Ray drains. Ray has no public way to ask."""
    from ray._private.state import state

    return state.get_draining_nodes()  # type: ignore[no-any-return]

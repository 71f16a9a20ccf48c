"""The local Ray's own processes, watched: a driver that lost them would wait for ever."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from cluster.errors import NodeLost

_LOOK_S = 0.2
_AGAIN_S = 3.0  # between two signals, should what the first one raised have been swallowed
_SIGNAL = signal.SIGUSR1  # wakes the main thread where it waits inside Ray, as Ctrl-C does


@contextmanager
def watched_node() -> Iterator[None]:
    """Raises `NodeLost` in the main thread, whatever it waits for, once the raylet or the GCS of a local Ray ends.

    The watch also takes note of the ended process, which would stay a zombie else: to the raylet's workers a zombie
    counts as alive, and they would work on for nobody.
    """
    processes, over = _ray_processes(), threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_S):
            if _ended(processes) and not over.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)
                over.wait(_AGAIN_S)

    def tell(_number: int, _frame: FrameType | None) -> None:
        if reason := _ended(processes):
            raise NodeLost(reason)

    before = signal.signal(_SIGNAL, tell)
    watcher = threading.Thread(target=watch, name="ray-watch", daemon=True)
    watcher.start()
    try:
        yield
    except Exception as error:  # what dies with it may be noticed first, and Ray wraps what is raised while it waits
        if reason := _ended(processes):
            raise NodeLost(reason) from error
        raise
    finally:
        over.set()
        watcher.join()
        signal.signal(_SIGNAL, before)


def _ended(processes: Mapping[str, subprocess.Popen[bytes]]) -> str:
    """The first process that has ended, and how, in words; empty if there is none."""
    codes = {name: process.poll() for name, process in processes.items()}
    return next((f"its {name} ended ({_status(code)})" for name, code in codes.items() if code is not None), "")


def _ray_processes() -> Mapping[str, subprocess.Popen[bytes]]:
    """The raylet and the GCS that `ray.init` started in this process. Ray has no public way to ask."""
    from ray._private import ray_constants
    from ray._private.worker import global_worker

    kinds = {"raylet": ray_constants.PROCESS_TYPE_RAYLET, "GCS": ray_constants.PROCESS_TYPE_GCS_SERVER}
    started = global_worker.node.all_processes
    return {name: started[kind][0].process for name, kind in kinds.items()}


def _status(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"status {code}"

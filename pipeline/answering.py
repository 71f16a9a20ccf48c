"""How a command ends: its work is done here; what goes wrong becomes words and an exit status, never a traceback."""

from __future__ import annotations

import errno
import os
import select
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.texts import visible
from stages.errors import ConfigError, PrefloopError

if TYPE_CHECKING:
    from cluster.errors import ClusterError


_CARRIES_ON = "the same command carries on where this one stopped"
_UNREAD = 141  # as of a program that SIGPIPE ended


def answer_for(work: Callable[[], Any]) -> None:
    """Do the work, and end the process with a status.

    0: done; 1: it could not be done; 2: the config is wrong; 70: a mistake of ours; 130: interrupted; 141: nobody reads
    its output any more; 143: SIGTERM.
    """
    try:
        work()
        sys.stdout.flush()
        message, status = "", 0
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        message, status = ending(error)
    with suppress(OSError):  # of an output that is closed, or on a full disk
        sys.stdout.flush()
    if message:
        with suppress(OSError):
            print(visible(message), file=sys.stderr, flush=True)
    # Ray and torch threads may still be up; they must not delay the exit, talk over it, or change its status.
    os._exit(status)


def ending(error: BaseException) -> tuple[str, int]:
    """What a command that ended with an error says, and its status; see `answer_for`."""
    from cluster.errors import ClusterError, TakenAway

    if isinstance(error, PrefloopError):
        return str(error), 2 if isinstance(error, ConfigError) else 1
    if isinstance(error, ClusterError) and (told := _of_the_cluster(error)):
        return told, 1
    if isinstance(error, TakenAway):
        return f"ended as asked (SIGTERM); {_CARRIES_ON}", 143
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {_CARRIES_ON}", 130
    if _is_unread(error):
        return "", _UNREAD
    if _is_for_want_of_room(error):
        return _full_disk(str(error)), 1
    notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", []))
    first_line = (str(error).splitlines() or [""])[0]
    return f"a mistake in prefloop: {type(error).__name__}: {first_line}{notes}", 70


def _of_the_cluster(error: ClusterError) -> str | None:
    """The words for what went wrong with the machines; None for what should have been dealt with before."""
    from cluster.errors import KeptWaiting, NodeLost, NotEnough, Unprotected, Unreachable, WorkerLost

    match error:
        case WorkerLost() if _is_full(error.log.parent):
            return _full_disk(f"No space left on device, under {error.log.parent}")
        case WorkerLost():
            wanted, fix = "a worker that lives up to the end", f"read {error.log}; {_CARRIES_ON}"
            return _told(f"{error.name} was lost", wanted, error.reason, fix)
        case NodeLost():
            fix = f"if the machine was short of memory, give it less to do; {_CARRIES_ON}"
            return _told("Ray was lost", "its processes, up to the end", error.reason, fix)
        case NotEnough():
            fix = "fewer sample.engines or update.workers, or a larger cluster"
            return _told("the cluster is too small", error.wanted, error.got, fix)
        case KeptWaiting():
            wanted = f"{error.name}: {error.wanted}, within {error.waited_s:g} s"
            fix = "wait until others let go (ray status tells what is held), then give the same command; it carries on"
            return _told("cluster.start_timeout_s", wanted, error.got, fix)
        case Unreachable():
            fix = "--set cluster.address=local, or the address that ray status prints"
            return _told("cluster.address", "a Ray cluster", f"{error.address}: {error.reason}", fix)
        case Unprotected():
            wanted, got = "a cluster that takes work only with a token", f"{error.address}: {error.reason}"
            fix = (
                "start it with RAY_AUTH_MODE=token and a token (ray get-auth-token --generate), and set both here; or, "
                "where everybody who reaches it may run code on it, --set cluster.allow_unauthenticated=true"
            )
            return _told("cluster.allow_unauthenticated", wanted, got, fix)
    return None


def _told(where: str, wanted: str, got: str, fix: str) -> str:
    return f"{where}\n  wanted: {wanted}\n  got:    {got}\n  fix:    {fix}"


def _full_disk(got: str) -> str:
    return _told(
        "a full disk", "room to write", got, f"make room there, for example with prefloop clean; {_CARRIES_ON}"
    )


def _is_unread(error: BaseException) -> bool:
    """Whether output went into a pipe whose reader has ended, as `head` does."""
    if isinstance(error, SystemExit):  # rich's way out, which has led the output elsewhere by now
        return isinstance(error.__context__, BrokenPipeError)
    looked = select.poll()
    looked.register(1, select.POLLOUT)
    return isinstance(error, BrokenPipeError) and any(state & select.POLLERR for _, state in looked.poll(0))


def _is_full(folder: Path) -> bool:
    """Whether there is no room for a log's last words."""
    return folder.exists() and shutil.disk_usage(folder).free < 1 << 16


def _is_for_want_of_room(error: BaseException | None) -> bool:
    """Whether a file could not be written since its disk, or somebody's share of it, is full."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__
    return False

"""How a command ends: its work is done here; what goes wrong becomes words and an exit status, never a traceback."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.texts import visible
from stages.errors import ConfigError, PrefloopError


def answer_for(work: Callable[[], Any]) -> None:
    """Do the work, and end the process with a status.

    0: done; 1: it could not be done; 2: the config is wrong; 70: a mistake of ours; 130: interrupted; 143: SIGTERM.
    """
    from cluster.errors import KeptWaiting, NodeLost, NotEnough, TakenAway, Unprotected, Unreachable, WorkerLost

    try:
        work()
        _leave("", 0)
    except PrefloopError as error:
        _leave(str(error), 2 if isinstance(error, ConfigError) else 1)
    except WorkerLost as error:
        if _is_full(error.log.parent):
            _leave(_full_disk(f"No space left on device, under {error.log.parent}"), 1)
        _leave(f"{error}\n  fix:    read the log; the same command carries on where this one stopped", 1)
    except NodeLost as error:
        fix = (
            "if the machine was short of memory, give it less to do; the same command carries on where this one stopped"
        )
        _leave(f"Ray was lost\n  wanted: its processes, up to the end\n  got:    {error.reason}\n  fix:    {fix}", 1)
    except NotEnough as error:
        fix = "fewer sample.engines or update.workers, or a larger cluster"
        _leave(f"the cluster is too small\n  wanted: {error.wanted}\n  got:    {error.got}\n  fix:    {fix}", 1)
    except KeptWaiting as error:
        fix = "wait until others let go (ray status tells what is held), then give the same command; it carries on"
        _leave(
            f"cluster.start_timeout_s\n  wanted: {error.name}: {error.wanted}, within {error.waited_s:g} s\n"
            f"  got:    {error.got}\n  fix:    {fix}",
            1,
        )
    except Unreachable as error:
        fix = "--set cluster.address=local, or the address that ray status prints"
        _leave(
            f"cluster.address\n  wanted: a Ray cluster\n  got:    {error.address}: {error.reason}\n  fix:    {fix}", 1
        )
    except Unprotected as error:
        fix = "start it with RAY_AUTH_MODE=token and a token (ray get-auth-token --generate), and set both here"
        _leave(
            "cluster.allow_unauthenticated\n  wanted: a cluster that takes work only with a token\n"
            f"  got:    {error.address}: {error.reason}\n  fix:    {fix}; or, where everybody who reaches it may run "
            "code on it, --set cluster.allow_unauthenticated=true",
            1,
        )
    except TakenAway:
        _leave("ended as asked (SIGTERM); the same command carries on where this one stopped", 143)
    except KeyboardInterrupt:
        _leave("interrupted; the same command carries on where this one stopped", 130)
    except Exception as error:  # the last line before the user
        if _is_for_want_of_room(error):
            _leave(_full_disk(str(error)), 1)
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", []))
        first_line = (str(error).splitlines() or [""])[0]
        _leave(f"a mistake in prefloop: {type(error).__name__}: {first_line}{notes}", 70)


def _full_disk(got: str) -> str:
    fix = "make room there, for example with prefloop clean; the same command carries on where this one stopped"
    return f"a full disk\n  wanted: room to write\n  got:    {got}\n  fix:    {fix}"


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


def _leave(message: str, status: int) -> None:
    sys.stdout.flush()
    if message:
        print(visible(message), file=sys.stderr, flush=True)
    # Ray and torch threads may still be up; they must not delay the exit, talk over it, or change its status.
    os._exit(status)

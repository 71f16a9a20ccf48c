"""Fault points: named places where a process can be made to die, hang or fail, to see what a run makes of it.

A point is one call, ``fault_point("sample.middle", ...)``, that costs a look-up unless the environment arms it:

    PREFLOOP_FAULTS='sample.middle:kill@2; file.written[round-0001/candidates/part-]:hang'
    PREFLOOP_FAULTS_FOLDER=/tmp/marks

Faults are parted by semicolons; each is ``POINT[ON]:KIND@NTH*TIMES``. It counts how often the point is reached (with
brackets: reached on something whose name holds ON), over all processes, and fires the NTH time (1) and from then on,
TIMES (1) in all. The folder keeps these counts, so that the same command given again goes on from them, and a line with
time and process for each firing. The driver's environment reaches the workers of a local Ray.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FAULTS, FOLDER = "PREFLOOP_FAULTS", "PREFLOOP_FAULTS_FOLDER"

POINTS = {
    "driver.start": "in the driver: Ray is up, nothing was done in this call",
    "driver.shard": "in the driver: a worker has told that a shard is done; on the stage's name",
    "sample.start": "in a sampler: before a shard; on its table's path, and the shard as shard-N",
    "sample.rows": "in a sampler: before the engine gets its requests; on the prompts' ids",
    "sample.middle": "in a sampler: the answers are there, nothing of them is written; on, as at the start",
    "score.start": "in the scorer: before a shard; on its table's path, and the shard as shard-N",
    "score.middle": "in the scorer: the rewards are there, nothing of them is written; on, as at the start",
    "update.start": "in a training rank: before a round's update; on round-N/rank-N",
    "update.step": "in a training rank: before an optimizer step; on rank-N/step-N. with a full stop",
    "update.middle": "in a training rank: after an optimizer step; on rank-N",
    "update.publishing": "in a training rank: the new weights are written, not yet published; on round-N/rank-N",
    "update.end": "in a training rank: the new policy is published, nobody was told; on round-N/rank-N",
    "file.written": "anywhere: a file is whole under a scratch name, before it gets its own; on its path",
    "file.placed": "anywhere: just after a file got its name; on its path",
}
"""What each point is, where it is reached, and on what."""

KINDS = {
    "kill": "SIGKILL to the process itself",
    "parent": "SIGKILL to its parent, which has to be a raylet: Ray's workers are its children",
    "exit": "the process exits with status 1, without clearing up",
    "hang": "it goes on for ever and does nothing",
    "raise": "a RuntimeError",
}

_FAULT = re.compile(r"(?P<point>[\w.]+)(\[(?P<on>[^]]*)\])?:(?P<kind>\w+)(@(?P<nth>\d+))?(\*(?P<times>\d+))?")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault that is armed; see the module."""

    point: str
    on: str
    kind: str
    nth: int
    times: int

    @property
    def name(self) -> str:
        return f"{self.point}[{self.on}]:{self.kind}@{self.nth}"


def parse_faults(text: str) -> list[Fault]:
    """Faults as the environment spells them.

    Raises:
        ValueError: if one is misspelt, or there is no such point or kind.
    """
    faults = []
    for part in filter(None, map(str.strip, text.split(";"))):
        found = _FAULT.fullmatch(part)
        if found is None or found["point"] not in POINTS or found["kind"] not in KINDS:
            raise ValueError(f"{FAULTS}: {part!r} is none of POINT[ON]:KIND@NTH*TIMES with points {', '.join(POINTS)}")
        nth, times = int(found["nth"] or 1), int(found["times"] or 1)
        faults.append(Fault(found["point"], found["on"] or "", found["kind"], nth, times))
    return faults


def fault_point(point: str, on: Iterable[object] = ()) -> None:
    """Do here what was armed for this point, if anything was."""
    if armed := _armed():
        assert point in POINTS, point
        names = [str(name) for name in on]
        for fault in armed:
            if fault.point == point and (not fault.on or any(fault.on in name for name in names)):
                _reached(fault)


def fired(folder: Path) -> dict[str, list[float]]:
    """When each fault has fired, by its name, in seconds since 1970: what a folder of marks says."""
    found: dict[str, list[float]] = {}
    for file in sorted(folder.glob("fault-*.jsonl")):
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            found.setdefault(line["fault"], []).extend([line["time"]] if line["fires"] else [])
    return found


@lru_cache(maxsize=1)
def _armed() -> list[Fault]:
    return parse_faults(os.environ.get(FAULTS, ""))


def _reached(fault: Fault) -> None:
    folder = Path(os.environ[FOLDER])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"fault-{_armed().index(fault):02d}.jsonl").open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        before = [json.loads(line)["fires"] for line in file]
        fires = len(before) + 1 >= fault.nth and sum(before) < fault.times
        mark = {"fault": fault.name, "fires": fires, "time": time.time(), "process": os.getpid()}
        file.write(json.dumps(mark) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if fires:
        _fire(fault)


def _fire(fault: Fault) -> None:
    match fault.kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "parent":
            name = Path(f"/proc/{os.getppid()}/comm").read_text(encoding="utf-8").strip()
            assert name == "raylet", f"{fault.name}: the parent here is {name}, no raylet"
            os.kill(os.getppid(), signal.SIGKILL)
        case "exit":
            os._exit(1)
        case "hang":
            while True:
                time.sleep(3600)
        case "raise":
            raise RuntimeError(f"the fault {fault.name} was armed here")

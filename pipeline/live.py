"""A run at one moment, read from its folder alone: from any terminal of a machine that sees it, at any time.

Nothing is asked of the run and nothing is written. What is put in place or removed while it is read is read again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.progress import Progress, newest_step, stages_of, time_of, whole_lines
from pipeline.reading import num_rounds, reason_stopped, rounds_in, run_settings
from pipeline.report import round_reports
from stages.errors import InputError

_TRIES = 10  # no stage publishes so often that it meets each of them


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        rounds: every round's stages by its number; 0 is the evaluation before the first.
        reports: of the rounds that have one.
        num_asked: rounds; None before the first is settled.
        stopped: why no round follows the settled ones, though more were asked for.
        works: whether a process of this machine works on it; None where that cannot be seen.
        workers: what is known of each, by name.
        step: the newest optimizer step's metrics of the rounds under way.
        quiet_s: since the folder last changed.
        round_s: median of the settled rounds; None before there is one.
        begun_s: since the round that goes on began, or was taken up again.
    """

    folder: Path
    rounds: Mapping[int, list[Progress]]
    reports: list[dict[str, Any]]
    num_asked: int | None
    stopped: str | None
    works: bool | None
    workers: Mapping[str, str]
    step: Mapping[str, Any]
    quiet_s: float
    round_s: float | None
    begun_s: float

    @property
    def num_settled(self) -> int:
        """Rounds that have a report."""
        return sum(report["round"] > 0 for report in self.reports)

    @property
    def under_way(self) -> dict[int, list[Progress]]:
        """The rounds without a report; of two the later one is sampled ahead."""
        reported = {report["round"] for report in self.reports}
        return {number: stages for number, stages in self.rounds.items() if number not in reported}

    @property
    def is_finished(self) -> bool:
        """Whether nobody works on it, and no round is left to be done."""
        is_done = self.num_asked is not None and self.num_settled >= self.num_asked
        return (is_done or self.stopped is not None) and not self.works

    @property
    def to_go_s(self) -> float | None:
        """Seconds to the run's end, if rounds go on as the settled ones did."""
        if self.round_s is None or self.num_asked is None:
            return None
        left = self.num_asked - self.num_settled
        return max(0.0, left * self.round_s - (self.begun_s if left else 0.0))


def snapshot(folder: Path) -> Snapshot:
    """A run now.

    Raises:
        InputError: if the folder holds no run, or a file of it cannot be read.
    """
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):  # removed after it was found
            return _snapshot(folder)
    raise InputError(
        str(folder), wanted="files that stay for as long as they are read", got="none", fix="give the command again"
    )


def _snapshot(folder: Path) -> Snapshot:
    found = rounds_in(folder)
    if not found and not (folder / ".lock").exists():
        raise InputError(
            str(folder),
            wanted="the folder of a run",
            got="no round in it" if folder.is_dir() else "no such folder",
            fix="runs lie in runs/NAME by default",
        )
    reports, settings = round_reports(folder), run_settings(folder)
    reported = {report["round"] for report in reports}
    under_way = {number: path for number, path in found.items() if number not in reported}
    seconds = [report["seconds"] for report in reports if "seconds" in report]
    attempts = sorted((folder / "logs").glob("attempt-*"), key=time_of)[-1:]
    now, since = time.time(), _taken_up(folder)
    steps = filter(None, map(newest_step, reversed(under_way.values())))
    return Snapshot(
        folder,
        {number: stages_of(path, number, since=since) for number, path in found.items()},
        reports,
        num_rounds(folder, settings),
        reason_stopped(folder, settings, reports),
        _is_worked_on(folder / ".lock"),
        _workers(attempts[0] / "workers.jsonl") if attempts else {},
        next(steps, {}),
        now - max(map(_changed, [*under_way.values(), *attempts]), default=now),
        median(seconds) if seconds else None,
        now - max(since, min(map(_began, under_way.values()), default=now)),
    )


def _taken_up(folder: Path) -> float:
    """When the process that works on a run began, or the last one that did; see `pipeline.run_folder.only_run`."""
    lock = folder / ".lock"
    return time_of(lock) if lock.exists() else 0.0


def _workers(file: Path) -> dict[str, str]:
    """What each worker's last line says, and how often it had died before in this call."""
    found: dict[str, str] = {}
    deaths: dict[str, int] = {}
    for event in whole_lines(file.read_text(encoding="utf-8").splitlines() if file.exists() else ()):
        name = event["worker"]
        if event["event"] == "died":
            found[name], deaths[name] = f"died: {event.get('reason', '')}", deaths.get(name, 0) + 1
        else:
            found[name] = "up" + (f", {deaths[name]} died before it" if name in deaths else "")
    return found


def _is_worked_on(lock: Path) -> bool | None:
    """Whether a process of this machine holds a lock; asking the lock itself might keep a run from starting."""
    try:
        inode, held = lock.stat().st_ino, Path("/proc/locks").read_text(encoding="utf-8")
    except OSError:
        return None
    return any(line.split()[5].rpartition(":")[2] == str(inode) for line in held.splitlines() if "FLOCK" in line)


def _changed(folder: Path) -> float:
    """When something below a folder changed last."""
    times = []
    for path in [folder, *folder.rglob("*")]:
        with suppress(FileNotFoundError):
            times.append(time_of(path))
    return max(times, default=0.0)


def _began(folder: Path) -> float:
    claims = [time_of(claim) for claim in folder.glob("*/fingerprint.json")]
    return min(claims, default=time_of(folder))

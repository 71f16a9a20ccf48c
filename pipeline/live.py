"""How a run goes just now, read from its folder alone: from any terminal of a machine that sees it, at any time.

Nothing is asked of the run and nothing is written. Rates are of what was published: a stage's parts and the times at
which their entries appeared, the optimizer steps in ``metrics.jsonl``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.artifacts import MANIFEST
from pipeline.files import read_json
from pipeline.reading import num_rounds, run_settings
from pipeline.report import round_reports
from stages.errors import InputError

STAGES = ("prompts", "candidates", "scored", "pairs", "groups", "reference_logps", "policy", "evaluation/scored")
_ENTRIES = "_shards/part-*.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """A stage of a round.

    Attributes:
        done, total: parts, or optimizer steps; `total` 0 where it is not known yet.
        rate: a second, of `unit`; None before there are two points in time.
    """

    stage: str
    done: int
    total: int
    is_closed: bool
    rate: float | None = None
    unit: str = ""
    pace: float = 0.0  # parts or steps a second

    @property
    def to_go_s(self) -> float | None:
        """Seconds that it still takes at its own pace; None where that cannot be told."""
        left = self.total - self.done
        return left / self.pace if left > 0 and self.pace and not self.is_closed else None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        rounds: every round's stages by its number; 0 is the evaluation before the first.
        num_settled, num_asked: rounds; `num_asked` None before the first is settled.
        works: whether a process of this machine works on it; None where that cannot be seen.
        workers: what is known of each, by name.
        step: the newest optimizer step's metrics.
        quiet_s: since the folder last changed.
        round_s: median of the settled rounds; None before there is one.
        begun_s: since the round that goes on began.
    """

    folder: Path
    rounds: Mapping[int, list[Progress]]
    reports: list[dict[str, Any]]
    num_settled: int
    num_asked: int | None
    works: bool | None
    workers: Mapping[str, str]
    step: Mapping[str, Any]
    quiet_s: float
    round_s: float | None
    begun_s: float

    @property
    def is_finished(self) -> bool:
        return self.num_asked is not None and self.num_settled >= self.num_asked and not self.works

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
        InputError: if the folder holds no run.
    """
    found = {int(f.name.removeprefix("round-")): f for f in sorted(folder.glob("round-[0-9]*"))}
    if not found and not (folder / ".lock").exists():
        raise InputError(
            str(folder),
            wanted="the folder of a run",
            got="no round in it" if folder.is_dir() else "no such folder",
            fix="runs lie in runs/NAME by default",
        )
    reports = round_reports(folder)
    settled = [report for report in reports if report["round"]]
    seconds = [report["seconds"] for report in settled if "seconds" in report]
    now = time.time()
    attempts = sorted((folder / "logs").glob("attempt-*"), key=lambda path: path.stat().st_mtime)
    last = max((_changed(path) for number, path in found.items() if number > len(settled)), default=0.0)
    return Snapshot(
        folder,
        {number: _stages(path, number) for number, path in found.items()},
        reports,
        len(settled),
        num_rounds(folder, run_settings(folder)),
        _is_worked_on(folder / ".lock"),
        _workers(attempts[-1] / "workers.jsonl") if attempts else {},
        _last_step(found[max(found)] / "metrics.jsonl") if found else {},
        now - max([last, *(_changed(path) for path in attempts[-1:])], default=now),
        median(seconds) if seconds else None,
        now - min((_began(path) for number, path in found.items() if number > len(settled)), default=now),
    )


def _stages(folder: Path, number: int) -> list[Progress]:
    parts = len(list((folder / "prompts").glob(_ENTRIES)))
    names = [name for name in STAGES if name.startswith("evaluation") or number]
    present = [name for name in names if (folder / name).is_dir() or name not in ("pairs", "groups")]
    return [_update(folder) if name == "policy" else _table(folder / name, name, parts) for name in present]


def _table(stage: Path, name: str, parts: int) -> Progress:
    """A stage that publishes parts; its rate is in rows, of candidates in tokens."""
    entries = sorted(stage.glob(_ENTRIES))
    closed, done = (stage / MANIFEST).exists(), len(entries)
    total = done if closed else 0 if name.startswith("evaluation") else parts
    claim = stage / "fingerprint.json"
    if closed or not done or not claim.exists():
        return Progress(name, done, total, closed)
    took = max(_time(entry) for entry in entries) - _time(claim)
    sizes = [_size(entry, tokens=name == "candidates") for entry in entries]
    if took <= 0:
        return Progress(name, done, total, closed)
    unit = "tokens" if name == "candidates" else "rows"
    return Progress(name, done, total, closed, sum(sizes) / took, unit, done / took)


def _update(folder: Path) -> Progress:
    """The training, by its steps; what an ended update left is closed too."""
    closed = (folder / "policy" / MANIFEST).exists() or (folder / "update_ended.json").exists()
    step = _last_step(folder / "metrics.jsonl")
    if not step:
        return Progress("policy", 0, 0, closed)
    step_s = float(step.get("step_s") or 0.0)
    rate = step.get("num_tokens", 0.0) / step_s if step_s else None
    done, total = int(step["step"]), int(step["steps"])
    return Progress("policy", done, total, closed, rate, "tokens", 1 / step_s if step_s else 0.0)


def _last_step(file: Path) -> dict[str, Any]:
    """The newest whole line; a run may be writing another."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    for line in reversed(lines[-2:]):
        try:
            return dict(json.loads(line))
        except ValueError:
            continue
    return {}


def _workers(file: Path) -> dict[str, str]:
    """What each worker's last line says, and how often it had died before in this call."""
    found: dict[str, str] = {}
    deaths: dict[str, int] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        event = json.loads(line)
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


def _size(entry: Path, *, tokens: bool) -> float:
    found = read_json(entry)
    return float(found["stats"].get("tokens", 0) if tokens else found["rows"])


def _time(file: Path) -> float:
    return file.stat().st_mtime


def _changed(folder: Path) -> float:
    """When something below a folder changed last."""
    times = []
    for path in [folder, *folder.rglob("*")]:
        try:
            times.append(path.stat().st_mtime)
        except FileNotFoundError:
            continue
    return max(times, default=0.0)


def _began(folder: Path) -> float:
    claims = [_time(claim) for claim in folder.glob("*/fingerprint.json")]
    return min(claims, default=_time(folder))

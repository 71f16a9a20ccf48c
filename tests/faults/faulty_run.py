"""A run with faults armed, given again and again until it is done, and what must be true of it then."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stages.faults import FAULTS, FOLDER, fired

ROOT = Path(__file__).parents[2]
SMALL = (
    "rounds=2",
    "prompts.per_round=64",
    "prompts.shard_size=16",
    "evaluate.num_prompts=32",
    "update.global_batch_size=16",
)
LOST_RAY = "Ray was lost"
_ENDS_WITHIN_S = 20
_SCRATCH = re.compile(r"\..+\.[0-9a-f]{8}")  # what `pipeline.files.replacing` writes to
_TIMED = re.compile(r"seconds|started|timeline|idle_share|engine_sync|.*_s|num_tokens_now|is_carried_on|check")
"""What no two runs have alike: times, what was made in them, and a file's hash of itself with these in it."""


@dataclass(frozen=True)
class Call:
    """One call of the command."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass
class FaultyRun:
    """Calls of the same command, with the same faults armed.

    Attributes:
        runs: the folder of the runs.
        name: of this one.
        faults: as the environment spells them.
        deaths: when a process was killed by other means than faults, in seconds since 1970.
        seen: published parts, as they lay there right after each death or firing: path, sha256, inode, time of the last
            change.
    """

    runs: Path
    name: str
    faults: Sequence[str] = ()
    sets: Sequence[str] = SMALL
    calls: list[Call] = field(default_factory=list)
    deaths: list[float] = field(default_factory=list)
    seen: list[dict[str, tuple[str, int, int]]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    @property
    def marks(self) -> Path:
        return self.runs / f"{self.name}-marks"

    def call(self, *, timeout_s: float = 400) -> Call:
        """Give the command once."""
        began, over = time.monotonic(), threading.Event()
        sets = [part for o in (f"run.dir={self.runs}", f"run.name={self.name}", *self.sets) for part in ("--set", o)]
        environment = os.environ | {FAULTS: ";".join(self.faults), FOLDER: str(self.marks)}
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", "configs/quickstart.yaml", *sets],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        watcher = threading.Thread(target=self._watch, args=(over,))
        watcher.start()
        try:
            out, err = process.communicate(timeout=timeout_s)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            over.set()
            watcher.join()
        self.calls.append(Call(process.returncode, out, err, time.monotonic() - began))
        return self.calls[-1]

    def finish(self, *, at_most: int) -> FaultyRun:
        """Give the same command until it is done."""
        while self.call().code and len(self.calls) < at_most:
            pass
        return self

    def num_fired(self) -> int:
        return sum(map(len, fired(self.marks).values()))

    def note_death(self) -> None:
        """Look at what is published, now that a process was killed."""
        self.deaths.append(time.time())
        self.seen.append(self.published())

    def last_death(self) -> float | None:
        """When the last fault fired, or the last process was killed; None if nothing died."""
        return max([*self.deaths, *(at for times in fired(self.marks).values() for at in times)], default=None)

    def published(self) -> dict[str, tuple[str, int, int]]:
        """Every published part: its sha256, inode and time of the last change."""
        return {str(file.relative_to(self.folder)): _state(file) for file in self._parts()}

    def results(self) -> dict[str, Any]:
        """What the run has come to, by file: the sha256 of every part of every table and of all that a policy and its
        master are, the lineage, and, but for the times in them, every round's report and step metrics."""
        parts = {name: state[0] for name, state in self.published().items()}
        models = [file for name in ("policy", "master") for file in self.folder.glob(f"round-*/{name}/*")]
        hashed = {file: _state(file)[0] for file in models if file.name != "manifest.json"}
        told = [self.folder / "run.json", self.folder / "final.json", *self.folder.glob("round-*/report.json")]
        told += [file for file in models if file.name == "manifest.json"]
        steps = {
            file: [_without_times(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
            for file in [self.folder / "metrics.jsonl", *self.folder.glob("round-*/metrics.jsonl")]
        }
        plain = {file: _without_times(json.loads(file.read_text(encoding="utf-8"))) for file in told}
        return parts | {str(f.relative_to(self.folder)): found for f, found in (hashed | plain | steps).items()}

    def leftovers(self) -> list[str]:
        """Processes of the run that live on some seconds after its last call, which is none."""
        deadline = time.monotonic() + _ENDS_WITHIN_S
        while (left := processes_with(FOLDER, str(self.marks))) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [f"{pid} {name}" for pid, name in left.items()]

    def _watch(self, over: threading.Event) -> None:
        """Look at what is published as soon as a fault has fired."""
        known, is_over = self.num_fired(), False
        while not is_over:
            is_over = over.wait(0.02)  # and once more then: the last fault may have ended the call
            if (now := self.num_fired()) > known:
                known = now
                self.seen.append(self.published())

    def _parts(self) -> list[Path]:
        """The files of parts whose entry is there."""
        entries = self.folder.glob("**/_shards/part-*.json")
        return [entry.parents[1] / f"{entry.stem}.parquet" for entry in sorted(entries)]


def processes_with(variable: str, value: str) -> dict[int, str]:
    """The processes that were started with a variable of this value: their numbers and names."""
    found, wanted = {}, f"{variable}={value}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
                if state != "Z" and int(process.name) != os.getpid():
                    found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:60]
        except OSError:  # it has just ended, or is another user's
            continue
    return found


def refuse_wrong_end(run: FaultyRun, undisturbed: Mapping[str, str]) -> None:
    """Nothing lost, nothing twice, nothing else than without the faults."""
    last = run.calls[-1]
    assert last.code == 0, last.out + last.err
    for call in run.calls:
        assert "Traceback" not in call.out + call.err, call.err
        assert call.code in (0, 1, -signal.SIGKILL), call.err
        assert call.code != 1 or call.err.startswith(LOST_RAY), call.err
    for number in (1, 2):
        _refuse_lost_rows(run.folder / f"round-{number:04d}")
    refuse_changed_parts(run)
    refuse_late_scratch(run)
    found = run.results()
    differing = sorted(name for name in found.keys() | undisturbed.keys() if found.get(name) != undisturbed.get(name))
    assert not differing, f"other than in the undisturbed run: {differing}"
    final = json.loads((run.folder / "final.json").read_text())
    assert final["path"] == "round-0002/policy"
    assert not run.leftovers()


def refuse_changed_parts(run: FaultyRun) -> None:
    """What was published when something died is as it was then."""
    assert any(run.seen) or run.last_death() is None, "nothing published was seen when something died"
    end = run.published()
    for seen in run.seen:
        changed = {name for name, state in seen.items() if end.get(name) != state}
        assert not changed, f"published, then changed: {sorted(changed)}"


def refuse_late_scratch(run: FaultyRun) -> None:
    """Only a process that dies leaves the scratch of the file that it was writing, and others that die with it."""
    last = run.last_death()
    scratch = [file for file in run.folder.glob("**/.*") if _SCRATCH.fullmatch(file.name)]
    late = sorted(str(f) for f in scratch if last is None or f.stat().st_mtime > last + _ENDS_WITHIN_S)
    assert not late, f"scratch files that no death explains: {late}"


def _refuse_lost_rows(folder: Path) -> None:
    tables = {}
    for name in ("prompts", "candidates", "scored", "pairs", "fates"):
        tables[name] = [row for file in sorted((folder / name).glob("part-*.parquet")) for row in _rows(file)]
    ids = [row["prompt_id"] for row in tables["prompts"]]
    assert len(set(ids)) == len(ids) > 0
    assert sorted(row["prompt_id"] for row in tables["fates"]) == sorted(ids)
    for name, column in (("candidates", "response_id"), ("scored", "response_id"), ("pairs", "pair_id")):
        found = [row[column] for row in tables[name]]
        assert len(set(found)) == len(found) > 0, f"{name}: an id twice"
    assert {r["response_id"] for r in tables["scored"]} == {r["response_id"] for r in tables["candidates"]}


def _rows(file: Path) -> list[dict]:
    columns = [c for c in pq.read_schema(file).names if c in ("prompt_id", "response_id", "pair_id")]
    return pq.read_table(file, columns=columns).to_pylist()


def _without_times(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _without_times(value) for key, value in found.items() if not _TIMED.fullmatch(key)}
    return [_without_times(value) for value in found] if isinstance(found, list) else found


def _state(file: Path) -> tuple[str, int, int]:
    found = file.stat()
    return hashlib.sha256(file.read_bytes()).hexdigest(), found.st_ino, found.st_mtime_ns

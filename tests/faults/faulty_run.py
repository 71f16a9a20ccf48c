"""A run with faults armed, given again and again until it is done, and what must be true of it then."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
        seen: published parts, as they lay there right after each firing: path, sha256, inode, time of the last change.
    """

    runs: Path
    name: str
    faults: Sequence[str] = ()
    sets: Sequence[str] = SMALL
    calls: list[Call] = field(default_factory=list)
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

    def published(self) -> dict[str, tuple[str, int, int]]:
        """Every published part: its sha256, inode and time of the last change."""
        return {str(file.relative_to(self.folder)): _state(file) for file in self._parts()}

    def results(self) -> dict[str, str]:
        """What the run has come to: the sha256 of every part of every table, and of every policy's weights."""
        parts = {name: state[0] for name, state in self.published().items()}
        weights = sorted(self.folder.glob("round-*/policy/model.safetensors"))
        return parts | {str(file.relative_to(self.folder)): _state(file)[0] for file in weights}

    def leftovers(self) -> list[str]:
        """Processes of the run that live on some seconds after its last call, which is none."""
        deadline = time.monotonic() + _ENDS_WITHIN_S
        while (left := processes_with(FOLDER, str(self.marks))) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [f"{pid} {name}" for pid, name in left.items()]

    def _watch(self, over: threading.Event) -> None:
        """Look at what is published as soon as a fault has fired."""
        known = self.num_fired()
        while not over.wait(0.02):
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
    end = run.published()
    for seen in run.seen:
        changed = {name for name, state in seen.items() if end.get(name) != state}
        assert not changed, f"published, then changed: {sorted(changed)}"
    found = run.results()
    differing = sorted(name for name in found.keys() | undisturbed.keys() if found.get(name) != undisturbed.get(name))
    assert not differing, f"other than in the undisturbed run: {differing}"
    final = json.loads((run.folder / "final.json").read_text())
    assert final["path"] == "round-0002/policy"
    assert not list(run.folder.glob("**/.part-*")) or run.num_fired(), "scratch files without a fault"
    assert not run.leftovers()


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


def _state(file: Path) -> tuple[str, int, int]:
    found = file.stat()
    return hashlib.sha256(file.read_bytes()).hexdigest(), found.st_ino, found.st_mtime_ns

"""What else a run outlives: prompts that kill, workers that hang, and five workers killed at random, by the clock."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from faulty_run import SMALL, FaultyRun, processes_with, refuse_wrong_end

from stages.faults import FOLDER, fired

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]

NUM_KILLS, SEED = 5, 7


def test_a_prompt_that_kills_its_samplers_is_set_aside(runs, undisturbed, note):
    drawn = pq.read_table(undisturbed.folder / "round-0001" / "prompts" / "part-00001.parquet")
    culprit = drawn["prompt_id"][5].as_py()
    run = FaultyRun(runs, "quarantine", [f"sample.rows[{culprit}]:kill*99"], sets=(*SMALL, "rounds=1"))
    run.finish(at_most=1)
    assert run.calls[0].code == 0, run.calls[0].err
    assert run.num_fired() == 3
    fates = [
        row
        for file in sorted((run.folder / "round-0001" / "fates").glob("part-*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]
    assert len({row["prompt_id"] for row in fates}) == len(fates) == 64
    (found,) = [row for row in fates if row["fate"] == "quarantined"]
    assert found["prompt_id"] == culprit and found["num_candidates"] == 0
    assert "3 workers died" in found["detail"]
    assert "quarantined 1" in run.calls[0].out
    note(None, f"a prompt that kills its sampler: set aside after {run.num_fired()} deaths: {found['detail']}")


def test_a_batch_that_kills_its_ranks_is_set_aside(runs, undisturbed, note):
    run = FaultyRun(runs, "deadly", ["update.step[rank-1/step-2.]:kill*99"], sets=(*SMALL, "rounds=1"))
    run.finish(at_most=1)
    assert run.calls[0].code == 0, run.calls[0].err
    assert run.num_fired() == 3
    (skipped,) = map(json.loads, (run.folder / "round-0001" / "skipped.jsonl").read_text().splitlines())
    assert skipped["step"] == 2 and skipped["reason"] == "3 groups of ranks died in it"
    parts = (run.folder / "round-0001" / "pairs").glob("part-*.parquet")
    trained = [pair_id for part in parts for pair_id in pq.read_table(part)["pair_id"].to_pylist()]
    assert set(skipped["ids"]) < set(trained) and len(skipped["ids"]) == 16
    steps, usual = (
        [json.loads(line) for line in (folder / "round-0001" / "metrics.jsonl").open()]
        for folder in (run.folder, undisturbed.folder)
    )
    assert [step["step"] for step in steps] == [step["step"] for step in usual]
    assert steps[0]["loss"] == usual[0]["loss"] and "loss" not in steps[1]
    assert not (run.folder / "round-0001" / ".steps.jsonl").exists()
    note(None, "a batch that kills a rank: set aside after 3 deaths, its pair ids in skipped.jsonl")


def test_a_sampler_and_a_rank_that_hang_are_found_and_replaced(runs, undisturbed, note):
    faults = ["sample.middle[round-0001/candidates]:hang@2", "update.middle[rank-1]:hang@3"]
    run = FaultyRun(runs, "hang", faults, sets=(*SMALL, "cluster.job_timeout_s=60")).finish(at_most=1)
    assert [len(times) for times in fired(run.marks).values()] == [1, 1]
    refuse_wrong_end(run, undisturbed.results())
    assert run.calls[0].out.count("(cluster.job_timeout_s)") == 2
    note(None, f"a sampler and rank 1 that hang: right, {run.calls[0].seconds:.0f} s with deadlines of 60 s each")


class Killer(threading.Thread):
    """Kills workers of a run that are drawn at random, at times that are drawn beforehand."""

    def __init__(self, run: FaultyRun, moments: list[float]) -> None:
        super().__init__()
        self._run, self._moments = run, sorted(moments)
        self._random = random.Random(SEED)
        self.killed: list[tuple[float, str]] = []

    def run(self) -> None:
        began = time.monotonic()
        for moment in self._moments:
            time.sleep(max(0.0, began + moment - time.monotonic()))
            deadline = time.monotonic() + 60
            while not (workers := self._workers()) and time.monotonic() < deadline:
                time.sleep(0.1)
            if workers:
                name, pid = self._random.choice(sorted(workers.items()))
                os.kill(pid, signal.SIGKILL)
                self._run.note_death()
                self.killed.append((time.monotonic() - began, name))

    def _workers(self) -> dict[str, int]:
        """Samplers, scorers and ranks that are up, by the names of their logs."""
        found = {}
        for pid in processes_with(FOLDER, str(self._run.marks)):
            try:
                log = Path(f"/proc/{pid}/fd/1").readlink()
            except OSError:
                continue
            if log.stem.startswith(("sampler-", "scorer-", "trainer-")):
                found[log.stem] = pid
        return found


def test_five_workers_killed_at_random_cost_little_more_than_their_starts(runs, note):
    plain = FaultyRun(runs, "plain").finish(at_most=1)
    usual_s, costs = plain.calls[0].seconds, _costs(plain.folder)
    draw = random.Random(SEED)
    # Kills at random may hit one worker again and again before it has done a shard.
    run = FaultyRun(runs, "killed", sets=(*SMALL, f"cluster.max_worker_restarts={NUM_KILLS}"))
    killer = Killer(run, [draw.uniform(0.3, 0.95) * usual_s for _ in range(NUM_KILLS)])
    killer.start()
    run.finish(at_most=1)
    killer.join()
    refuse_wrong_end(run, plain.results())
    allowed_s = usual_s + sum(1.1 * costs[name.split("-")[0]] for _, name in killer.killed)
    told = ", ".join(f"{name} at {at:.0f} s" for at, name in killer.killed)
    each = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in costs.items())
    note(None, f"five workers killed: {told}")
    note(None, f"  undisturbed {usual_s:.0f} s, killed {run.calls[0].seconds:.0f} s, allowed {allowed_s:.0f} s")
    note(None, f"  what a death may cost, start and lost work: {each}")
    assert len(killer.killed) == NUM_KILLS
    assert run.calls[0].seconds <= allowed_s


def _costs(folder: Path) -> dict[str, float]:
    """What the death of each kind of worker may cost: its own start, and the work on one shard, or one update.

    A sampler's first job is a shard, and the start of its engine.
    """
    log = [json.loads(line) for line in (folder / "logs" / "attempt-1" / "workers.jsonl").open()]
    found = {line["worker"].split("-")[0]: line for line in log if line["event"] == "came up"}
    spans = [s for n in (1, 2) for s in json.loads((folder / f"round-{n:04d}/report.json").read_text())["timeline"]]
    update_s = max(span["end_s"] - span["start_s"] for span in spans if span["stage"] == "update")
    shards = {kind: found[kind]["start_s"] + found[kind]["first_job_s"] for kind in ("sampler", "scorer")}
    return shards | {"trainer": found["training group"]["start_s"] + update_s}

"""Workers that die or hang: they are started again, and their job is given to them once more. Real Ray, real deaths."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import os, signal, sys, time
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.resources import Resources
from cluster.session import session, set_environment

folder = Path(sys.argv[1])


class DieOnce:
    def __init__(self, name): self.name = name
    def __call__(self, state, report=None):
        marker = folder / self.name
        if not marker.exists():
            marker.touch()
            os._exit(9)
        if report is not None:
            report(self.name)
        return self.name


class DieAlways:
    def __call__(self, state, report=None): os._exit(9)


class HangOnce(DieOnce):
    def __call__(self, state, report=None):
        marker = folder / self.name
        if not marker.exists():
            marker.touch()
            time.sleep(3600)
        return self.name


class FreezeOnce(DieOnce):
    def __call__(self, state, report=None):
        marker = folder / self.name
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return self.name


class LastRankHangsOnce(DieOnce):
    def __call__(self, state, report):
        import torch.distributed as dist

        marker = folder / self.name
        if dist.get_rank() == 1 and not marker.exists():
            marker.touch()
            time.sleep(3600)
        dist.barrier()
        return self.name


class Refuse:
    def __call__(self, state, report=None): raise ValueError("mend this")


config = ClusterConfig()
set_environment(config)
from cluster.errors import WorkerLost
from cluster.mapper import Patience, Watcher
from cluster.pool import Pool
from cluster.tasks import Tasks
from cluster.workers import TrainingGroup

share, patience = Resources(0.3, 0), Patience(max_restarts=1, start_timeout_s=60)
watcher = Watcher(on_death=lambda lost: print("death", lost.name, lost.reason))


def attempt(work):
    try:
        return work()
    except (ValueError, WorkerLost) as error:
        return type(error).__name__


with session(config, log_dir=folder, search_path=[folder], shipped=[]):
    pool = Pool(object, name="pool", size=2, resources=share, log_dir=folder, patience=patience)
    print("pool", sorted(pool.map([DieOnce("a"), DieOnce("b")])))
    print("pool refusal", attempt(lambda: list(pool.map([Refuse()]))))
    print("pool lost", attempt(lambda: list(pool.map([DieAlways()]))))
    pool.close()
    hasty = Patience(max_restarts=1, start_timeout_s=60, job_timeout_s=8)
    pool = Pool(object, name="hasty", size=1, resources=share, log_dir=folder, patience=hasty, watcher=watcher)
    print("pool hung", list(pool.map([HangOnce("d")])), pool.each(HangOnce("e")), list(pool.map([FreezeOnce("f")])))
    pool.close()
    tasks = Tasks(resources=share, log_dir=folder, patience=hasty, watcher=watcher)
    print("task hung", tasks.run(HangOnce("g")))

    def group(patience=patience):
        return TrainingGroup(object, size=2, resources=share, refusals=(ValueError,), storage=folder / "train",
                             log_dir=folder, patience=patience, watcher=watcher)

    reports, first = [], group()
    print("group", first.run(DieOnce("c"), on_report=reports.append), reports)
    print("group again", first.run(DieOnce("h"), on_report=print))
    first.close()
    second = group()
    print("group refusal", attempt(lambda: second.run(Refuse(), on_report=print)))
    third = group()
    print("group lost", attempt(lambda: third.run(DieAlways(), on_report=print)))
    fourth = group(hasty)
    print("group hung", fourth.run(LastRankHangsOnce("i"), on_report=print))
"""


@pytest.mark.slow
def test_dead_workers_are_replaced_and_refusals_are_told_at_once(tmp_path):
    script = tmp_path / "deaths.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith(("pool", "task", "group"))]
    assert told == [
        "pool ['a', 'b']",
        "pool refusal ValueError",
        "pool lost WorkerLost",
        "pool hung ['d'] [] ['f']",
        "task hung g",
        "group c ['c']",
        "group again h",
        "group refusal ValueError",
        "group lost WorkerLost",
        "group hung i",
    ]
    hung = [line for line in done.stdout.splitlines() if line.startswith("death") and "within 8 s" in line]
    assert [line.split()[1] for line in hung] == ["hasty-0", "hasty-0", "hasty-0", "tasks", "training"]

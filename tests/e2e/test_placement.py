"""Five rounds under each placement: the same policy, and nothing that stays from round to round. Real Ray and engines.

A run is looked at whenever a round is settled: Ray's placement groups and actors, the processes under the driver, and
the memory that each of them has for itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
SMALL = (
    "rounds=5",
    "prompts.per_round=16",
    "prompts.shard_size=8",
    "evaluate=null",
    "update.num_train_epochs=1",
    "update.global_batch_size=8",
    "update.micro_batch_size=8",
)

SCRIPT = """
import json, os, sys
from pathlib import Path

import psutil

from pipeline.config_file import load_config
from pipeline.console import Console
from pipeline.start import opened

CONFIG = Path("configs/quickstart.yaml")
config = load_config(CONFIG, sys.argv[1:])


def private_memory():
    found = {}
    for process in psutil.Process().children(recursive=True):
        title = " ".join(process.cmdline()[:1])
        found[process.pid] = [title, process.memory_full_info().uss]
    return found


def look():
    import ray
    from ray._private.state import actors

    groups = [each for each in ray.util.placement_group_table().values() if each["state"] == "CREATED"]
    alive = [each for each in actors().values() if each["State"] == "ALIVE"]
    seen = {"groups": len(groups), "actors": len(alive), "processes": private_memory()}
    print("seen", json.dumps(seen), flush=True)


with opened(config, config.folder(), Console()) as shop:
    from pipeline.driver import align
    from pipeline.run import Run

    class LookedAt(Run):
        def settle(self, *settled):
            super().settle(*settled)
            look()

    run = LookedAt(shop)
    run.prepare()
    print("result", align(run).sha256)
"""


def run_of(folder: Path, placement: str) -> tuple[list[dict], str]:
    """What was seen after each round, and the sha256 of the policy that came of it."""
    script = folder / "look.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), *SMALL, f"run.dir={folder}", f"cluster.placement={placement}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    seen = [json.loads(rest) for word, _, rest in lines if word == "seen"]
    return seen, next(rest for word, _, rest in lines if word == "result")


PLACEMENTS = ("split", "colocate")
WORKERS = ("ray::_Actor", "ray::RayTrainWorker")  # the sampler and the scorer, the trainers


def kept_processes(seen: dict) -> dict[str, str]:
    """Titles by process id, without the workers that Ray keeps a while for the next task."""
    return {pid: title for pid, (title, _) in seen["processes"].items() if title and title != "ray::IDLE"}


def workers_memory(seen: dict) -> dict[str, int]:
    """Private bytes by process id."""
    return {pid: size for pid, (title, size) in seen["processes"].items() if title in WORKERS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {placement: run_of(tmp_path_factory.mktemp(placement), placement) for placement in PLACEMENTS}


def test_where_stages_run_decides_nothing_of_the_policy(runs):
    assert runs["split"][1] == runs["colocate"][1]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_no_process_actor_or_placement_group_stays_from_round_to_round(runs, placement):
    second, *later = runs[placement][0][1:]
    for seen in later:
        assert (seen["groups"], seen["actors"]) == (second["groups"], second["actors"])
        assert kept_processes(seen) == kept_processes(second)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_no_workers_memory_grows_by_what_an_engine_would_leave_behind(runs, placement):
    """An engine that stayed would keep its KV cache, 1 GiB a round; a quarter of one is allowed over three rounds."""
    seen = runs[placement][0]
    second, last = workers_memory(seen[1]), workers_memory(seen[-1])
    assert len(second) >= 4, "a sampler, a scorer and two trainers"
    assert max(last[pid] - second[pid] for pid in second) < 256 * MIB

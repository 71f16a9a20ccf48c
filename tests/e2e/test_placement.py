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


with opened(config, CONFIG, config.folder(), Console()) as shop:
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


@pytest.fixture(scope="module", params=["split", "colocate"])
def five_rounds(request, tmp_path_factory):
    return run_of(tmp_path_factory.mktemp(request.param), request.param)


RESULTS: set[str] = set()

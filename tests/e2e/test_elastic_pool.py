"""A pool that grows while jobs wait: an actor that is there only when none waits any more does no harm. Real Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
from pathlib import Path

import ray

from cluster.mapper import Patience, first_news
from cluster.pool import Pool
from cluster.resources import Resources

ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


@ray.remote(num_cpus=0.5)
class Elsewhere:
    def there(self): return True


def job(state, report=None): return "done"


elsewhere = Elsewhere.remote()
ray.get(elsewhere.there.remote())
pool = Pool(object, name="grown", size=1, most=2, resources=Resources(0.5, 0), log_dir=Path(sys.argv[1]),
            patience=Patience(max_restarts=0, start_timeout_s=60))
for _ in range(2):
    pool.add(job)
assert len(pool.refs) == 2, "a second actor is asked for, and finds no room"
pool.handle(first_news([pool])[1])
ray.kill(elsewhere)
assert len(ray.wait(pool.refs, num_returns=2, timeout=60)[0]) == 2, "a job is done, and the second actor is there"
while (outcome := pool.handle(first_news([pool])[1])) is None or outcome.number == 1:
    pass
print(outcome.number, outcome.value, len(pool.refs))
pool.close()
"""


@pytest.mark.long
def test_an_actor_that_comes_up_when_the_last_job_was_given_out_is_ended_quietly(tmp_path):
    script = tmp_path / "grown.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 done 0\n"

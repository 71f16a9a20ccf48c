"""A cluster that others use too: a run that cannot get its cores ends in time, and says what it waited for."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time, ray

ray.init(address=sys.argv[1], log_to_driver=False)


@ray.remote(num_cpus=float(sys.argv[2]))
class Other:
    def here(self): return True


other = Other.remote()
ray.get(other.here.remote())
print("held", flush=True)
time.sleep(600)
"""
SHORT = ("rounds=1", "prompts.per_round=32", "prompts.shard_size=32", "evaluate=null", "cluster.start_timeout_s=12")


@contextmanager
def group(command: list[str], log: Path, *, says: str) -> Iterator[None]:
    """A process group that has said something, ended with the block."""
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while says not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def ray_head(folder: Path) -> Iterator[str]:
    """The address of a Ray of two cores, which asks for what the environment says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = str(Path(sys.executable).with_name("ray"))
    options = ["--head", "--num-cpus=2", f"--port={port}", "--include-dashboard=false", "--disable-usage-stats"]
    with group([ray, "start", *options, "--block"], folder / "ray.log", says="runtime started"):
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[str]:
    """A cluster that takes work only with a token, which is in the environment here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        with ray_head(tmp_path_factory.mktemp("ray")) as address:
            yield address


@pytest.mark.long
@pytest.mark.parametrize(("held", "waits"), [(1.9, "task"), (0.6, "trainer")])
def test_a_run_that_others_keep_waiting_ends_in_time_and_says_so(prefloop, cluster, tmp_path, held, waits):
    hold = [sys.executable, "-c", HOLD, cluster, str(held)]
    with group(hold, tmp_path / "hold.log", says="held"):
        started = time.monotonic()
        outcome = prefloop.run(f"run.name=kept-{waits}", f"cluster.address={cluster}", *SHORT)
    assert outcome.code == 1, outcome.err
    assert f"wanted: {waits}: " in outcome.err and "within 12 s" in outcome.err
    free = re.search(r"got:    2 cores and 0 GPUs, of which ([\d.]+) core", outcome.err)
    assert free is not None and float(free[1]) < 2 - held + 0.01, outcome.err
    assert time.monotonic() - started < 120


@pytest.mark.long
def test_a_run_that_the_cluster_can_never_hold_is_refused_at_once(prefloop, cluster):
    outcome = prefloop.run("run.name=never", f"cluster.address={cluster}", "update.device=cuda", *SHORT)
    assert outcome.code == 2 and "update.device" in outcome.err
    assert "sample" not in outcome.out


@pytest.mark.long
def test_a_reward_beside_the_config_is_shipped_to_the_clusters_workers(prefloop, cluster, tmp_path):
    """The reward is only high where its module is a copy, away from the config, with the module that it imports."""
    (tmp_path / "where_from.py").write_text(f"def home(file):\n    return file.startswith({str(tmp_path)!r})\n")
    (tmp_path / "shipped.py").write_text(
        "import where_from\n\n\ndef away(prompts, completions, **columns):\n"
        "    return [float(index % 2) + 10.0 * (not where_from.home(__file__)) for index in range(len(completions))]\n"
    )
    quickstart = (ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8")
    (tmp_path / "quickstart.yaml").write_text(quickstart, encoding="utf-8")
    done = prefloop.command(
        "run",
        str(tmp_path / "quickstart.yaml"),
        sets=(
            f"run.dir={tmp_path}",
            f"cluster.address={cluster}",
            "rounds=1",
            "prompts.per_round=32",
            "evaluate=null",
            'score.rewards=[{type: function, target: "shipped:away"}]',
        ),
    )
    assert done.code == 0, done.err
    assert "from 10.00 to 11.00" in done.out


@pytest.mark.long
def test_a_cluster_that_takes_work_from_anybody_is_refused_unless_allowed_which_the_report_says(prefloop, tmp_path):
    """Also where the environment holds a token: what counts is whether the cluster asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with ray_head(tmp_path) as address:
            asked = (f"cluster.address={address}", "rounds=1", "prompts.per_round=32", "evaluate=null")
            without = prefloop.run("run.name=open", *asked)
            patch.setenv("RAY_AUTH_MODE", "token")
            patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
            with_token = prefloop.run("run.name=open", *asked)
            patch.setenv("RAY_AUTH_MODE", "disabled")
            allowed = prefloop.run("run.name=open", *asked, "cluster.allow_unauthenticated=true")
    for refused in (without, with_token):
        assert refused.code == 1 and "cluster.allow_unauthenticated" in refused.err, refused.err
        assert "sample" not in refused.out
    assert "RAY_AUTH_MODE is not token here" in without.err and "answers without a token" in with_token.err
    assert allowed.code == 0, allowed.err
    assert "cluster.allow_unauthenticated" in (prefloop.runs / "open" / "report.html").read_text()

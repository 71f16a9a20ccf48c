"""A run that is sent to a cluster: a real Ray with its dashboard on this machine, asked for a token."""

from __future__ import annotations

import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, Outcome

SHORT = ("run.name=sent", "rounds=2", "prompts.per_round=32", "prompts.shard_size=32", "evaluate=null", "gate=null")


def free_ports(count: int) -> list[int]:
    """Ports that nobody holds, of those that neither the system nor Ray gives to whoever asks for any."""
    found: list[int] = []
    while len(found) < count:
        port = random.randint(20_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            found.append(port)
    return found


def with_token(token: str | None) -> dict[str, str]:
    return {"RAY_AUTH_MODE": "disabled"} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


class Head:
    """A head node of two cores that can be lost, and started again under the same address."""

    def __init__(self, folder: Path, *, token: str | None) -> None:
        self._folder, self._ports = folder, free_ports(5)
        self._log = folder / "ray.log"
        self.address = f"http://127.0.0.1:{self._ports[1]}"
        self.token = token

    def start(self) -> None:
        names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
        ports = [f"--{name}={port}" for name, port in zip(names, self._ports, strict=False)]
        options = ["--head", "--num-cpus=2", "--include-dashboard=true", "--disable-usage-stats", "--block"]
        here = str(Path(sys.executable).parent)
        settings = {"PATH": f"{here}:{os.environ['PATH']}", **with_token(self.token)}
        with self._log.open("w") as out:
            self._process = subprocess.Popen(
                [f"{here}/ray", "start", *options, *ports, f"--ray-client-server-port={self._ports[4]}"],
                cwd=self._folder,
                env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_for_jobs()

    def _wait_for_jobs(self) -> None:
        deadline = time.monotonic() + 240
        while self.prefloop("status").code:
            assert self._process.poll() is None and time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.5)

    def lose(self) -> None:
        """As when its machine is switched off."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.lose()

    def prefloop(self, *words: object) -> Outcome:
        """A command as on another machine."""
        return self.prefloop_with(self.token, *words)

    def prefloop_with(self, token: str | None, *words: object) -> Outcome:
        settings = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        settings |= with_token(token)
        command = [sys.executable, "-m", "pipeline", *map(str, words), "--address", self.address]
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=900)
        return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    head = Head(tmp_path_factory.mktemp("head"), token=secrets.token_hex(32))
    head.start()
    yield head
    head.stop()


def submitted(head: Head, runs: Path, *sets: str, follow: bool = False) -> Outcome:
    options = [word for each in (f"run.dir={runs}", *SHORT, *sets) for word in ("--set", each)]
    return head.prefloop(
        "submit", "configs/quickstart.yaml", "--no-requirements", *options, *(["--follow"] if follow else [])
    )


def published(stage: Path) -> dict[str, tuple[bytes, int]]:
    """A stage's parts, with the time of their making."""
    return {part.name: (part.read_bytes(), part.stat().st_mtime_ns) for part in sorted(stage.glob("part-*.parquet"))}


def until(happens, *, within_s: float = 600) -> None:
    deadline = time.monotonic() + within_s
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_a_run_is_sent_followed_stopped_and_carried_on_after_its_head_is_lost(head, tmp_path):
    first_round = tmp_path / "sent" / "round-0001"
    sent = submitted(head, tmp_path)
    assert sent.code == 0 and "sent:1 " in sent.out and not sent.err, sent.out + sent.err

    until(lambda: (first_round / "candidates" / "manifest.json").exists())
    again = submitted(head, tmp_path)
    assert again.code == 0 and "sent:1 is going on already" in again.out, again.out + again.err
    other = submitted(head, tmp_path, "update.beta=0.2")
    assert other.code == 1 and "prefloop stop sent:1" in other.err, other.out + other.err
    status = head.prefloop("status", "sent")
    assert status.code == 0 and "RUNNING" in status.out and str(tmp_path / "sent") in status.out, status.out

    stopped = head.prefloop("stop", "sent")
    assert stopped.code == 0 and "sent:1   STOPPED" in stopped.out, stopped.out + stopped.err
    assert "ended as asked (SIGTERM); the same command carries on" in head.prefloop("logs", "sent:1").out
    candidates = published(first_round / "candidates")

    assert submitted(head, tmp_path).code == 0
    until(lambda: (first_round / "policy" / "manifest.json").exists())
    assert published(first_round / "candidates") == candidates
    head.lose()
    policy = (first_round / "policy" / "manifest.json").read_bytes()

    head.start()
    told = submitted(head, tmp_path, follow=True)
    assert told.code == 0, told.out + told.err
    assert "sent:1 " in told.out and "round 2/2  update" in told.out and "round 1/2  sample" not in told.out
    assert (first_round / "policy" / "manifest.json").read_bytes() == policy
    assert published(first_round / "candidates") == candidates
    assert (tmp_path / "sent" / "final.json").exists()
    assert "SUCCEEDED" in head.prefloop("status").out


@pytest.mark.long
def test_without_the_clusters_token_nothing_is_told(head):
    for token, says in ((None, "none is set here"), (secrets.token_hex(32), "the one set here is another's")):
        told = head.prefloop_with(token, "status")
        assert told.code == 1 and f"it asks for a token, and {says}" in told.err, told.err
        assert "Traceback" not in told.err


@pytest.mark.long
def test_a_run_that_fails_there_is_told_by_the_exit_status(head, tmp_path):
    failed = submitted(head, tmp_path, "run.name=failing", f"prompts.path={tmp_path}/none.jsonl", follow=True)
    assert failed.code == 1 and "FAILED, status 1" in failed.err, failed.out + failed.err
    assert "prompts.path" in failed.out and "wanted:" in failed.out
    assert "FAILED (1)" in head.prefloop("status", "failing:1").out
    assert "had ended before: FAILED" in head.prefloop("stop", "failing").out
    unknown = head.prefloop("logs", "other")
    assert unknown.code == 1 and "failing:1" in unknown.err


@pytest.mark.long
def test_a_cluster_that_takes_jobs_from_anybody_is_sent_none(tmp_path_factory, tmp_path):
    head = Head(tmp_path_factory.mktemp("open"), token=None)
    head.start()
    try:
        refused = submitted(head, tmp_path)
        assert refused.code == 1 and "cluster.allow_unauthenticated" in refused.err, refused.out + refused.err
        assert "sent" not in head.prefloop("status").out
    finally:
        head.stop()

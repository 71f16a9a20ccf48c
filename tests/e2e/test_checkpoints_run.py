"""An update whose worker, or driver, dies goes on from its last checkpoint and ends as one that was left alone."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from stages.weights import weights_sha256

pytestmark = pytest.mark.long

OPTIONS = (
    "rounds=1",
    "prompts.per_round=64",
    "prompts.shard_size=32",
    "evaluate=null",
    "update.global_batch_size=8",
    "update.num_train_epochs=6",
    "update.checkpoint_steps=4",
)


@pytest.fixture(scope="module")
def whole(prefloop) -> Path:
    """A run that nothing disturbs."""
    done = prefloop.run(*OPTIONS, "run.name=undisturbed")
    assert done.code == 0, done.err
    assert "went on from step" not in done.out
    return prefloop.runs / "undisturbed"


def update_of(run: Path) -> dict:
    return json.loads((run / "round-0001" / "report.json").read_text())["update"]


def check(run: Path, whole: Path, told: str) -> None:
    resumed_at = update_of(run)["resumed_at"]
    assert resumed_at % 4 == 0 and resumed_at >= 8
    assert f"went on from step {resumed_at}" in told
    assert f"it went on from step {resumed_at}" in (run / "report.txt").read_text()
    assert not (run / "round-0001" / "checkpoint").exists()
    steps = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (run, whole)]
    for one, other in zip(*steps, strict=True):
        assert {**one, "step_s": 0} == {**other, "step_s": 0}
    assert [step["step"] for step in steps[0]] == list(range(1, update_of(whole)["num_steps"] + 1))
    one, other = (weights_sha256(folder / "round-0001" / "policy") for folder in (run, whole))
    assert one == other


def published(run: Path, step: int) -> bool:
    return any(
        int(file.parent.name.removeprefix("step-")) >= step
        for file in run.glob("round-0001/checkpoint/step-*/manifest.json")
    )


def processes_writing_to(log: str, run: Path) -> list[int]:
    """Those whose standard output is a log of a run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "fd" / "1").resolve().match(f"{run}/logs/*/{log}"):
                found.append(int(process.name))
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_a_training_worker_that_is_killed_costs_the_steps_since_the_last_checkpoint(prefloop, whole, rank):
    run, killed = prefloop.runs / f"bereft-{rank}", []

    def kill():
        killed.extend(processes_writing_to(f"trainer-{rank}.log", run))
        for process in killed:
            os.kill(process, signal.SIGKILL)

    done = prefloop.disturbed(*OPTIONS, f"run.name={run.name}", when=lambda: published(run, 8), disturb=kill)
    assert done.code == 0 and killed, done.err
    check(run, whole, done.out)


def test_notice_to_end_saves_the_update_first_and_the_same_command_goes_on_from_there(prefloop, whole):
    """No checkpoint is due by itself: the one it goes on from was written since SIGTERM came."""
    run, mine = prefloop.runs / "noticed", (*OPTIONS, "run.name=noticed", "update.checkpoint_steps=null")

    def under_way() -> bool:
        steps = run / "round-0001" / "metrics.jsonl"
        return steps.exists() and len(steps.read_text().splitlines()) >= 8

    first = prefloop.interrupted(*mine, when=under_way, by=signal.SIGTERM)
    assert first.code == 143 and "the same command carries on" in first.err
    assert len(first.err.splitlines()) == 1, first.err
    second = prefloop.run(*mine)
    assert second.code == 0, second.err
    assert update_of(run)["resumed_at"] >= 8
    one, other = (weights_sha256(folder / "round-0001" / "policy") for folder in (run, whole))
    assert one == other


def test_the_same_command_goes_on_inside_the_round(prefloop, whole):
    run = prefloop.runs / "stopped"
    first = prefloop.interrupted(*OPTIONS, "run.name=stopped", when=lambda: published(run, 8))
    assert first.code == 130 and not (run / "round-0001" / "policy" / "manifest.json").exists(), first.err
    second = prefloop.run(*OPTIONS, "run.name=stopped")
    assert second.code == 0, second.err
    check(run, whole, second.out)

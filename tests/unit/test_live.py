"""The terminal view of a run: what its folder says at a moment, finished or not, and that looking changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
from refusals import refused
from rich.console import Console as RichConsole

from pipeline.artifacts import MANIFEST
from pipeline.live import snapshot
from pipeline.live_view import view, watch
from pipeline.run_folder import only_run
from stages.errors import InputError


@pytest.fixture
def going_on(run):
    """In round 2: sampled to the half, in steps of the last second; nothing after it."""
    folder = run / "round-0002"
    for name in ("scored", "pairs", "fates", "reference_logps", "policy", "evaluation"):
        shutil.rmtree(folder / name)
    for gone in (folder / "candidates" / MANIFEST, folder / "candidates" / "_shards" / "part-00001.json"):
        gone.unlink()
    for gone in ("report.json", "metrics.jsonl"):
        (folder / gone).unlink()
    now = time.time()
    for claim in folder.glob("*/fingerprint.json"):
        os.utime(claim, (now - 10, now - 10))
    entry = folder / "candidates" / "_shards" / "part-00000.json"
    found = json.loads(entry.read_text())
    entry.write_text(json.dumps(found | {"stats": {"tokens": 500}}))
    os.utime(entry, (now - 5, now - 5))
    report = run / "round-0001" / "report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"seconds": 60.0}))
    return run


def shown(found) -> str:
    console = RichConsole(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(view(found))
    return console.export_text()


def test_a_finished_run_says_so_and_watching_it_ends(run, capsys):
    found = snapshot(run)
    assert found.is_finished and found.num_settled == found.num_asked == 2
    watch(run)
    assert "finished   2 of 2 rounds settled" in capsys.readouterr().out


def test_nobody_at_work_is_told_from_somebody(going_on):
    with only_run(going_on):
        assert snapshot(going_on).works is True
        assert "at work" in shown(snapshot(going_on))
    assert snapshot(going_on).works is False
    assert "no process of this machine works on it" in shown(snapshot(going_on))


def test_looking_writes_nothing_and_takes_no_lock(going_on):
    before = {file: file.stat().st_mtime_ns for file in [going_on, *going_on.rglob("*")]}
    snapshot(going_on)
    assert {file: file.stat().st_mtime_ns for file in [going_on, *going_on.rglob("*")]} == before
    with only_run(going_on):
        snapshot(going_on)


def test_what_is_under_way_has_a_rate_and_a_time_to_go(going_on):
    found = snapshot(going_on)
    assert not found.is_finished and found.num_settled == 1
    sampled = next(p for p in found.rounds[2] if p.stage == "candidates")
    assert (sampled.done, sampled.total, sampled.unit) == (1, 2, "tokens")
    assert sampled.rate == pytest.approx(100, rel=0.05) and sampled.to_go_s == pytest.approx(5, rel=0.05)
    assert found.to_go_s is not None and 40 < found.to_go_s <= 60  # a round takes 60 s, some of it are over
    told = shown(found)
    assert "1/2" in told and "tokens/s" in told and "to go" in told


def test_an_update_under_way_shows_its_newest_whole_step(going_on):
    file = going_on / "round-0002" / "metrics.jsonl"
    step = {"step": 3, "steps": 8, "loss": 0.5, "step_s": 0.5, "num_tokens": 100.0}
    file.write_text(json.dumps(step | {"step": 2}) + "\n" + json.dumps(step) + '\n{"step": 4, "lo')
    found = next(p for p in snapshot(going_on).rounds[2] if p.stage == "policy")
    assert (found.done, found.total, found.rate, found.to_go_s) == (3, 8, 200.0, 2.5)
    assert "step 3/8   loss 0.500" in shown(snapshot(going_on))


def test_workers_show_what_became_of_them(going_on):
    log = going_on / "logs" / "attempt-1" / "workers.jsonl"
    log.parent.mkdir(parents=True)
    events = [("sampler-0", "came up"), ("sampler-0", "died"), ("sampler-0", "came up"), ("scorer-0", "died")]
    log.write_text("".join(json.dumps({"worker": w, "event": e, "reason": "killed"}) + "\n" for w, e in events))
    assert snapshot(going_on).workers == {
        "sampler-0": "up, 1 died before it",
        "scorer-0": "died: killed",
    }


def test_a_run_that_just_started_can_be_watched_and_an_empty_folder_cannot(tmp_path):
    refused(lambda: watch(tmp_path), "the folder of a run", kind=InputError)
    with only_run(tmp_path / "young"):
        told = shown(snapshot(tmp_path / "young"))
    assert "0 of ? rounds settled" in told and "at work" in told

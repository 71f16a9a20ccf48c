"""The terminal view of a run: what its folder says at a moment, finished or not, and that looking changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time

import pytest
import yaml
from refusals import refused
from rich.console import Console as RichConsole
from written_run import NUM_STEPS

from pipeline.artifacts import MANIFEST
from pipeline.live import snapshot
from pipeline.live_view import show_live, view
from pipeline.page.render import page
from pipeline.report import round_reports
from pipeline.run_folder import is_held, only_run
from pipeline.status import show_status
from pipeline.tensorboard import step_curves
from stages.errors import InputError, StageError


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
    show_live(run)
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
    sampled = next(p for p in found.rounds[2] if p.stage == "sample")
    assert (sampled.done, sampled.total, sampled.unit) == (1, 2, "tokens")
    assert sampled.rate == pytest.approx(100, rel=0.05) and sampled.to_go_s == pytest.approx(5, rel=0.05)
    assert found.to_go_s is not None and 40 < found.to_go_s <= 60  # a round takes 60 s, some of it are over
    told = shown(found)
    assert "1/2" in told and "tokens/s" in told and "to go" in told


def test_an_update_under_way_shows_its_newest_whole_step(going_on):
    file = going_on / "round-0002" / "metrics.jsonl"
    step = {"step": 3, "steps": 8, "loss": 0.5, "step_s": 0.5, "num_tokens": 100.0}
    file.write_text(json.dumps(step | {"step": 2}) + "\n" + json.dumps(step) + '\n{"step": 4, "lo')
    found = next(p for p in snapshot(going_on).rounds[2] if p.stage == "update")
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
    refused(lambda: show_live(tmp_path), "the folder of a run", kind=InputError)
    with only_run(tmp_path / "young"):
        told = shown(snapshot(tmp_path / "young"))
    assert "0 of ? rounds settled" in told and "at work" in told


# ---- a run that stopped early ---------------------------------------------------------------------------------------


def set_config(run, **sections):
    file = run / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | sections))


STOPS = {
    "the rounds took 0.01 hours": {"stop_when": {"max_hours": 0.001}},
    "gate.on_fail is stop": {"gate": {"on_fail": "stop"}},
}


@pytest.mark.parametrize(("reason", "section"), STOPS.items())
def test_a_run_that_stopped_early_is_finished_and_says_why_everywhere(run, capsys, reason, section):
    set_config(run, rounds=3, **section)
    if "gate" in section:
        report = run / "round-0002" / "report.json"
        report.write_text(json.dumps(json.loads(report.read_text()) | {"decision": "hold"}))
    assert snapshot(run).is_finished and reason in snapshot(run).stopped
    show_live(run)
    show_status(run)
    live, status = capsys.readouterr().out.split("finished   2 of 3 rounds settled")[1].split("stopped after 2 of 3")
    assert reason in live and reason in status
    told = page(run, round_reports(run))
    assert reason in told and "rounds are settled" not in told
    with only_run(run):
        assert not snapshot(run).is_finished


def test_limits_that_are_not_reached_stop_nothing(run):
    set_config(run, rounds=3, stop_when={"max_hours": 100.0})
    assert snapshot(run).stopped is None and not snapshot(run).is_finished
    set_config(run, rounds=2, stop_when={"max_hours": 0.001})
    assert snapshot(run).stopped is None and snapshot(run).is_finished
    set_config(run, rounds=3, stop_when={"max_hours": 0.001, "of_another_release": 1})
    assert snapshot(run).stopped is None


# ---- what is under way ----------------------------------------------------------------------------------------------


def test_an_update_is_shown_while_the_next_round_is_sampled_ahead(going_on):
    ahead = shutil.copytree(going_on / "round-0002", going_on / "round-0003")
    step = {"step": 3, "steps": 8, "loss": 0.5, "step_s": 0.5, "num_tokens": 100.0}
    (going_on / "round-0002" / "metrics.jsonl").write_text(json.dumps(step))
    told = shown(snapshot(going_on))
    assert "step 3/8   loss 0.500" in told and "200 tokens/s" in told
    rows = [line.split()[:3] for line in told.splitlines() if line.startswith("round")]
    assert ["round", "2", "update"] in rows and ["round", "3", "sample"] in rows
    (ahead / "metrics.jsonl").touch()
    assert snapshot(going_on).step == step


def test_what_was_done_before_the_run_was_taken_up_again_is_in_no_rate(going_on):
    folder = going_on / "round-0002" / "candidates"
    hour_ago = time.time() - 3600
    for file in [*folder.glob("_shards/*"), *folder.parent.glob("*/fingerprint.json")]:
        os.utime(file, (hour_ago, hour_ago))
    with only_run(going_on):
        sampled = next(p for p in snapshot(going_on).rounds[2] if p.stage == "sample")
        assert (sampled.done, sampled.rate, sampled.to_go_s) == (1, None, None)
        taken_up = (going_on / ".lock").stat().st_mtime
        os.utime(folder / "_shards" / "part-00000.json", (taken_up + 5, taken_up + 5))
        refused(lambda: only_run(going_on).__enter__(), "nobody else", kind=StageError)
        assert is_held(going_on)
        found = snapshot(going_on)
        sampled = next(p for p in found.rounds[2] if p.stage == "sample")
        assert sampled.rate == pytest.approx(100) and sampled.to_go_s == pytest.approx(5)
        assert 55 < found.to_go_s <= 60


# ---- what else may lie there ----------------------------------------------------------------------------------------


def test_a_copy_of_a_round_beside_it_is_no_round(run):
    shutil.copytree(run / "round-0002", run / "round-0002.bak")
    assert [report["round"] for report in round_reports(run)] == [0, 1, 2]
    assert sorted(snapshot(run).rounds) == [0, 1, 2]
    assert step_curves(run, round=3).steps_before == 2 * NUM_STEPS


def test_lines_that_are_not_whole_are_passed_over(going_on):
    log = going_on / "logs" / "attempt-1" / "workers.jsonl"
    log.parent.mkdir(parents=True)
    whole = json.dumps({"worker": "sampler-0", "event": "came up"})
    log.write_text('{"worker": "scor' + "\n" + whole + '\n{"worker": "sam')
    assert snapshot(going_on).workers == {"sampler-0": "up"}


def test_files_that_come_and_go_while_a_run_is_read_do_no_harm(going_on):
    shards = going_on / "round-0002" / "candidates" / "_shards"
    entry, aside, over = shards / "part-00000.json", shards / ".aside", threading.Event()

    def come_and_go():
        while not over.is_set():
            entry.rename(aside)
            aside.rename(entry)

    churn = threading.Thread(target=come_and_go)
    churn.start()
    try:
        for _ in range(20):
            assert snapshot(going_on).num_settled == 1
    finally:
        over.set()
        churn.join()

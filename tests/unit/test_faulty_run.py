"""What the kill matrix asks of a run's end: each demand refuses what it is there for. Nothing is started here."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from faulty_run import FaultyRun, refuse_changed_parts, refuse_late_scratch

from pipeline.files import replacing

REPORT, METRICS, MANIFEST = "round-0002/report.json", "round-0001/metrics.jsonl", "round-0001/policy/manifest.json"


@pytest.fixture
def run(written, tmp_path):
    shutil.copytree(written, tmp_path / "mine")
    (tmp_path / "mine" / "round-0001" / "master").mkdir()
    (tmp_path / "mine" / "round-0001" / "master" / "model.safetensors").write_bytes(b"float32")
    shutil.copy(tmp_path / "mine" / METRICS, tmp_path / "mine" / "metrics.jsonl")
    return FaultyRun(tmp_path, "mine")


def altered(found, key, value):
    """The same JSON with another value under a key, wherever it stands."""
    if isinstance(found, dict):
        return {name: value if name == key else altered(inner, key, value) for name, inner in found.items()}
    return [altered(inner, key, value) for inner in found] if isinstance(found, list) else found


def rewritten(text, key, value):
    return "".join(json.dumps(altered(json.loads(line), key, value)) + "\n" for line in text.splitlines())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("run.json", "decision"),
        ("run.json", "sha256"),
        ("final.json", "round"),
        (REPORT, "reason"),
        (REPORT, "reward"),
        (METRICS, "loss"),
        ("metrics.jsonl", "loss"),
        (MANIFEST, "num_steps"),
    ],
)
def test_another_decision_or_figure_is_another_result(run, name, key):
    before, file = run.results(), run.folder / name
    text = file.read_text()
    lines = text if name.endswith("l") else json.dumps(json.loads(text))
    file.write_text(rewritten(lines, key, "other"))
    after = run.results()
    assert {name for name in before if before[name] != after[name]} == {name}


def test_another_time_is_none(run):
    before = run.results()
    times = {
        "seconds": 7.0,
        "started": 1.0,
        "idle_share": 0.5,
        "timeline": [{"start_s": 1.0}],
        "first_answers_s": 0.1,
        "sampling_s": 0.2,
        "is_carried_on": True,
        "check": "ab",
    }
    (run.folder / REPORT).write_text(json.dumps(json.loads((run.folder / REPORT).read_text()) | times))
    steps = (run.folder / METRICS).read_text().splitlines()
    (run.folder / METRICS).write_text("".join(json.dumps(json.loads(s) | {"step_s": 9.0}) + "\n" for s in steps))
    assert run.results() == before


def test_a_line_twice_a_master_of_other_bytes_and_a_file_too_many_are_other_results(run):
    before, steps, master = run.results(), run.folder / METRICS, run.folder / "round-0001/master/model.safetensors"
    steps.write_text(steps.read_text() + steps.read_text().splitlines()[-1] + "\n")
    master.write_bytes(b"float16")
    (run.folder / "round-0002" / "policy" / "more.json").write_text("{}")
    after = run.results()
    differing = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert differing == {METRICS, "round-0001/master/model.safetensors", "round-0002/policy/more.json"}


def test_what_was_published_when_a_worker_died_stays(run):
    refuse_changed_parts(run)
    run.note_death()
    assert run.seen[0] and run.last_death() == run.deaths[0]
    refuse_changed_parts(run)
    part = next(run.folder.glob("round-0001/scored/part-*.parquet"))
    os.utime(part, (1.0, 1.0))
    with pytest.raises(AssertionError, match="published, then changed"):
        refuse_changed_parts(run)


def test_a_death_at_which_nobody_looked_proves_nothing(run):
    run.deaths.append(0.0)
    with pytest.raises(AssertionError, match="nothing published was seen"):
        refuse_changed_parts(run)


def test_scratch_is_left_by_what_dies_alone(run):
    refuse_late_scratch(run)
    with replacing(run.folder / "round-0001" / "some.json") as scratch:
        scratch.write_text("half")
        with pytest.raises(AssertionError, match="no death explains"):
            refuse_late_scratch(run)
        run.note_death()
        refuse_late_scratch(run)
        os.utime(scratch, (run.deaths[0] + 3600,) * 2)
        with pytest.raises(AssertionError, match="no death explains"):
            refuse_late_scratch(run)

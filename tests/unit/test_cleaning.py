"""Freeing a run's disk: what stays is all that the next round may need, and what goes is noted first."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import weights
from refusals import refused
from written_run import write_run

from pipeline.cleaning import clean, kept_rounds, weights_in
from pipeline.lineage import Lineage, RoundRecord
from pipeline.run_folder import only_run


def lineage_of(tmp_path, standing) -> Lineage:
    lineage = Lineage(tmp_path / "run.json")
    for number, made_in in enumerate(standing, start=1):
        made = weights(number)
        lineage.rounds.append(RoundRecord(number, made, made, [], made, weights(made_in), "", "", {}))
    return lineage


def test_the_last_and_the_best_and_the_final_each_with_the_one_before_it_stay(tmp_path):
    plain = lineage_of(tmp_path, range(1, 11))
    assert kept_rounds(plain, best=4, last=2) == {3, 4, 5, 9, 10}
    assert kept_rounds(plain, best=0, last=1) == {9, 10}
    held = lineage_of(tmp_path, [1, 2, 3, 3, 3, 3, 3])
    assert kept_rounds(held, best=3, last=2) == {2, 3, 4, 6, 7}
    assert kept_rounds(lineage_of(tmp_path, []), best=0, last=2) == set()


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 3))
def test_what_stands_and_what_led_to_it_always_stay(tmp_path_factory, promoted, last):
    standing, found = 0, []
    for number, is_promoted in enumerate(promoted, start=1):
        standing = number if is_promoted else standing
        found.append(standing)
    lineage = lineage_of(tmp_path_factory.getbasetemp(), found)
    stay = kept_rounds(lineage, best=standing, last=last)
    assert set(lineage.line(len(found))[:2]) <= stay
    assert set(range(max(1, len(found) - last + 1), len(found) + 1)) <= stay


@given(st.lists(st.booleans(), max_size=12), st.data())
def test_a_roll_back_to_the_best_misses_nothing(tmp_path_factory, promoted, data):
    standing, found = 0, []
    for number, is_promoted in enumerate(promoted, start=1):
        standing = number if is_promoted else standing
        found.append(standing)
    best = data.draw(st.sampled_from(sorted({0, *found})))
    lineage = lineage_of(tmp_path_factory.getbasetemp(), found)
    stay = kept_rounds(lineage, best=best, last=1)
    rolled_back = len(found) + 1
    lineage.rounds.append(
        replace(
            lineage_of(tmp_path_factory.getbasetemp(), range(1, rolled_back + 1)).rounds[-1], standing=weights(best)
        )
    )
    needed = lineage.line(rolled_back)[:2]
    assert {number for made_in in needed for number in (made_in, made_in + 1)} <= {*stay, rolled_back}


@pytest.fixture
def run(tmp_path):
    """Five rounds with weights in them; the best is the last."""
    run = write_run(tmp_path, rounds=5)
    for number in range(1, 6):
        for name in ("policy", "master", "optimizer"):
            folder = run / f"round-{number:04d}" / name
            folder.mkdir(exist_ok=True)
            (folder / "model.safetensors").write_bytes(bytes(1000))
    return run


def left(run):
    return {number for number in range(1, 6) if weights_in(run / f"round-{number:04d}")}


def test_nothing_goes_without_yes_and_then_what_was_shown(run, capsys):
    clean(run, keep=None, yes=False)
    shown = capsys.readouterr().out
    assert "round 4, round 5" in shown and "to drop   round 1: master, optimizer, policy" in shown and "--yes" in shown
    assert left(run) == {1, 2, 3, 4, 5} and not any(r.is_dropped for r in Lineage.read(run / "run.json").rounds)
    clean(run, keep=None, yes=True)
    assert "dropped   round 3" in capsys.readouterr().out
    assert left(run) == {4, 5}
    assert [record.is_dropped for record in Lineage.read(run / "run.json").rounds] == [True, True, True, False, False]
    assert (run / "round-0001" / "policy" / "manifest.json").exists() and (run / "round-0001" / "pairs").exists()
    clean(run, keep=None, yes=True)
    assert "nothing to free" in capsys.readouterr().out


def test_how_many_stay_can_be_said(run):
    clean(run, keep=4, yes=True)
    assert left(run) == {2, 3, 4, 5}


def test_a_run_that_is_going_on_is_left_alone_and_no_run_is_refused(run, tmp_path):
    with only_run(run):
        refused(lambda: clean(run, keep=1, yes=True), "another prefloop run holds it")
    assert left(run) == {1, 2, 3, 4, 5}
    refused(lambda: clean(tmp_path / "nowhere", keep=None, yes=False), "no such folder")

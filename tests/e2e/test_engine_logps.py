"""The engine's log-probs as references: the numbers that it sampled with, and no others, count in the update."""

from __future__ import annotations

import json
import re

import pyarrow.dataset as ds
import pytest

from stages.weights import weights_sha256

pytestmark = pytest.mark.long

TINY = (
    *("prompts.per_round=64", "prompts.shard_size=32", "sample.num_generations=4", "rounds=2"),
    *("evaluate=null", "run.tensorboard=false", "update.global_batch_size=16"),
)
ENGINE = ("update.reference_logps=engine", "update.gate_floor=1e-3")


@pytest.fixture(scope="module")
def runs(prefloop):
    """The folders of two runs, with the engine's log-probs and with the trainer's."""
    found = {}
    for name, more in {"engine": ENGINE, "trainer": ("update.gate_floor=1e-3",)}.items():
        result = prefloop.run(*TINY, *more, f"run.name={name}")
        assert result.code == 0, result.out + result.err
        assert ("by the engine; the trainer differs by" in result.out) == (name == "engine")
        found[name] = prefloop.runs / name
    return found


def rows(folder, name, number=1):
    return ds.dataset(sorted((folder / f"round-000{number}" / name).glob("part-*.parquet"))).to_table().to_pylist()


@pytest.mark.parametrize("number", [1, 2])
def test_a_reference_log_prob_is_the_sum_that_the_engine_stored(runs, number):
    sampled = {row["response_id"]: sum(row["response_logps"]) for row in rows(runs["engine"], "candidates", number)}
    found = rows(runs["engine"], "reference_logps", number)
    assert found and all(row["logp"] == sampled[row["response_id"]] for row in found)


def test_they_are_those_of_the_trainer_up_to_rounding(runs):
    engine, trainer = (
        {row["response_id"]: row["logp"] for row in rows(runs[name], "reference_logps")} for name in runs
    )
    assert engine.keys() == trainer.keys()
    assert engine == pytest.approx(trainer, abs=1e-4) and engine != trainer


def test_the_gap_that_was_measured_is_reported_and_the_policies_are_hardly_apart(runs):
    reports = [json.loads((runs[name] / "round-0001" / "report.json").read_text()) for name in runs]
    assert all(0 < report["engine_gap"] < 1e-5 for report in reports)
    losses = [report["update"]["last"]["loss"] for report in reports]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert weights_sha256(runs["engine"] / "round-0001/policy") != weights_sha256(runs["trainer"] / "round-0001/policy")


def test_a_floor_that_does_not_cover_the_gap_is_refused_before_a_step_and_the_run_goes_on_when_it_does(prefloop):
    asked = (*TINY, "rounds=1", "update.reference_logps=engine", "run.name=narrow")
    narrow = prefloop.run(*asked, "update.gate_floor=1e-9")
    folder = prefloop.runs / "narrow" / "round-0001"
    assert narrow.code == 1 and "update.reference_logps" in narrow.err and "gate_floor=" in narrow.err
    assert not list((folder / "reference_logps").glob("part-*")) and not (folder / "policy").exists()
    candidates = (folder / "candidates" / "manifest.json").read_bytes()
    (floor,) = re.findall(r"update\.gate_floor=([\d.e-]+)", narrow.err)
    wide = prefloop.run(*asked, f"update.gate_floor={floor}")
    assert wide.code == 0, wide.err
    assert (folder / "candidates" / "manifest.json").read_bytes() == candidates

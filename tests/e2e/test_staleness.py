"""A round's data collected while the round before is still trained: one policy older, and said so of every row."""

from __future__ import annotations

import json

import pyarrow.dataset as ds
import pytest

from stages.weights import weights_sha256

pytestmark = pytest.mark.long

TINY = ("prompts.per_round=96", "prompts.shard_size=32", "evaluate.num_prompts=64", "rounds=3", "max_staleness=1")


@pytest.fixture(scope="module")
def outcome(prefloop):
    result = prefloop.run(*TINY, "run.name=stale")
    assert result.code == 0, result.err
    return result, prefloop.runs / "stale"


def records(folder):
    return json.loads((folder / "run.json").read_text())["rounds"]


def test_every_row_says_which_policy_it_is_of_and_none_is_older_than_allowed(outcome):
    _, folder = outcome
    for number in (1, 2, 3):
        for name in ("candidates", "pairs"):
            files = sorted((folder / f"round-{number:04d}" / name).glob("part-*.parquet"))
            assert set(ds.dataset(files).to_table()["policy_round"].to_pylist()) == {max(0, number - 2)}


def test_rounds_train_from_the_latest_policy(outcome):
    _, folder = outcome
    first, second, third = records(folder)
    assert [record["start"] for record in (second, third)] == [first["result"], second["result"]]
    assert [record["sampling"] for record in (second, third)] == [first["start"], second["start"]]


def test_the_next_rounds_answers_are_there_before_this_rounds_update_ends(outcome):
    result, folder = outcome
    lines = result.out.splitlines()
    for number in (1, 2):
        sampled = next(i for i, line in enumerate(lines) if line.startswith(f"round {number + 1}/3  sample"))
        evaluated = next(i for i, line in enumerate(lines) if line.startswith(f"round {number}/3  evaluate"))
        assert sampled < evaluated
        report = json.loads((folder / f"round-{number + 1:04d}" / "report.json").read_text())
        assert report["sample"]["num_candidates"] == 96 * 8 and report["pairs"]["num_pairs"] > 0


def test_interrupted_while_two_rounds_are_under_way_it_ends_the_same(prefloop, outcome):
    _, folder = outcome
    other = prefloop.runs / "broken-stale"
    under_way = other / "round-0002" / "candidates" / "_shards" / "part-00001.json"
    first = prefloop.interrupted(*TINY, "run.name=broken-stale", when=under_way.exists)
    assert first.code == 130, first.err
    assert prefloop.run(*TINY, "run.name=broken-stale").code == 0
    for number in (1, 2, 3):
        one, two = (weights_sha256(run / f"round-{number:04d}" / "policy") for run in (folder, other))
        assert one == two

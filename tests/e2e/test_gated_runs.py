"""The gate at work: rewards that are gamed, a judge that is too weak, an update that breaks, a round rolled back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.dataset as ds
import pytest

DATA = Path(os.environ.get("PREFLOOP_TEST_DATA", "/nowhere"))
TINY = ("prompts.per_round=96", "prompts.shard_size=32", "evaluate.num_prompts=64")
NO_LIMITS = tuple(f"gate.{name}=null" for name in ("max_reward_drop", "max_holdout_drop", "min_win_rate"))

pytestmark = pytest.mark.long


def records(folder):
    return json.loads((folder / "run.json").read_text())["rounds"]


def reports(folder):
    return json.loads((folder / "report.json").read_text())["rounds"]


def final(folder):
    return json.loads((folder / "final.json").read_text())


def broken_limits(report):
    return {check["name"] for check in report["gate"]["checks"] if not check["kept"]}


# ---- an update that breaks ------------------------------------------------------------------------------------------


BREAKS = (
    *TINY,
    "run.name=breaks",
    "rounds=[{update: {learning_rate: 1.0e+30}}, {}]",
    "update.warmup_ratio=0",
    "update.global_batch_size=8",
    "update.guard.max_skipped=3",
)


@pytest.fixture(scope="module")
def broken(prefloop):
    """A learning rate under which the first step leaves nothing to go on from, in the first of two rounds."""
    return prefloop.run(*BREAKS), prefloop.runs / "breaks"


def test_an_update_that_breaks_ends_its_round_and_the_run_goes_on_from_the_last_good_policy(broken):
    outcome, folder = broken
    assert outcome.code == 0, outcome.err
    first, second = records(folder)
    assert (first["decision"], first["result"]) == ("hold", None)
    assert first["standing"]["round"] == 0 and second["start"] == first["standing"]
    assert not (folder / "round-0001" / "policy" / "manifest.json").exists()
    assert second["decision"] == "promote" and final(folder)["round"] == 2
    assert "3 steps in a row were skipped" in first["reason"]


def test_the_rows_of_skipped_steps_are_named(broken):
    _, folder = broken
    lines = [json.loads(line) for line in (folder / "round-0001" / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4]
    pairs = ds.dataset(sorted((folder / "round-0001" / "pairs").glob("part-*.parquet"))).to_table()
    assert {i for line in lines for i in line["ids"]} <= set(pairs["pair_id"].to_pylist())
    assert all(len(line["ids"]) == 8 for line in lines)


def test_a_run_with_an_ended_update_is_done_when_the_command_is_given_again(prefloop, broken):
    _, folder = broken
    again = prefloop.run(*BREAKS)
    assert again.code == 0, again.err
    assert again.out.count("finished   nothing to do") == 2
    assert "the update was ended" in (folder / "report.html").read_text()


# ---- rolled back ----------------------------------------------------------------------------------------------------


AGAINST = (
    "[{type: model, path: 'embedded:reverse-judge', name: judge, weight: -1.0},"
    " {type: function, target: 'stages.score.functions:exact_match', role: holdout}]"
)
ROLLS = (
    *TINY,
    *NO_LIMITS,
    "run.name=rolls",
    "max_staleness=1",
    "gate.on_fail=roll_back",
    "gate.max_kl=3",
    "update.guard={max_kl: null, max_loss_jump: null}",
    "rounds=[{}, {score: {rewards: " + AGAINST + "}}, {update: {learning_rate: 1.0e-1}}, {}]",
)


@pytest.fixture(scope="module")
def rolled_back(prefloop):
    """Round 2 is trained against the judge and let through, round 3 runs away; each is sampled ahead of its turn."""
    return prefloop.run(*ROLLS), prefloop.runs / "rolls"


def test_a_result_that_runs_away_is_rolled_back_to_the_best_so_far(rolled_back):
    outcome, folder = rolled_back
    assert outcome.code == 0, outcome.err
    found = records(folder)
    assert [record["decision"] for record in found[:3]] == ["promote", "promote", "roll_back"], outcome.out
    exact = [report["evaluate"]["holdout"]["exact_match"] for report in reports(folder)[:3]]
    best = max(range(3), key=lambda round: exact[round])
    assert best != 2, "round 2 was to do harm"
    assert found[2]["standing"]["round"] == best and found[3]["start"] == found[2]["standing"]


def test_what_was_sampled_by_a_policy_that_was_rolled_back_is_not_trained_on(rolled_back):
    outcome, folder = rolled_back
    assert "was rolled back" in outcome.out
    files = sorted((folder / "round-0004" / "candidates").glob("part-*.parquet"))
    rows = ds.dataset(files).to_table()
    standing = records(folder)[2]["standing"]
    assert set(rows["policy_version"].to_pylist()) == {standing["sha256"]}
    assert records(folder)[3]["sampling"] == standing


def test_a_cleaned_run_is_done_and_what_was_decided_stands_whatever_the_limits_are_now(prefloop, rolled_back):
    _, folder = rolled_back
    stands = final(folder)["path"]
    assert prefloop.command("clean", folder, "--keep", 1, "--yes").code == 0
    decided = [record["decision"] for record in records(folder)]
    again = prefloop.run(*ROLLS, "gate.max_kl=1000")
    assert again.code == 0 and again.out.count("finished   nothing to do") == 4, again.out + again.err
    assert [record["decision"] for record in records(folder)] == decided, "what is decided is not judged again"
    assert final(folder)["path"] == stands and list((folder / "final").glob("*.safetensors"))


# ---- a reward that is gamed -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason="PREFLOOP_TEST_DATA names no folder with real data")
def test_a_reward_that_is_gamed_is_held_before_the_stories_fall_apart(prefloop):
    outcome = prefloop.run(
        f"policy.path={DATA / 'stories260k'}",
        f"prompts.path={DATA / 'tinystories' / 'prompts.jsonl'}",
        f"evaluate.texts.path={DATA / 'tinystories' / 'stories.jsonl'}",
        "evaluate.num_prompts=64",
        "evaluate.texts.num_texts=64",
        "prompts.per_round=160",
        "rounds=3",
        "update.learning_rate=1.0e-3",
        "run.name=gamed",
        config="configs/stories.yaml",
    )
    assert outcome.code == 0, outcome.err
    folder = prefloop.runs / "gamed"
    found, told = records(folder), {report["round"]: report for report in reports(folder)}
    assert found[0]["decision"] == "promote"
    held = [record["round"] for record in found if record["decision"] != "promote"]
    assert held == [3], outcome.out
    first = told[0]["evaluate"]
    for round in held:
        assert told[round]["evaluate"]["reward"] > first["reward"], "the reward alone saw nothing wrong"
        assert broken_limits(told[round]) & {"max_kl", "max_texts_nll", "max_repetition"}
    standing = told[final(folder)["round"]]["evaluate"]
    assert standing["kl"] <= 20 and standing["texts_nll"] < first["texts_nll"] + 0.25


# ---- a judge that is too weak ---------------------------------------------------------------------------------------


def test_a_judge_that_is_too_weak_is_seen_by_the_reward_that_training_never_sees(prefloop, tmp_path_factory):
    import additions

    home = tmp_path_factory.mktemp("additions")
    additions.make(home)
    outcome = prefloop.run(
        "run.name=additions",
        f"policy.path={home / 'policy'}",
        f"prompts.path={home / 'prompts.jsonl'}",
        f"evaluate.path={home / 'heldout.jsonl'}",
        "evaluate.num_prompts=1024",
        "prompts.per_round=512",
        "score.rewards=[{type: model, name: judge, path: " + str(home / "judge") + "},"
        " {type: function, target: 'stages.score.functions:exact_match', role: holdout}]",
    )
    assert outcome.code == 0, outcome.err
    folder = prefloop.runs / "additions"
    found, told = records(folder), {report["round"]: report for report in reports(folder)}
    held = [record["round"] for record in found if record["decision"] != "promote"]
    assert held, outcome.out
    for round in held:
        assert told[round]["evaluate"]["reward"] > told[0]["evaluate"]["reward"], "the judge saw nothing wrong"
        assert "max_holdout_drop" in broken_limits(told[round])
    standing = told[final(folder)["round"]]["evaluate"]["holdout"]["exact_match"]
    assert standing >= told[0]["evaluate"]["holdout"]["exact_match"] - 0.03

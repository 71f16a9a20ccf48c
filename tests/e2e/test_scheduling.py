"""Rounds with settings of their own, standardised and auxiliary rewards, watched files, added rounds, reasons to stop.

One run, grown by three calls of the command.
"""

from __future__ import annotations

import json

import pyarrow.dataset as ds
import pytest

pytestmark = pytest.mark.long

REWARDS = (
    '[{type: model, path: "embedded:reverse-judge", name: judge, scale: zscore},'
    ' {type: function, target: "stages.score.functions:exact_match", scale: zscore, weight: 0.5},'
    ' {type: function, target: "happy:length", role: auxiliary}]'
)
CONFIG = """
run: {{name: grown}}
policy: {{path: "embedded:reverse", dtype: float32}}
rounds:
  - {{}}
  - {{update: {{learning_rate: 1.0e-4, workers: 2}}, sample: {{num_generations: 6}}, reference: initial}}
prompts: {{path: "embedded:reverse-prompts", per_round: 64, shard_size: 32}}
sample: {{num_generations: 4, max_new_tokens: 8}}
score: {{rewards: {rewards}}}
update: {{learning_rate: 3.0e-4, global_batch_size: 16, micro_batch_size: 8, device: cpu}}
evaluate: {{path: "embedded:reverse-heldout", num_prompts: 64}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A config with a reward beside it, and a folder with one file of prompts, one that is broken, and a stop file."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "grown.yaml").write_text(CONFIG.format(rewards=REWARDS), encoding="utf-8")
    (folder / "happy.py").write_text(
        "def length(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n",
        encoding="utf-8",
    )
    (folder / "in").mkdir()
    lines = [json.dumps({"prompt": f"{n}>", "answer": str(n)[::-1]}) for n in range(51234, 51254)]
    (folder / "in" / "new.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "in" / "broken.jsonl").write_text('{"prompt": "1>"}\n{"prompt"\n', encoding="utf-8")
    (folder / "in" / "STOP").touch()
    return folder


@pytest.fixture(scope="module")
def calls(prefloop, home):
    """The outcomes: watched, one round more, stopped before a third one more."""
    config, sets = str(home / "grown.yaml"), (f"run.dir={home}",)
    watched = prefloop.command("run", config, f"--watch={home / 'in'}", sets=sets)
    added = prefloop.command("run", config, "--rounds=+1", sets=sets)
    stopped = prefloop.command("run", config, "--rounds=+2", sets=(*sets, "stop_when.max_hours=1.0e-6"))
    return watched, added, stopped


def report(home, round):
    return json.loads((home / "grown" / f"round-{round:04d}" / "report.json").read_text(encoding="utf-8"))


def rows(home, round, table):
    files = sorted((home / "grown" / f"round-{round:04d}" / table).glob("part-*.parquet"))
    return ds.dataset(files).to_table().to_pylist()


def test_every_call_ends_well(calls):
    for outcome in calls:
        assert outcome.code == 0, outcome.err


def test_a_rounds_entry_overrides_its_round_alone(home, calls):
    generations = [
        report(home, r)["sample"]["num_candidates"] / report(home, r)["sample"]["num_prompts"] for r in (1, 2)
    ]
    assert generations == [4, 6]
    manifests = [
        json.loads((home / "grown" / f"round-000{r}" / "policy" / "manifest.json").read_text("utf-8")) for r in (1, 2)
    ]
    assert [m["fingerprint"]["update"]["learning_rate"] for m in manifests] == [3e-4, 1e-4]
    lineage = json.loads((home / "grown" / "run.json").read_text(encoding="utf-8"))["rounds"]
    assert lineage[1]["references"][0]["round"] == 0 and lineage[1]["start"]["round"] == 1


def test_standardised_rewards_have_mean_0_over_a_rounds_answers_and_first_evaluations_too(home, calls):
    for round in (1, 2):
        rewards = [row["reward"] for row in rows(home, round, "scored")]
        assert sum(rewards) / len(rewards) == pytest.approx(0, abs=1e-9)
    assert report(home, 0)["evaluate"]["reward"] == pytest.approx(0, abs=1e-9)
    assert report(home, 2)["evaluate"]["reward"] > 0.1


def test_an_auxiliary_reward_is_beside_the_pairs_and_not_in_the_sum(home, calls):
    for row in rows(home, 1, "pairs"):
        for mark in ("chosen", "rejected"):
            (found,) = [reward for reward in row[f"{mark}_rewards"] if reward["role"] == "auxiliary"]
            assert found["value"] == len(row[mark])
    assert 5 <= report(home, 1)["evaluate"]["auxiliary"]["length"] <= 8


def test_a_watched_file_gives_a_round_on_its_prompts_and_a_broken_one_is_refused(home, calls):
    watched = calls[0].out
    assert "broken.jsonl line 2" in watched or "broken.jsonl" in watched
    assert "refused" in watched
    assert {row["prompt"] for row in rows(home, 3, "prompts")} == {f"{n}>" for n in range(51234, 51254)}
    ledger = json.loads((home / "grown" / "watched.json").read_text(encoding="utf-8"))["files"]
    assert [(entry["file"].rpartition("/")[2], entry["round"]) for entry in ledger if entry["round"]] == [
        ("new.jsonl", 3)
    ]


def test_a_round_more_goes_on_from_the_last_and_draws_other_prompts(home, calls):
    assert "3 in all" in calls[1].out
    lineage = json.loads((home / "grown" / "run.json").read_text(encoding="utf-8"))["rounds"]
    assert [entry["round"] for entry in lineage] == [1, 2, 3, 4]
    assert lineage[3]["start"]["round"] == 3
    drawn = [{row["prompt_id"] for row in rows(home, round, "prompts")} for round in (1, 2, 4)]
    assert len(set.union(*drawn)) == 3 * 64


def test_a_reason_to_stop_is_told_and_no_round_is_made(home, calls):
    assert "stop_when.max_hours" in calls[2].out
    assert not (home / "grown" / "round-0005").exists()

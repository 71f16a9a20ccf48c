"""The same loop with nearly every choice made otherwise: DPO, bfloat16, a fixed reference, a user's own prompts."""

from __future__ import annotations

import json
import shutil

import pyarrow.dataset as ds
import pytest
import yaml

pytestmark = pytest.mark.long

REWARD = """
def few_nines(prompts, completions, answer, level, **columns):
    return [-float(c.count("9")) - len(c) / 100 + 0 * l for c, l in zip(completions, level)]
"""


@pytest.fixture(scope="module")
def outcome(prefloop, policy_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_rewards.py").write_text(REWARD)
    rows = [{"q": f"{n:05d}>", "answer": "x", "level": n} for n in range(120)]
    rows += [rows[0], {"q": "1" * 40 + ">", "answer": "x", "level": 0}]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run": {"tensorboard": False},
        "policy": {"path": str(policy_folder), "dtype": "bfloat16"},
        "reference": "initial",
        "prompts": {"path": str(folder / "own.jsonl"), "per_round": 80, "columns": {"prompt": "q"}},
        "sample": {"num_generations": 4, "max_new_tokens": 8, "engines": 2, "top_p": 0.95},
        "score": {"rewards": [{"type": "function", "target": "own_rewards:few_nines"}], "workers": 2},
        "pair": {"truncated": "keep"},
        "update": {"loss_type": "dpo", "learning_rate": 1e-3, "global_batch_size": 16, "workers": 1}
        | {"zero_stage": 0, "gradient_checkpointing": True},
        "evaluate": {"holdout": 0.2, "num_prompts": 50},
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(config))
    result = prefloop.run(
        "prompts.per_round=80", "prompts.shard_size=16", "evaluate.num_prompts=20", config=folder / "own.yaml"
    )
    return result, prefloop.runs / "own"


def table(folder, name):
    return ds.dataset(sorted((folder / name).glob("part-*.parquet"))).to_table()


def test_it_runs_to_its_end(outcome):
    result, folder = outcome
    assert result.code == 0, result.out + result.err
    assert not (folder / "tensorboard").exists() and "tensorboard" not in result.out
    assert "1 repeated rows merged" in result.out


def test_a_prompt_beyond_the_context_is_a_fate_and_fates_add_up(outcome):
    _, folder = outcome
    fates = [table(folder / f"round-000{r}", "fates") for r in (1, 2)]
    assert all(found.num_rows == 80 for found in fates)
    asked = {row["prompt_id"] for found in fates for row in found.to_pylist() if row["fate"] == "prompt_too_long"}
    long = [row["prompt_id"] for row in table(folder, "prompts").to_pylist() if len(row["prompt"]) > 30]
    assert asked == set(long)


def test_held_out_prompts_are_not_trained_on(outcome):
    _, folder = outcome
    held = set(table(folder / "evaluation", "prompts")["prompt"].to_pylist())
    trained = {p for r in (1, 2) for p in table(folder / f"round-000{r}", "prompts")["prompt"].to_pylist()}
    assert held and not held & trained


def test_the_fixed_reference_is_the_first_policy_and_the_next_round_starts_from_the_master(outcome):
    _, folder = outcome
    rounds = json.loads((folder / "run.json").read_text())["rounds"]
    assert rounds[1]["references"] == rounds[0]["references"] != [rounds[1]["start"]]
    assert rounds[1]["start"]["master_sha256"] and rounds[1]["start"]["master"] == "round-0001/master"
    weights = set(table(folder / "round-0002", "reference_logps")["weights"].to_pylist())
    assert weights == {rounds[0]["references"][0]["sha256"]}
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    first = {step["round"]: step["loss"] for step in steps if step["step"] == 1}
    assert first[1] == pytest.approx(0.693147180, abs=1e-7)
    assert first[2] != first[1]


def test_a_run_folder_may_move(outcome):
    _, folder = outcome
    assert (folder / "final" / "model.safetensors").exists()
    moved = folder.with_name("moved")
    shutil.copytree(folder, moved, symlinks=True)
    assert (moved / "final" / "model.safetensors").exists()
    assert not (folder / "final").readlink().is_absolute()

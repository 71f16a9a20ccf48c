"""Two rounds of the command line on policies of several architectures: text and chats, tied and not."""

from __future__ import annotations

import json

import pyarrow.dataset as ds
import pytest
import tiny_models
import yaml

pytestmark = pytest.mark.long

REWARD = """
def share_of_e(prompts, completions, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [text.count("e") / (1 + len(text)) for text in texts]
"""

CASES = {
    "llama": {},
    "qwen3": {
        "prompts.to_chat": True,
        "prompts.system": "Be brief",
        "prompts.chat_template_kwargs": {"enable_thinking": False},
    },
    "gemma2": {"prompts.to_chat": True},
    "gpt2": {},
    "mistral": {"prompts.to_chat": True, "policy.dtype": "bfloat16"},
}


@pytest.fixture(scope="module", params=list(CASES))
def finished(request, prefloop, tmp_path_factory):
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    (folder / "own_rewards.py").write_text(REWARD)
    rows = [{"prompt": f"{text} {n}"} for text in tiny_models.PROMPTS for n in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind = tiny_models.KINDS[name]
    policy = {"path": str(tiny_models.policy(name, folder / "policy")), "dtype": "float32", "pad_token": kind.pad_token}
    config = {
        "policy": policy,
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "sample": {"num_generations": 4, "max_new_tokens": 16},
        "score": {"rewards": [{"type": "function", "target": "own_rewards:share_of_e"}]},
        "pair": {"truncated": "keep"},
        "update": {"learning_rate": 1e-3, "global_batch_size": 8, "workers": 1, "zero_stage": 1, "device": "cpu"},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    sets = [f"{key}={json.dumps(value)}" for key, value in CASES[name].items()]
    outcome = prefloop.run(
        "prompts.per_round=16", "prompts.shard_size=16", "evaluate=null", *sets, config=folder / f"{name}.yaml"
    )
    assert outcome.code == 0, outcome.out + outcome.err
    return name, prefloop.runs / name


def rows_of(folder, table):
    return ds.dataset(sorted((folder / table).glob("part-*.parquet"))).to_table().to_pylist()


def test_two_rounds_finish_and_the_engine_agrees_with_the_trainer(finished):
    name, folder = finished
    limit = 1e-3 if CASES[name].get("policy.dtype") is None else 0.1
    for number in (1, 2):
        report = json.loads((folder / f"round-000{number}" / "report.json").read_text())
        assert report["engine_gap"] < limit
        assert report["pairs"]["num_pairs"] > 0


def test_what_is_trained_are_the_sampled_tokens_behind_the_prompts_tokens(finished):
    _, folder = finished
    for rnd in (folder / "round-0001", folder / "round-0002"):
        sampled = {row["response_id"]: row["response_token_ids"] for row in rows_of(rnd, "candidates")}
        asked = {row["prompt_id"]: row["prompt_token_ids"] for row in rows_of(rnd, "prompts")}
        for pair in rows_of(rnd, "pairs"):
            assert pair["chosen_token_ids"] == sampled[pair["chosen_id"]]
            assert pair["rejected_token_ids"] == sampled[pair["rejected_id"]]
            assert pair["prompt_token_ids"] == asked[pair["prompt_id"]]


def test_a_chat_is_asked_as_one_and_a_text_as_text(finished):
    name, folder = finished
    for row in rows_of(folder / "round-0001", "prompts"):
        roles = None if row["conversation"] is None else [message["role"] for message in row["conversation"]]
        expected = {"qwen3": ["system", "user"], "gemma2": ["user"], "mistral": ["user"]}.get(name)
        assert roles == expected
        assert row["prompt"].endswith("<think>\n\n</think>\n\n") == (name == "qwen3")


def test_the_final_policy_loads_and_differs_from_the_first(finished):
    from transformers import AutoModelForCausalLM

    name, folder = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared == tiny_models.KINDS[name].tied
    lineage = json.loads((folder / "run.json").read_text())["rounds"]
    assert len({lineage[0]["start"]["sha256"], lineage[0]["result"]["sha256"], lineage[1]["result"]["sha256"]}) == 3

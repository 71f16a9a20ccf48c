"""One real engine: its log-probs are the model's, its answers are a function of their seeds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from stages.contracts import PROMPTS
from stages.errors import StageError
from stages.protocols import SampleRequest, Weights
from stages.sample.config import SampleConfig
from stages.sample.stage import Draw, sample
from stages.sample.vllm_sampler import VLLMSampler
from stages.weights import weights_sha256

CONFIG = SampleConfig(num_generations=4, max_new_tokens=8)
DRAW = Draw(run_seed=0, round=1, seed_round=1, stream="policy")


def weights_of(folder: Path) -> Weights:
    return Weights(folder, weights_sha256(folder), round=0)


@pytest.fixture(scope="module")
def sampler():
    sampler = VLLMSampler(CONFIG, dtype="float32", num_threads=2, use_gpu=False, seed=0)
    yield sampler
    sampler.close()


def prompts(*texts):
    digits = {str(d): 4 + d for d in range(10)} | {">": 14}
    return PROMPTS.table(
        dict(
            prompt_id=f"id{i}",
            round=1,
            prompt=text,
            conversation=None,
            prompt_token_ids=[1] + [digits[c] for c in text],
            answer=None,
            extra="{}",
        )
        for i, text in enumerate(texts)
    )


def sampled(sampler, folder, table, **options):
    weights = weights_of(folder)
    sampler.load(weights)
    config = CONFIG.model_copy(update=options)
    candidates, dropped = sample(table, sampler, config, weights=weights, draw=DRAW)
    return candidates.to_pylist(), dropped


TABLE = prompts("48315>", "00000>", "13579>", "24680>", "99999>")


@pytest.fixture(scope="module")
def rows(sampler, policy_folder):
    return sampled(sampler, policy_folder, TABLE)[0]


def hf_logps(folder, rows, table):
    from stages.update.batching import token_batch
    from stages.update.logps import answer_logps
    from stages.update.model import load_policy

    ids = dict(zip(table["prompt_id"].to_pylist(), table["prompt_token_ids"].to_pylist(), strict=True))
    batch = token_batch([ids[row["prompt_id"]] for row in rows], [row["response_token_ids"] for row in rows])
    with torch.no_grad():
        return answer_logps(load_policy(folder, dtype="float32"), batch, torch.device("cpu")).tolist()


def test_every_prompt_has_its_answers_with_the_policys_name_on_them(rows, policy_folder):
    assert len(rows) == 5 * 4
    assert len({row["response_id"] for row in rows}) == 20
    assert {row["policy_version"] for row in rows} == {weights_sha256(policy_folder)}
    assert [row["sample_index"] for row in rows[:4]] == [0, 1, 2, 3]
    assert [row["seed"] - rows[0]["seed"] for row in rows[:4]] == [0, 1, 2, 3]


def test_the_engines_log_probs_are_the_models(rows, policy_folder):
    ours = hf_logps(policy_folder, rows, TABLE)
    theirs = [sum(row["response_logps"]) for row in rows]
    assert theirs == pytest.approx(ours, abs=1e-3)
    assert all(len(row["response_logps"]) == len(row["response_token_ids"]) for row in rows)


def test_the_stop_token_is_there_exactly_when_it_was_sampled(sampler, policy_folder, rows):
    short, _ = sampled(sampler, policy_folder, TABLE, max_new_tokens=2)
    assert {row["finish_reason"] for row in short} >= {"length"}
    for row in [*rows, *short]:
        assert (row["response_token_ids"][-1] == 2) == (row["finish_reason"] == "stop")
        assert "</s>" not in row["response"]


def test_answers_depend_on_the_prompt_and_not_on_its_place_or_company(sampler, policy_folder, rows):
    again, _ = sampled(sampler, policy_folder, TABLE)
    assert again == rows
    part, _ = sampled(sampler, policy_folder, TABLE.slice(2, 2))
    wanted = [row for row in rows if row["prompt_id"] in ("id2", "id3")]
    assert [row["response_token_ids"] for row in part] == [row["response_token_ids"] for row in wanted]


def test_log_probs_are_at_temperature_1_whatever_the_sampling_temperature(sampler, policy_folder):
    cold, _ = sampled(sampler, policy_folder, TABLE, temperature=0.5, top_k=5)
    assert [sum(row["response_logps"]) for row in cold] == pytest.approx(hf_logps(policy_folder, cold, TABLE), abs=1e-3)


def test_a_prompt_without_room_for_an_answer_is_dropped_with_its_reason(sampler, policy_folder):
    table = prompts("48315>", "1" * 40 + ">")
    rows, dropped = sampled(sampler, policy_folder, table)
    assert {row["prompt_id"] for row in rows} == {"id0"}
    assert [(drop.prompt_id, drop.fate) for drop in dropped] == [("id1", "prompt_too_long")]


def changed_policy(folder: Path, target: Path, *, tied: bool, factor: float) -> Path:
    """A copy with other weights, with tied embeddings or not."""
    from stages.update.model import load_policy

    shutil.copytree(folder, target)
    model = load_policy(folder, dtype="float32")
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    model.save_pretrained(target)
    assert json.loads((target / "config.json").read_text())["tie_word_embeddings"] == tied
    return target


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_after_a_change_of_weights_the_engine_samples_from_the_new_ones(sampler, policy_folder, tmp_path, tied):
    first = changed_policy(policy_folder, tmp_path / "first", tied=tied, factor=1.1)
    changed = changed_policy(policy_folder, tmp_path / "changed", tied=tied, factor=1.3)
    sampler.load(weights_of(first))
    assert sampler.load(weights_of(changed)).way == "in place"
    rows, _ = sampled(sampler, changed, TABLE)
    assert {row["policy_version"] for row in rows} == {weights_sha256(changed)}
    theirs, ours = [sum(row["response_logps"]) for row in rows], hf_logps(changed, rows, TABLE)
    assert theirs == pytest.approx(ours, abs=1e-3)
    assert theirs != pytest.approx(hf_logps(first, rows, TABLE), abs=1e-2)
    prompt_ids = dict(zip(TABLE["prompt_id"].to_pylist(), TABLE["prompt_token_ids"].to_pylist(), strict=True))
    asked = sampler.logps([prompt_ids[row["prompt_id"]] for row in rows], [row["response_token_ids"] for row in rows])
    assert asked == pytest.approx(ours, abs=1e-4 * CONFIG.max_new_tokens)


@pytest.mark.slow
def test_an_answer_that_fills_the_context_has_a_log_prob(sampler, policy_folder):
    sampler.load(weights_of(policy_folder))
    prompt, answer = [1, 4, 5, 14], [4] * (sampler.max_model_len - 4)
    rows = [{"prompt_id": "id", "response_token_ids": answer}]
    table = {"prompt_id": pa.array(["id"]), "prompt_token_ids": pa.array([prompt])}
    assert sampler.logps([prompt], [answer]) == pytest.approx(hf_logps(policy_folder, rows, table), abs=1e-2)
    assert sampler.logps([], []) == []


def test_a_folder_that_holds_other_weights_than_asked_for_is_refused(sampler, policy_folder):
    with pytest.raises(StageError, match="sha256"):
        sampler.load(Weights(policy_folder, "0" * 64, round=0))
    sampler.load(weights_of(policy_folder))
    assert sampler.generate([SampleRequest([1, 4, 14], 1)], CONFIG)[0][0] is not None


@pytest.mark.slow
def test_an_engine_that_rested_holds_nothing_and_answers_as_before(sampler, policy_folder):
    before = sampled(sampler, policy_folder, TABLE)
    sampler.rest()
    sampler.rest()
    loading = sampler.load(weights_of(policy_folder))
    assert (loading.way, loading.reason) == ("started", "none was running")
    assert sampled(sampler, policy_folder, TABLE) == before

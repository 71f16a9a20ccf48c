"""Laws that hold whatever the architecture and tokenizer: sampled, trained, published, loaded and sampled again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from ranks import on_ranks

from pipeline.prompts import distinct, prompt_rows
from stages.protocols import Weights
from stages.sample.config import SampleConfig
from stages.sample.stage import Draw, sample
from stages.sample.vllm_sampler import VLLMSampler
from stages.tokenizers import load_tokenizer
from stages.update.batching import token_batch
from stages.update.config import UpdateConfig
from stages.update.logps import answer_logps
from stages.update.model import load_policy
from stages.update.rows import AnswerRow, PairRow, answers_of

pytestmark = pytest.mark.slow

CONFIG = SampleConfig(num_generations=16, max_new_tokens=24)
UPDATE = UpdateConfig(learning_rate=1e-3, global_batch_size=4, micro_batch_size=2, max_grad_norm=1.0)
KINDS = list(tiny_models.KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("policies")
    return {name: tiny_models.policy(name, root / name) for name in KINDS}


@pytest.fixture(scope="module")
def prompts(folders):
    """Prompts as the pipeline reads them: chats where there is a template, text where there is none."""

    def table(name):
        kind = tiny_models.KINDS[name]
        rows = [
            ("here", {"prompt": [{"role": "user", "content": text}] if kind.chat else text})
            for text in tiny_models.PROMPTS
        ]
        tokenizer = load_tokenizer(folders[name], pad_token=kind.pad_token, key="policy.path")
        return distinct(prompt_rows(rows, tokenizer, columns={}, system=None))[0]

    return {name: table(name) for name in KINDS}


@pytest.fixture(scope="module")
def sampler():
    sampler = VLLMSampler(CONFIG, dtype="float32", num_threads=2, use_gpu=False, seed=0)
    yield sampler
    sampler.close()


def candidates_of(sampler, folder, table, **options):
    weights = Weights.found(folder, round=0)
    sampler.load(weights)
    config = CONFIG.model_copy(update=options)
    candidates, dropped = sample(
        table, sampler, config, weights=weights, draw=Draw(run_seed=0, round=1, seed_round=1, stream="policy")
    )
    assert not dropped
    return candidates.to_pylist()


@pytest.fixture(scope="module")
def candidates(sampler, folders, prompts):
    return {name: candidates_of(sampler, folders[name], prompts[name]) for name in KINDS}


def pairs_of(rows, table) -> list[PairRow]:
    """Each prompt's first answer against its second: what is better does not matter here."""
    ids = dict(zip(table["prompt_id"].to_pylist(), table["prompt_token_ids"].to_pylist(), strict=True))
    return [
        PairRow(
            a["response_id"],
            a["response_id"],
            b["response_id"],
            ids[a["prompt_id"]],
            a["response_token_ids"],
            b["response_token_ids"],
        )
        for a, b in zip(rows[::16], rows[1::16], strict=True)
    ]


def trained(folder: Path, out: Path, rows: list[PairRow], dtype: str) -> dict[str, dict[str, float]]:
    """Log-probs of a policy before an update, after it, and as the published folder gives them back."""
    from stages.update.worker import Trainer

    out.mkdir(parents=True)
    trainer = Trainer(UPDATE, dtype=dtype, pad_token=None, num_threads=2)
    trainer.load(Weights.found(folder, round=0))
    answers = answers_of(rows)
    before = trainer.logps(answers)
    trainer.update(rows, [before], from_reference=True, seed=1)
    after = trainer.logps(answers)
    trainer.save(out)
    master = out / "master" if (out / "master").exists() else None
    trainer.load(Weights.found(out / "policy", round=1, master=master))
    return {"before": before, "after": after, "again": trainer.logps(answers)}


def all_trained(work: list[tuple[str, Path, Path, list[PairRow]]], dtype: str):
    return {name: trained(folder, out, rows, dtype) for name, folder, out, rows in work}


@pytest.fixture(scope="module")
def results(folders, prompts, candidates, tmp_path_factory):
    """By dtype and architecture: log-probs around an update, and the folder that it published."""
    root, found = tmp_path_factory.mktemp("results"), {}
    for dtype in ("float32", "bfloat16"):
        work = [(n, folders[n], root / dtype / n, pairs_of(candidates[n], prompts[n])) for n in KINDS]
        (logps,) = on_ranks(1, all_trained, work, dtype)
        found[dtype] = {n: (logps[n], root / dtype / n) for n in KINDS}
    return found


def plain_logps(folder: Path, answers: list[AnswerRow]) -> list[float]:
    """By transformers alone, one answer at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for row in answers:
        tokens = torch.tensor([row.prompt_token_ids + row.token_ids])
        with torch.no_grad():
            logps = model(tokens).logits[0, :-1].log_softmax(-1)
        wanted = tokens[0, 1:, None]
        found.append(float(logps.gather(-1, wanted)[len(row.prompt_token_ids) - 1 :].sum()))
    return found


@pytest.mark.parametrize("name", KINDS)
def test_engine_trainer_and_plain_transformers_give_one_log_prob(name, candidates, prompts, folders, results):
    pairs = pairs_of(candidates[name], prompts[name])
    answers, engines = answers_of(pairs), {row["response_id"]: sum(row["response_logps"]) for row in candidates[name]}
    plain = plain_logps(folders[name], answers)
    trainers = [results["float32"][name][0]["before"][row.response_id] for row in answers]
    assert trainers == pytest.approx(plain, abs=1e-3)
    assert [engines[row.response_id] for row in answers] == pytest.approx(plain, abs=2e-3)


@pytest.mark.parametrize("name", KINDS)
def test_an_answer_ends_with_a_stop_token_exactly_when_it_stopped(name, candidates, folders):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    stops = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(tiny_models.KINDS[name].stops))}
    ends = set()
    for row in candidates[name]:
        *body, last = row["response_token_ids"]
        assert (last in stops) == (row["finish_reason"] == "stop")
        assert not stops & set(body)
        ends |= stops & {last}
    assert ends == stops, "every stop token ends some answer"
    lengths = {len(row["response_token_ids"]) for row in candidates[name] if row["finish_reason"] == "length"}
    assert lengths == {CONFIG.max_new_tokens}


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_has_one_bos_where_the_model_has_one_and_starts_what_is_trained(name, candidates, prompts, folders):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    expected = {
        "llama": 1,
        "mistral": 1,
        "gemma2": 1,
        "opt": 1,
        "mixtral": 1,
        "gpt2": 0,
        "qwen3": 0,
        "bloom": 0,
        "gpt_neox": 0,
    }[name]
    for ids in prompts[name]["prompt_token_ids"].to_pylist():
        assert ids.count(tokenizer.bos_token_id) == expected
        assert not expected or ids[0] == tokenizer.bos_token_id
    for pair in pairs_of(candidates[name], prompts[name]):
        batch = token_batch([pair.prompt_token_ids], [pair.chosen_token_ids])
        length = len(pair.prompt_token_ids)
        assert batch.tokens_NT[0].tolist() == pair.prompt_token_ids + pair.chosen_token_ids
        assert batch.answer_NT[0].tolist() == [False] * length + [True] * len(pair.chosen_token_ids)


@pytest.mark.parametrize("name", KINDS)
def test_what_a_model_brings_for_chatting_does_not_change_how_it_is_sampled(name, candidates):
    """At temperature 1 without truncation, sampled tokens' mean log-prob is minus the entropy: far from greedy."""
    logps = [logp for row in candidates[name] for logp in row["response_logps"]]
    assert min(logps) < -6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_the_published_policy_is_the_trained_one(name, dtype, candidates, prompts, results):
    logps, out = results[dtype][name]
    answers = answers_of(pairs_of(candidates[name], prompts[name]))
    before, after, again = ([logps[key][row.response_id] for row in answers] for key in ("before", "after", "again"))
    assert after != pytest.approx(before, abs=1e-1)
    assert again == after
    near = 1e-3 if dtype == "float32" else 1.0
    assert plain_logps(out / "policy", answers) == pytest.approx(after, abs=near)
    if dtype == "bfloat16":
        assert (out / "master").exists()


@pytest.mark.parametrize("name", KINDS)
def test_tied_stays_tied_and_the_tokenizer_goes_along(name, folders, prompts, results):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for dtype in ("float32", "bfloat16"):
        _, out = results[dtype][name]
        model = AutoModelForCausalLM.from_pretrained(out / "policy")
        shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert shared == tiny_models.KINDS[name].tied == model.config.tie_word_embeddings
        config, old = (json.loads((f / "config.json").read_text()) for f in (out / "policy", folders[name]))
        assert config.pop("dtype") == dtype
        old.pop("dtype")
        assert config == old
        first, new = AutoTokenizer.from_pretrained(folders[name]), AutoTokenizer.from_pretrained(out / "policy")
        text = prompts[name]["prompt"][0].as_py()
        assert new(text).input_ids == first(text).input_ids
        assert new.chat_template == first.chat_template
        assert (
            model.generation_config.eos_token_id
            == json.loads((folders[name] / "generation_config.json").read_text())["eos_token_id"]
        )


@pytest.mark.parametrize("name", KINDS)
def test_the_engine_starts_on_what_was_published(name, sampler, prompts, results):
    _, out = results["float32"][name]
    rows = candidates_of(sampler, out / "policy", prompts[name].slice(0, 2), num_generations=4)
    ids = dict(zip(prompts[name]["prompt_id"].to_pylist(), prompts[name]["prompt_token_ids"].to_pylist(), strict=True))
    batch = token_batch([ids[row["prompt_id"]] for row in rows], [row["response_token_ids"] for row in rows])
    with torch.no_grad():
        ours = answer_logps(load_policy(out / "policy", dtype="float32"), batch, torch.device("cpu")).tolist()
    assert [sum(row["response_logps"]) for row in rows] == pytest.approx(ours, abs=2e-3)

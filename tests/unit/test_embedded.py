"""The embedded task: what is taught, what is held out, what the tokenizer does."""

from __future__ import annotations

import json

import numpy as np

from pipeline import embedded_models
from stages.tokenizers import load_tokenizer


def test_the_tokenizers_plain_call_gives_the_tokens_that_were_trained(policy_folder):
    tokenizer = load_tokenizer(policy_folder, pad_token=None, key="policy.path")
    digits = np.array([[int(c) + embedded_models.FIRST_DIGIT for c in "48315"]])
    trained = embedded_models.token_rows(digits, digits[:, ::-1], end=True)[0].tolist()
    assert tokenizer("48315>51384").input_ids == trained[:-1]
    assert trained[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(trained, skip_special_tokens=True) == "48315>51384"
    assert len(tokenizer("48315>").input_ids) == embedded_models.PROMPT_LEN


def test_held_out_strings_are_in_no_corpus_and_no_round(make_small):
    taught = {"".join(str(t - embedded_models.FIRST_DIGIT) for t in row) for row in embedded_models.Strings(0).digits}
    asked = {json.loads(line)["prompt"][:-1] for line in make_small("reverse-prompts").open()}
    kept = {json.loads(line)["prompt"][:-1] for line in make_small("reverse-heldout").open()}
    assert "48315" not in taught
    assert not kept & (taught | asked)
    assert len(kept) >= 500 and len(asked) >= 512
    assert len(taught) + sum(embedded_models.held_out(f"{n:05d}") for n in range(100_000)) == 100_000


def test_more_than_half_of_the_corpus_is_wrong_by_exactly_one_digit():
    strings = embedded_models.Strings(0)
    right = strings.draw(500)
    assert ((strings.with_wrong_digit(right) != right).sum(axis=1) == 1).all()
    assert embedded_models.Recipe().wrong_share > 0.5


def test_what_is_made_is_found_again_and_another_recipe_is_another_thing(make_small, policy_folder):
    before = (policy_folder / "model.safetensors").stat().st_mtime_ns
    assert make_small("reverse") == policy_folder
    assert (policy_folder / "model.safetensors").stat().st_mtime_ns == before
    config = json.loads((policy_folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]

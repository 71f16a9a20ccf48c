"""The setting that a plan names where a config does not fit: it fits, and changes no result where it need not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.config_file import load_config
from pipeline.plan.command import outlook_of, show_plan
from stages.errors import ConfigError
from stages.update.config import UpdateConfig

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
QWEN_HALF_B = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
ON_GPU = ("update.device=auto", "policy.dtype=bfloat16", "sample.max_new_tokens=256")


@pytest.fixture(autouse=True)
def _where_nothing_has_run(tmp_path_factory, monkeypatch):
    """A run that lies beside the tests would change what is still to do."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def of_shapes(shapes: dict[str, object], *more: str) -> list[str]:
    return ["policy.path=no-such/model", f"policy.shapes={json.dumps(shapes)}", *more]


def named_by(sets: list[str], devices: str, capsys) -> tuple[list[str], ConfigError]:
    """The words that a plan names, as it prints them and as its refusal has them."""
    with pytest.raises(ConfigError) as refused:
        show_plan(QUICKSTART, sets, devices=devices, in_json=True)
    words = json.loads(capsys.readouterr().out)["nearest"]
    assert words, refused.value
    pasted = re.findall(r"--set (\S+?);?(?= |$)", refused.value.fix.partition("; or:")[0])
    assert pasted == words
    return words, refused.value


@pytest.mark.parametrize(
    ("shapes", "more", "devices"),
    [
        (LLAMA_8B, (*ON_GPU, "update.workers=1"), "8x80GB"),
        (LLAMA_8B, (*ON_GPU, "update.workers=1"), "1x80GB"),
        (LLAMA_8B, (*ON_GPU, "update.workers=2", "update.zero_stage=0"), "2x8x80GB"),
        (QWEN_HALF_B, (*ON_GPU, "update.workers=2"), "1x24GB"),
        (QWEN_HALF_B, ("sample.engines=4", "sample.kv_cache_gib=8", "update.workers=1"), "cpu:16x32GB"),
        (QWEN_HALF_B, (*ON_GPU, "sample.tensor_parallel_size=4", "update.workers=1"), "8x24GB"),
        (QWEN_HALF_B, (*ON_GPU, "sample.max_model_len=9000", "update.workers=1"), "4x80GB"),
    ],
)
def test_the_setting_that_is_named_fits(shapes, more, devices, capsys):
    sets = of_shapes(shapes, *more)
    words, _ = named_by(sets, devices, capsys)
    assert not outlook_of(load_config(QUICKSTART, [*sets, *words]), devices).shortages
    for left_out in range(len(words)):
        fewer = [*sets, *words[:left_out], *words[left_out + 1 :]]
        try:
            assert outlook_of(load_config(QUICKSTART, fewer), devices).shortages
        except ConfigError:
            continue


def test_a_setting_that_changes_no_result_is_named_first(capsys):
    sets = of_shapes(QWEN_HALF_B, "sample.kv_cache_gib=16", "update.workers=1", "sample.max_new_tokens=256")
    words, _ = named_by(sets, "cpu:16x32GB", capsys)
    before, after = load_config(QUICKSTART, sets), load_config(QUICKSTART, [*sets, *words])
    assert after.update.identity() == before.update.identity() == UpdateConfig(**before.update.model_dump()).identity()
    assert after.policy.identity() == before.policy.identity()


def test_it_says_by_how_much_it_does_not_fit(capsys):
    sets = of_shapes(LLAMA_8B, *ON_GPU, "update.workers=1")
    with pytest.raises(ConfigError):
        show_plan(QUICKSTART, sets, devices="8x80GB", in_json=False)
    told = capsys.readouterr().out
    assert re.search(r"memory of a GPU: wanted .* GiB .*, got 74\.5 GiB: \d+\.\d GiB too little", told)
    assert "\nnearest    fits with --set " in told


def test_where_nothing_fits_none_is_named(capsys):
    with pytest.raises(ConfigError) as refused:
        show_plan(QUICKSTART, of_shapes(LLAMA_8B, *ON_GPU), devices="1x4GB", in_json=True)
    assert json.loads(capsys.readouterr().out)["nearest"] is None
    assert "nearest" not in refused.value.fix


def test_what_fits_needs_no_other_setting(capsys):
    show_plan(QUICKSTART, of_shapes(QWEN_HALF_B, *ON_GPU, "update.workers=1"), devices="4x80GB", in_json=True)
    assert json.loads(capsys.readouterr().out)["nearest"] == []

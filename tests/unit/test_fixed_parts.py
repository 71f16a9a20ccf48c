"""What of a model folder a running engine is bound to."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_models

from stages.errors import InputError
from stages.sample.fixed_parts import differing_parts, fixed_parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.policy("qwen3", tmp_path_factory.mktemp("policy") / "qwen3")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def rewritten(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(content, indent=4, sort_keys=True))


def differing(folder, copy):
    return differing_parts(fixed_parts(folder), fixed_parts(copy))


def test_other_values_in_another_dtype_and_number_of_files_are_the_same_to_an_engine(folder, copy):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="50KB")
    assert len(list(copy.glob("*.safetensors"))) > 1
    shutil.copy(folder / "generation_config.json", copy)
    assert differing(folder, copy) == []


def test_how_a_config_is_written_does_not_matter(folder, copy):
    rewritten(copy / "config.json", dtype="bfloat16", transformers_version="5.0.0", use_cache=True)
    rewritten(copy / "generation_config.json", temperature=0.3)
    (copy / "README.md").write_text("another card")
    (copy / "trainer_state.json").write_text("{}")
    assert differing(folder, copy) == []


@pytest.mark.parametrize(
    ("file", "changes", "part"),
    [
        ("config.json", {"rms_norm_eps": 0.1}, "config.json"),
        ("config.json", {"tie_word_embeddings": False}, "config.json"),
        ("generation_config.json", {"eos_token_id": [3]}, "the EOS tokens of generation_config.json"),
        ("tokenizer_config.json", {"eos_token": "e"}, "tokenizer_config.json"),
        ("tokenizer.json", {"added_tokens": []}, "tokenizer.json"),
    ],
)
def test_what_an_engine_reads_at_its_start_matters(folder, copy, file, changes, part):
    rewritten(copy / file, **changes)
    assert differing(folder, copy) == [part]


def test_a_missing_tensor_or_tokenizer_file_matters(folder, copy):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "chat_template.jinja").unlink()
    assert differing(folder, copy) == ["chat_template.jinja", "the names and shapes of the weights"]


def test_a_config_that_nobody_knows_is_refused(copy):
    rewritten(copy / "config.json", model_type="nobody-knows")
    with pytest.raises(InputError):
        fixed_parts(copy)

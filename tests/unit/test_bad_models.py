"""Bad model folders: refused before an engine or a training group starts, in words that say what to mend."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import tiny_models
from here import workshop
from refusals import refuse_published, refused

from pipeline.jobs.inputs import CheckTokenizers
from pipeline.run import Run
from stages.errors import InputError
from stages.score.reward_model import RewardModel
from stages.update.model import load_policy

NUMBERS = itertools.count()
REWARDS = "score.rewards=[{type: function, target: 'stages.score.functions:exact_match'}]"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_models.policy("qwen3", root / "policy")
    tiny_models.policy("gpt2", root / "gpt2")
    tiny_models.judge("qwen3", root / "judge")
    tiny_models.judge("bert", root / "bert")
    (root / "prompts.jsonl").write_text('{"prompt": "The old mill"}\n{"prompt": "Bread is"}\n')
    return root


def open_policy(models, folder, *overrides, into=None):
    """The way of a policy into a run, as far as it goes without an engine."""
    sets = [f"policy.path={folder}", f"prompts.path={models / 'prompts.jsonl'}", "prompts.per_round=2"]
    shop = workshop(into or models / f"run-{next(NUMBERS)}", *sets, "evaluate=null", REWARDS, *overrides)
    Run(shop).prepare()
    load_policy(shop.sources.policy.path, dtype="float32")


def open_reward(models, folder):
    """The way of a reward model into a run, to the score of an answer."""
    sets = [f"policy.path={models / 'policy'}", "evaluate=null", f"prompts.path={models / 'prompts.jsonl'}"]
    shop = workshop(models / f"run-{next(NUMBERS)}", *sets, f"score.rewards=[{{type: model, path: {folder}}}]")
    (found,) = shop.sources.of(1).rewards
    CheckTokenizers((shop.sources.policy.path, None, "policy.path"), [(found.folder, None, found.key)], [])(None)
    model = RewardModel(found.config, name="r", folder=found.folder, key=found.key, num_threads=1, use_gpu=False)
    return model(["The old mill"], [" stands <new99>"], {})


# ---- what is done to a good folder ----------------------------------------------------------------------------------


def json_edit(name, **changes):
    def edit(folder):
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def without(*patterns):
    return lambda folder: [file.unlink() for pattern in patterns for file in folder.glob(pattern)]


def tensors(change):
    def edit(folder):
        from safetensors.numpy import load_file, save_file

        found = load_file(folder / "model.safetensors")
        save_file(change(found), folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def cut(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])


def lose_a_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def pickle_it(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def make_it_an_adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


def add_tokens(folder):
    """More than the spare rows of the embedding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{number}>" for number in range(100)])
    tokenizer.save_pretrained(folder)


CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
POLICIES = {
    "no config": (without(CONFIG), "config.json", "none in it"),
    "an adapter": (make_it_an_adapter, "LoRA", "merge_and_unload"),
    "a broken config": (write(CONFIG, b"{"), "config.json", "JSON"),
    "a config of Latin-1": (write(CONFIG, b'{"a": "\xff"}'), "config.json", "0xff"),
    "a config that is a list": (write(CONFIG, b"[]"), "a model's config"),
    "architectures that are numbers": (json_edit(CONFIG, architectures=[1]), "a model's config"),
    "an unknown architecture": (json_edit(CONFIG, model_type="nope"), "transformers knows", "nope"),
    "code that comes with it": (
        json_edit(CONFIG, model_type="own", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}),
        "transformers",
    ),
    "a masked language model": (json_edit(CONFIG, architectures=["BertForMaskedLM"]), "causal", "writes text"),
    "pickled weights": (pickle_it, "pytorch_model.bin", "safetensors"),
    "no weights": (without("*.safetensors"), "no weights"),
    "weights cut short": (cut, "model.safetensors", "whole"),
    "a pointer in their place": (write("model.safetensors", b"version https://git-lfs\n" * 3), "whole safetensors"),
    "a shard too few": (lose_a_shard, "model-00002-of-00002.safetensors", "1 missing"),
    "an index of nothing": (write("model.safetensors.index.json", b"[]"), "weight_map"),
    "weights of other names": (tensors(lambda t: {f"x.{k}": v for k, v in t.items()}), "not in its files"),
    "a weight too few": (tensors(lambda t: {k: v for k, v in t.items() if "norm" not in k}), "norm", "not in its"),
    "weights of another shape": (json_edit(CONFIG, intermediate_size=32), "another shape", "mlp"),
    "no tokenizer": (without("tokenizer*"), "tokenizer", "save_pretrained"),
    "a broken tokenizer": (write("tokenizer.json", b"{"), "tokenizer", "JSON"),
    "no EOS": (json_edit(TOKENIZER, eos_token=None), "EOS"),
    "no pad token": (json_edit(TOKENIZER, pad_token=None), "--set policy.pad_token="),
    "another model's tokenizer": (json_edit(CONFIG, vocab_size=100), "360 tokens", "100 tokens"),
}
REWARD_MODELS = {
    "three classes": (json_edit(CONFIG, id2label={"0": "a", "1": "b", "2": "c"}), "3 classes"),
    "two classes, unsaid": (json_edit(CONFIG, id2label=None, label2id=None), "2 classes"),
    "labels that are a number": (json_edit(CONFIG, id2label=2), "2 classes"),
    "a head that was never trained": (
        tensors(lambda t: {k: v for k, v in t.items() if k != "score.weight"}),
        "score.weight",
        "trained first",
    ),
    "no pad token": (json_edit(TOKENIZER, pad_token=None), "--set score.rewards.0.pad_token="),
    "no tokenizer": (without("tokenizer*"), "save_pretrained"),
    "tokens without a row": (add_tokens, "tokenizer knows more", "resize"),
    "pickled weights": (pickle_it, "pytorch_model.bin"),
}


def edited(models, kind, tmp_path, edit):
    folder = shutil.copytree(models / kind, tmp_path / kind)
    edit(folder)
    return folder


@pytest.mark.parametrize("case", POLICIES)
def test_a_folder_that_cannot_be_a_policy(models, tmp_path, case):
    edit, *says = POLICIES[case]
    refused(lambda: open_policy(models, edited(models, "policy", tmp_path, edit)), *says, kind=InputError)


@pytest.mark.parametrize("case", REWARD_MODELS)
def test_a_folder_that_cannot_be_a_reward_model(models, tmp_path, case):
    edit, *says = REWARD_MODELS[case]
    refused(lambda: open_reward(models, edited(models, "judge", tmp_path, edit)), *says, kind=InputError)


def test_a_reward_model_under_the_tokenizer_of_another_vocabulary(models, tmp_path):
    folder = shutil.copytree(models / "bert", tmp_path / "bert")
    without("tokenizer*")(folder)
    for file in (models / "gpt2").glob("tokenizer*"):
        shutil.copy(file, folder)
    json_edit(TOKENIZER, pad_token="<|endoftext|>")(folder)
    refused(lambda: open_reward(models, folder), "253 tokens", "360 tokens", "own tokenizer", kind=InputError)


def test_names_that_lead_to_no_model(models):
    for name, says in {
        "/no/such": "no such path",
        "models/x/y": "no such path",
        "x" * 5000: "too long",
        "~nobody-of-this-name/model": "home",
        str(models / "prompts.jsonl"): "a file",
        "embedded:revers": "embedded:reverse",
    }.items():
        refused(lambda name=name: open_policy(models, name), "policy.path", says, kind=InputError)
    refused(lambda: open_policy(models, models / "judge"), "score.rewards", kind=InputError)
    refused(lambda: open_reward(models, models / "policy"), "Qwen3ForCausalLM", kind=InputError)


def test_a_policy_that_knows_a_token_without_a_row_is_refused_at_the_prompt_that_has_it(models, tmp_path):
    folder = edited(models, "policy", tmp_path, add_tokens)
    prompts = tmp_path / "new.jsonl"
    prompts.write_text('{"prompt": "Name <new99>"}\n{"prompt": "Why?"}\n')
    refused(
        lambda: open_policy(models, folder, f"prompts.path={prompts}", into=tmp_path / "run"), "Name <new99>", "resize"
    )
    refuse_published(tmp_path / "run")


def test_fewer_prompts_than_a_round_asks(models):
    error = refused(
        lambda: open_policy(models, models / "policy", "prompts.per_round=3"), "at most the 2 different prompts"
    )
    assert error.fix == "--set prompts.per_round=2"

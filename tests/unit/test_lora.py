"""Adapters: only they move, and what is published is the start with their product added, for every kind of engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plain_update import PlainUpdate, plain_logps
from pydantic import ValidationError
from ranks import on_ranks
from safetensors.torch import load_file
from trainer_cases import BASE, SEED, difference, some_rows

from stages.errors import ConfigError
from stages.protocols import Weights
from stages.update.config import LoraConfig, UpdateConfig
from stages.update.lora import add_adapters, merged_policy, save_adapters
from stages.update.model import load_policy, read_weights
from stages.update.rows import answers_of

LORA = LoraConfig(r=3, alpha=5.0)
KINDS = [("float32", stage) for stage in range(4)] + [("bfloat16", stage) for stage in (0, 2, 3)]


# ---- on a model -----------------------------------------------------------------------------------------------------


def a_llama(folder: Path, *, tied: bool) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, tie_word_embeddings=tied, **shape)).save_pretrained(folder)
    return folder


def a_gpt2(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=16, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {
        "tied": a_llama(home / "tied", tied=True),
        "untied": a_llama(home / "untied", tied=False),
        "gpt2": a_gpt2(home / "gpt2"),
    }


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["tied", "untied", "gpt2"])
def test_the_merged_model_answers_as_the_one_with_adapters_and_peft_agrees(folders, tmp_path, kind):
    from peft import PeftModel

    model, tokens = load_policy(folders[kind], dtype="float32"), torch.tensor([[3, 5, 7, 4]])
    before = model(tokens).logits
    add_adapters(model, LORA, round=0)
    assert torch.equal(model(tokens).logits, before), "a new adapter changes nothing"
    assert trained(model) and all(".lora_" in name for name in trained(model))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.normal_()
    adapters = {name: p.detach().clone() for name, p in trained(model).items()}
    merged = merged_policy(folders[kind], adapters, LORA)
    assert not torch.allclose(merged(tokens).logits, before, atol=1e-3)
    assert torch.allclose(merged(tokens).logits, model(tokens).logits, atol=1e-5)

    save_adapters(model, tmp_path, adapters, base=folders[kind])
    theirs = PeftModel.from_pretrained(load_policy(folders[kind], dtype="float32"), tmp_path).merge_and_unload()
    start = read_weights(folders[kind])
    moved = {name for name, p in merged.named_parameters() if not torch.equal(p, start[name])}
    assert moved and not any("norm" in name or "embed" in name or "wte" in name for name in moved)
    for (name, ours), other in zip(merged.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(ours, other, rtol=0, atol=1e-6), name


def test_adapters_are_drawn_from_the_round_alone(folders):
    drawn = []
    for number in (1, 1, 2):
        torch.rand(3)
        model = load_policy(folders["tied"], dtype="float32")
        add_adapters(model, LORA, round=number)
        drawn.append(torch.cat([p.flatten() for p in trained(model).values()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("targets", [("lm_head",), ("q_prj",), ("embed_tokens",)])
def test_targets_that_are_no_linear_maps_of_the_layers_are_refused_with_those_there_are(folders, targets):
    model = load_policy(folders["untied"], dtype="float32")
    with pytest.raises(ConfigError) as refused:
        add_adapters(model, LoraConfig(target_modules=targets), round=0)
    assert refused.value.where == "update.lora.target_modules"
    assert "q_proj" in refused.value.fix and "lm_head" not in refused.value.fix


def test_named_targets_are_the_only_ones(folders):
    model = load_policy(folders["tied"], dtype="float32")
    add_adapters(model, LoraConfig(target_modules=("q_proj", "v_proj")), round=0)
    assert {name.split(".")[-4] for name in trained(model)} == {"q_proj", "v_proj"}


def test_moments_cannot_be_kept_for_adapters_that_are_not():
    with pytest.raises(ValidationError, match="each round trains new adapters"):
        UpdateConfig(lora={"r": 4}, keep_optimizer=True)


# ---- through the trainer --------------------------------------------------------------------------------------------


def two_rounds(folder: Path, out: Path, dtype: str, stage: int, more: dict):
    """Two rounds by one trainer; and for the first, the adapters before it and log-probs before and after saving."""
    from stages.update import deepspeed_engine
    from stages.update.worker import Trainer

    config = UpdateConfig(**BASE | {"zero_stage": stage, "lora": LORA, "learning_rate": 1e-2} | more)
    trainer = Trainer(config, dtype=dtype, pad_token=None, num_threads=1)
    rows, found = some_rows(11), {}
    start = Weights.found(folder, round=0)
    for number in (1, 2):
        trainer.load(start)
        before, base = (
            dict(deepspeed_engine.trained_state(trainer._engine)),
            dict(deepspeed_engine.float32_state(trainer._engine)),
        )
        references = [trainer.logps(answers_of(rows))]
        summary = trainer.update(rows, references, own_reference=0, seed=SEED)
        after, moved = (
            dict(deepspeed_engine.trained_state(trainer._engine)),
            dict(deepspeed_engine.float32_state(trainer._engine)),
        )
        with_adapters = trainer.logps(answers_of(rows))
        start = trainer.save(out / f"round-{number}", round=number)
        found[number] = {
            "before": before,
            "after": after,
            "frozen": all(torch.equal(base[name], moved[name]) for name in base if name not in before),
            "first": summary.first["loss"],
            "shares": trainer._holder.sharing.why_apart(answers_of(rows)) is None,
            "with adapters": with_adapters,
            "merged": trainer.logps(answers_of(rows)),
            "result": start,
        }
    fresh = Trainer(config, dtype=dtype, pad_token=None, num_threads=1)
    fresh.load(found[1]["result"])
    fresh.update(rows, [fresh.logps(answers_of(rows))], own_reference=0, seed=SEED)
    found["fresh"] = fresh.save(out / "fresh", round=2)
    return found


def of_kinds(folder: Path, out: Path, kinds: list[tuple[str, int]], more: dict):
    return [two_rounds(folder, out / f"{dtype}-{stage}", dtype, stage, more) for dtype, stage in kinds]


class PlainLora(PlainUpdate):
    """An update of adapters in plain torch."""

    def __init__(self, folder: Path, config: UpdateConfig, rows, references, *, own: int | None, seed: int) -> None:
        super().__init__(folder, config, rows, references, own=own, seed=seed)
        add_adapters(self.model, config.lora, round=0)
        self.optimizer = torch.optim.AdamW(trained(self.model).values(), lr=1.0, weight_decay=config.weight_decay)


@pytest.fixture(scope="module")
def in_plain_torch(policy_folder):
    config = UpdateConfig(**BASE | {"lora": LORA, "learning_rate": 1e-2})
    rows = some_rows(11)
    plain = PlainLora(policy_folder, config, rows, [plain_logps(policy_folder, answers_of(rows))], own=0, seed=SEED)
    plain.run()
    return {name: p.detach() for name, p in trained(plain.model).items()}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "more"), [(1, {}), (2, {}), (1, {"gradient_checkpointing": True})])
def test_every_engine_moves_the_adapters_alone_and_publishes_their_sum(
    policy_folder, tmp_path, in_plain_torch, world, more
):
    kinds = KINDS if not more else [("float32", 2), ("float32", 3)]
    (first, *others) = on_ranks(world, of_kinds, policy_folder, tmp_path, kinds, more)
    assert all(rank[i]["fresh"] == found["fresh"] for rank in others for i, found in enumerate(first))
    for (dtype, stage), found in zip(kinds, first, strict=True):
        home = tmp_path / f"{dtype}-{stage}"
        begin = read_weights(policy_folder)
        for number in (1, 2):
            made = found[number]
            assert made["frozen"] and made["shares"], (dtype, stage)
            assert made["first"] == float(torch.tensor(2.0).log())
            assert all(torch.equal(t, torch.zeros_like(t)) for name, t in made["before"].items() if "lora_B" in name)
            assert any(t.any() for name, t in made["after"].items() if "lora_B" in name)
            begin = check_sum(home / f"round-{number}", begin, dtype)
            most = 1e-4 if dtype == "float32" else 0.5
            assert made["merged"] == pytest.approx(made["with adapters"], abs=most)
        assert found["fresh"].identity == found[2]["result"].identity
        if dtype == "float32":
            ours, drawn = found[1]["after"], found[1]["before"]
            assert difference(ours, in_plain_torch, drawn) < 1e-3, (world, stage)
            assert any(not torch.equal(drawn[name], found[2]["before"][name]) for name in drawn)


def check_sum(folder: Path, begin: dict, dtype: str) -> dict[str, torch.Tensor]:
    """The float32 weights that a round published: those before it, plus its adapters' products."""
    adapters = load_file(folder / "adapter" / "adapter_model.safetensors")
    whole = read_weights(folder / ("policy" if dtype == "float32" else "master"))
    for name, weight in whole.items():
        a = adapters.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        b = adapters.get(f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight")
        change = 0.0 if a is None else LORA.alpha / LORA.r * (b @ a)
        assert torch.equal(weight, begin[name].float() + change), name
    if dtype == "bfloat16":
        rounded = read_weights(folder / "policy")
        assert all(torch.equal(rounded[name], weight.bfloat16()) for name, weight in whole.items())
    return whole

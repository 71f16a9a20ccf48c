"""The configs: all of them load, the published schedules have their papers' numbers, and each small one is a twin."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.plan.command import outlook_of, show_plan

CONFIGS = Path(__file__).parents[2] / "configs"
EVERY = sorted(CONFIGS.rglob("*.yaml"))


@dataclass(frozen=True)
class Schedule:
    """What a paper, or its authors' code, says; and the devices that the config's header names."""

    rounds: int
    per_round: int
    num_generations: int
    temperature: tuple[float, ...]
    top_p: float
    betas: tuple[float, ...]
    learning_rate: float
    batch: int
    epochs: int
    momentum: float = 0.0
    devices: str = "8x80GB"


PUBLISHED = {
    "rlhflow": Schedule(3, 20_000, 8, (1.0,), 1.0, (0.1,), 5e-7, 128, 2),
    "sppo": Schedule(3, 19_500, 5, (0.7,), 0.9, (1 / 1000,), 5e-7, 64, 1),
    "apo": Schedule(3, 19_500, 5, (0.7,), 0.9, (0.01, 0.1, 1.0), 5e-7, 64, 1, momentum=0.3),
    "rs_dpo": Schedule(1, 8_192, 16, (1.0,), 1.0, (0.1,), 5e-7, 64, 1),
    "iterative_rpo": Schedule(4, 7_473, 30, (0.8, 0.8, 1.3, 1.3), 1.0, (0.1,), 7e-7, 16, 1, devices="8x8x180GB"),
}

LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SIZES = {
    "RLHFlow/LLaMA3-SFT": (8_030_261_248, 8192, {"vocab_size": 128256, "intermediate_size": 14336, "kv": 8}),
    "sfairXC/FsfairX-LLaMA3-RM-v0.1": (
        7_504_928_768,
        8192,
        {"vocab_size": 128256, "intermediate_size": 14336, "kv": 8},
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": (7_241_732_096, 32768, {"intermediate_size": 14336, "kv": 8}),
    "weqweasdas/RM-Mistral-7B": (7_110_664_192, 32768, {"intermediate_size": 14336, "kv": 8}),
    "meta-llama/Llama-2-7b-chat-hf": (6_738_415_616, 4096, {}),
    "meta-llama/Llama-2-70b-chat-hf": (
        68_976_648_192,
        4096,
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "kv": 8},
    ),
}
"""Of the models that the configs name: parameters, context, and what differs in shape from Llama 2 with 7 billion."""


def small_files(name: str, folder: Path) -> Path:
    """The JSON files of a model, as far as a plan reads them."""
    num_parameters, context, other = SIZES[name]
    shape = {"vocab_size": 32000, "max_position_embeddings": context, "dtype": "bfloat16"} | LLAMA | other
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape | {"num_key_value_heads": other.get("kv", 32)}))
    index = {"metadata": {"total_size": 2 * num_parameters}, "weight_map": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def published(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / "published" / f"{name}.yaml", overrides)


@pytest.mark.parametrize("file", EVERY, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_config_loads(file):
    assert load_config(file).every_round()


def test_every_published_schedule_stands_in_the_table_and_has_a_twin():
    for folder in ("published", "small"):
        assert {file.stem for file in (CONFIGS / folder).glob("*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_numbers_are_the_published_ones(name):
    config = published(name)
    rounds = [config.for_round(number) for number in range(1, config.num_rounds + 1)]

    def numbers(of) -> tuple[float, ...]:
        """One number for all rounds, or one a round."""
        found = tuple(of(each) for each in rounds)
        return found[:1] if len(set(found)) == 1 else found

    (per_round,) = numbers(lambda each: each.prompts.per_round)
    (num_generations,) = numbers(lambda each: each.sample.num_generations)
    (top_p,) = numbers(lambda each: each.sample.top_p)
    (learning_rate,) = numbers(lambda each: each.update.learning_rate)
    (batch,) = numbers(lambda each: each.update.global_batch_size)
    (epochs,) = numbers(lambda each: each.update.num_train_epochs)
    (momentum,) = numbers(lambda each: each.momentum)
    assert PUBLISHED[name] == Schedule(
        rounds=len(rounds),
        per_round=per_round,
        num_generations=num_generations,
        temperature=numbers(lambda each: each.sample.temperature),
        top_p=top_p,
        betas=numbers(lambda each: each.update.beta),
        learning_rate=learning_rate,
        batch=batch,
        epochs=epochs,
        momentum=momentum,
        devices=PUBLISHED[name].devices,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_schedule_passes_a_plan_for_the_devices_that_it_names(name, capsys):
    file, devices = CONFIGS / "published" / f"{name}.yaml", PUBLISHED[name].devices
    assert f"prefloop plan configs/published/{name}.yaml --devices {devices}\n" in file.read_text()
    show_plan(file, [], devices=devices, in_json=True)
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["rounds"]) == PUBLISHED[name].rounds and not plan["shortages"]
    assert not any("beside the config" in words for words in plan["unknown"]), "a reward function that is not there"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_devices_hold_models_of_the_published_sizes(name, tmp_path):
    config = published(name)
    sets = [f"policy.path={small_files(config.policy.path, tmp_path / 'policy')}"]
    if config.rewards[0].type == "model":
        sets.append(f"score.rewards.0.path={small_files(config.rewards[0].path, tmp_path / 'reward')}")
    outlook = outlook_of(published(name, *sets), PUBLISHED[name].devices)
    assert not outlook.shortages
    assert all(worker.on_gpu is not None for worker in outlook.workers if worker.resources.gpus)


def structure(config: Config) -> dict[str, object]:
    """What a small schedule must have as its original has it, whatever the sizes and the model's own temperature."""
    update, pair = config.update, config.pair
    return {
        "rounds": config.num_rounds,
        "references": config.references,
        "start": config.start,
        "momentum": config.momentum,
        "schedules": config.schedules,
        "answers of a prompt": config.sample.num_generations,
        "objective": (update.loss_types, update.loss_weights, update.loss_params),
        "pairs": (pair.strategy, pair.truncated, {k: v for k, v in pair.own.items() if k != "num_pairs"}),
        "several pairs": pair.most_pairs(16) > 1,
        "what scores": config.rewards[0].type,
        "learning rate over a round": (update.lr_scheduler_type, update.warmup_ratio),
        "epochs": update.num_train_epochs,
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_twin_has_its_originals_structure_and_no_other(name):
    twin = structure(load_config(CONFIGS / "small" / f"{name}.yaml"))
    assert twin == structure(published(name))
    assert all(twin != structure(published(other)) for other in PUBLISHED if other != name)

"""Everything that an objective may ask of the trainer, against plain torch, on one rank and on two."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from plain_update import PlainUpdate, plain_logps
from ranks import on_ranks
from test_trainer import BASE, SEED, difference, some_rows

from stages.protocols import Weights
from stages.update.config import UpdateConfig
from stages.update.model import load_policy, read_weights
from stages.update.objectives.base import Pairs
from stages.update.rows import AnswerRow, GroupRow, answers_of

VALUED = {"loss_type": "own_objectives:VALUED", "num_train_epochs": 2}
# Rows, references ("own": the start, "other": another model), options.
CASES = {
    "value head, no ZeRO": ("pairs", ["own"], VALUED | {"zero_stage": 0}),
    "value head, ZeRO 1": ("pairs", ["own"], VALUED | {"zero_stage": 1}),
    "value head, ZeRO 2": ("pairs", ["own"], VALUED | {"zero_stage": 2}),
    "value head, ZeRO 3": ("pairs", ["own"], VALUED | {"zero_stage": 3, "gradient_checkpointing": True}),
    "a mean over tokens beside one over pairs": (
        "pairs",
        ["own"],
        {"loss_type": ["dpo", "own_objectives:TOKEN_MEAN"], "loss_weights": [2.0, 0.5]},
    ),
    "no reference": ("pairs", [], {"loss_type": "own_objectives:AVERAGE_MARGIN"}),
    "a stream": ("pairs", [], {"loss_type": "own_objectives:STREAMED", "zero_stage": 3}),
    "two references, one of them the start": ("pairs", ["other", "own"], {"loss_type": "own_objectives:AGAINST_ALL"}),
    "groups, fewer answers a forward than some have": ("groups", ["own"], {"loss_type": "own_objectives:LISTWISE"}),
    "groups, several a forward": (
        "groups",
        ["own"],
        {"loss_type": "own_objectives:LISTWISE", "micro_batch_size": 5, "zero_stage": 3},
    ),
    "groups without a reference": ("groups", [], {"loss_type": "own_objectives:LISTWISE"}),
}


def rows_of(kind: str) -> list:
    """Pairs with scores, auxiliary rewards and, two of three, an answer from the reference; or groups of 2 to 6."""
    rng, pairs = random.Random(2), some_rows(11)
    if kind == "groups":
        return [group_of(pairs, number, rng) for number in range(7)]
    return [
        replace(
            row,
            score_chosen=rng.gauss(1, 1) if number % 4 else None,
            score_rejected=rng.gauss(0, 1) if number % 4 else None,
            aux_chosen=rng.gauss(0, 1),
            aux_rejected=rng.gauss(0, 1),
            stream=AnswerRow(f"s{number}", row.prompt_token_ids, pairs[number - 1].chosen_token_ids)
            if number % 3
            else None,
        )
        for number, row in enumerate(pairs)
    ]


def group_of(pairs, number: int, rng: random.Random) -> GroupRow:
    size = 2 + number % 5
    answers = [rng.choice(pairs).chosen_token_ids for _ in range(size)]
    ids = [f"g{number}-{k}" for k in range(size)]
    rewards = [float(rng.randint(0, 3)) for _ in range(size - 1)]
    return GroupRow(f"{number}", "", ids, pairs[number].prompt_token_ids, answers, [*rewards, max(rewards) + 1])


@pytest.fixture(scope="module")
def other_folder(policy_folder, tmp_path_factory) -> Path:
    model = load_policy(policy_folder, dtype="float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    folder = tmp_path_factory.mktemp("other")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tables(policy_folder, other_folder) -> dict[str, dict[str, float]]:
    answers = answers_of([*rows_of("pairs"), *rows_of("groups")])
    return {"own": plain_logps(policy_folder, answers), "other": plain_logps(other_folder, answers)}


def update_all(folder: Path, tables: dict, names: list[str]):
    """One rank's view of each case: metrics by step, and the weights and the value head after it."""
    from stages.update import deepspeed_engine
    from stages.update.worker import Trainer

    found = {}
    for name in names:
        kind, references, options = CASES[name]
        trainer = Trainer(UpdateConfig(**BASE | options), dtype="float32", pad_token=None, num_threads=1)
        trainer.load(Weights.found(folder, round=0))
        steps: list[dict[str, float]] = []
        trainer.update(
            rows_of(kind),
            [tables[reference] for reference in references],
            own_reference=references.index("own") if "own" in references else None,
            seed=SEED,
            on_step=steps.append,
        )
        head = trainer._value_head
        tensors = {} if head is None else {key: t.detach() for key, t in head._tensors.items()}
        found[name] = {"steps": steps, "state": deepspeed_engine.float32_state(trainer._engine), "head": tensors}
    return found


@pytest.fixture(scope="module")
def results(policy_folder, tables):
    return {world: on_ranks(world, update_all, policy_folder, tables, list(CASES)) for world in (1, 2)}


@pytest.fixture(scope="module")
def expected(policy_folder, tables):
    found = {}
    for name, (kind, references, options) in CASES.items():
        own = references.index("own") if "own" in references else None
        update = PlainUpdate(
            policy_folder,
            UpdateConfig(**BASE | options),
            rows_of(kind),
            [tables[reference] for reference in references],
            own=own,
            seed=SEED,
        )
        found[name] = update, update.run()
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", [1, 2])
def test_every_layout_takes_plain_torchs_steps(results, expected, policy_folder, world, name):
    start, (plain, steps) = read_weights(policy_folder), expected[name]
    for rank in results[world]:
        assert difference(rank[name]["state"], plain.weights, start) < 2e-3
    ours = results[world][0][name]["steps"]
    assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in steps], rel=1e-4)
    assert [step["grad_norm"] for step in ours] == pytest.approx([step["grad_norm"] for step in steps], rel=1e-4)


@pytest.mark.parametrize("world", [1, 2])
def test_the_value_head_takes_plain_torchs_steps_on_every_rank(results, expected, world):
    for name in CASES:
        for rank in results[world]:
            head, plain = rank[name]["head"], expected[name][0].head
            assert bool(head) == name.startswith("value head")
            if head:
                assert head["weight"] == pytest.approx(plain.weight.detach()[0], abs=1e-4)
                assert head["bias"] == pytest.approx(plain.bias.item(), abs=1e-4)
                assert all(torch.equal(head[key], results[world][0][name]["head"][key]) for key in head)


def test_metrics_are_those_of_the_global_batch(results):
    for name in CASES:
        for one, two in zip(results[1][0][name]["steps"], results[2][0][name]["steps"], strict=True):
            assert one.keys() == two.keys()
            for key in one.keys() - {"step_s"}:
                assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-3), (name, key)


def test_log_ratios_margins_and_agreement_are_plain_torchs(results, expected):
    for name, (kind, references, _) in CASES.items():
        for ours, plain in zip(results[2][0][name]["steps"], expected[name][1], strict=True):
            shown = told_of_groups(plain) if kind == "groups" else told_of_pairs(plain)
            for key, value in shown.items():
                assert ours[key] == pytest.approx(value, rel=1e-3, abs=2e-4), (name, key)
            assert ("log_ratios/chosen" in ours) == bool(references) == ("rejected_active" in ours)


def told_of_pairs(step: dict) -> dict[str, float]:
    pairs, batch = step["made"], step["batch"]
    shown = told_of_ratios(pairs, pairs.chosen_len_B, pairs.rejected_len_B) | {"num_pairs": len(batch)}
    logits = [(term.weight_B, term.logit_B) for term in step["terms"] if term.logit_B is not None]
    (_, logit_B), *_ = logits
    shown["margins/objective"] = logit_B.mean().item()
    scored = [i for i, row in enumerate(batch) if row.score_chosen is not None]
    if scored:
        gaps = [batch[i].score_chosen - batch[i].score_rejected for i in scored]
        alike = [(gap > 0) == (logit_B[i] > 0) and logit_B[i] != 0 for i, gap in zip(scored, gaps, strict=True)]
        shown["agreement"] = sum(map(float, alike)) / len(scored)
    if pairs.value_B is not None:
        both = torch.stack([pairs.aux_chosen_B, pairs.aux_rejected_B])
        shown["value/mean"] = pairs.value_B.mean().item()
        shown["value/error"] = (both - pairs.value_B).abs().mean().item()
    return shown


def told_of_groups(step: dict) -> dict[str, float]:
    groups, batch = step["made"], step["batch"]
    ends = [
        (g, row.rewards.index(max(row.rewards)), row.rewards.index(min(row.rewards))) for g, row in enumerate(batch)
    ]
    g, best, worst = (torch.tensor(places) for places in zip(*ends, strict=True))
    pairs = Pairs(
        groups.logp_GK[g, best],
        groups.logp_GK[g, worst],
        groups.ref_logp_RGK[:, g, best],
        groups.ref_logp_RGK[:, g, worst],
        groups.len_GK[g, best],
        groups.len_GK[g, worst],
    )
    r_GK = groups.logp_GK - groups.ref_logp_RGK.sum(0)
    compared, alike = 0, 0
    for number, row in enumerate(batch):
        for i, j in itertools.permutations(range(row.num_answers), 2):
            if row.rewards[i] > row.rewards[j]:
                compared += 1
                alike += int(r_GK[number, i] > r_GK[number, j])
    shown = told_of_ratios(pairs, groups.len_GK[g, best], groups.len_GK[g, worst])
    tokens = sum(len(ids) for row in batch for ids in row.response_token_ids)
    return shown | {"agreement": alike / compared, "num_groups": len(batch), "num_tokens": tokens}


def told_of_ratios(pairs: Pairs, chosen_len_B: torch.Tensor, rejected_len_B: torch.Tensor) -> dict[str, float]:
    r_w, r_l = pairs.chosen_B.detach(), pairs.rejected_B.detach()
    shown = {"lengths/chosen": chosen_len_B.mean().item(), "lengths/rejected": rejected_len_B.mean().item()}
    if len(pairs.ref_chosen_RB):
        r_w, r_l = r_w - pairs.ref_chosen_RB[0], r_l - pairs.ref_rejected_RB[0]
        for side, ratios in (("chosen", r_w), ("rejected", r_l)):
            shown[f"log_ratios/{side}"] = ratios.mean().item()
            for percent in (10, 50, 90):
                shown[f"log_ratios/{side}/p{percent}"] = float(numpy.percentile(ratios.numpy(), percent))
    return shown

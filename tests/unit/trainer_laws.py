"""What an update on ranks has in common with the same one in plain torch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import pytest
import torch
from plain_update import PlainUpdate
from trainer_cases import difference

from stages.update.objectives.base import Pairs


def check_steps(ranks: list[dict], update: PlainUpdate, steps: list[dict], name: str, *, start: dict) -> None:
    """The same weights and value head on every rank, and the same losses and gradients on the way."""
    for rank in ranks:
        assert difference(rank[name]["state"], update.weights, start) < 2e-3
        if head := rank[name]["head"]:
            assert head["weight"] == pytest.approx(update.head.weight.detach()[0], abs=1e-4)
            assert head["bias"] == pytest.approx(update.head.bias.item(), abs=1e-4)
            assert head["weight"].norm() > 0.01
            assert all(torch.equal(tensor, ranks[0][name]["head"][key]) for key, tensor in head.items())
    ours = ranks[0][name]["steps"]
    for metric in ("loss", "grad_norm"):
        assert [step[metric] for step in ours] == pytest.approx([step[metric] for step in steps], rel=1e-4), metric


def check_metrics(ours: list[dict[str, float]], steps: list[dict[str, Any]]) -> None:
    """Log-ratios, margins and agreement are those of all rows of the global batch."""
    for found, plain in zip(ours, steps, strict=True):
        shown = told_of_pairs(plain) if isinstance(plain["made"], Pairs) else told_of_groups(plain)
        for key, value in shown.items():
            assert found[key] == pytest.approx(value, rel=1e-3, abs=2e-4), key
        told = {key.partition("/")[0] for key in shown}
        for key in ("log_ratios", "agreement", "value"):
            assert (key in told) == any(name.partition("/")[0] == key for name in found), key
        assert ("rejected_active" in found) == ("gate_noise" in found) == ("log_ratios" in told)


def told_of_pairs(step: dict) -> dict[str, float]:
    pairs, batch = step["made"], step["batch"]
    shown = told_of_ratios(pairs, pairs.chosen_len_B, pairs.rejected_len_B) | {"num_pairs": len(batch)}
    (logit_B,) = [term.logit_B for term in step["terms"] if term.logit_B is not None]
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

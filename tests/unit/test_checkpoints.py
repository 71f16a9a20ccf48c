"""An update that goes on from a checkpoint ends as one that was never interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_cases import Kind, kept_moments, kind, trained, without_newest
from ranks import on_ranks
from trainer_cases import VALUED

KINDS = {
    **{f"ZeRO {stage}": kind(zero_stage=stage) for stage in range(4)},
    **{f"bfloat16, ZeRO {stage}": kind(dtype="bfloat16", zero_stage=stage) for stage in range(4)},
    **{f"adapters, ZeRO {stage}": kind(lora={"r": 4}, zero_stage=stage) for stage in (0, 2, 3)},
    "adapters, bfloat16, ZeRO 1": kind(dtype="bfloat16", lora={"r": 4}, zero_stage=1),
    **{f"value head, ZeRO {stage}": kind("pairs", **VALUED | {"zero_stage": stage}) for stage in (0, 3)},
    "random numbers": kind(loss_type="own_objectives:NOISY"),
    "groups": kind("groups", loss_type="own_objectives:LISTWISE"),
    "steps skipped": kind(guard={"max_kl": 0.05, "max_skipped": 99}),
    "kept moments": kind(keep_optimizer=True),
    "activations computed again": kind(gradient_checkpointing=True, zero_stage=3),
}


def interrupted(start: Path, out: Path, kinds: dict[str, Kind]):
    """Each update in one go, with checkpoints, and again by a new trainer that finds all of them but the newest."""
    found = {}
    for number, (name, made) in enumerate(kinds.items()):
        home = out / f"{number}"
        moments = kept_moments(start, made, home / "optimizer") if made.config().keep_optimizer else None
        whole = trained(start, made, None, moments=moments)
        kept = trained(start, made, home, moments=moments, checkpoint_steps=2)
        left = without_newest(home)
        found[name] = left, whole, kept, trained(start, made, home, moments=moments)
    return found


def check(ranks: list[dict]) -> None:
    for rank, found in enumerate(ranks):
        for name, (left, whole, kept, resumed) in found.items():
            assert left >= 2
            assert bool(whole["skipped"]) == (name == "steps skipped" and rank == 0)
            assert (whole["resumed_at"], kept["resumed_at"], resumed["resumed_at"]) == (None, None, left), name
            for other in (kept, resumed):
                for part in ("weights", "moments", "head"):
                    changed = [key for key, t in whole[part].items() if not torch.equal(t, other[part][key])]
                    assert whole[part].keys() == other[part].keys() and not changed, (name, part, changed[:3])
                for part in ("steps", "skipped", "first", "gate_floor"):
                    assert whole[part] == other[part], (name, part)
            assert (len(whole["steps"]) > left) == (rank == 0)


@pytest.mark.slow
def test_it_ends_with_the_same_bits(policy_folder, tmp_path):
    check(on_ranks(1, interrupted, policy_folder, tmp_path, {"ZeRO 2": KINDS["ZeRO 2"]}))


@pytest.mark.slow
@pytest.mark.parametrize(("world", "names"), [(1, ["ZeRO 0", "bfloat16, ZeRO 3", "random numbers"]), (2, KINDS)])
def test_every_kind_of_update_ends_with_the_same_bits(policy_folder, tmp_path, world, names):
    check(on_ranks(world, interrupted, policy_folder, tmp_path, {name: KINDS[name] for name in names}))


@pytest.mark.slow
def test_with_the_optimizer_in_the_machines_memory_it_ends_within_rounding(policy_folder, tmp_path):
    """DeepSpeed's CPU Adam multiplies its betas up step by step, and anew by a power when it goes on."""
    kinds = {f"{stage}": kind(offload_optimizer=True, zero_stage=stage) for stage in (1, 2, 3)}
    for rank in on_ranks(2, interrupted, policy_folder, tmp_path, kinds):
        for name, (left, whole, kept, resumed) in rank.items():
            assert resumed["resumed_at"] == left >= 2
            assert distance(kept["weights"], whole["weights"]) == 0, name
            assert distance(resumed["weights"], whole["weights"]) < 1e-6, name


# ---- on another number of workers, under another ZeRO stage ---------------------------------------------------------

MOVED = {
    "all weights": kind(),
    "value head": kind("pairs", **VALUED),
    "adapters": kind(lora={"r": 4}),
    "bfloat16": kind(dtype="bfloat16", micro_batch_size=1),
}


def written(start: Path, out: Path, stage: int):
    """Each update in one go; and its checkpoints but the newest."""
    found = {}
    for name, made in MOVED.items():
        found[name] = trained(start, made, None, zero_stage=stage)
        trained(start, made, out / name, zero_stage=stage, checkpoint_steps=2)
        found[name]["left"] = without_newest(out / name)
    return found


def resumed(start: Path, out: Path, stages: list[int]):
    return {
        (name, stage): trained(start, made, out / name, zero_stage=stage)
        for name, made in MOVED.items()
        for stage in stages
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("writers", "stage", "readers", "stages"), [(1, 3, 2, [2, 3]), (2, 2, 1, [0, 1, 3]), (2, 1, 3, [2, 3])]
)
def test_another_number_of_workers_and_another_stage_end_within_rounding(
    policy_folder, tmp_path, writers, stage, readers, stages
):
    (whole, *_) = on_ranks(writers, written, policy_folder, tmp_path, stage)
    for rank in on_ranks(readers, resumed, policy_folder, tmp_path, stages):
        for (name, found_stage), found in rank.items():
            assert found["resumed_at"] == whole[name]["left"]
            most = 1e-4 if name == "bfloat16" else 1e-5
            far = distance(found["weights"], whole[name]["weights"])
            assert far < most, (name, found_stage)


def distance(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> float:
    """The greatest distance of a weight from its other."""
    return max((these[name] - tensor).abs().max().item() for name, tensor in those.items())

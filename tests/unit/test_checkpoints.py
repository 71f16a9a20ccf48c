"""An update that goes on from a checkpoint ends as one that was never interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import LAST, Kind, drop_newest, kind, trained
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
    "activations computed again": kind(gradient_checkpointing=True, zero_stage=3),
}


def interrupted(start: Path, out: Path, kinds: dict[str, Kind]):
    """Each update in one go, with checkpoints, and again by a new trainer that finds all of them but the newest."""
    found = {}
    for number, (name, made) in enumerate(kinds.items()):
        home = out / f"{number}"
        whole, kept = trained(start, made, None), trained(start, made, home, checkpoint_steps=2)
        if dist.get_rank() == 0:
            drop_newest(home)
        dist.barrier()
        found[name] = whole, kept, trained(start, made, home)
    return found


def check(ranks: list[dict]) -> None:
    for rank, found in enumerate(ranks):
        for name, (whole, kept, resumed) in found.items():
            assert (whole["resumed_at"], kept["resumed_at"], resumed["resumed_at"]) == (None, None, LAST), name
            for other in (kept, resumed):
                for part in ("weights", "moments", "head"):
                    assert whole[part].keys() == other[part].keys()
                    assert all(torch.equal(tensor, other[part][key]) for key, tensor in whole[part].items()), (
                        name,
                        part,
                    )
                assert [other[key] for key in ("steps", "first", "gate_floor")] == [
                    whole[key] for key in ("steps", "first", "gate_floor")
                ], name
            assert len(whole["steps"]) == (9 if rank == 0 else 0) or "groups" in name or "head" in name


def test_it_ends_with_the_same_bits(policy_folder, tmp_path):
    check(on_ranks(2, interrupted, policy_folder, tmp_path, {"ZeRO 2": KINDS["ZeRO 2"]}))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_every_kind_of_update_ends_with_the_same_bits(policy_folder, tmp_path, world):
    check(on_ranks(world, interrupted, policy_folder, tmp_path, KINDS))

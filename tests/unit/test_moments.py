"""AdamW's moments between rounds: the same under every ZeRO stage, and on a start that momentum moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from plain_update import PlainUpdate, plain_logps
from ranks import on_ranks
from trainer_cases import BASE, SEED, difference, some_rows

from stages.protocols import Moments, Weights
from stages.update.config import UpdateConfig
from stages.update.mixing import mix
from stages.update.model import read_weights
from stages.update.rows import answers_of
from stages.update.tensor_files import TensorFiles
from stages.weights import weights_sha256

pytestmark = pytest.mark.slow

OPTIONS = BASE | {"loss_type": "dpo", "keep_optimizer": True}
MOMENTUM = 0.3


def new(dtype: str = "float32", **options):
    from stages.update.worker import Trainer

    return Trainer(UpdateConfig(**OPTIONS | options), dtype=dtype, pad_token=None, num_threads=1)


# ---- across ZeRO stages ---------------------------------------------------------------------------------------------


def kept(start: Path, out: Path, dtype: str, stages: list[int]) -> list[Moments]:
    """Of a round under each stage."""
    found, rows = [], some_rows(11)
    for stage in stages:
        trainer = new(dtype, zero_stage=stage, micro_batch_size=1)
        trainer.load(Weights.found(start, round=0))
        trainer.update(rows, [trainer.logps(answers_of(rows))], own_reference=None, seed=SEED)
        found.append(trainer.save_moments(out / f"{stage}"))
    return found


def taken(start: Path, moments: Moments, dtype: str, stages: list[int]):
    """The moments that each stage's optimizer holds once it has taken them, and the weights after a round with them."""
    from stages.update import deepspeed_engine

    found, rows = [], some_rows(11)
    for stage in stages:
        trainer = new(dtype, zero_stage=stage, micro_batch_size=1)
        trainer.load(Weights.found(start, round=0))
        trainer._holder.take_moments(moments)
        held = {name: tensor.clone() for name, tensor in deepspeed_engine.moments(trainer._engine)}
        trainer.load(Weights.found(start, round=0))
        trainer.update(rows, [trainer.logps(answers_of(rows))], own_reference=None, seed=SEED, moments=moments)
        found.append((held, dict(deepspeed_engine.float32_state(trainer._engine))))
    return found


@pytest.mark.parametrize(("dtype", "writers", "readers"), [("float32", 2, 1), ("float32", 1, 3), ("bfloat16", 2, 2)])
def test_every_stage_gives_and_takes_the_same_moments(policy_folder, tmp_path, dtype, writers, readers):
    stages = [0, 1, 2, 3]
    made = [TensorFiles(moments.path) for moments in on_ranks(writers, kept, policy_folder, tmp_path, dtype, stages)[0]]
    for files in made:
        assert files.keys() == made[0].keys() and files["num_steps"] == 3
        for name, tensor in files.items():
            far = (tensor - made[0][name]).abs().max()
            assert far <= 1e-4 * made[0][name].abs().max(), name
    moments = Moments(tmp_path / "3", weights_sha256(tmp_path / "3"))
    found = [pair for rank in on_ranks(readers, taken, policy_folder, moments, dtype, stages) for pair in rank]
    start = read_weights(policy_folder)
    for held, weights in found:
        assert all(torch.equal(tensor, made[3][name]) for name, tensor in held.items())
        assert difference(weights, found[0][1], start) < 1e-3


# ---- with momentum --------------------------------------------------------------------------------------------------


def second_round(trainer, begin: Weights, references, moments: Moments, out: Path) -> Weights:
    trainer.load(begin)
    trainer.update(some_rows(11), references, own_reference=None, seed=SEED, moments=moments)
    return trainer.save(out, round=2)


def with_momentum(folder: Path, out: Path, kinds: list[tuple[str, int]]):
    """Second rounds by the trainer of the first one and by a new one, from a start beyond the first's result."""
    found = []
    for dtype, stage in kinds:
        home = out / f"{dtype}-{stage}"
        living, start = new(dtype, zero_stage=stage), Weights.found(folder, round=0)
        living.load(start)
        references = [living.logps(answers_of(some_rows(11)))]
        living.update(some_rows(11), references, own_reference=None, seed=SEED)
        first = living.save(home / "1", round=1)
        moments = living.save_moments(home / "optimizer")
        if dist.get_rank() == 0:
            mix(first, start, by=MOMENTUM, out=home / "start", dtype=dtype, pad_token=None)
        dist.barrier()
        master = home / "start" / "master"
        begin = Weights.found(home / "start" / "policy", round=1, master=master if master.exists() else None)
        rounds = [
            second_round(trainer, begin, references, moments, home / name)
            for name, trainer in (("living", living), ("new", new(dtype, zero_stage=stage)))
        ]
        found.append((dtype, rounds))
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_a_round_that_momentum_moved_goes_on_with_kept_moments(policy_folder, tmp_path, world):
    kinds = [("float32", 0), ("float32", 2), ("float32", 3), ("bfloat16", 2)]
    start, wanted = read_weights(policy_folder), in_plain_torch(policy_folder)
    for rank in on_ranks(world, with_momentum, policy_folder, tmp_path, kinds):
        for dtype, (living, anew) in rank:
            assert living.identity == anew.identity
            if dtype == "float32":  # in bfloat16 the start itself is rounded by more than an update's length
                assert difference(read_weights(living.path), wanted, start) < 2e-3


def in_plain_torch(folder: Path) -> dict[str, torch.Tensor]:
    rows, start = some_rows(11), read_weights(folder)
    update = PlainUpdate(
        folder, UpdateConfig(**OPTIONS), rows, [plain_logps(folder, answers_of(rows))], own=None, seed=SEED
    )
    update.run()
    with torch.no_grad():
        for name, parameter in update.model.named_parameters():
            parameter.add_(parameter - start[name], alpha=MOMENTUM)
    update.run()
    return update.weights

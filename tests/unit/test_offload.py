"""The optimizer in the machine's memory: the same steps up to rounding, under every ZeRO stage that has one."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from ranks import on_ranks
from trainer_cases import BASE, SEED, difference, some_rows

from stages.protocols import Weights
from stages.update.config import UpdateConfig
from stages.update.model import read_weights
from stages.update.rows import answers_of

KINDS = [("float32", 1), ("float32", 2), ("float32", 3)]
ROUNDING = [("bfloat16", 2)]
"""DeepSpeed 0.19.8 adds up offloaded gradients in the weights' dtype; adapters, which begin at 0, drift apart by it."""


def test_without_zero_there_is_nothing_to_offload():
    with pytest.raises(ValidationError, match="update.zero_stage=2"):
        UpdateConfig(offload_optimizer=True, zero_stage=0)


def updated(folder: Path, out: Path, kinds: list[tuple[str, int]], more: dict):
    """The folders of float32 weights after two rounds, kept moments between them: without offload and with it."""
    from stages.update.worker import Trainer

    found = []
    for dtype, stage in kinds:
        for offload in (False, True):
            options = BASE | {"zero_stage": stage, "offload_optimizer": offload, "micro_batch_size": 1} | more
            trainer = Trainer(UpdateConfig(**options), dtype=dtype, pad_token=None, num_threads=1)
            policy, rows, moments = Weights.found(folder, round=0), some_rows(11), None
            for number in (1, 2):
                trainer.load(policy)
                logps = trainer.logps(answers_of(rows))
                trainer.update(rows, [logps], own_reference=0, seed=SEED, moments=moments)
                home = out / f"{dtype}-{stage}-{offload}-{number}"
                policy = trainer.save(home, round=number)
                moments = trainer.save_moments(home / "optimizer") if "keep_optimizer" in more else None
            found.append(policy.master or policy.path)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("more", "kinds"),
    [({"keep_optimizer": True}, KINDS + ROUNDING), ({"lora": {"r": 4}}, KINDS)],
    ids=["all weights", "adapters"],
)
def test_the_steps_are_the_same(policy_folder, tmp_path, world, more, kinds):
    (folders, *_) = on_ranks(world, updated, policy_folder, tmp_path, kinds, more)
    start = read_weights(policy_folder)
    for kind, here, there in zip(kinds, folders[::2], folders[1::2], strict=True):
        gap = difference(read_weights(there), read_weights(here), start)
        assert gap < (1e-4 if kind[0] == "float32" else 0.05), kind

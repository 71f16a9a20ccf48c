"""Updates that are written down on the way, and gone on with from there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from trainer_cases import BASE, SEED, rows_of

from pipeline.checkpoints import CheckpointFolder
from stages.protocols import Moments, Weights
from stages.update.config import UpdateConfig
from stages.update.rows import answers_of


@dataclass(frozen=True)
class Kind:
    """An update of some steps."""

    dtype: str = "float32"
    rows: str | int = 11
    options: tuple[tuple[str, Any], ...] = ()

    def config(self, **more: Any) -> UpdateConfig:
        # A rate at which rejected answers rise above their references and fall again, so that steps skip and do not.
        options = {"learning_rate": 1e-3, "num_train_epochs": 3, **dict(self.options)} | more
        return UpdateConfig(**BASE | options)

    def fingerprint(self) -> dict[str, Any]:
        return {"update": self.config().identity()}


def kind(rows: str | int = 11, dtype: str = "float32", **options: Any) -> Kind:
    return Kind(dtype, rows, tuple(options.items()))


def trained(
    start: Path, kind: Kind, home: Path | None, *, moments: Moments | None = None, **more: Any
) -> dict[str, Any]:
    """What an update leaves on this rank: weights, moments, value head, steps.

    Args:
        home: where its checkpoints lie; None: nowhere.
        more: settings that say where and how it runs.
    """
    from stages.update import deepspeed_engine
    from stages.update.worker import Trainer

    config, steps, skipped = kind.config(**more), [], []
    trainer = Trainer(config, dtype=kind.dtype, pad_token=None, num_threads=1)
    trainer.load(Weights.found(start, round=0))
    rows = rows_of(kind.rows)
    summary = trainer.update(
        rows,
        [trainer.logps(answers_of(rows))],
        own_reference=0,
        seed=SEED,
        on_step=steps.append,
        on_skip=skipped.append,
        moments=moments,
        checkpoints=None if home is None else CheckpointFolder(home, kind.fingerprint(), config),
    )
    head = trainer._value_head
    return {
        "weights": dict(deepspeed_engine.trained_state(trainer._engine)),
        "moments": {name: t.clone() for name, t in deepspeed_engine.moments(trainer._engine)},
        "head": {} if head is None else head.state(),
        "steps": [{name: value for name, value in step.items() if name != "step_s"} for step in steps],
        "skipped": skipped,
        "resumed_at": summary.resumed_at,
        "first": summary.first["loss"],
        "gate_floor": summary.gate_floor,
    }


def kept_moments(start: Path, kind: Kind, home: Path) -> Moments:
    """AdamW's moments after a first update."""
    from stages.update.worker import Trainer

    trainer = Trainer(kind.config(), dtype=kind.dtype, pad_token=None, num_threads=1)
    trainer.load(Weights.found(start, round=0))
    rows = rows_of(kind.rows)
    trainer.update(rows, [trainer.logps(answers_of(rows))], own_reference=0, seed=SEED)
    return trainer.save_moments(home)


def without_newest(home: Path) -> int:
    """Remove the newest checkpoint, so that it goes on from the one before; the step of that one."""
    if dist.get_rank() == 0:
        shutil.rmtree(max((home / "checkpoint").iterdir()))
    dist.barrier()
    (left,) = (home / "checkpoint").iterdir()
    return int(left.name.removeprefix("step-"))

"""The state of an unfinished update in a folder: written after a step, and gone on from by this trainer or another.

Weights (with LoRA the adapters alone) and AdamW's moments are written whole and in float32, so that another number of
ranks and another ZeRO stage can go on from them. On as many ranks as before the update goes on to the last bit.

- ``tensors-*.safetensors``: ``weights/NAME``, ``moments/NAME.exp_avg``, ``moments/NAME.exp_avg_sq``,
  ``moments/num_steps``; ``value_head/…``, the value head with its optimizer, where there is one; and the state of every
  rank's random numbers, ``random/RANK/…``;
- ``progress.json``: the other numbers;
- ``metrics.jsonl``: the metrics of every step so far. Their number is the place in the data and in the schedule.

When one is written, which of them counts, and what proves that it is whole, is said by who calls the trainer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from stages.update import deepspeed_engine
from stages.update.randomness import random_state, seed_rank, set_random_state
from stages.update.tensor_files import TensorFiles, write_tensors
from stages.update.value_head import ValueHead

_log = logging.getLogger(__name__)
_PROGRESS, _METRICS = "progress.json", "metrics.jsonl"

StepMetrics = dict[str, float]


class Checkpoints(Protocol):
    """Where an update's checkpoints lie; rank 0 alone asks."""

    def newest(self) -> Path | None:
        """The newest whole one of this very update."""
        ...

    def is_due(self, step: int) -> bool:
        """Whether one is wanted, after so many steps."""
        ...

    def writing(self, step: int) -> AbstractContextManager[Path]:
        """The folder to write one to; it counts once the block has ended well."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an update has come, besides weights and moments.

    Attributes:
        steps: the metrics of each.
        gate_floor: see `stages.update.step.Stepper`.
        active_share: see `stages.update.skipping.Skipping`.
    """

    steps: list[StepMetrics]
    gate_floor: float | None
    active_share: float | None


# ---- by all ranks together ------------------------------------------------------------------------------------------


def newest_of(checkpoints: Checkpoints | None) -> Path | None:
    """The checkpoint to go on from, by what rank 0 sees."""
    if checkpoints is None:
        return None
    found = [checkpoints.newest() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def is_due(checkpoints: Checkpoints | None, step: int, device: torch.device) -> bool:
    """Whether to write one now, by rank 0's clock."""
    if checkpoints is None:
        return False
    due = torch.tensor(int(dist.get_rank() == 0 and checkpoints.is_due(step)), device=device)
    dist.broadcast(due, src=0)
    return bool(due)


def write(checkpoints: Checkpoints, engine: Any, progress: Progress, value_head: ValueHead | None) -> None:
    """Write what the ranks hold after a step. Tensors are gathered on all, one at a time; rank 0 writes."""
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, random_state())
    tensors = _tensors(engine, value_head, states)
    if dist.get_rank() > 0:
        for _ in tensors:
            pass
        return
    with checkpoints.writing(len(progress.steps)) as folder:
        write_tensors(folder, tensors)
        numbers = {
            "num_ranks": dist.get_world_size(),
            "gate_floor": progress.gate_floor,
            "active_share": progress.active_share,
        }
        (folder / _PROGRESS).write_text(json.dumps(numbers), encoding="utf-8")
        lines = [json.dumps(step) + "\n" for step in progress.steps]
        (folder / _METRICS).write_text("".join(lines), encoding="utf-8")


def _tensors(
    engine: Any, value_head: ValueHead | None, states: list[dict[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in deepspeed_engine.trained_state(engine):
        yield f"weights/{name}", tensor
    for name, tensor in deepspeed_engine.moments(engine):
        yield f"moments/{name}", tensor
    for name, tensor in value_head.state().items() if value_head is not None else ():
        yield f"value_head/{name}", tensor
    for rank, state in enumerate(states):
        for name, tensor in state.items():
            yield f"random/{rank}/{name}", tensor


def restore(folder: Path, engine: Any) -> Progress:
    """Have the engine, which holds the update's start, hold a checkpoint's weights and moments."""
    deepspeed_engine.set_float32_state(engine, TensorFiles(folder, prefix="weights/"))
    deepspeed_engine.set_moments(engine, TensorFiles(folder, prefix="moments/"))
    numbers = _numbers(folder)
    lines = (folder / _METRICS).read_text(encoding="utf-8").splitlines()
    return Progress([json.loads(line) for line in lines], numbers["gate_floor"], numbers["active_share"])


def restore_value_head(folder: Path, head: ValueHead) -> None:
    """Have a value head go on."""
    head.set_state(TensorFiles(folder, prefix="value_head/"), source=folder)


def restore_random_numbers(folder: Path, *, step: int, seed: int) -> None:
    """Have this rank's random numbers go on; on another number of ranks they begin anew, by the step and the seed."""
    before, now, rank = _numbers(folder)["num_ranks"], dist.get_world_size(), dist.get_rank()
    if before == now:
        set_random_state(TensorFiles(folder, prefix=f"random/{rank}/"))
        return
    seed_rank(seed, step, rank)
    if rank == 0:
        _log.warning("from step %d on random numbers begin anew: there were %d workers, now %d", step, before, now)


def _numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))  # type: ignore[no-any-return]

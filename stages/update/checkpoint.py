"""The state of an unfinished update in a folder: written after a step, and gone on from by this trainer or another.

Weights (with LoRA the adapters alone) and AdamW's moments are written whole and in float32, so that another number of
ranks and another ZeRO stage can go on from them. On as many ranks as before the update goes on to the last bit.

- ``tensors-*.safetensors``: ``weights/NAME``, ``moments/NAME.exp_avg``, ``moments/NAME.exp_avg_sq``,
  ``moments/num_steps``; ``value_head/…``, the value head with its optimizer, where there is one; and the state of every
  rank's random numbers, ``random/RANK/…``;
- ``numbers.json``: the number of ranks, the gate's floor, what skipping and guard go by;
- ``metrics.jsonl``: the metrics of every step so far. Their number is the place in the data and in the schedule.

When one is written, which of them counts, and what proves that it is whole, is said by who calls the trainer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from stages.update import deepspeed_engine
from stages.update.randomness import random_state, seed_rank, set_random_state
from stages.update.step import Stepper
from stages.update.tensor_files import TensorFiles, write_tensors
from stages.update.value_head import ValueHead

_log = logging.getLogger(__name__)
_NUMBERS, _METRICS = "numbers.json", "metrics.jsonl"

StepMetrics = dict[str, float]


class Checkpoints(Protocol):
    """Where an update's checkpoints lie; rank 0 alone asks, but for `bring`."""

    def newest(self) -> Path | None:
        """The newest whole one of this very update."""
        ...

    def bring(self, folder: Path) -> None:
        """Have one that rank 0 found on this rank's node, too."""
        ...

    def is_due(self, step: int) -> bool:
        """Whether one is wanted, after so many steps."""
        ...

    def writing(self, step: int) -> AbstractContextManager[Path]:
        """The folder to write one to; it counts once the block has ended well."""
        ...


@dataclass(frozen=True, slots=True)
class Resumed:
    """A checkpoint that an update goes on from.

    Attributes:
        steps: the metrics of each step before it.
        num_ranks: that wrote it.
        gate_floor: see `stages.update.step.Stepper`.
        active_share: see `stages.update.skipping.Skipping`.
        guard: see `stages.update.guard.Guard.state`.
    """

    folder: Path
    steps: list[StepMetrics]
    num_ranks: int
    gate_floor: float | None
    active_share: float | None
    guard: Mapping[str, Any]


# ---- by all ranks together ------------------------------------------------------------------------------------------


def is_due(checkpoints: Checkpoints, step: int, device: torch.device) -> bool:
    """Whether to write one now, by rank 0's clock."""
    due = torch.tensor(int(dist.get_rank() == 0 and checkpoints.is_due(step)), device=device)
    dist.broadcast(due, src=0)
    return bool(due)


def write(checkpoints: Checkpoints, stepper: Stepper, steps: Sequence[StepMetrics]) -> None:
    """Write what the ranks hold after some steps. Tensors are gathered on all, one at a time; rank 0 writes."""
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, random_state())
    tensors = _tensors(stepper, states)
    if dist.get_rank() > 0:
        for _ in tensors:
            pass
        return
    with checkpoints.writing(len(steps)) as folder:
        write_tensors(folder, tensors)
        numbers = {
            "num_ranks": dist.get_world_size(),
            "gate_floor": stepper.gate_floor,
            "active_share": stepper.skipping.active_share,
            "guard": stepper.guard.state(),
        }
        (folder / _NUMBERS).write_text(json.dumps(numbers), encoding="utf-8")
        (folder / _METRICS).write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")


def _tensors(stepper: Stepper, states: Sequence[Mapping[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in deepspeed_engine.trained_state(stepper.engine):
        yield f"weights/{name}", tensor
    for name, tensor in deepspeed_engine.moments(stepper.engine):
        yield f"moments/{name}", tensor
    for name, tensor in stepper.value_head.state().items() if stepper.value_head is not None else ():
        yield f"value_head/{name}", tensor
    for rank, state in enumerate(states):
        for name, tensor in state.items():
            yield f"random/{rank}/{name}", tensor


def newest_of(checkpoints: Checkpoints | None) -> Path | None:
    """The checkpoint to go on from, by what rank 0 sees."""
    if checkpoints is None:
        return None
    found = [checkpoints.newest() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    if found[0] is not None:
        checkpoints.bring(found[0])
    return found[0]


def restore(folder: Path, engine: Any) -> Resumed:
    """Have the engine, which holds the update's start, hold a checkpoint's weights and moments."""
    deepspeed_engine.set_float32_state(engine, TensorFiles(folder, prefix="weights/"))
    deepspeed_engine.set_moments(engine, TensorFiles(folder, prefix="moments/"))
    lines = (folder / _METRICS).read_text(encoding="utf-8").splitlines()
    numbers = json.loads((folder / _NUMBERS).read_text(encoding="utf-8"))
    return Resumed(folder, [json.loads(line) for line in lines], **numbers)


def restore_value_head(resumed: Resumed, head: ValueHead) -> None:
    """Have a value head go on."""
    head.set_state(TensorFiles(resumed.folder, prefix="value_head/"), source=resumed.folder)


def restore_random_numbers(resumed: Resumed, *, seed: int) -> None:
    """Have this rank's random numbers go on; on another number of ranks they begin anew, by the step and the seed."""
    rank, num_ranks, step = dist.get_rank(), dist.get_world_size(), len(resumed.steps)
    if num_ranks == resumed.num_ranks:
        set_random_state(TensorFiles(resumed.folder, prefix=f"random/{rank}/"))
        return
    seed_rank(seed, step, rank)
    if rank == 0:
        told = "from step %d on random numbers begin anew: there were %d workers, now there are %d"
        _log.warning(told, step, resumed.num_ranks, num_ranks)

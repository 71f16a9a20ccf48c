"""How the two sides of `update.py` are measured: the job that both get, the clock of their steps, memory, matmuls.

A step's time runs from the end of the step before to its own end, so that data loading, metrics and the optimizer are
in it on both sides.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

BETA = 0.1
APART = 5.0  # nats between a rejected answer and its reference; the gate's floor is 1e-3
_MATMUL, _MATMULS = 1536, 20


@dataclass(frozen=True, slots=True)
class Job:
    """What a side is to do.

    Attributes:
        policy, pairs: a folder and a file.
        batch: pairs behind an optimizer step; where `share` is given, all of them, in every step.
        micro_batch: pairs a forward, at most.
        share: of the rejected answers above their reference; None: the reference is the policy itself, two epochs are
            trained, and the second one is timed.
        loss_type: of ours; TRL's is plain DPO.
        warm_up, steps: steps before those timed, and those.
        threads: a process.
    """

    policy: str
    pairs: str
    batch: int
    micro_batch: int
    share: float | None
    loss_type: str
    learning_rate: float
    warm_up: int
    steps: int
    threads: int
    zero_stage: int

    @classmethod
    def read(cls, file: Path) -> Job:
        return cls(**json.loads(file.read_text(encoding="utf-8")))

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @property
    def num_epochs(self) -> int:
        return 2 if self.share is None else self.warm_up + self.steps

    def num_warm_up(self, num_pairs: int) -> int:
        return -(-num_pairs // self.batch) if self.share is None else self.warm_up


class Clock:
    """Ends of optimizer steps, and the peak of memory after the warm-up; made before the weights are loaded.

    Memory is compared with what was held then, since weights that were loaded are in memory only once they are read.

    Args:
        warm_up: steps that do not count.
    """

    def __init__(self, warm_up: int) -> None:
        self._warm_up, self._ends = warm_up, [time.perf_counter()]
        self.empty_mib = rss_mib()

    def step(self) -> None:
        """Called at the end of each."""
        synchronise()
        self._ends.append(time.perf_counter())
        if len(self._ends) - 1 == self._warm_up:
            reset_peak()

    def start(self) -> None:
        """Called before the first."""
        self._ends = [time.perf_counter()]
        if self._warm_up == 0:
            reset_peak()

    def told(self) -> dict[str, Any]:
        ends = self._ends[self._warm_up :]
        seconds = [after - before for before, after in pairwise(ends)]
        return {
            "step_s": round(statistics.median(seconds), 4),
            "steps_s": [round(found, 4) for found in seconds],
            "all_s": round(sum(seconds), 4),
            "empty_mib": round(self.empty_mib, 1),
            "peak_mib": round(peak_mib(), 1),
        }


def synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rss_mib() -> float:
    """Memory held now: of the process, or on the GPU."""
    return _memory("VmRSS", "memory_allocated")


def peak_mib() -> float:
    """The most that was held since `reset_peak`."""
    return _memory("VmHWM", "max_memory_allocated")


def _memory(field: str, on_gpu: str) -> float:
    import torch

    if torch.cuda.is_available():
        return float(getattr(torch.cuda, on_gpu)()) / 2**20
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def active(place: int, share: float) -> bool:
    """Whether the rejected answer of the pair at `place` is one of the active `share`, spread evenly."""
    return int((place + 1) * share + 1e-9) > int(place * share + 1e-9)


def shift(place: int, share: float) -> float:
    """Nats from a rejected answer's log-prob to its reference's: below it where the answer is to be active."""
    return -APART if active(place, share) else APART


def matmul_gflops() -> float:
    """The fastest of some float32 matrix products, by the threads that this process has."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(_MATMUL, _MATMUL, device=device) for _ in range(2))
    seconds = []
    for _ in range(_MATMULS):
        synchronise()
        began = time.perf_counter()
        torch.mm(a, b)
        synchronise()
        seconds.append(time.perf_counter() - began)
    return 2 * _MATMUL**3 / min(seconds) / 1e9

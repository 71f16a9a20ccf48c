"""One rank of a case of `memory.py`: the real trainer loads, updates and saves; the peak of its memory in each.

python benchmarks/memory_rank.py JOB.json       prints its figures as JSON, on rank 0
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  (before memory is measured)
import torch
import torch.distributed as dist

from benchmarks.group import process_group
from benchmarks.update_measure import peak_mib, reset_peak, rss_mib
from benchmarks.update_work import random_pairs
from stages.protocols import Weights
from stages.update.allocation import keep_freed_memory
from stages.update.config import UpdateConfig
from stages.update.rows import PairRow
from stages.update.worker import Trainer

SEED = 1
PARTS = ("load", "logps", "update", "save")  # of a round, one after another


@dataclass(frozen=True, slots=True)
class MemoryJob:
    """What a rank is to do.

    Attributes:
        small: a policy that is updated first, so that what libraries load on first use is not counted.
        policy: the policy whose update is measured.
        prompt, answer: tokens.
        num_pairs: in each of two steps.
    """

    small: str
    policy: str
    folder: str
    dtype: str
    update: dict[str, Any]
    prompt: int
    answer: int
    num_pairs: int
    vocabulary: int
    threads: int

    @classmethod
    def read(cls, file: Path) -> MemoryJob:
        return cls(**json.loads(file.read_text(encoding="utf-8")))

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")


def measured(job: MemoryJob) -> dict[str, float]:
    """MiB above idle, at the peak of each part of a round."""
    if not torch.cuda.is_available():
        keep_freed_memory()  # as the trainer's process of a run does
    trainer = Trainer(UpdateConfig(**job.update), dtype=job.dtype, pad_token=None, num_threads=job.threads)
    small = Weights.found(Path(job.small), round=0)
    _round(trainer, small, _rows(job, num_pairs=2, prompt=4, answer=4), Path(job.folder) / "small")
    trainer.rest()
    idle = rss_mib()
    found = _round(trainer, Weights.found(Path(job.policy), round=0), _rows(job), Path(job.folder) / "large")
    on_gpu = {"on_gpu": float(torch.cuda.is_available())}
    return (
        on_gpu | {"idle_mib": round(idle, 1)} | {f"{part}_mib": round(peak - idle, 1) for part, peak in found.items()}
    )


def _round(trainer: Trainer, weights: Weights, rows: list[PairRow], folder: Path) -> dict[str, float]:
    peaks = {}
    reset_peak()
    trainer.load(weights)
    peaks["load"] = peak_mib()
    reset_peak()
    own = trainer.logps([answer for row in rows for answer in row.answers])
    peaks["logps"] = peak_mib()
    reset_peak()
    trainer.update(rows, [own], own_reference=0, seed=SEED)
    peaks["update"] = peak_mib()
    reset_peak()
    trainer.save(folder, round=1)
    peaks["save"] = peak_mib()
    return peaks


def _rows(job: MemoryJob, **less: int) -> list[PairRow]:
    sizes = {"prompt": job.prompt, "answer": job.answer, "num_pairs": 2 * job.num_pairs} | less
    pairs = random_pairs(
        sizes["num_pairs"], prompt=sizes["prompt"], answer=sizes["answer"], vocabulary=min(job.vocabulary, 300)
    )
    return [
        PairRow(f"{place:04d}", f"c{place}", f"r{place}", pair.prompt, pair.chosen, pair.rejected)
        for place, pair in enumerate(pairs)
    ]


def main() -> None:
    with process_group() as rank:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        mine = measured(MemoryJob.read(Path(sys.argv[1])))
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, mine)
        if rank == 0:
            print(json.dumps(everyones), flush=True)


if __name__ == "__main__":
    main()

"""Our side of a case of `update.py`: `stages.update.worker.Trainer`, in a process of its own or several under torchrun.

python benchmarks/update_ours.py JOB.json       prints its figures as JSON, on rank 0
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  (before memory is measured)
import torch

from benchmarks.group import process_group
from benchmarks.update_measure import BETA, Clock, Job, matmul_gflops, shift
from benchmarks.update_work import Pair, read_pairs
from stages.protocols import Weights
from stages.update.allocation import keep_freed_memory
from stages.update.config import UpdateConfig
from stages.update.rows import PairRow, answers_of
from stages.update.worker import Trainer


def ours(job: Job, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Figures of the steps that count; on rank 0, which alone is told of them."""
    num_warm_up = job.num_warm_up(len(pairs))
    clock, steps = Clock(num_warm_up), []
    keep_freed_memory()  # as the trainer's process of a run does
    trainer = Trainer(_config(job), dtype="float32", pad_token=None, num_threads=job.threads)
    trainer.load(Weights.found(Path(job.policy), round=0))
    rows = [
        PairRow(f"{place:04d}", f"c{place}", f"r{place}", pair.prompt, pair.chosen, pair.rejected)
        for place, pair in enumerate(pairs)
    ]
    began = time.perf_counter()
    own = trainer.logps(answers_of(rows))
    reference_s = time.perf_counter() - began

    def stepped(metrics: dict[str, float]) -> None:
        clock.step()
        steps.append(metrics)

    clock.start()
    references = own if job.share is None else _apart(own, job.share)
    own_reference = 0 if job.share is None else None
    trainer.update(rows, [references], own_reference=own_reference, seed=1, on_step=stepped)
    if trainer.rank != 0:
        return {}
    timed = steps[num_warm_up:]
    return clock.told() | {
        "reference_s": round(reference_s, 3),
        "active_share": _mean(timed, "rejected_active"),
        "tokens_processed": _mean(timed, "tokens/processed"),
        "loss": [round(step["loss"], 6) for step in timed],
        "matmul_gflops": round(matmul_gflops(), 1),
    }


def _config(job: Job) -> UpdateConfig:
    return UpdateConfig(
        loss_type=job.loss_type,
        beta=BETA,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        global_batch_size=job.batch,
        micro_batch_size=job.micro_batch,
        num_train_epochs=job.num_epochs,
        zero_stage=job.zero_stage,
    )


def _apart(own: Mapping[str, float], share: float) -> dict[str, float]:
    """References far from the policy for the rejected answers, its own log-probs for the chosen ones."""
    return {name: logp if name[0] == "c" else logp + shift(int(name[1:]), share) for name, logp in own.items()}


def _mean(steps: Sequence[Mapping[str, float]], name: str) -> float | None:
    """None where the steps do not tell it."""
    found = [step[name] for step in steps if name in step]
    return round(statistics.mean(found), 4) if found else None


def main() -> None:
    job = Job.read(Path(sys.argv[1]))
    with process_group() as rank:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        found = ours(job, read_pairs(Path(job.pairs)))
        if rank == 0:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

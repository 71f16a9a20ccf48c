"""TRL's side of a case of `update.py`: `DPOTrainer` with `precompute_ref_log_probs`, in a process of its own.

    python benchmarks/update_trl.py JOB.json       prints its figures as JSON

It trains plain DPO, whose time does not depend on where the references are. The policy's own log-probs come from the
trainer's precompute; where references are to lie elsewhere, its columns are moved before the first step. A batch is one
forward of `per_device_train_batch_size` pairs, nothing is logged and nothing saved.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.update_measure import BETA, Clock, Job, shift
from benchmarks.update_work import Pair, read_pairs, text_of


class Told(TrainerCallback):
    """Tells a clock of the steps."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._clock.step()


class Watched(DPOTrainer):
    """Besides, knows how long the reference pass took, and how many tokens each forward had, padding included."""

    reference_s = 0.0

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_s += time.perf_counter() - began
        return found

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.setdefault("tokens", []).append(inputs["input_ids"].numel())
        return super().compute_loss(model, inputs, *args, **kwargs)


def trl(job: Job, pairs: Sequence[Pair], folder: str) -> dict[str, Any]:
    """Figures of the steps that count."""
    torch.set_num_threads(job.threads)
    num_warm_up, num_forwards = job.num_warm_up(len(pairs)), -(-job.batch // job.micro_batch)
    clock = Clock(num_warm_up)
    model = AutoModelForCausalLM.from_pretrained(job.policy, dtype=torch.float32)
    if torch.cuda.is_available():
        model = model.cuda()
    trainer = Watched(
        model,
        args=_config(job, num_forwards, folder),
        train_dataset=Dataset.from_list([_as_text(pair) for pair in pairs]),
        processing_class=AutoTokenizer.from_pretrained(job.policy),
        callbacks=[Told(clock)],
    )
    for row, pair in zip(trainer.train_dataset, pairs, strict=True):
        assert Pair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == pair, "it reads other tokens"
    if job.share is not None:
        _set_apart(trainer, job.share)
    trainer.train()
    tokens = trainer.tokens[num_warm_up * num_forwards :]
    return clock.told() | {
        "reference_s": round(trainer.reference_s, 3),
        "tokens_processed": round(statistics.mean(tokens) * num_forwards, 1),
    }


def _config(job: Job, num_forwards: int, folder: str) -> DPOConfig:
    return DPOConfig(
        folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=num_forwards,
        num_train_epochs=job.num_epochs,
        beta=BETA,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        max_length=None,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _as_text(pair: Pair) -> dict[str, str]:
    """The space stands before an answer, since a prompt's text is read by itself too."""
    return {
        "prompt": text_of(pair.prompt),
        "chosen": " " + text_of(pair.chosen),
        "rejected": " " + text_of(pair.rejected),
    }


def _set_apart(trainer: Any, share: float) -> None:
    """Move the rejected answers' references as ours are."""
    rows = trainer.train_dataset
    moved = [logp + shift(place, share) for place, logp in enumerate(rows["ref_rejected_logps"])]
    trainer.train_dataset = rows.remove_columns("ref_rejected_logps").add_column("ref_rejected_logps", moved)


def main() -> None:
    job = Job.read(Path(sys.argv[1]))
    with TemporaryDirectory() as folder:
        print(json.dumps(trl(job, read_pairs(Path(job.pairs)), folder)), flush=True)


if __name__ == "__main__":
    main()

"""A cell's work: the update that it says, and what came of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.robustness.grid import Cell
from benchmarks.robustness.recipes import NUM_ROUNDS, ROUND_PROMPTS
from benchmarks.robustness.store import Figures
from benchmarks.robustness.task import Task
from stages.errors import StageError
from stages.protocols import Weights
from stages.score.config import PairConfig
from stages.score.pairing.stage import pair
from stages.update.allocation import keep_freed_memory
from stages.update.config import GuardConfig, UpdateConfig
from stages.update.rows import PairRow, answers_of, pair_rows
from stages.update.worker import Trainer

_UNGUARDED = GuardConfig(max_loss_jump=None, max_kl=None, max_skipped=1)
"""What a method does by itself is what is studied: only numbers that are not finite end an update, at once."""


class Training:
    """One trainer for all cells, in this process."""

    def __init__(self, num_threads: int) -> None:
        keep_freed_memory()
        self._trainer = Trainer(UpdateConfig(zero_stage=0), dtype="float32", pad_token=None, num_threads=num_threads)

    def on_table(self, task: Task, cell: Cell) -> Figures:
        """One update on a fixed table; ``diverged`` where it ended in numbers that are not finite."""
        pairs = task.table(cell.point.kind, cell.seed)
        with TemporaryDirectory() as folder:
            try:
                weights, more = self._update(task, cell, task.start, pairs, Path(folder), round=1)
            except StageError as error:
                return _diverged(error)
            return task.figures(weights, pairs) | more

    def on_policy(self, task: Task, cell: Cell) -> Figures:
        """Three rounds, each on pairs that its own start policy samples; the last one's figures, and all by round."""
        weights, rounds = task.start, []
        with TemporaryDirectory() as folder:
            for round in range(1, NUM_ROUNDS + 1):
                pairs = self._collected(task, cell, weights, round)
                more: dict[str, float] = {}
                if pairs:  # a policy that always gives one answer leaves none, and stays
                    try:
                        weights, more = self._update(task, cell, weights, pairs, Path(folder) / f"{round}", round=round)
                    except StageError as error:
                        return _diverged(error)
                rounds.append(task.figures(weights) | more | {"num_pairs": len(pairs)})
        return rounds[-1] | {"rounds": rounds}

    def _collected(self, task: Task, cell: Cell, weights: Weights, round: int) -> list[PairRow]:
        """Sampled, scored and paired as the quickstart does."""
        drawn = random.Random(f"{cell.seed} {round}").sample(range(task.prompts.num_rows), ROUND_PROMPTS)
        prompts = task.prompts.take(drawn)
        task.sampler.load(weights)
        candidates, scored = task.scored(prompts, weights, round=round, seed=cell.seed)
        config = PairConfig(strategy="best_worst", min_margin=task.recipe.min_margin)
        pairs, _ = pair(prompts, candidates, scored, [], config, round=round, seed=cell.seed)
        return pair_rows([pairs])

    def _update(
        self, task: Task, cell: Cell, start: Weights, pairs: Sequence[PairRow], folder: Path, *, round: int
    ) -> tuple[Weights, Figures]:
        """The new weights, and what only the trainer knows."""
        recipe = task.recipe
        config = UpdateConfig(
            loss_type=cell.method,
            beta=cell.point.beta,
            learning_rate=cell.point.rate * recipe.learning_rate,
            global_batch_size=recipe.batch,
            micro_batch_size=recipe.batch,
            num_train_epochs=recipe.epochs,
            zero_stage=0,
            guard=_UNGUARDED,
        )
        self._trainer.configure(config)
        self._trainer.load(start)
        referred = config.num_references != (0, 0)
        references = [self._trainer.logps(answers_of(pairs))] if referred else []
        summary = self._trainer.update(pairs, references, own_reference=0 if referred else None, seed=cell.seed)
        if summary.ended is not None:
            fix = "a lower rate; that it diverges is the cell's result"
            raise StageError("update", wanted="finite numbers", got=summary.ended, fix=fix)
        folder.mkdir(exist_ok=True)
        weights = self._trainer.save(folder, round=round)
        told = {"loss": summary.last["loss"], "rejected_active": summary.last.get("rejected_active")}
        return weights, told | {"num_steps": summary.num_steps}


def _diverged(error: StageError) -> Figures:
    return {"diverged": True, "error": str(error)}

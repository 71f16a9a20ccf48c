"""The study's cells in order, each done once, until all are there or the time is over."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.robustness.grid import DEFAULT_BETA, DEFAULT_RATE, Cell, Point, Stage, cells_of
from benchmarks.robustness.store import Figures, Store
from benchmarks.robustness.verdict import chosen_points

if TYPE_CHECKING:
    from benchmarks.robustness.task import Task

DEFAULT_POINT = Point(DEFAULT_RATE, DEFAULT_BETA, "on_policy")
ORDER: tuple[Stage, ...] = ("grid", "rounds", "stories", "others")


def start_cell(stage: Stage) -> Cell:
    """Where a task's start policy stands in the store."""
    return Cell("stories" if stage == "stories" else "grid", "start", Point(0, None, "unlike"), 0)


@dataclass(frozen=True, slots=True)
class Study:
    """Which cells there are, and which of them are done.

    Attributes:
        data: the folder of real data, where there is one; without it there are no stories.
    """

    store: Store
    seeds: Sequence[int]
    data: Path | None

    def cells(self, stage: Stage) -> list[Cell]:
        """A stage's cells; none of `rounds` before the grid is complete, which decides on their points."""
        if stage == "rounds":
            grid = cells_of("grid", self.seeds)
            if self.store.missing(grid):
                return []
            return cells_of(stage, self.seeds, points=chosen_points(self.results("grid"), DEFAULT_POINT))
        return cells_of(stage, self.seeds)

    def results(self, stage: Stage) -> dict[Cell, Figures]:
        found = {cell: self.store.get(cell) for cell in self.cells(stage)}
        return {cell: figures for cell, figures in found.items() if figures is not None}

    def start(self, stage: Stage) -> Figures | None:
        """The figures of the policy that a stage's cells start from."""
        return self.store.get(start_cell(stage))

    def do(self, stages: Sequence[Stage], *, until: float, num_threads: int) -> None:
        """Do what is missing of some stages, up to a time of `time.monotonic`."""
        work = _Work(self, until, num_threads)
        for stage in (found for found in ORDER if found in stages):
            if stage == "stories" and self.data is None:
                _tell("stories skipped: --data names no folder with stories260k and tinystories in it")
            elif stage == "rounds" and not self.cells(stage):
                _tell("rounds skipped: their points are chosen from the grid, which is not complete")
            else:
                work.stage(stage)


class _Work:
    """Tasks and trainer, made when the first cell needs them."""

    def __init__(self, study: Study, until: float, num_threads: int) -> None:
        from benchmarks.robustness.training import Training

        self._study, self._until = study, until
        self._num_threads = num_threads
        self._training = Training(num_threads)

    def stage(self, stage: Stage) -> None:
        store, cells = self._study.store, self._study.cells(stage)
        missing = store.missing([start_cell(stage), *cells])
        if not missing or time.monotonic() >= self._until:
            return
        task = self._task(stage)
        for cell in missing:
            if time.monotonic() >= self._until:
                _tell(f"the time is over; {len(store.missing(cells))} of {len(cells)} cells of {stage} are missing")
                return
            began = time.monotonic()
            if cell.method == "start":
                figures: Figures = task.figures(task.start)
            elif stage == "rounds":
                figures = self._training.on_policy(task, cell)
            else:
                figures = self._training.on_table(task, cell)
            figures["seconds"] = round(time.monotonic() - began, 2)
            store.add(cell, figures)
            _tell(f"{stage:<8} {cell.method:<10} {cell.point.name:<28} seed {cell.seed}   {_told(figures)}")

    def _task(self, stage: Stage) -> Task:
        if stage == "stories":
            from benchmarks.robustness.stories import stories_task

            assert self._study.data is not None
            return stories_task(self._study.data)
        from benchmarks.robustness.reverse import reverse_task

        return reverse_task(self._num_threads)


def _told(figures: Figures) -> str:
    if figures.get("diverged"):
        return f"diverged   {figures['seconds']} s"
    names = [name for name in ("exact", "reward", "truth", "kl") if name in figures]
    return "   ".join([*(f"{name} {figures[name]:.3f}" for name in names), f"{figures['seconds']} s"])


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

"""Curves of a run for TensorBoard: what ``metrics.jsonl`` and the reports hold, as event files.

``RUN/tensorboard/update``: the metrics of every optimizer step, by the step's number counted over all rounds.
``RUN/tensorboard/evaluation``: the evaluation's figures, by round.

What is plotted again starts by telling readers to forget what they hold from that step on, so that no step is shown
twice after a retry. Earlier files stay: a TensorBoard that is reading one would wait for it for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.mirror import keep
from pipeline.report import round_reports

_COORDINATES = ("round", "step", "steps")


@dataclass(frozen=True, slots=True)
class StepCurves:
    """The curves of a round's update.

    Attributes:
        run_folder: of the run.
        steps_before: optimizer steps of all rounds before this one.
    """

    run_folder: Path
    round: int
    steps_before: int

    @contextmanager
    def plotting(self) -> Iterator[Callable[[Mapping[str, float]], None]]:
        """A function that takes a step's metrics, as in ``metrics.jsonl``."""
        folder = self.run_folder / "tensorboard" / "update"
        with _event_file(folder, start=self.steps_before + 1) as add:
            yield lambda metrics: add(self.steps_before + int(metrics["step"]), step_scalars(metrics))


def step_scalars(metrics: Mapping[str, float]) -> dict[str, float]:
    """What is plotted of a step's metrics."""
    return {name: value for name, value in metrics.items() if name not in _COORDINATES}


def evaluation_scalars(figures: Mapping[str, Any]) -> dict[str, float]:
    """What is plotted of an evaluation's figures."""
    return dict(_flat(figures))


def step_curves(run_folder: Path, *, round: int) -> StepCurves:
    """The curves of a round's update; the rounds before it have their reports."""
    before = [report for report in round_reports(run_folder) if report["round"] < round]
    updates = [found for report in before if (found := report.get("update") or report.get("ended_update"))]
    return StepCurves(run_folder, round, sum(update["num_steps"] for update in updates))


def plot_evaluation(run_folder: Path, *, round: int, figures: Mapping[str, Any]) -> None:
    """Plot the figures of a round's evaluation, and again those of later rounds, which readers forget with it."""
    later = {found["round"]: found["evaluate"] for found in round_reports(run_folder) if found.get("evaluate")}
    with _event_file(run_folder / "tensorboard" / "evaluation", start=round) as add:
        add(round, evaluation_scalars(figures))
        for number in sorted(number for number in later if number > round):
            add(number, evaluation_scalars(later[number]))


@contextmanager
def _event_file(folder: Path, *, start: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A function that adds scalars to a new event file, whose readers forget `start` and all later steps first."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    # Files are read in the order of their names.
    path = folder / f"events.out.tfevents.{time.time_ns()}"
    try:
        with path.open("wb") as file:
            records = RecordWriter(file)

            def write(**content: Any) -> None:
                records.write(Event(wall_time=time.time(), **content).SerializeToString())
                records.flush()

            def add(step: int, scalars: Mapping[str, float]) -> None:
                values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
                write(step=step, summary=Summary(value=values))

            write(file_version="brain.Event:2")
            write(step=start, session_log=SessionLog(status=SessionLog.START))
            yield add
    finally:
        keep(path)  # of an update that broke off, too


def _flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested figures, named by their path."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, value

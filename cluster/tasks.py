"""Stateless jobs, each as a Ray task of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from cluster.errors import KeptWaiting, WorkerLost
from cluster.mapper import Attempt, Job, Outcome, Patience, Watcher, Workers, result_of, waited_for
from cluster.resources import Resources
from cluster.session import redirect_output
from cluster.timing import timed

_STARTED = "started"


@dataclass(slots=True)
class _Begun:
    """A task that has started: its job, and until when it has to be done; infinite once it was ended for being late."""

    attempt: Attempt
    due: float
    was_late: bool = False


class Tasks(Workers):
    """Stateless jobs as Ray tasks; a job is called with None."""

    def __init__(
        self, *, resources: Resources, log_dir: Path, patience: Patience, watcher: Watcher | None = None
    ) -> None:
        super().__init__(patience, watcher or Watcher())
        self._log = log_dir / "tasks.log"
        self._starting: dict[Any, Attempt] = {}
        self._running: dict[Any, _Begun] = {}
        self._resources = resources
        # A stream of two: that the task has started, and its result.
        self._task = ray.remote(_run_job).options(
            num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0, num_returns="streaming"
        )

    @property
    def refs(self) -> list[Any]:
        return [*self._running, *self._starting]

    @property
    def due(self) -> float | None:
        return min((begun.due for begun in self._running.values()), default=None)

    def end_late(self) -> None:
        now = time.monotonic()
        for ref, begun in self._running.items():
            if begun.due <= now:
                begun.due, begun.was_late = math.inf, True
                ray.cancel(ref, force=True)

    def handle(self, ref: Any) -> Outcome | None:
        begun = self._running.pop(ref, None)
        attempt = self._starting.pop(ref) if begun is None else begun.attempt
        try:
            value = result_of(next(ref), self._log)
        except WorkerLost as died:
            lost = self._hung(died.name, died.log) if begun is not None and begun.was_late else died
            self._begin(attempt.again(lost, self.patience.max_restarts))
            self._watcher.on_death(lost)
            return None
        if value == _STARTED:
            self._running[ref] = _Begun(attempt, time.monotonic() + self.patience.job_timeout_s)
            return None
        return Outcome(attempt.number, self._noted(attempt.job, value, by=self._log))

    def forget(self) -> None:
        self._starting.clear()
        self._running.clear()

    def kept_waiting(self) -> KeptWaiting:
        return waited_for("task", self._resources, self.patience.start_timeout_s)

    def _begin(self, attempt: Attempt) -> None:
        self._starting[self._task.remote(attempt.job, self._log)] = attempt

    def run(self, job: Job) -> Any:
        """One job's result."""
        return next(self.map([job]))


def _run_job(job: Job, log: Path) -> Iterator[Any]:
    redirect_output(log)
    yield _STARTED
    yield timed(job, None)

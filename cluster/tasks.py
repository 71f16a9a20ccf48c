"""Stateless jobs, each as a Ray task of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from cluster.errors import KeptWaiting, WorkerLost
from cluster.mapper import Attempt, Job, Outcome, Workers, again, result_of, waited_for
from cluster.resources import Resources
from cluster.session import redirect_output
from cluster.timing import OnWork, timed, unnoted

_STARTED = "started"


class Tasks(Workers):
    """Stateless jobs as Ray tasks; a job is called with None."""

    def __init__(
        self,
        *,
        resources: Resources,
        log_dir: Path,
        max_retries: int,
        start_timeout_s: float,
        on_work: OnWork = unnoted,
    ) -> None:
        super().__init__(start_timeout_s=start_timeout_s, on_work=on_work)
        self._log = log_dir / "tasks.log"
        self._starting: dict[Any, Attempt] = {}
        self._running: dict[Any, Attempt] = {}
        self._resources, self._max_retries = resources, max_retries
        # A stream of two: that the task has started, and its result.
        self._task = ray.remote(_run_job).options(
            num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0, num_returns="streaming"
        )

    @property
    def refs(self) -> list[Any]:
        return [*self._running, *self._starting]

    @property
    def is_working(self) -> bool:
        return bool(self._running)

    def handle(self, ref: Any) -> Outcome | None:
        attempt = self._running.pop(ref) if ref in self._running else self._starting.pop(ref)
        try:
            value = result_of(next(ref), self._log)
        except WorkerLost as lost:
            self._begin(again(attempt, lost, self._max_retries))
            return None
        if value == _STARTED:
            self._running[ref] = attempt
            return None
        return Outcome(attempt.number, self._noted(attempt.job, value))

    def forget(self) -> None:
        self._starting.clear()
        self._running.clear()

    def kept_waiting(self) -> KeptWaiting:
        return waited_for("task", self._resources, self.start_timeout_s)

    def _begin(self, attempt: Attempt) -> None:
        self._starting[self._task.remote(attempt.job, self._log)] = attempt

    def run(self, job: Job) -> Any:
        """One job's result."""
        return next(self.map([job]))


def _run_job(job: Job, log: Path) -> Iterator[Any]:
    redirect_output(log)
    yield _STARTED
    yield timed(job, None)

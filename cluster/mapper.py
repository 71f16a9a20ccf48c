"""Batch work on a few long-lived actors, or on stateless tasks.

A job is a picklable callable; what it returns comes back to the driver, so it returns counts and names, never rows. A
dead actor is started again and its job given to it once more: jobs must be safe to run twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.errors import WorkerLost, last_words
from cluster.session import Resources, redirect_output

Job = Callable[[Any], Any]


class Pool:
    """Actors that each build one state (an engine, a reward model) and run jobs on it.

    Args:
        build: makes the state, in the actor.
        name: of the actors' log files, ``NAME-0.log`` and on.
        size: how many actors.
        resources: what each asks Ray for.
        log_dir: where their output goes.
        max_restarts: how often each may be started again.
    """

    def __init__(
        self,
        build: Callable[[], Any],
        *,
        name: str,
        size: int,
        resources: Resources,
        log_dir: Path,
        max_restarts: int,
    ) -> None:
        self._logs = [log_dir / f"{name}-{index}.log" for index in range(size)]
        actor = ray.remote(_Actor).options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            max_restarts=max_restarts,
            max_task_retries=max_restarts,
        )
        self._actors = [actor.remote(build, log) for log in self._logs]

    def map(self, jobs: Sequence[Job]) -> Iterator[Any]:
        """Results as jobs end, in no particular order; each actor has one job at a time.

        Raises:
            WorkerLost: if an actor died once too often.
            Exception: what a job or `build` raised, as it was.
        """
        waiting = list(reversed(jobs))
        idle = list(range(len(self._actors)))
        running: dict[Any, int] = {}
        while waiting or running:
            while waiting and idle:
                index = idle.pop(0)
                running[self._actors[index].run.remote(waiting.pop())] = index
            done, _ = ray.wait(list(running), num_returns=1)
            index = running.pop(done[0])
            idle.append(index)
            yield _result(done[0], self._logs[index])

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


class Tasks:
    """Stateless jobs as Ray tasks, with the same `map` as a `Pool`; a job is called with None."""

    def __init__(self, *, resources: Resources, log_dir: Path, max_retries: int) -> None:
        self._log = log_dir / "tasks.log"
        self._task = ray.remote(_run_job).options(
            num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=max_retries
        )

    def map(self, jobs: Sequence[Job]) -> Iterator[Any]:
        """As `Pool.map`."""
        running = [self._task.remote(job, self._log) for job in jobs]
        while running:
            done, running = ray.wait(running, num_returns=1)
            yield _result(done[0], self._log)

    def run(self, job: Job) -> Any:
        """One job's result."""
        return next(self.map([job]))


class _Actor:
    def __init__(self, build: Callable[[], Any], log: Path) -> None:
        redirect_output(log)
        self._build = build
        self._state: Any = None

    def run(self, job: Job) -> Any:
        # Built at the first job, not in __init__: what it raises then comes back as it is.
        if self._state is None:
            self._state = self._build()
        return job(self._state)


def _run_job(job: Job, log: Path) -> Any:
    redirect_output(log)
    return job(None)


def _result(ref: Any, log: Path) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        reason = str(error).splitlines()[0] or last_words(log)
        raise WorkerLost(log.stem, log, reason) from error

"""Batch work on a few long-lived actors, or on stateless tasks.

A job is a picklable callable; what it returns comes back to the driver, so it returns counts and names, never rows. A
dead worker is started again and its job given out once more: jobs must be safe to run twice. Ray itself restarts
nothing here, since it would wait without end for cores that others hold; here every wait for a worker to come up ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.errors import KeptWaiting, WorkerLost, last_words
from cluster.resources import Resources
from cluster.session import redirect_output, told, what_is_free

Job = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A job, and how many workers have died under it."""

    job: Job
    deaths: int = 0


class Pool:
    """Actors that each build one state (an engine, a reward model) and run jobs on it.

    Args:
        build: makes the state, in the actor.
        name: of the actors' log files, ``NAME-0.log`` and on.
        size: how many actors.
        resources: what each asks Ray for.
        log_dir: where their output goes.
        max_restarts: how often each may be started again, and how many deaths a job may cause.
        start_timeout_s: how long to wait for an actor to come up while none works.
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
        start_timeout_s: float,
    ) -> None:
        self._name, self._build, self._resources = name, build, resources
        self._max_restarts, self._start_timeout_s = max_restarts, start_timeout_s
        self._logs = [log_dir / f"{name}-{index}.log" for index in range(size)]
        self._deaths = [0] * size
        self._actors: list[Any] = [None] * size
        self._idle: list[int] = []
        self._starting: dict[Any, int] = {}
        for index in range(size):
            self._start(index)

    def map(self, jobs: Sequence[Job]) -> Iterator[Any]:
        """Results as jobs end, in no particular order; each actor has one job at a time.

        Raises:
            WorkerLost: if an actor died once too often.
            KeptWaiting: if no actor came up in time.
            Exception: what a job or `build` raised, as it was.
        """
        waiting = [_Attempt(job) for job in reversed(jobs)]
        running: dict[Any, tuple[int, _Attempt]] = {}
        try:
            while waiting or running:
                while waiting and self._idle:
                    index, attempt = self._idle.pop(0), waiting.pop()
                    running[self._actors[index].run.remote(attempt.job)] = index, attempt
                done = self._first([*running, *self._starting], working=bool(running))
                if done in self._starting:
                    self._arrived(done)
                    continue
                index, attempt = running.pop(done)
                try:
                    result = _result(done, self._logs[index])
                except WorkerLost as lost:
                    waiting.append(_again(attempt, lost, self._max_restarts))
                    self._restart(index, lost)
                    continue
                except BaseException:
                    self._idle.append(index)
                    raise
                self._idle.append(index)
                yield result
        finally:
            self._idle += [index for index, _ in running.values()]

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._idle, self._starting = [], [], {}

    def _start(self, index: int) -> None:
        actor = ray.remote(_Actor).options(num_cpus=self._resources.cpus, num_gpus=self._resources.gpus)
        self._actors[index] = actor.remote(self._build, self._logs[index])
        self._starting[self._actors[index].__ray_ready__.remote()] = index

    def _arrived(self, ref: Any) -> None:
        """An actor has come up, or died on the way."""
        index = self._starting.pop(ref)
        try:
            _result(ref, self._logs[index])
        except WorkerLost as lost:
            self._restart(index, lost)
        else:
            self._idle.append(index)

    def _restart(self, index: int, lost: WorkerLost) -> None:
        self._deaths[index] += 1
        if self._deaths[index] > self._max_restarts:
            raise lost
        self._start(index)

    def _first(self, refs: list[Any], *, working: bool) -> Any:
        done, _ = ray.wait(refs, num_returns=1, timeout=None if working else self._start_timeout_s)
        if not done:
            raise _kept_waiting(self._name, self._resources, self._start_timeout_s)
        return done[0]


class Tasks:
    """Stateless jobs as Ray tasks, with the same `map` as a `Pool`; a job is called with None."""

    def __init__(self, *, resources: Resources, log_dir: Path, max_retries: int, start_timeout_s: float) -> None:
        self._log = log_dir / "tasks.log"
        self._resources, self._max_retries, self._start_timeout_s = resources, max_retries, start_timeout_s
        # A stream of two: that the task has started, and its result.
        self._task = ray.remote(_run_job).options(
            num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0, num_returns="streaming"
        )

    def map(self, jobs: Sequence[Job]) -> Iterator[Any]:
        """As `Pool.map`."""
        starting = {self._task.remote(job, self._log): _Attempt(job) for job in jobs}
        running: dict[Any, _Attempt] = {}
        while starting or running:
            timeout_s = None if running else self._start_timeout_s
            done, _ = ray.wait([*running, *starting], num_returns=1, timeout=timeout_s)
            if not done:
                raise _kept_waiting("task", self._resources, self._start_timeout_s)
            stream = done[0]
            attempt = running.pop(stream) if stream in running else starting.pop(stream)
            try:
                value = _result(next(stream), self._log)
            except WorkerLost as lost:
                again = _again(attempt, lost, self._max_retries)
                starting[self._task.remote(again.job, self._log)] = again
                continue
            if value == _STARTED:
                running[stream] = attempt
            else:
                yield value[0]

    def run(self, job: Job) -> Any:
        """One job's result."""
        return next(self.map([job]))


_STARTED = "started"


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


def _run_job(job: Job, log: Path) -> Iterator[Any]:
    redirect_output(log)
    yield _STARTED
    yield [job(None)]


def _again(attempt: _Attempt, lost: WorkerLost, most: int) -> _Attempt:
    if attempt.deaths == most:
        raise lost
    return replace(attempt, deaths=attempt.deaths + 1)


def _kept_waiting(name: str, resources: Resources, waited_s: float) -> KeptWaiting:
    return KeptWaiting(name, told(resources.cpus, resources.gpus), waited_s, what_is_free())


def _result(ref: Any, log: Path) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        reason = str(error).splitlines()[0] or last_words(log)
        raise WorkerLost(log.stem, log, reason) from error

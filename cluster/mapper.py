"""Batch work on a few long-lived actors, or on stateless tasks.

A job is a picklable callable; what it returns comes back to the driver, so it returns counts and names, never rows. A
dead worker is started again and its job given out once more: jobs must be safe to run twice. Ray itself restarts
nothing here, since it would wait without end for cores that others hold; here every wait for a worker to come up ends.

`Workers.map` runs jobs to their end; `cluster.flow` runs the jobs of several kinds of workers side by side, by what
they are made of: `add`, `refs` and `handle`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.errors import KeptWaiting, WorkerLost, last_words
from cluster.resources import Resources
from cluster.session import redirect_output, told, what_is_free
from cluster.timing import OnWork, Timed, timed, unnoted

Job = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A job, its number, and how many workers have died under it."""

    number: int
    job: Job
    deaths: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job returned; `number` is what `add` gave for it."""

    number: int
    value: Any


class Workers(ABC):
    """Whoever runs jobs: each job is added, given out when there is room, and handled when Ray has news of it."""

    def __init__(self, *, start_timeout_s: float, on_work: OnWork) -> None:
        self.start_timeout_s = start_timeout_s
        self._on_work = on_work
        self._num_jobs = 0

    def map(self, jobs: Sequence[Job]) -> Iterator[Any]:
        """Results as jobs end, in no particular order.

        Raises:
            WorkerLost: if a worker died once too often.
            KeptWaiting: if no worker came up in time.
            Exception: what a job, or making a worker, raised, as it was.
        """
        for job in jobs:
            self.add(job)
        left = len(jobs)
        try:
            while left:
                _, ref = first_news([self])
                if (outcome := self.handle(ref)) is not None:
                    left -= 1
                    yield outcome.value
        finally:
            self.forget()

    def add(self, job: Job) -> int:
        """Take a job, to be begun as soon as a worker is free; its number."""
        self._num_jobs += 1
        self._begin(_Attempt(self._num_jobs, job))
        return self._num_jobs

    @abstractmethod
    def _begin(self, attempt: _Attempt) -> None: ...

    def _noted(self, job: Job, done: Timed) -> Any:
        """What a job returned, once its times have been noted."""
        self._on_work(job, done)
        return done.value

    @property
    @abstractmethod
    def refs(self) -> list[Any]:
        """What to wait for, where anything is under way."""

    @property
    @abstractmethod
    def is_working(self) -> bool:
        """Whether a job has been begun."""

    @abstractmethod
    def handle(self, ref: Any) -> Outcome | None:
        """Take note of one of `refs` that is done; a job's outcome, if it was a job that ended."""

    @abstractmethod
    def forget(self) -> None:
        """Let go of all jobs that have not ended: what they still return goes nowhere."""

    @abstractmethod
    def kept_waiting(self) -> KeptWaiting:
        """The refusal to wait any longer for a worker to come up."""


def first_news(workers: Sequence[Workers]) -> tuple[Workers, Any]:
    """Wait until Ray has news of some workers, of whom one at least has something under way: whose, and what to handle.

    Raises:
        KeptWaiting: if none works, and none came up in time.
    """
    news = news_within(workers, None)
    assert news is not None, "waited without end, and for nothing"
    return news


def news_within(workers: Sequence[Workers], timeout_s: float | None) -> tuple[Workers, Any] | None:
    """As `first_news`, but None if there is none within a time."""
    owners = {ref: each for each in workers for ref in each.refs}
    if not owners:
        return None
    waiting = list(owners.values())
    patience_s = None if any(each.is_working for each in waiting) else min(each.start_timeout_s for each in waiting)
    limits = [limit for limit in (timeout_s, patience_s) if limit is not None]
    done, _ = ray.wait(list(owners), num_returns=1, timeout=min(limits, default=None))
    if done:
        return owners[done[0]], done[0]
    if patience_s is not None and (timeout_s is None or patience_s <= timeout_s):
        raise waiting[0].kept_waiting()
    return None


class Pool(Workers):
    """Actors that each build one state (an engine, a reward model) and run jobs on it.

    Args:
        build: makes the state, in the actor.
        name: of the actors' log files, ``NAME-0.log`` and on.
        size: how many actors.
        resources: what each asks Ray for.
        log_dir: where their output goes.
        max_restarts: how often each may be started again, and how many deaths a job may cause.
        start_timeout_s: how long to wait for an actor to come up while none works.
        on_work: told of every job that has ended.
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
        on_work: OnWork = unnoted,
    ) -> None:
        super().__init__(start_timeout_s=start_timeout_s, on_work=on_work)
        self._name, self._build, self._resources = name, build, resources
        self._max_restarts = max_restarts
        self._logs = [log_dir / f"{name}-{index}.log" for index in range(size)]
        self._deaths = [0] * size
        self._actors: list[Any] = [None] * size
        self._idle: list[int] = []
        self._starting: dict[Any, int] = {}
        self._waiting: deque[_Attempt] = deque()
        self._running: dict[Any, tuple[int, _Attempt]] = {}
        for index in range(size):
            self._start(index)

    def wait_until_up(self) -> None:
        """Wait until every actor has come up, and holds what it asked for.

        Raises:
            WorkerLost: if one died once too often.
            KeptWaiting: if none came up in time.
        """
        while self._starting:
            self.handle(first_news([self])[1])

    def each(self, job: Job, *, built_only: bool = False) -> list[Any]:
        """What a job returns on every actor that is up; no other job may be under way.

        An actor that dies under it is started again, and gives nothing.

        Args:
            built_only: an actor that has not built its state yet gives None, and builds none.

        Raises:
            WorkerLost: if an actor died once too often.
            Exception: what the job raised, as it was.
        """
        assert not self._running and not self._waiting, "other jobs are under way"
        values, asked = [], [(index, self._actors[index].run.remote(job, built_only)) for index in self._idle]
        for index, ref in asked:
            try:
                done = _result(ref, self._logs[index])
                values.append(None if done is None else self._noted(job, done))
            except WorkerLost as lost:
                self._idle.remove(index)
                self._restart(index, lost)
        return values

    @property
    def refs(self) -> list[Any]:
        return [*self._running, *self._starting]

    @property
    def is_working(self) -> bool:
        return bool(self._running)

    def handle(self, ref: Any) -> Outcome | None:
        """See `Workers.handle`; each actor has one job at a time."""
        if ref in self._starting:
            self._arrived(ref)
            return None
        index, attempt = self._running.pop(ref)
        try:
            value = _result(ref, self._logs[index])
        except WorkerLost as lost:
            self._waiting.appendleft(_again(attempt, lost, self._max_restarts))
            self._restart(index, lost)
            return None
        except BaseException:
            self._idle.append(index)
            raise
        self._idle.append(index)
        self._give_out()
        return Outcome(attempt.number, self._noted(attempt.job, value))

    def forget(self) -> None:
        self._waiting.clear()
        self._idle += [index for index, _ in self._running.values()]
        self._running.clear()

    def kept_waiting(self) -> KeptWaiting:
        return _kept_waiting(self._name, self._resources, self.start_timeout_s)

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._idle, self._starting = [], [], {}
        self.forget()

    def _begin(self, attempt: _Attempt) -> None:
        self._waiting.append(attempt)
        self._give_out()

    def _give_out(self) -> None:
        while self._waiting and self._idle:
            index, attempt = self._idle.pop(0), self._waiting.popleft()
            self._running[self._actors[index].run.remote(attempt.job)] = index, attempt

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
            self._give_out()

    def _restart(self, index: int, lost: WorkerLost) -> None:
        self._deaths[index] += 1
        if self._deaths[index] > self._max_restarts:
            raise lost
        self._start(index)


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
        self._starting: dict[Any, _Attempt] = {}
        self._running: dict[Any, _Attempt] = {}
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
            value = _result(next(ref), self._log)
        except WorkerLost as lost:
            self._begin(_again(attempt, lost, self._max_retries))
            return None
        if value == _STARTED:
            self._running[ref] = attempt
            return None
        return Outcome(attempt.number, self._noted(attempt.job, value))

    def forget(self) -> None:
        self._starting.clear()
        self._running.clear()

    def kept_waiting(self) -> KeptWaiting:
        return _kept_waiting("task", self._resources, self.start_timeout_s)

    def _begin(self, attempt: _Attempt) -> None:
        self._starting[self._task.remote(attempt.job, self._log)] = attempt

    def run(self, job: Job) -> Any:
        """One job's result."""
        return next(self.map([job]))


_STARTED = "started"


class _Actor:
    def __init__(self, build: Callable[[], Any], log: Path) -> None:
        redirect_output(log)
        self._build = build
        self._state: Any = None

    def run(self, job: Job, built_only: bool = False) -> Timed | None:
        # Built at the first job, not in __init__: what it raises then comes back as it is.
        if self._state is None and built_only:
            return None
        if self._state is None:
            self._state = self._build()
        return timed(job, self._state)


def _run_job(job: Job, log: Path) -> Iterator[Any]:
    redirect_output(log)
    yield _STARTED
    yield timed(job, None)


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

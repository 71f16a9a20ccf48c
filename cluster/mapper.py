"""Batch work by whoever runs jobs: long-lived actors (`cluster.pool`) or stateless tasks (`cluster.tasks`).

A job is a picklable callable; what it returns comes back to the driver, so it returns counts and names, never rows. A
dead worker is started again and its job given out once more: jobs must be safe to run twice. A worker that gives no
answer in time counts as dead. Ray itself restarts nothing here, since it would wait without end for cores that others
hold; here every wait ends.

`Workers.map` runs jobs to their end; `cluster.flow` runs the jobs of several kinds of workers side by side, by what
they are made of: `add`, `refs` and `handle`.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from cluster.errors import KeptWaiting, WorkerLost, last_words
from cluster.resources import Resources
from cluster.session import told, what_is_free
from cluster.timing import OnWork, Timed, unnoted

Job = Callable[[Any], Any]


@runtime_checkable
class Searching(Protocol):
    """A job that can look for what in its input kills its workers."""

    def searching(self, lost: WorkerLost, deaths: int) -> Job | None:
        """The job to give out once it has cost as many workers as it may, or more.

        It looks for the culprit, or goes without the one that it has just found; None: it found none.

        Args:
            lost: the last of them.
            deaths: how many it has cost.
        """
        ...


@dataclass(frozen=True, slots=True)
class GoOn:
    """What a job that is not done returns to a pool: it is given out again, with all the time that a job has."""

    job: Job


@dataclass(frozen=True, slots=True)
class Patience:
    """How much is put up with.

    Attributes:
        max_restarts: how often a worker may be started again in a row, and how many deaths a job may cause.
        start_timeout_s: how long to wait for a worker to come up while none works.
        job_timeout_s: how long a job may take before its worker counts as hung.
    """

    max_restarts: int
    start_timeout_s: float
    job_timeout_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who is told of what happens.

    Attributes:
        on_work: of every job that has ended.
        on_start: of every worker that has done its first job: its name, the seconds from asking for it until it had
            built its state, and those of the job.
        on_death: of every worker that has died and is replaced.
    """

    on_work: OnWork = unnoted
    on_start: Callable[[str, float, float], object] = lambda _name, _start_s, _job_s: None
    on_death: Callable[[WorkerLost], object] = lambda _: None


@dataclass(frozen=True, slots=True)
class Attempt:
    """A job, its number, and how many workers have died under it."""

    number: int
    job: Job
    deaths: int = 0

    def again(self, lost: WorkerLost, most: int) -> Attempt:
        """The next attempt, after another death.

        Raises:
            WorkerLost: if there have been more than `most`, and the job finds no culprit.
        """
        deaths = self.deaths + 1
        searching = self.job.searching(lost, deaths) if deaths >= most > 0 and isinstance(self.job, Searching) else None
        if searching is None and deaths > most:
            raise lost
        return Attempt(self.number, searching or self.job, deaths)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job returned; `number` is what `add` gave for it."""

    number: int
    value: Any


class Workers(ABC):
    """Whoever runs jobs: each job is added, given out when there is room, and handled when Ray has news of it."""

    def __init__(self, patience: Patience, watcher: Watcher) -> None:
        self.patience, self._watcher = patience, watcher
        self._num_jobs = 0
        self.idle_since: float | None = None  # since when nobody works, and some are coming up

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
        self._begin(Attempt(self._num_jobs, job))
        return self._num_jobs

    @abstractmethod
    def _begin(self, attempt: Attempt) -> None: ...

    def _noted(self, job: Job, done: Timed, *, by: Path) -> Any:
        """What a job returned, once its times have been noted; `by`: the log of who did it."""
        self._watcher.on_work(job, replace(done, worker=by.stem))
        return done.value

    def _hung(self, name: str, log: Path) -> WorkerLost:
        return WorkerLost(
            name, log, f"it gave no answer within {self.patience.job_timeout_s:g} s (cluster.job_timeout_s)"
        )

    @property
    @abstractmethod
    def refs(self) -> list[Any]:
        """What to wait for, where anything is under way."""

    @property
    @abstractmethod
    def due(self) -> float | None:
        """When the first of the jobs that were begun has to be done, by the monotonic clock; None: none was begun."""

    @abstractmethod
    def end_late(self) -> None:
        """End the workers whose job is overdue: Ray then has news of them."""

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
    waiting, began = list(dict.fromkeys(owners.values())), time.monotonic()
    ends = began + (math.inf if timeout_s is None else timeout_s)
    while True:
        dues = [each.due for each in waiting if each.due is not None]
        for each in waiting:
            each.idle_since = None if dues else each.idle_since or time.monotonic()
        comes_up = min((each.idle_since or math.inf) + each.patience.start_timeout_s for each in waiting)
        until = min(ends, comes_up, *dues)
        left_s = None if math.isinf(until) else max(0.0, until - time.monotonic())
        done, _ = ray.wait(list(owners), num_returns=1, timeout=left_s)
        if done:
            for each in waiting:
                each.idle_since = None
            return owners[done[0]], done[0]
        for each in waiting:
            each.end_late()
        now = time.monotonic()
        if comes_up <= min(now, ends):
            raise waiting[0].kept_waiting()
        if ends <= now:
            return None


def waited_for(name: str, resources: Resources, waited_s: float) -> KeptWaiting:
    """The refusal to wait any longer for a worker that asks for so much."""
    return KeptWaiting(name, told(resources.cpus, resources.gpus), waited_s, what_is_free())


def result_of(ref: Any, log: Path, *, within_s: float | None = None) -> Any:
    """What Ray has for a reference.

    Raises:
        WorkerLost: if its worker died.
        GetTimeoutError: if there is nothing within a time.
        Exception: what the job raised, as it was.
    """
    try:
        return ray.get(ref, timeout=within_s)
    except RayTaskError as error:
        raise error.cause from error
    except GetTimeoutError:
        raise
    except RayError as error:
        raise WorkerLost(log.stem, log, first_line(error) or last_words(log)) from error


def first_line(error: Exception) -> str:
    """Of what an error says, which may be nothing."""
    return next(iter(str(error).splitlines()), "")

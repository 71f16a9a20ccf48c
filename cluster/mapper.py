"""Batch work by whoever runs jobs: long-lived actors (`cluster.pool`) or stateless tasks (`cluster.tasks`).

A job is a picklable callable; what it returns comes back to the driver, so it returns counts and names, never rows. A
dead worker is started again and its job given out once more: jobs must be safe to run twice. Ray itself restarts
nothing here, since it would wait without end for cores that others hold; here every wait for a worker to come up ends.

`Workers.map` runs jobs to their end; `cluster.flow` runs the jobs of several kinds of workers side by side, by what
they are made of: `add`, `refs` and `handle`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.errors import KeptWaiting, WorkerLost, last_words
from cluster.resources import Resources
from cluster.session import told, what_is_free
from cluster.timing import OnWork, Timed

Job = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Attempt:
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
        self._begin(Attempt(self._num_jobs, job))
        return self._num_jobs

    @abstractmethod
    def _begin(self, attempt: Attempt) -> None: ...

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


def again(attempt: Attempt, lost: WorkerLost, most: int) -> Attempt:
    if attempt.deaths == most:
        raise lost
    return replace(attempt, deaths=attempt.deaths + 1)


def waited_for(name: str, resources: Resources, waited_s: float) -> KeptWaiting:
    return KeptWaiting(name, told(resources.cpus, resources.gpus), waited_s, what_is_free())


def result_of(ref: Any, log: Path) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        reason = str(error).splitlines()[0] or last_words(log)
        raise WorkerLost(log.stem, log, reason) from error

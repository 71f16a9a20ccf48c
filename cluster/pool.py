"""Long-lived actors that each hold one state, an engine or a reward model, and run jobs on it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from cluster.errors import KeptWaiting, WorkerLost
from cluster.mapper import Attempt, GoOn, Job, Outcome, Patience, Watcher, Workers, first_news, result_of, waited_for
from cluster.resources import Resources
from cluster.session import redirect_output
from cluster.timing import Timed, timed


@dataclass(slots=True)
class _Given:
    """A job that an actor has: which one, and until when; infinite once it was ended for being late."""

    index: int
    attempt: Attempt
    due: float
    was_late: bool = False


class Pool(Workers):
    """Actors that each build one state (an engine, a reward model) and run jobs on it.

    Args:
        build: makes the state, in the actor.
        name: of the actors' log files, ``NAME-0.log`` and on.
        size: how many actors.
        most: how many there may be while jobs wait; None: as many as `size`. Those above it end when none waits.
        resources: what each asks Ray for.
        log_dir: where their output goes.
        leaving: the nodes that will be taken away soon, by their ids: an idle actor there is started again elsewhere.
    """

    def __init__(
        self,
        build: Callable[[], Any],
        *,
        name: str,
        size: int,
        most: int | None = None,
        resources: Resources,
        log_dir: Path,
        patience: Patience,
        watcher: Watcher | None = None,
        leaving: Callable[[], Collection[str]] = tuple,
    ) -> None:
        super().__init__(patience, watcher or Watcher())
        self._name, self._build, self._resources = name, build, resources
        self._fewest, self.size, self._leaving = size, max(size, most or size), leaving
        self._logs = [log_dir / f"{name}-{index}.log" for index in range(self.size)]
        self._deaths = [0] * self.size  # of an actor, since it came up last
        self._asked_at, self._start_s = [0.0] * self.size, [0.0] * self.size
        self._actors: list[Any] = [None] * self.size  # None: it is not wanted now
        self._nodes = [""] * self.size  # where each came up
        self._idle: deque[int] = deque()
        self._starting: dict[Any, int] = {}
        self._waiting: deque[Attempt] = deque()
        self._running: dict[Any, _Given] = {}
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
        within_s = None if math.isinf(self.patience.job_timeout_s) else self.patience.job_timeout_s
        for index, ref in asked:
            try:
                done = result_of(ref, self._logs[index], within_s=within_s)
                values.append(None if done is None else self._noted_on(index, job, done))
            except GetTimeoutError:
                self._idle.remove(index)
                self._restart(index, self._hung(self._logs[index].stem, self._logs[index]))
            except WorkerLost as lost:
                self._idle.remove(index)
                self._restart(index, lost)
        return values

    @property
    def refs(self) -> list[Any]:
        return [*self._running, *self._starting]

    @property
    def due(self) -> float | None:
        return min((given.due for given in self._running.values()), default=None)

    def end_late(self) -> None:
        now = time.monotonic()
        for given in self._running.values():
            if given.due <= now:
                given.due, given.was_late = math.inf, True
                ray.kill(self._actors[given.index])

    def handle(self, ref: Any) -> Outcome | None:
        """See `Workers.handle`; each actor has one job at a time."""
        if ref in self._starting:
            self._arrived(ref)
            return None
        given = self._running.pop(ref)
        index, attempt = given.index, given.attempt
        try:
            value = result_of(ref, self._logs[index])
        except WorkerLost as died:
            lost = self._hung(died.name, died.log) if given.was_late else died
            self._waiting.appendleft(attempt.again(lost, self.patience.max_restarts))
            self._restart(index, lost)
            return None
        except BaseException:
            self._idle.append(index)
            raise
        self._idle.append(index)
        if isinstance(value.value, GoOn):
            self._waiting.appendleft(replace(attempt, job=value.value.job))
            self._give_out()
            return None
        self._give_out()
        return Outcome(attempt.number, self._noted_on(index, attempt.job, value))

    def forget(self) -> None:
        super().forget()
        self._waiting.clear()
        self._idle += [given.index for given in self._running.values()]
        self._running.clear()

    def kept_waiting(self) -> KeptWaiting:
        return waited_for(self._name, self._resources, self.patience.start_timeout_s)

    def close(self) -> None:
        """End the actors."""
        for actor in filter(None, self._actors):
            ray.kill(actor)
        self.forget()
        self._actors, self._idle, self._starting = [], deque(), {}

    def _begin(self, attempt: Attempt) -> None:
        self._waiting.append(attempt)
        self._give_out()

    def _give_out(self) -> None:
        """Have idle actors begin jobs, and as many actors there as the jobs that wait are worth."""
        if leaving := self._leaving():
            for index in [index for index in self._idle if self._nodes[index] in leaving]:
                self._end(index)
                self._start(index)
        while self._waiting and self._idle:
            index, attempt = self._idle.popleft(), self._waiting.popleft()
            due = time.monotonic() + self.patience.job_timeout_s
            self._running[self._actors[index].run.remote(attempt.job)] = _Given(index, attempt, due)

        extra = range(self._fewest, len(self._actors))
        if not self._waiting:
            for index in [index for index in extra if self._actors[index] and not self._works(index)]:
                self._end(index)
        for index in extra:
            if len(self._starting) < len(self._waiting) and self._actors[index] is None:
                self._start(index)

    def _works(self, index: int) -> bool:
        return any(given.index == index for given in self._running.values())

    def _end(self, index: int) -> None:
        """End an actor that has no job; whether it has come up or not."""
        ray.kill(self._actors[index])
        self._actors[index] = None
        self._idle = deque(other for other in self._idle if other != index)
        for ref in [ref for ref, other in self._starting.items() if other == index]:
            del self._starting[ref]
            if ref in self.news:  # it has come up, and nobody was told yet
                self.news.remove(ref)

    def _start(self, index: int) -> None:
        # Started again here, not by Ray, which would wait without end for cores that others took meanwhile.
        once = {"max_restarts": 0, "max_task_retries": 0}
        actor = ray.remote(_Actor).options(num_cpus=self._resources.cpus, num_gpus=self._resources.gpus, **once)
        self._asked_at[index] = time.monotonic()
        self._actors[index] = actor.remote(self._build, self._logs[index])
        self._starting[self._actors[index].node.remote()] = index

    def _arrived(self, ref: Any) -> None:
        """An actor has come up, or died on the way."""
        index = self._starting.pop(ref)
        try:
            self._nodes[index] = result_of(ref, self._logs[index])
        except WorkerLost as lost:
            self._restart(index, lost)
        else:
            self._deaths[index] = 0
            self._start_s[index] = time.monotonic() - self._asked_at[index]
            self._idle.append(index)
            self._give_out()

    def _noted_on(self, index: int, job: Job, done: Timed) -> Any:
        if done.build_s is not None:
            start_s = self._start_s[index] + done.build_s
            self._watcher.on_start(self._logs[index].stem, start_s, done.ended - done.began)
        return self._noted(job, done, by=self._logs[index])

    def _restart(self, index: int, lost: WorkerLost) -> None:
        """Start an actor again; deaths under a job count for the job, those on the way up for the actor."""
        self._deaths[index] += 1
        if self._deaths[index] > self.patience.max_restarts:
            raise lost
        self._watcher.on_death(lost)
        self._end(index)  # it may only have hung
        if index < self._fewest or self._waiting:
            self._start(index)


class _Actor:
    def __init__(self, build: Callable[[], Any], log: Path) -> None:
        redirect_output(log)
        self._build = build
        self._state: Any = None

    def node(self) -> str:
        """The id of the node that it came up on."""
        return str(ray.get_runtime_context().get_node_id())

    def run(self, job: Job, built_only: bool = False) -> Timed | None:
        # Built at the first job, not in __init__: what it raises then comes back as it is.
        if self._state is None and built_only:
            return None
        began, builds = time.monotonic(), self._state is None
        if builds:
            self._state = self._build()
        return timed(job, self._state, build_s=time.monotonic() - began if builds else None)

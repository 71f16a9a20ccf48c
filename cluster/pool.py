"""Long-lived actors that each hold one state, an engine or a reward model, and run jobs on it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from cluster.errors import KeptWaiting, WorkerLost
from cluster.mapper import Attempt, Job, Outcome, Workers, again, first_news, result_of, waited_for
from cluster.resources import Resources
from cluster.session import redirect_output
from cluster.timing import OnWork, Timed, timed, unnoted


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
        self._waiting: deque[Attempt] = deque()
        self._running: dict[Any, tuple[int, Attempt]] = {}
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
                done = result_of(ref, self._logs[index])
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
            value = result_of(ref, self._logs[index])
        except WorkerLost as lost:
            self._waiting.appendleft(again(attempt, lost, self._max_restarts))
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
        return waited_for(self._name, self._resources, self.start_timeout_s)

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._idle, self._starting = [], [], {}
        self.forget()

    def _begin(self, attempt: Attempt) -> None:
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
            result_of(ref, self._logs[index])
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

"""Several steps over the same shards, side by side: a shard goes on to the next step as soon as one is done with it.

What lies between two steps is bounded: a step is given no further shard while too many of its results wait for the next
one. A single loop in the driver waits for all workers at once, so that no thread of it can outlive Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.mapper import Job, Workers, news_within

MOST_AHEAD = 16  # shards; each is at most some MB on disk, so that the bound is on work that an error would waste


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a flow.

    Attributes:
        workers: gives whoever runs its jobs; called when the first shard is there.
        jobs: by the shard that each does, in the order in which they are given out.
    """

    workers: Callable[[], Workers]
    jobs: Mapping[int, Job]


@dataclass(frozen=True, slots=True)
class Finished:
    """A shard that a step is done with."""

    step: int
    shard: int


class StepFailed(Exception):
    """A worker raised something at a step."""

    def __init__(self, step: int, error: Exception) -> None:
        super().__init__(step, error)
        self.step, self.error = step, error


class Flow:
    """Steps over shards, under way.

    Args:
        steps: each takes what the one before it made of a shard; a shard for which that one has no job is there
            already.
        most_ahead: shards that a step may have been given and that the next one has still to do; None: a step begins
            once the one before it is done with all.
    """

    def __init__(self, steps: Sequence[Step], *, most_ahead: int | None) -> None:
        self._steps, self._most_ahead = steps, most_ahead
        self._workers: dict[int, Workers] = {}
        self._left = [list(step.jobs) for step in steps]
        self._under_way: dict[tuple[Workers, int], Finished] = {}
        self._done: set[Finished] = set()

    @property
    def is_done(self) -> bool:
        return not any(self._left) and not self._under_way

    def pump(self, *, timeout_s: float | None = None) -> Finished | None:
        """Give out what can be given, wait for news, at most so long, and tell if a shard was done.

        Raises:
            StepFailed: with what a worker raised.
            KeptWaiting: if no worker works, and none came up in time.
        """
        self._give_out()
        news = news_within(list(self._workers.values()), timeout_s)
        if news is None:
            return None
        workers, ref = news
        try:
            outcome = workers.handle(ref)
        except Exception as error:
            place = next(place for place, mine in self._workers.items() if mine is workers)
            raise StepFailed(place, error) from error
        if outcome is None:
            return None
        finished = self._under_way.pop((workers, outcome.number))
        self._done.add(finished)
        return finished

    def stop(self) -> None:
        """Let go of what is under way."""
        for workers in self._workers.values():
            workers.forget()
        self._under_way.clear()

    def _give_out(self) -> None:
        for place, step in enumerate(self._steps):
            for shard in list(self._left[place]):
                if self._most_ahead is not None and self._ahead(place) >= self._most_ahead:
                    break
                if not self._is_there(place, shard):
                    continue
                if place not in self._workers:
                    self._workers[place] = step.workers()
                workers = self._workers[place]
                self._under_way[workers, workers.add(step.jobs[shard])] = Finished(place, shard)
                self._left[place].remove(shard)

    def _is_there(self, place: int, shard: int) -> bool:
        """Whether what a step takes of a shard has been made."""
        if place == 0:
            return True
        made = self._steps[place - 1].jobs
        awaited = made if self._most_ahead is None else {shard} & made.keys()
        return all(Finished(place - 1, found) in self._done for found in awaited)

    def _ahead(self, place: int) -> int:
        """Shards that a step was given and that the next one has still to do."""
        if place + 1 == len(self._steps):
            return 0
        given = set(self._steps[place].jobs) - set(self._left[place])
        return sum(
            shard in self._steps[place + 1].jobs and Finished(place + 1, shard) not in self._done for shard in given
        )

"""Several steps over the same shards, side by side: a shard goes on to the next step as soon as one is done with it.

What lies between two steps is bounded: a step is given no further shard while too many of its results wait for the next
one. A single loop in the driver waits for all workers at once, so that no thread of it can outlive Ray. What the loop
does for a shard depends neither on how many shards there are nor on how many workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from cluster.mapper import Job, Workers, news_within

MOST_AHEAD = 16
"""Shards, or as many as a step has workers where those are more; each is at most some MB on disk, so that the bound is
on work that an error would waste."""


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
        most_ahead: shards that may wait between a step's workers and the end of the next step; never fewer than that
            step has workers. None: a step begins once the one before it is done with all.
    """

    def __init__(self, steps: Sequence[Step], *, most_ahead: int | None) -> None:
        self._steps, self._most_ahead = steps, most_ahead
        self._workers: dict[int, Workers] = {}
        self._under_way: dict[tuple[Workers, int], Finished] = {}
        self._order = [{shard: place for place, shard in enumerate(step.jobs)} for step in steps]
        self._there = [self._at_first(place) for place in range(len(steps))]  # by order: what can be given
        self._left = [len(step.jobs) for step in steps]  # not done
        self._ahead = [0] * len(steps)  # given to a step, and not done by the next one

    @property
    def is_done(self) -> bool:
        return not any(self._left)

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
        self._pass_on(finished)
        return finished

    def stop(self) -> None:
        """Let go of what is under way."""
        for workers in self._workers.values():
            workers.forget()
        self._under_way.clear()

    def _at_first(self, place: int) -> list[tuple[int, int]]:
        """What a step can be given before anything is done: all that the one before it has no job for."""
        before = self._steps[place - 1].jobs if place else {}
        waits_for_all = self._most_ahead is None and before
        return [(order, s) for s, order in self._order[place].items() if not waits_for_all and s not in before]

    def _pass_on(self, finished: Finished) -> None:
        """Take note of what a step has done: the next one can be given it, the one before is less far ahead."""
        place, shard = finished.step, finished.shard
        self._left[place] -= 1
        if place and shard in self._order[place - 1]:
            self._ahead[place - 1] -= 1
        if place + 1 == len(self._steps):
            return
        following, order = self._there[place + 1], self._order[place + 1]
        if self._most_ahead is not None:
            if shard in order:
                heappush(following, (order[shard], shard))
        elif not self._left[place]:
            following += [(number, shard) for shard, number in order.items()]
            heapify(following)

    def _give_out(self) -> None:
        for place, step in enumerate(self._steps):
            there = self._there[place]
            while there and self._has_room(place):
                shard = heappop(there)[1]
                if place not in self._workers:
                    self._workers[place] = step.workers()
                workers = self._workers[place]
                self._under_way[workers, workers.add(step.jobs[shard])] = Finished(place, shard)
                if place + 1 < len(self._steps) and shard in self._order[place + 1]:
                    self._ahead[place] += 1

    def _has_room(self, place: int) -> bool:
        """Whether a step may be given another shard: its workers are never idle while few results wait."""
        if self._most_ahead is None or place + 1 == len(self._steps):
            return True
        workers = self._workers[place].size if place in self._workers else 0
        return self._ahead[place] < workers + max(self._most_ahead, workers)

"""The mailbox of a training group: jobs in, outcomes out; asynchronous, so that waiting ranks cost nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cluster.timing import Timed

GroupJob = Callable[[Any, Callable[[Any], None]], Any]

_LONG_POLL_S = 5.0


@dataclass(frozen=True, slots=True)
class News:
    """What has become of a job.

    Attributes:
        reports: since the last look.
        outcome: what it returned, or a refusal; None as long as it goes on.
        silent_s: seconds since the group's last sign of life: a report, that it took a job, or came up to take one;
            None: no job is open, or no group is there.
        num_groups: how often a group has come up.
        built_at: when one has built its state since the last look, in seconds since 1970.
    """

    reports: list[Any]
    outcome: Timed | Exception | None
    silent_s: float | None
    num_groups: int
    built_at: float | None


class Mailbox:
    """A small actor between the driver and the ranks."""

    def __init__(self) -> None:
        self._jobs: list[GroupJob] = []
        self._outcomes: dict[int, Timed | Exception] = {}
        self._reports: list[tuple[int, Any]] = []
        self._ranks: dict[int, Any] = {}
        self._num_groups = 0
        self._built_at: float | None = None
        self._alive_at: float | None = None
        self._closed = False
        self._changed = asyncio.Event()

    # ---- the driver's side ------------------------------------------------------------------------------------------

    async def put(self, job: GroupJob) -> None:
        self._jobs.append(job)
        if self._ranks:
            self._alive_at = time.monotonic()
        self._wake()

    async def close(self) -> None:
        self._closed = True
        self._wake()

    async def look(self, number: int, at_most_s: float) -> News:
        """News of a job as soon as it has an outcome, or after a while; late reports of others are dropped."""
        await self._until(lambda: number in self._outcomes, at_most_s)
        reports = [value for of, value in self._reports if of == number]
        silent_s = None if self._alive_at is None else time.monotonic() - self._alive_at
        news = News(reports, self._outcomes.get(number), silent_s, self._num_groups, self._built_at)
        self._reports, self._built_at = [], None
        return news

    async def ranks(self) -> list[Any]:
        """The actors of the group that came up last, of which no sign of life is awaited any more."""
        self._alive_at = None
        found = list(self._ranks.values())
        self._ranks = {}
        return found

    # ---- the ranks' side --------------------------------------------------------------------------------------------

    async def enter(self, rank: int, actor: Any) -> None:
        """A rank is there, to take the open job, if one is."""
        self._ranks[rank] = actor
        if len(self._jobs) > len(self._outcomes):
            self._alive_at = time.monotonic()

    async def built(self, at: float) -> None:
        """Rank 0 has built its state."""
        self._built_at = at

    async def first_open(self) -> int:
        """The first job that nobody has acknowledged; rank 0 of a new group asks."""
        self._num_groups += 1
        return len(self._outcomes)

    async def take(self, number: int, rank: int) -> Any:
        """Job `number` in a list, ``"closed"``, or None after a while without either."""
        await self._until(lambda: number < len(self._jobs) or self._closed, _LONG_POLL_S)
        if number < len(self._jobs):
            if rank == 0:
                self._alive_at = time.monotonic()
            return [self._jobs[number]]
        return "closed" if self._closed else None

    async def report(self, number: int, value: Any) -> None:
        self._alive_at = time.monotonic()
        self._reports.append((number, value))

    async def acknowledge(self, number: int, outcome: Timed | Exception) -> None:
        self._alive_at = None
        self._outcomes.setdefault(number, outcome)
        self._wake()

    # ---- both -------------------------------------------------------------------------------------------------------

    async def _until(self, holds: Callable[[], bool], at_most_s: float) -> None:
        """Wait for a change that makes something hold, for a while."""
        deadline = time.monotonic() + at_most_s
        while not holds() and (left := deadline - time.monotonic()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

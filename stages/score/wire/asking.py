"""Answers in, numbers or reasons out: what is known is taken from the cache, the rest asked for in batches, at once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from stages.protocols import NoReward, Turn
from stages.score.wire.cache import Cache
from stages.score.wire.client import Client, Refused
from stages.score.wire.config import WireSettings
from stages.vocab import RewardRole

Settings = TypeVar("Settings", bound=WireSettings)
Question = dict[str, Any]
"""What is asked about one answer, as plain JSON values; the cache knows it by its hash."""


class Asker(ABC, Generic[Settings]):
    """`stages.protocols.Reward` by a server.

    Args:
        config: the reward's settings.
        name: of the reward.
        cache: the folder in which answers are kept.
    """

    def __init__(self, config: Settings, *, name: str, cache: Path) -> None:
        self.config, self.name, self._cache_folder = config, name, cache

    name: str

    @property
    def role(self) -> RewardRole:
        return self.config.role

    @property
    def weight(self) -> float:
        return self.config.weight

    @property
    def sees(self) -> Literal["turns", "texts"]:
        return "turns"

    @property
    @abstractmethod
    def url(self) -> str:
        """The address to post to."""

    @abstractmethod
    def question(self, prompt: Turn, completion: Turn, columns: Mapping[str, object]) -> Question:
        """What is asked about an answer."""

    @abstractmethod
    def key(self, question: Question) -> bytes:
        """A hash of all that decides the server's answer."""

    @abstractmethod
    def batches(self, questions: Sequence[Question]) -> list[list[int]]:
        """Which questions go together in a request, by their places."""

    @abstractmethod
    def body(self, questions: Sequence[Question]) -> dict[str, Any]:
        """The request for a batch."""

    @abstractmethod
    def replies(self, reply: Any, count: int) -> list[Any]:
        """What the reply says of each of so many answers, as it is kept.

        Raises:
            Refused: if it is no reply to so many.
        """

    @abstractmethod
    def value(self, reply: Any) -> float | NoReward:
        """The number in what a reply says of an answer."""

    def __call__(
        self, prompts: Sequence[Turn], completions: Sequence[Turn], columns: Mapping[str, Sequence[object]]
    ) -> list[float | NoReward]:
        """One number an answer, or why there is none.

        Raises:
            StageError: if the server is down.
        """
        rows = [{name: values[row] for name, values in columns.items()} for row in range(len(prompts))]
        questions = [self.question(*asked) for asked in zip(prompts, completions, rows, strict=True)]
        keys = [self.key(question) for question in questions]
        known = {key: self.value(reply) for key, reply in self._cache.found(list(dict.fromkeys(keys))).items()}
        unknown = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
        if unknown:
            known |= self._asked(unknown)
        return [known[key] for key in keys]

    def rest(self) -> None:
        """Nothing to let go of: no device is held."""

    @cached_property
    def _cache(self) -> Cache:
        return Cache(self._cache_folder)

    @cached_property
    def _client(self) -> Client:
        return Client(self.config, url=self.url, where=f"score: reward {self.name}")

    def _asked(self, unknown: Mapping[bytes, Question]) -> dict[bytes, float | NoReward]:
        keys, questions = list(unknown), list(unknown.values())
        client, out = self._client, dict[bytes, float | NoReward]()
        pool = ThreadPoolExecutor(self.config.concurrency)
        try:
            under_way = [
                pool.submit(self._ask, client, {keys[at]: questions[at] for at in batch})
                for batch in self.batches(questions)
            ]
            for batch in under_way:
                out |= batch.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error, nobody waits for what hangs
        return out

    def _ask(
        self, client: Client, batch: Mapping[bytes, Question], *, tries: int | None = None
    ) -> dict[bytes, float | NoReward]:
        """A batch's numbers, kept at once; where it fails as a whole, those that can be had one by one."""
        try:
            replies = client.ask(
                self.body(list(batch.values())), lambda reply: self.replies(reply, len(batch)), tries=tries
            )
        except Refused as refused:
            if len(batch) == 1:
                return dict.fromkeys(batch, NoReward(refused.reason))
            out: dict[bytes, float | NoReward] = {}
            for key, question in batch.items():
                out |= self._ask(client, {key: question}, tries=1)
            return out
        values = {key: self.value(reply) for key, reply in zip(batch, replies, strict=True)}
        self._cache.keep(
            {
                key: reply
                for key, reply in zip(batch, replies, strict=True)
                if not isinstance(values[key], NoReward)  # asked again the next time: it may have been an accident
            }
        )
        return values


def number(value: Any) -> float | NoReward:
    """A finite number out of a reply."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return NoReward(f"the server says {str(value)[:80]!r}, no number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    return found if math.isfinite(found) else NoReward(f"the server says {found}")

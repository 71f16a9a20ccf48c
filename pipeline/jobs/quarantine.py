"""Which prompts of a shard kill their workers: a search that survives the deaths it causes.

A shard whose workers died again and again is gone through prompt by prompt, nothing of it published. A journal beside
the shards' entries says which prompt is being tried; the one that was tried when the worker died is set aside, and the
search goes on after it. Then the shard is made as one batch without those: no bit of it depends on the search. A search
is parted into jobs of a few seconds, so that a prompt that hangs has nearly all the time of a job to itself.
"""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import WorkerLost
from cluster.mapper import GoOn
from pipeline.artifacts import StageFolder
from pipeline.entries import Entry
from pipeline.mirror import fetch, keep, remove
from stages.sample.stage import Dropped

MOST_SET_ASIDE = 4
"""Prompts of one shard. Where more of them kill their workers, the fault is not the prompts'."""

FEWEST_DEATHS = 3
"""Under a shard, before a prompt of it is set aside."""

_STRETCH_S = 5.0  # after which no further prompt is tried in the same job


@dataclass(frozen=True, slots=True)
class Search:
    """A search through one shard, as far as it has come.

    Attributes:
        journal: a line for each prompt that a trial began with, and one for each that it survived.
        set_aside: the prompts that were found, and why.
    """

    journal: Path
    set_aside: tuple[Dropped, ...] = ()

    @classmethod
    def begin(cls, out: StageFolder, shard: int) -> Search:
        """A new search; what an earlier call of the command may have left of one says nothing."""
        search = cls(out.path / "_shards" / f".search-{shard:05d}.jsonl")
        search.end()
        return search

    def after_death(self, lost: WorkerLost, deaths: int) -> Search | None:
        """The search to go on with after a worker died under it; None: nothing was being tried, or too many were found.

        Args:
            lost: the worker.
            deaths: how many workers the shard has cost.
        """
        began, survived = self._read()
        culprits = [prompt_id for prompt_id in began if prompt_id not in survived | self.names]
        if not culprits or len(self.set_aside) == MOST_SET_ASIDE:
            return None
        if deaths < FEWEST_DEATHS:
            return self
        reason = f"{deaths} workers died under its shard, {lost.name} at last on this prompt alone: {lost.reason}"
        found = Dropped(culprits[-1], "quarantined", reason)
        return replace(self, set_aside=(*self.set_aside, found))

    @property
    def names(self) -> frozenset[str]:
        """The ids of the prompts that are set aside."""
        return frozenset(drop.prompt_id for drop in self.set_aside)

    def go_on(self, prompt_ids: Sequence[str], attempt: Callable[[str], object]) -> bool:
        """Try prompts that were not tried yet, each alone, for a while; whether there were any."""
        _, survived = self._read()
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        left, until = (
            [found for found in prompt_ids if found not in survived | self.names],
            time.monotonic() + _STRETCH_S,
        )
        for prompt_id in left:
            self._note("begins", prompt_id)
            attempt(prompt_id)
            self._note("survived", prompt_id)
            if time.monotonic() > until:
                break
        return bool(left)

    def end(self) -> None:
        """Take the journal away, once the shard is published."""
        remove(self.journal)

    def _note(self, what: str, prompt_id: str) -> None:
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps({what: prompt_id}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        keep(self.journal)

    def _read(self) -> tuple[list[str], set[str]]:
        """The prompts that trials began with, in order, and those that were survived."""
        fetch(self.journal)
        text = self.journal.read_text(encoding="utf-8") if self.journal.exists() else ""
        found = [
            json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")
        ]  # none that is torn
        return [f["begins"] for f in found if "begins" in f], {f["survived"] for f in found if "survived" in f}


@dataclass(frozen=True, slots=True)
class SearchedShard(ABC):
    """A job on one shard of prompts that can look for those that kill its workers; see `cluster.mapper.Searching`."""

    shard: int
    prompts: StageFolder
    out: StageFolder
    search: Search | None = field(default=None, kw_only=True)

    @abstractmethod
    def __call__(self, state: Any) -> Entry | GoOn: ...

    def searching(self, lost: WorkerLost, deaths: int) -> Self | None:
        begun = self.search
        search = Search.begin(self.out, self.shard) if begun is None else begun.after_death(lost, deaths)
        return None if search is None else replace(self, search=search)

    def done(self) -> Entry | None:
        """The shard's entry, if a worker has published it that died before it told."""
        entry = self.out.entry_or_none(self.shard)
        if entry is not None and self.search is not None:
            self.search.end()
        return entry

    def searched(self, prompts: pa.Table, attempt: Callable[[pa.Table], object]) -> GoOn | None:
        """The job to go on with after a stretch of the search; None: there is nothing to search, or no more.

        Args:
            attempt: works on a table of prompts, and publishes nothing.
        """
        if self.search is None:
            return None
        ids = prompts["prompt_id"].to_pylist()
        tried = self.search.go_on(ids, lambda prompt_id: attempt(prompts.slice(ids.index(prompt_id), 1)))
        return GoOn(self) if tried else None

    @property
    def set_aside(self) -> tuple[Dropped, ...]:
        """The prompts to go without."""
        return self.search.set_aside if self.search is not None else ()

    def published(
        self,
        table: pa.Table,
        *,
        parents: Sequence[Entry],
        drops: Sequence[Dropped],
        stats: Mapping[str, float],
    ) -> Entry:
        """The shard's entry, its table published; see `StageFolder.publish`."""
        entry = self.out.publish(
            self.shard, table, parents=parents, drops=[asdict(drop) for drop in drops], stats=stats
        )
        if self.search is not None:
            self.search.end()
        return entry


def without_prompts(prompts: pa.Table, set_aside: Sequence[Dropped]) -> pa.Table:
    """A table of prompts without those."""
    names = pa.array([drop.prompt_id for drop in set_aside], pa.string())
    return prompts.filter(pc.invert(pc.is_in(prompts["prompt_id"], names))) if set_aside else prompts

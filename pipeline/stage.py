"""One way to run a stage: skip what is published, do what is missing, close the manifest, keep the time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.artifacts import Entry, StageFolder
from pipeline.console import Bar, Console, Stopwatch
from stages.errors import PrefloopError


class Mapper(Protocol):
    """What runs jobs: a pool of actors or stateless tasks."""

    def map(self, jobs: Sequence[Callable[..., Any]]) -> Iterable[Any]: ...


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage over shards.

    Attributes:
        name: in the progress bar.
        outputs: the folders it fills; the jobs return entries of the last one.
        fingerprint: what decides its result.
        num_shards: how many parts each output has.
        jobs: from missing shards to jobs.
        workers: starts, or gives, whoever runs them and may move the bar; not called when nothing is missing.
    """

    name: str
    outputs: Sequence[StageFolder]
    fingerprint: Mapping[str, Any]
    num_shards: int
    jobs: Callable[[list[int]], Sequence[Callable[..., Any]]]
    workers: Callable[[Bar], Mapper]


@dataclass(frozen=True, slots=True)
class Done:
    """A finished stage: the entries of its last output, the seconds that it took now, and whether it did anything."""

    entries: list[Entry]
    seconds: float
    made: int


def run_stage(stage: Stage, console: Console) -> Done:
    """Make every missing shard of a stage and close its manifests.

    What a job refuses leaves the stage refused: mended inputs or settings make it anew, equal ones go on.

    Raises:
        FingerprintError: if a folder holds a result made from something else.
        ContractError: if a published part is missing or cut.
        PrefloopError: what a job refuses.
    """
    for output in stage.outputs:
        output.begin(stage.fingerprint)
        output.refuse_damaged()
    watch = Stopwatch()
    missing = sorted({shard for output in stage.outputs for shard in output.missing(stage.num_shards)})
    if missing:
        with console.bar(f"{stage.name}: starting", total=len(missing)) as bar:
            try:
                for _ in stage.workers(bar).map(stage.jobs(missing)):
                    bar.say(stage.name)
                    bar.advance(1)
            except PrefloopError as error:
                for output in stage.outputs:
                    output.refuse(error.where)
                raise
    for output in stage.outputs:
        if not output.is_closed():
            output.close(stage.num_shards)
    return Done(stage.outputs[-1].entries(), watch.seconds, len(missing))


def by_group(start: Callable[[], Any], *, total: float | None) -> Callable[[Bar], Mapper]:
    """The training group in the place of a mapper: jobs one after another, each on all ranks.

    Args:
        start: gives the group, started now if need be.
        total: what its reports count up to.
    """
    return lambda bar: _OneByOne(start(), lambda done: bar.at(done, total))


class _OneByOne:
    def __init__(self, group: Any, on_report: Callable[[Any], None]) -> None:
        self._group, self._on_report = group, on_report

    def map(self, jobs: Sequence[Callable[..., Any]]) -> list[Any]:
        return [self._group.run(job, on_report=self._on_report) for job in jobs]

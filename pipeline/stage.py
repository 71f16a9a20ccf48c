"""How stages run: what is published is skipped, what is missing is done, manifests are closed, the time is kept.

Stages that follow one another run side by side, each shard going on as soon as it is published.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.flow import MOST_AHEAD, Flow, Step, StepFailed
from cluster.mapper import Workers
from pipeline.artifacts import Damages, StageFolder
from pipeline.console import Bar, Console, Stopwatch
from pipeline.entries import Entry
from stages.errors import PrefloopError
from stages.faults import fault_point


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
        jobs: from missing shards to jobs, one for each in a flow.
        workers: starts, or gives, whoever runs them; not called when nothing is missing.
        tell_damage: told of each published part that is not as it was published, and is made again.
        made_from: the tables of whose parts each of its parts is made.
        look: finds the published parts that are damaged.
    """

    name: str
    outputs: Sequence[StageFolder]
    fingerprint: Mapping[str, Any]
    num_shards: int
    jobs: Callable[[list[int]], Sequence[Callable[..., Any]]]
    workers: Callable[[Bar | None], Any]
    tell_damage: Callable[[str], object]
    made_from: Sequence[StageFolder] = ()
    look: Damages = StageFolder.damages

    def claim(self) -> None:
        """Claim the outputs: what is made from them may now be named by `StageFolder.claim`.

        Raises:
            FingerprintError: if a folder holds a result made from something else.
        """
        for output in self.outputs:
            output.begin(self.fingerprint)

    def begin(self) -> list[int]:
        """Claim the outputs, take back what is damaged, and find the shards that are missing.

        Raises:
            FingerprintError: if a folder holds a result made from something else.
        """
        self.claim()
        for output in self.outputs:
            for damage in output.drop_damaged(self.look):
                self.tell_damage(damage)
            output.drop_stale(self.made_from)
        return sorted({shard for output in self.outputs for shard in output.missing(self.num_shards)})

    def end(self) -> list[Entry]:
        """Close the outputs' manifests, also one that speaks of other parts; the entries of the last."""
        return [output.close(self.num_shards) for output in self.outputs][-1]

    def refuse(self, reason: str) -> None:
        """Mended inputs or settings make it anew, equal ones go on."""
        for output in self.outputs:
            output.refuse(reason)


@dataclass(frozen=True, slots=True)
class Done:
    """A finished stage: the entries of its last output, the seconds that it took now, and how many shards it made."""

    entries: list[Entry]
    seconds: float
    made: int


def run_stage(stage: Stage, console: Console) -> Done:
    """Make every missing shard of a stage and close its manifests.

    What a job refuses leaves the stage refused.

    Raises:
        FingerprintError: if a folder holds a result made from something else.
        PrefloopError: what a job refuses.
    """
    watch, missing = Stopwatch(), stage.begin()
    if missing:
        with console.bar(f"{stage.name}: starting", total=len(missing)) as bar:
            try:
                for _ in stage.workers(bar).map(stage.jobs(missing)):
                    bar.say(stage.name)
                    bar.advance(1)
                    fault_point("driver.shard", [stage.name])
            except PrefloopError as error:
                stage.refuse(error.where)
                raise
    return Done(stage.end(), watch.seconds, len(missing))


class StageFlow:
    """Stages that follow one another, under way side by side.

    Args:
        stages: each made from the one before it; all of their workers are pools or tasks.
        in_turn: a stage begins once the one before it has ended, since they would take each other's cores.
        told: called as each stage ends, in their order, with its place.

    Raises:
        PrefloopError: what a stage's `begin` refuses.
    """

    def __init__(self, stages: Sequence[Stage], *, in_turn: bool, told: Callable[[int, Done], object]) -> None:
        self._stages, self._told = stages, told
        self._missing = [stage.begin() for stage in stages]
        self._left = [len(found) for found in self._missing]
        self._began: dict[int, float] = {}
        self._ended = [time.monotonic()] * len(stages)
        self._closed = 0
        self._flow = Flow(
            [
                Step(self._starter(place), dict(zip(found, stage.jobs(found), strict=True)))
                for place, (stage, found) in enumerate(zip(stages, self._missing, strict=True))
            ],
            most_ahead=None if in_turn else MOST_AHEAD,
        )

    @property
    def is_done(self) -> bool:
        return self._closed == len(self._stages)

    def run(self, console: Console) -> None:
        """Go on to the end of all. Raises as `pump`."""
        with console.bar("starting", total=sum(self._left)) as bar:
            while not self.is_done:
                if (name := self.pump()) is not None:
                    bar.say(name)
                    bar.advance(1)

    def pump(self, *, timeout_s: float | None = None) -> str | None:
        """Go on until a shard is done, at most so long; the name of its stage.

        Raises:
            PrefloopError: what a job or `told` refuses; its stage is left refused, and those after it.
        """
        try:
            self._close_ended()
            finished = None if self.is_done else self._flow.pump(timeout_s=timeout_s)
            if finished is None:
                return None
            self._left[finished.step] -= 1
            self._ended[finished.step] = time.monotonic()
            fault_point("driver.shard", [self._stages[finished.step].name])
            self._close_ended()
            return self._stages[finished.step].name
        except StepFailed as failed:
            self._stop(failed.step, failed.error)
            raise failed.error from None
        except BaseException as error:
            self._stop(self._closed - 1, error)
            raise

    def _stop(self, place: int, error: BaseException) -> None:
        """Let go of all that is under way, since a stage failed."""
        self._flow.stop()
        if isinstance(error, PrefloopError):
            for stage in self._stages[max(0, place) :]:
                stage.refuse(error.where)

    def _close_ended(self) -> None:
        while self._closed < len(self._stages) and not self._left[self._closed]:
            place = self._closed
            seconds = self._ended[place] - self._began.get(place, self._ended[place])
            self._closed += 1
            self._told(place, Done(self._stages[place].end(), seconds, len(self._missing[place])))

    def _starter(self, place: int) -> Callable[[], Workers]:
        def start() -> Workers:
            self._began[place] = time.monotonic()
            return self._stages[place].workers(None)  # type: ignore[no-any-return]

        return start


def by_group(start: Callable[[], Any], *, total: float | None) -> Callable[[Bar | None], Mapper]:
    """The training group in the place of a mapper: jobs one after another, each on all ranks.

    Args:
        start: gives the group, started now if need be.
        total: what its reports count up to.
    """
    return lambda bar: _OneByOne(start(), lambda done: bar.at(done, total) if bar is not None else None)


class _OneByOne:
    def __init__(self, group: Any, on_report: Callable[[Any], None]) -> None:
        self._group, self._on_report = group, on_report

    def map(self, jobs: Sequence[Callable[..., Any]]) -> list[Any]:
        return [self._group.run(job, on_report=self._on_report) for job in jobs]

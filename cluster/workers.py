"""The training group: one Ray Train run that serves a whole pipeline run.

Starting a group costs 18 s on two cores, nearly all of it processes and imports, so that the group is started once and
takes its work from a mailbox, a small actor. A job is a picklable callable ``job(state, report)`` that all ranks run
together on the state they built; rank 0's return value is the job's. A job is delivered again until it is
acknowledged: when one rank dies, Ray Train starts the whole group from the top of its function, and the job with it.

Ray Train's own loop blocks until the group ends, so that it runs in a process of its own, a Ray task: a thread of the
driver that still waits when Ray is shut down ends the driver with status 1, whatever it was about to say.
"""

from __future__ import annotations

import asyncio
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.errors import KeptWaiting, WorkerLost, last_words
from cluster.resources import Resources
from cluster.session import redirect_output, told, what_is_free
from cluster.timing import OnWork, Timed, timed, unnoted

GroupJob = Callable[[Any, Callable[[Any], None]], Any]

_LOOK_S = 0.5  # between looks at the reports of a job that goes on; its end is told at once
_BRIEF_LOOK_S = 0.02  # where something else goes on meanwhile
_LONG_POLL_S = 5.0
_CLOSE_S = 60.0


class TrainingGroup:
    """A group of ranks that build one state each and run jobs on it together.

    Args:
        build: makes a rank's state; torch.distributed is up when it is called.
        size: ranks.
        resources: what each rank asks Ray for.
        refusals: exceptions that are a user's to mend; `run` raises them at once, whatever becomes of the group.
        storage: a folder for Ray Train's own files.
        log_dir: where the ranks' output goes.
        max_restarts: how often the group may be started again.
        start_timeout_s: how long to wait, over all these times, for what the ranks ask for.
        on_work: told of every job that has ended, with rank 0's times.
    """

    def __init__(
        self,
        build: Callable[[], Any],
        *,
        size: int,
        resources: Resources,
        refusals: tuple[type[Exception], ...],
        storage: Path,
        log_dir: Path,
        max_restarts: int,
        start_timeout_s: float,
        on_work: OnWork = unnoted,
    ) -> None:
        self._on_work = on_work
        self._size, self._resources, self._start_timeout_s = size, resources, start_timeout_s
        self._log = log_dir / "trainer-0.log"
        self._mailbox: Any = ray.remote(_Mailbox).options(num_cpus=0).remote()
        self._num_jobs = 0
        fit = ray.remote(_fit).options(num_cpus=0, max_retries=0)
        self._ended = fit.remote(
            {"mailbox": self._mailbox, "build": build, "refusals": refusals, "log_dir": log_dir},
            size=size,
            resources=resources,
            storage=storage,
            max_restarts=max_restarts,
            start_timeout_s=start_timeout_s,
        )

    def run(
        self, job: GroupJob, *, on_report: Callable[[Any], None], meanwhile: Callable[[], None] | None = None
    ) -> Any:
        """Run a job on all ranks; what rank 0 reports goes to `on_report`, and `meanwhile` is called in between.

        Raises:
            WorkerLost: if the group died once too often.
            KeptWaiting: if others held what the ranks ask for, for too long.
            Exception: a refusal that a rank raised, as it was.
        """
        number = self._num_jobs
        self._num_jobs += 1
        ray.get(self._mailbox.put.remote(job))
        at_most_s = _LOOK_S if meanwhile is None else _BRIEF_LOOK_S
        while True:
            ended, _ = ray.wait([self._ended], timeout=0)
            reports, outcome = ray.get(self._mailbox.look.remote(number, at_most_s))
            for report in reports:
                on_report(report)
            if outcome is not None:
                if isinstance(outcome, Exception):
                    raise outcome
                self._on_work(job, outcome)
                return outcome.value
            if ended:
                raise self._end()
            if meanwhile is not None:
                meanwhile()

    def close(self) -> None:
        """Let the ranks return, and wait for the group to end."""
        ray.get(self._mailbox.close.remote())
        ray.wait([self._ended], timeout=_CLOSE_S)

    def _end(self) -> Exception:
        """Why the group is no more."""
        try:
            kept_waiting = ray.get(self._ended)
        except RayError:  # its own process died
            kept_waiting = False
        if kept_waiting:
            wanted = f"{self._size} x ({told(self._resources.cpus, self._resources.gpus)})"
            return KeptWaiting("trainer", wanted, self._start_timeout_s, what_is_free())
        return WorkerLost("training group", self._log, last_words(self._log))


def _fit(config: dict[str, Any], **options: Any) -> bool:
    """Run the group to its end; whether it ended because its ranks waited too long for what they ask for."""
    redirect_output(config["log_dir"] / "trainer.log")
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    try:
        _ray_trainer(config, **options).fit()
    except ControllerError as error:
        traceback.print_exc()
        return isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)
    except Exception:  # what a rank raised is told through the mailbox, or by its last words
        traceback.print_exc()
    return False


def _ray_trainer(
    config: dict[str, Any],
    *,
    size: int,
    resources: Resources,
    storage: Path,
    max_restarts: int,
    start_timeout_s: float,
) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    # Ray Train gives up waiting after this time, and by default begins again without end.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(start_timeout_s / (1 + max_restarts))
    use_gpu = resources.gpus > 0
    each = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if use_gpu else {})
    return TorchTrainer(
        _serve,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=size, use_gpu=use_gpu, resources_per_worker=each),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            # A name used twice silently resumes the old run.
            name=f"group-{time.time_ns()}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=max_restarts, controller_failure_limit=max_restarts),
        ),
    )


def _serve(config: dict[str, Any]) -> None:
    """A rank's whole life: build the state, then run one job after another until the mailbox closes."""
    from ray.train.collective import broadcast_from_rank_zero

    rank = ray.train.get_context().get_world_rank()
    redirect_output(config["log_dir"] / f"trainer-{rank}.log")
    mailbox = config["mailbox"]
    # One rank asks for all: asked a moment apart, two ranks might begin with different jobs, and wait for each other.
    state, number = None, broadcast_from_rank_zero(ray.get(mailbox.first_open.remote()) if rank == 0 else None)
    while True:
        found = ray.get(mailbox.take.remote(number))
        if found == "closed":
            return
        if found is None:
            continue
        try:
            state = config["build"]() if state is None else state
            done = timed(found[0], state, _reporter(mailbox, number if rank == 0 else None))
        except config["refusals"] as refusal:
            ray.get(mailbox.acknowledge.remote(number, refusal))
            raise
        if rank == 0:
            ray.get(mailbox.acknowledge.remote(number, done))
        number += 1


def _reporter(mailbox: Any, number: int | None) -> Callable[[Any], None]:
    """Sends reports of one job; those of other ranks than 0 (no number) go nowhere."""

    def report(value: Any) -> None:
        if number is not None:
            mailbox.report.remote(number, value)

    return report


class _Mailbox:
    """Jobs in, outcomes out; asynchronous, so that waiting ranks cost nothing."""

    def __init__(self) -> None:
        self._jobs: list[GroupJob] = []
        self._outcomes: dict[int, Timed | Exception] = {}
        self._reports: list[tuple[int, Any]] = []
        self._closed = False
        self._changed = asyncio.Event()

    async def put(self, job: GroupJob) -> None:
        self._jobs.append(job)
        self._wake()

    async def close(self) -> None:
        self._closed = True
        self._wake()

    async def first_open(self) -> int:
        """The first job that nobody has acknowledged."""
        return len(self._outcomes)

    async def take(self, number: int) -> Any:
        """Job `number` in a list, ``"closed"``, or None after a while without either."""
        await self._until(lambda: number < len(self._jobs) or self._closed, _LONG_POLL_S)
        if number < len(self._jobs):
            return [self._jobs[number]]
        return "closed" if self._closed else None

    async def report(self, number: int, value: Any) -> None:
        self._reports.append((number, value))

    async def acknowledge(self, number: int, outcome: Timed | Exception) -> None:
        self._outcomes.setdefault(number, outcome)
        self._wake()

    async def look(self, number: int, at_most_s: float) -> tuple[list[Any], Timed | Exception | None]:
        """A job's reports since the last look, and its outcome as soon as it has one, or None after a while.

        Late reports of others are dropped.
        """
        await self._until(lambda: number in self._outcomes, at_most_s)
        reports = [value for of, value in self._reports if of == number]
        self._reports = []
        return reports, self._outcomes.get(number)

    async def _until(self, holds: Callable[[], bool], at_most_s: float) -> None:
        """Wait for a change that makes something hold, for a while."""
        deadline = time.monotonic() + at_most_s
        while not holds() and (left := deadline - time.monotonic()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

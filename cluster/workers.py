"""The training group: one Ray Train run that serves a whole pipeline run.

Starting a group costs 18 s on two cores, nearly all of it processes and imports, so that the group is started once and
takes its work from a mailbox, a small actor. A job is a picklable callable ``job(state, report)`` that all ranks run
together on the state they built; rank 0's return value is the job's. A job is delivered again until it is
acknowledged: when one rank dies, Ray Train starts the whole group from the top of its function, and the job with it.

Ray Train's own loop blocks until the group ends, so that it runs in a process of its own, a Ray task: a thread of the
driver that still waits when Ray is shut down ends the driver with status 1, whatever it was about to say.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import KeptWaiting, WorkerLost, last_words
from cluster.mailbox import GroupJob, Mailbox, News
from cluster.mapper import Patience, Searching, Watcher, first_line
from cluster.resources import Resources
from cluster.session import redirect_output, told, what_is_free
from cluster.timing import Timed, timed

_LOOK_S = 0.5  # between looks at the reports of a job that goes on; its end is told at once
_BRIEF_LOOK_S = 0.02  # where something else goes on meanwhile
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
        patience: how often the group may be started again under one job, how long to wait, over all these times, for
            what the ranks ask for, and how long no rank may give a sign of life.
        watcher: is told of every job that has ended, with rank 0's times.
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
        patience: Patience,
        watcher: Watcher | None = None,
    ) -> None:
        self._patience, self._watcher = patience, watcher or Watcher()
        self._size, self._resources, self._storage = size, resources, storage
        self._log = log_dir / "trainer-0.log"
        self._mailbox: Any = ray.remote(Mailbox).options(num_cpus=0, max_restarts=0, **_here()).remote()
        self._config = {"mailbox": self._mailbox, "build": build, "refusals": refusals, "log_dir": log_dir}
        self._num_jobs = self._num_done = self._num_groups = 0
        self._hung = False
        self._built_at: float | None = None
        self._begin()

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
        self._asked(self._mailbox.put.remote(job))
        at_most_s = _LOOK_S if meanwhile is None else _BRIEF_LOOK_S
        while True:
            ended, _ = ray.wait([self._ended], timeout=0)
            news = self._asked(self._mailbox.look.remote(number, at_most_s))
            self._tell_groups(news)
            for report in news.reports:
                on_report(report)
            if news.outcome is not None:
                self._num_done += 1
                if isinstance(news.outcome, Exception):
                    raise news.outcome
                self._watcher.on_work(job, replace(news.outcome, worker="trainers"))
                return news.outcome.value
            if ended:
                self._go_on(job)
            elif news.silent_s is not None and news.silent_s > self._patience.job_timeout_s:
                self._kill()
            if meanwhile is not None:
                meanwhile()

    def close(self) -> None:
        """Let the ranks return, and wait for the group to end."""
        with suppress(WorkerLost):  # its work is done
            self._asked(self._mailbox.close.remote())
        ray.wait([self._ended], timeout=_CLOSE_S)

    def _begin(self) -> None:
        self._done_before, self._asked_at = self._num_done, time.time()
        fit = ray.remote(_fit).options(num_cpus=0, max_retries=0, **_here())
        self._ended = fit.remote(
            self._config,
            size=self._size,
            resources=self._resources,
            storage=self._storage,
            max_restarts=self._patience.max_restarts,
            start_timeout_s=self._patience.start_timeout_s,
        )

    def _go_on(self, job: GroupJob) -> None:
        """The group has ended: begin another one, with a count of its own, if it had done a job since it began.

        Also where the job has found what kills its ranks, and goes on without that.

        Raises:
            WorkerLost: if neither is so.
            KeptWaiting: if it ended since it was kept waiting.
        """
        try:
            kept_waiting = ray.get(self._ended)
        except RayError:  # its own process died
            kept_waiting = False
        if kept_waiting:
            wanted = f"{self._size} x ({told(self._resources.cpus, self._resources.gpus)})"
            raise KeptWaiting("trainer", wanted, self._patience.start_timeout_s, what_is_free())
        most = self._patience.max_restarts
        if self._num_done == self._done_before or not most:
            lost = self._lost()
            if not most or not isinstance(job, Searching) or job.searching(lost, 1 + most) is None:
                raise lost
        self._begin()

    def _kill(self) -> None:
        """End all ranks, since one of them hangs: which one cannot be told, they wait for each other."""
        self._hung = True
        for actor in self._asked(self._mailbox.ranks.remote()):
            ray.kill(actor)

    def _tell_groups(self, news: News) -> None:
        if news.num_groups > max(1, self._num_groups):
            died = WorkerLost("training group", self._log, "a rank died; trainer.log beside it says which")
            self._watcher.on_death(self._lost() if self._hung else died)
            self._hung = False
        self._num_groups = news.num_groups
        self._built_at = news.built_at or self._built_at
        if self._built_at is not None and isinstance(news.outcome, Timed):
            if news.num_groups == 1:  # when a later one was asked for, only Ray Train knows
                job_s = news.outcome.ended - news.outcome.began
                self._watcher.on_start("training group", self._built_at - self._asked_at, job_s)
            self._built_at = None

    def _lost(self) -> WorkerLost:
        silent = f"it gave no sign of life within {self._patience.job_timeout_s:g} s (cluster.job_timeout_s)"
        return WorkerLost("training group", self._log, silent if self._hung else last_words(self._log))

    def _asked(self, ref: Any) -> Any:
        """An answer of the mailbox; without it nothing can be told about the group."""
        try:
            return ray.get(ref)
        except RayError as error:
            reason = f"its mailbox died: {first_line(error)}"
            raise WorkerLost("training group", self._log, reason) from error


def _here() -> dict[str, Any]:
    """Options of what is to live and die with the driver: another node may be taken away."""
    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}


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
    ray.get(mailbox.enter.remote(rank, ray.get_runtime_context().current_actor))
    # One rank asks for all: asked a moment apart, two ranks might begin with different jobs, and wait for each other.
    state, number = None, broadcast_from_rank_zero(ray.get(mailbox.first_open.remote()) if rank == 0 else None)
    while True:
        found = ray.get(mailbox.take.remote(number, rank))
        if found == "closed":
            return
        if found is None:
            continue
        try:
            if state is None:
                state = config["build"]()
                if rank == 0:
                    ray.get(mailbox.built.remote(time.time()))
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

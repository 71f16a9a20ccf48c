"""The workers of a run: started when first needed, kept to its end.

This is where the stages' classes meet the cluster's actors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.mapper import Patience, Watcher
from cluster.metrics import rates
from cluster.notices import Notices
from cluster.pool import Pool
from cluster.session import Devices, Resources
from cluster.tasks import Tasks
from cluster.timing import Timed
from cluster.workers import TrainingGroup
from pipeline.artifacts import Entry
from pipeline.config import Config
from pipeline.jobs.resting import rest_rewards, rest_sampler, rest_trainer
from pipeline.layout import lay_out
from pipeline.sources import RewardSource
from pipeline.timeline import Timeline, stage_of
from pipeline.worker_log import WorkerLog
from stages.errors import PrefloopError
from stages.protocols import Reward
from stages.sample.config import SampleConfig
from stages.sample.vllm_sampler import VLLMSampler
from stages.score.config import FunctionReward
from stages.score.functions import FunctionScorer
from stages.score.reward_model import RewardModel
from stages.score.wire.config import HttpReward, JudgeReward
from stages.score.wire.judge import Judge
from stages.score.wire.server import RewardServer
from stages.update.config import UpdateConfig


@dataclass(frozen=True, slots=True)
class BuildSampler:
    """Makes an engine in its actor."""

    config: SampleConfig
    dtype: str
    num_threads: int
    use_gpu: bool
    seed: int
    sleeps: bool

    def __call__(self) -> VLLMSampler:
        return VLLMSampler(
            self.config,
            dtype=self.dtype,
            num_threads=self.num_threads,
            use_gpu=self.use_gpu,
            seed=self.seed,
            sleeps=self.sleeps,
        )


def answers_folder(config: Config, run_folder: Path) -> Path:
    """Where the answers of reward servers are kept."""
    named = config.score.cache if config.score is not None else None
    return named.absolute() if named is not None else run_folder.absolute() / "reward_answers"


@dataclass(frozen=True, slots=True)
class BuildRewards:
    """Loads every reward in its actor.

    Attributes:
        cache: where the answers of reward servers are kept.
    """

    sources: Sequence[RewardSource]
    num_threads: int
    use_gpu: bool
    cache: Path

    def __call__(self) -> list[Reward]:
        return [self._reward(source) for source in self.sources]

    def _reward(self, source: RewardSource) -> Reward:
        config = source.config
        if isinstance(config, FunctionReward):
            return FunctionScorer(source.name, config.role, config.weight, config.target)
        if isinstance(config, HttpReward):
            return RewardServer(config, name=source.name, cache=self.cache)
        if isinstance(config, JudgeReward):
            return Judge(config, name=source.name, cache=self.cache, rubric=source.rubric)
        assert source.folder is not None
        return RewardModel(
            config,
            name=source.name,
            folder=source.folder,
            key=source.key,
            num_threads=self.num_threads,
            use_gpu=self.use_gpu,
        )


@dataclass(frozen=True, slots=True)
class BuildTrainer:
    """Makes a rank's trainer in its Ray Train worker."""

    config: UpdateConfig
    dtype: str
    pad_token: str | None
    num_threads: int

    def __call__(self) -> object:
        from stages.update.allocation import keep_freed_memory
        from stages.update.worker import Trainer

        trainer = Trainer(self.config, dtype=self.dtype, pad_token=self.pad_token, num_threads=self.num_threads)
        if trainer.device.type == "cpu":
            keep_freed_memory()
        return trainer


class Crew:
    """Samplers, scorers, the training group and stateless tasks of one run.

    Each kind is started when first asked for, and again, in the old one's place, when a round asks for another one.
    Under placement ``colocate`` asking for one is its turn: the kind before it rests first.

    Args:
        config: the run's.
        devices: what the cluster has.
        log_dir: where the workers' output goes.
        worker_log: told of every worker that came up, or died and is replaced.

    Attributes:
        notices: of what will be taken away soon.
        timeline: when they worked.
        rates: how fast, for Prometheus.
    """

    def __init__(
        self, config: Config, devices: Devices, *, log_dir: Path, worker_log: WorkerLog, notices: Notices
    ) -> None:
        self.timeline, asked = Timeline(), config.cluster
        self._patience = Patience(asked.max_worker_restarts, asked.start_timeout_s, asked.job_timeout_s)
        self._watcher = Watcher(self._note, worker_log.came_up, worker_log.died)
        self._config, self.devices, self._log_dir, self.notices = config, devices, log_dir, notices
        self.layout = lay_out(config, devices)
        self._held: dict[str, tuple[object, Any]] = {}
        self._colocated = config.cluster.placement == "colocate"
        self._on_turn: str | None = None
        self.rates = rates(asked, config.run.name)

    def _note(self, job: Any, done: Timed) -> None:
        self.timeline.note(job, done)
        if isinstance(done.value, Entry):
            amounts = {"rows": float(done.value.rows)}
            if "tokens" in done.value.stats:
                amounts["tokens"] = done.value.stats["tokens"]
            self.rates.show(stage_of(job), amounts, done.ended - done.began)

    @property
    def stages_overlap(self) -> bool:
        """Whether stages of a round run side by side."""
        wanted = self._config.cluster.streaming
        if self._colocated:
            return False
        return self.devices.gpus > 0 if wanted == "auto" else wanted == "on"

    def samplers(self, config: Config) -> Pool:
        """Engines for a round's config."""
        self._take_turn("sampler")
        return self._samplers(config)

    def _samplers(self, config: Config) -> Pool:
        layout, threads = self.layout, self._threads(config.sample.num_threads, among=config.num_engines)
        build = BuildSampler(
            config.sample.engine(),
            config.policy.dtype,
            threads,
            layout.sampler.gpus > 0,
            config.run.seed,
            self._colocated,
        )
        return self._pool("sampler", build, config.sample.engines, layout.sampler, most=config.sample.max_engines)

    def scorers(self, config: Config, rewards: Sequence[RewardSource], *, kept_in: Path) -> Pool:
        """Rewards, loaded; without a model among them they need no turn.

        Args:
            kept_in: the run's folder, where servers' answers are kept unless the config names another place.
        """
        if any(source.folder is not None for source in rewards):
            self._take_turn("scorer")
        num_scorers = max(1, config.num_scorers)
        threads, on_gpu = self._threads(None, among=num_scorers), self.layout.scorer.gpus > 0
        build = BuildRewards(tuple(rewards), threads, on_gpu, answers_folder(config, kept_in))
        return self._pool("scorer", build, num_scorers, self.layout.scorer)

    def trainers(self, config: Config) -> TrainingGroup:
        """The training group; how to update comes with each job."""
        self._take_turn("trainer")
        if self._colocated and self.devices.gpus > 1 and config.num_engines and "sampler" not in self._held:
            self._samplers(config).wait_until_up()  # the shares of GPUs need them to be placed first, see `lay_out`
        resources, update = self.layout.trainer, config.update
        threads = self._threads(update.num_threads, among=update.workers)
        key = (update.workers, update.device, threads)

        def start() -> TrainingGroup:
            return TrainingGroup(
                BuildTrainer(update, config.policy.dtype, config.policy.pad_token, threads),
                size=update.workers,
                resources=resources,
                refusals=(PrefloopError, AssertionError),
                storage=self._log_dir / "ray_train",
                log_dir=self._log_dir,
                patience=self._patience,
                watcher=self._watcher,
            )

        return self._same_or_new("trainer", key, start)  # type: ignore[no-any-return]

    def start_trainers(self, config: Config) -> None:
        """Have the training group come up while others work, where it has devices of its own."""
        if not self._colocated:
            self.trainers(config)

    @cached_property
    def tasks(self) -> Tasks:
        """Stateless workers."""
        return Tasks(
            resources=self.layout.task,
            log_dir=self._log_dir,
            patience=self._patience,
            watcher=self._watcher,
        )

    def close(self) -> None:
        """End those that were started."""
        while self._held:
            self._held.popitem()[1][1].close()

    def _threads(self, asked: int | None, *, among: int) -> int:
        """CPU threads of each of some equal workers: as asked, else an equal share, since stages take turns."""
        return asked or max(1, min(self.devices.cpus // max(1, among), self.devices.cpus_of_a_node))

    def _take_turn(self, kind: str) -> None:
        """Have the kind whose turn it was rest, where devices are shared."""
        before, self._on_turn = self._on_turn, kind
        if not self._colocated or before in (None, kind) or before not in self._held:
            return
        workers = self._held[before][1]
        if before == "trainer":
            workers.run(rest_trainer, on_report=lambda _: None)
        else:
            workers.each(rest_sampler if before == "sampler" else rest_rewards, built_only=True)

    def _pool(self, name: str, build: Any, size: int, resources: Resources, *, most: int | None = None) -> Pool:
        def start() -> Pool:
            return Pool(
                build,
                name=name,
                size=size,
                most=most,
                resources=resources,
                log_dir=self._log_dir,
                patience=self._patience,
                watcher=self._watcher,
                leaving=lambda: self.notices.leaving,
            )

        return self._same_or_new(name, (build, size, most, resources), start)  # type: ignore[no-any-return]

    def _same_or_new(self, kind: str, key: object, start: Callable[[], Any]) -> Any:
        if kind in self._held and self._held[kind][0] != key:
            self._held.pop(kind)[1].close()
        if kind not in self._held:
            self._held[kind] = (key, start())
        return self._held[kind][1]

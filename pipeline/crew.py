"""The workers of a run: started when first needed, kept to its end.

This is where the stages' classes meet the cluster's actors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.mapper import Pool, Tasks
from cluster.session import Devices, Resources
from cluster.workers import TrainingGroup
from pipeline.config import Config
from pipeline.layout import lay_out
from pipeline.sources import RewardSource
from pipeline.timeline import Timeline
from stages.errors import PrefloopError
from stages.protocols import Reward
from stages.sample.config import SampleConfig
from stages.sample.vllm_sampler import VLLMSampler
from stages.score.config import FunctionReward
from stages.score.functions import FunctionScorer
from stages.score.reward_model import RewardModel
from stages.update.config import UpdateConfig


@dataclass(frozen=True, slots=True)
class BuildSampler:
    """Makes an engine in its actor."""

    config: SampleConfig
    dtype: str
    num_threads: int
    use_gpu: bool
    seed: int

    def __call__(self) -> VLLMSampler:
        return VLLMSampler(
            self.config, dtype=self.dtype, num_threads=self.num_threads, use_gpu=self.use_gpu, seed=self.seed
        )


@dataclass(frozen=True, slots=True)
class BuildRewards:
    """Loads every reward in its actor."""

    sources: Sequence[RewardSource]
    num_threads: int
    use_gpu: bool

    def __call__(self) -> list[Reward]:
        return [self._reward(source) for source in self.sources]

    def _reward(self, source: RewardSource) -> Reward:
        config = source.config
        if isinstance(config, FunctionReward):
            return FunctionScorer(source.name, config.role, config.weight, config.target)
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
        from stages.update.worker import Trainer

        return Trainer(self.config, dtype=self.dtype, pad_token=self.pad_token, num_threads=self.num_threads)


class Crew:
    """Samplers, scorers, the training group and stateless tasks of one run.

    Each kind is started when first asked for, and again, in the old one's place, when a round asks for another one.

    Args:
        config: the run's.
        devices: what the cluster has.
        log_dir: where the workers' output goes.

    Attributes:
        timeline: when they worked.
    """

    def __init__(self, config: Config, devices: Devices, *, log_dir: Path) -> None:
        self.timeline = Timeline()
        self._config, self.devices, self._log_dir = config, devices, log_dir
        self.layout = lay_out(config, devices)
        self._held: dict[str, tuple[object, Any]] = {}

    @property
    def stages_overlap(self) -> bool:
        """Whether stages of a round run side by side."""
        wanted = self._config.cluster.streaming
        return self.devices.gpus > 0 if wanted == "auto" else wanted == "on"

    def samplers(self, config: Config) -> Pool:
        """Engines for a round's config."""
        layout, threads = self.layout, max(1, self.devices.cpus // max(1, config.num_engines))
        build = BuildSampler(
            config.sample.engine(), config.policy.dtype, threads, layout.sampler.gpus > 0, config.run.seed
        )
        return self._pool("sampler", build, config.sample.engines, layout.sampler)

    def scorers(self, config: Config, rewards: Sequence[RewardSource]) -> Pool:
        """Rewards, loaded."""
        build = BuildRewards(tuple(rewards), self.devices.cpus, self.layout.scorer.gpus > 0)
        return self._pool("scorer", build, 1, self.layout.scorer)

    def trainers(self, config: Config) -> TrainingGroup:
        """The training group; how to update comes with each job."""
        resources, update = self.layout.trainer, config.update
        key = (update.workers, update.device)
        threads = max(1, self.devices.cpus // update.workers)

        def start() -> TrainingGroup:
            return TrainingGroup(
                BuildTrainer(update, config.policy.dtype, config.policy.pad_token, threads),
                size=update.workers,
                resources=resources,
                refusals=(PrefloopError, AssertionError),
                storage=self._log_dir / "ray_train",
                log_dir=self._log_dir,
                max_restarts=config.cluster.max_worker_restarts,
                start_timeout_s=config.cluster.start_timeout_s,
                on_work=self.timeline.note,
            )

        return self._same_or_new("trainer", key, start)  # type: ignore[no-any-return]

    @cached_property
    def tasks(self) -> Tasks:
        """Stateless workers."""
        return Tasks(
            resources=self.layout.task,
            log_dir=self._log_dir,
            max_retries=self._config.cluster.max_worker_restarts,
            start_timeout_s=self._config.cluster.start_timeout_s,
            on_work=self.timeline.note,
        )

    def close(self) -> None:
        """End those that were started."""
        while self._held:
            self._held.popitem()[1][1].close()

    def _pool(self, name: str, build: Any, size: int, resources: Resources) -> Pool:
        def start() -> Pool:
            return Pool(
                build,
                name=name,
                size=size,
                resources=resources,
                log_dir=self._log_dir,
                max_restarts=self._config.cluster.max_worker_restarts,
                start_timeout_s=self._config.cluster.start_timeout_s,
                on_work=self.timeline.note,
            )

        return self._same_or_new(name, (build, size, resources), start)  # type: ignore[no-any-return]

    def _same_or_new(self, kind: str, key: object, start: Callable[[], Any]) -> Any:
        if kind in self._held and self._held[kind][0] != key:
            self._held.pop(kind)[1].close()
        if kind not in self._held:
            self._held[kind] = (key, start())
        return self._held[kind][1]

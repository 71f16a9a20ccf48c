"""The workers of a run: started when first needed, kept to its end.

This is where the stages' classes meet the cluster's actors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cluster.mapper import Pool, Tasks
from cluster.workers import TrainingGroup
from pipeline.config import Config
from pipeline.layout import Layout
from pipeline.sources import RewardSource, Sources
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
    """Samplers, scorers, the training group and stateless tasks of one run."""

    def __init__(self, config: Config, sources: Sources, layout: Layout, *, log_dir: Path) -> None:
        self._config, self._sources, self._layout = config, sources, layout
        self._log_dir = log_dir

    @cached_property
    def samplers(self) -> Pool:
        config, layout = self._config, self._layout
        build = BuildSampler(
            config.sample, config.policy.dtype, layout.threads, layout.sampler.gpus > 0, config.run.seed
        )
        return Pool(
            build,
            name="sampler",
            size=config.sample.engines,
            resources=layout.sampler,
            log_dir=self._log_dir,
            max_restarts=config.cluster.max_worker_restarts,
            start_timeout_s=config.cluster.start_timeout_s,
        )

    @cached_property
    def scorers(self) -> Pool:
        layout = self._layout
        return Pool(
            BuildRewards(self._sources.rewards, layout.threads, layout.scorer.gpus > 0),
            name="scorer",
            size=1,
            resources=layout.scorer,
            log_dir=self._log_dir,
            max_restarts=self._config.cluster.max_worker_restarts,
            start_timeout_s=self._config.cluster.start_timeout_s,
        )

    @cached_property
    def trainers(self) -> TrainingGroup:
        config, layout = self._config, self._layout
        return TrainingGroup(
            BuildTrainer(config.update, config.policy.dtype, config.policy.pad_token, layout.trainer_threads),
            size=config.update.workers,
            resources=layout.trainer,
            refusals=(PrefloopError, AssertionError),
            storage=self._log_dir / "ray_train",
            log_dir=self._log_dir,
            max_restarts=config.cluster.max_worker_restarts,
            start_timeout_s=config.cluster.start_timeout_s,
        )

    @cached_property
    def tasks(self) -> Tasks:
        return Tasks(
            resources=self._layout.task,
            log_dir=self._log_dir,
            max_retries=self._config.cluster.max_worker_restarts,
            start_timeout_s=self._config.cluster.start_timeout_s,
        )

    def close(self) -> None:
        """End those that were started."""
        for name in ("samplers", "scorers", "trainers"):
            if name in self.__dict__:
                self.__dict__.pop(name).close()

"""What a run needs, settled before it starts: its inputs found and hashed, and who gets which share of the machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from cluster.session import Devices, Resources, refuse_unless_it_fits
from pipeline import embedded, models
from pipeline.config import Config, EvaluateConfig, reward_names
from pipeline.prompts import source_sha256
from stages.errors import ConfigError
from stages.protocols import Weights
from stages.score.config import FunctionReward, ModelReward
from stages.score.functions import find_function
from stages.weights import file_sha256, weights_sha256


@dataclass(frozen=True, slots=True)
class RewardSource:
    """A reward as found: its config, name, and, for a model, folder; `sha256` names the weights or the module."""

    config: ModelReward | FunctionReward
    name: str
    key: str
    folder: Path | None
    sha256: str

    def identity(self) -> dict[str, object]:
        """What decides the rewards it gives."""
        given = self.config.identity()
        given.pop("path", None)
        return given | {"name": self.name, "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class PromptSource:
    """A source of prompts as found."""

    path: Path
    key: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Sources:
    """Everything a run starts from, found and hashed."""

    policy: Weights
    prompts: PromptSource
    evaluation: PromptSource | None
    rewards: tuple[RewardSource, ...]


def find_sources(config: Config, *, maker: models.Maker = embedded.make) -> Sources:
    """Resolve every name in the config; embedded models are made now if the cache lacks them.

    Raises:
        InputError: for the first thing that cannot be used.
    """
    policy = models.resolve(config.policy.path, key="policy.path", maker=maker)
    models.check_policy(policy, key="policy.path")
    evaluation = None
    if config.evaluate is not None:
        evaluation = _evaluation_source(config.evaluate, config, maker)
    return Sources(
        policy=Weights(policy, weights_sha256(policy), round=0),
        prompts=_prompt_source(config.prompts.path, "prompts.path", maker),
        evaluation=evaluation,
        rewards=tuple(
            _reward_source(reward, name, f"score.rewards.{index}", maker)
            for index, (reward, name) in enumerate(zip(config.score.rewards, reward_names(config.score), strict=True))
        ),
    )


def _prompt_source(name: str, key: str, maker: models.Maker) -> PromptSource:
    path = models.resolve(name, key=key, maker=maker)
    return PromptSource(path, key, source_sha256(path))


def _evaluation_source(evaluate: EvaluateConfig, config: Config, maker: models.Maker) -> PromptSource:
    if evaluate.path is None:
        return _prompt_source(config.prompts.path, "prompts.path", maker)
    return _prompt_source(evaluate.path, "evaluate.path", maker)


def _reward_source(reward: ModelReward | FunctionReward, name: str, key: str, maker: models.Maker) -> RewardSource:
    if isinstance(reward, FunctionReward):
        module = find_function(reward.target).__code__.co_filename
        return RewardSource(reward, name, key, None, file_sha256(Path(module)))
    folder = models.resolve(reward.path, key=f"{key}.path", maker=maker)
    models.check_reward(folder, key=f"{key}.path")
    return RewardSource(reward, name, f"{key}.path", folder, weights_sha256(folder))


@dataclass(frozen=True, slots=True)
class Layout:
    """Who gets what: Ray resources of each worker, and the threads it may use where it has no GPU."""

    sampler: Resources
    scorer: Resources
    trainer: Resources
    task: Resources
    threads: int
    trainer_threads: int


def lay_out(config: Config, devices: Devices) -> Layout:
    """Shares of the machine such that everyone holds theirs at once (placement ``split``).

    Cores are dealt in equal shares to all workers and one spare for tasks, so that Ray never waits for cores that the
    run's own actors hold; stages take turns, so that each may use all threads. GPUs are dealt whole where there are
    enough, else in shares.

    Raises:
        ConfigError: if the training workers are more than the GPUs they would share.
        NotEnough: if the cluster cannot hold the run.
    """
    sample, update = config.sample, config.update
    num_workers = sample.engines * sample.tensor_parallel_size + 1 + update.workers + 1
    cpus = min(1.0, math.floor(100 * devices.cpus / num_workers) / 100)
    models_score = any(isinstance(reward, ModelReward) for reward in config.score.rewards)
    train_on_gpu = devices.gpus > 0 and update.device != "cpu"
    wanted = sample.engines * sample.tensor_parallel_size + models_score + update.workers * train_on_gpu
    gpu = 0.0 if devices.gpus == 0 else min(1.0, math.floor(100 * devices.gpus / wanted) / 100)
    if train_on_gpu and gpu < 1 and update.workers > 1:
        raise ConfigError(
            "update.workers",
            wanted=f"{wanted} GPUs for engines, reward model and training workers, one each",
            got=f"{devices.gpus}; training workers cannot share one",
            fix="--set update.workers=1, or --set update.device=cpu for a small model",
        )
    if update.device == "cuda" and not train_on_gpu:
        raise ConfigError("update.device", wanted="a GPU", got="none here", fix="--set update.device=auto")
    layout = Layout(
        sampler=Resources(cpus, gpu * sample.tensor_parallel_size),
        scorer=Resources(cpus, gpu if models_score else 0.0),
        trainer=Resources(cpus, gpu if train_on_gpu else 0.0),
        task=Resources(cpus, 0.0),
        threads=devices.cpus,
        trainer_threads=max(1, devices.cpus // update.workers),
    )
    refuse_unless_it_fits(
        [(sample.engines, layout.sampler), (1, layout.scorer), (update.workers, layout.trainer), (1, layout.task)]
    )
    return layout

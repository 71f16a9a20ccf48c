"""What a run needs, settled before it starts: its inputs found and hashed, and who gets which share of the machine."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.session import Devices, Resources
from pipeline import embedded, models
from pipeline.config import Config, EvaluateConfig, reward_names
from pipeline.prompts import source_sha256
from stages.errors import ConfigError
from stages.protocols import Weights
from stages.score.config import FunctionReward, ModelReward
from stages.score.functions import find_function
from stages.weights import file_sha256, files_sha256, weights_sha256


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
    """Everything a run starts from, found and hashed; `policy_files` is of config and tokenizer."""

    policy: Weights
    policy_files: str
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
        policy=Weights.found(policy, round=0),
        policy_files=files_sha256(policy),
        prompts=_prompt_source(config.prompts.path, "prompts.path", maker),
        evaluation=evaluation,
        rewards=tuple(
            _reward_source(reward, name, f"score.rewards.{index}", maker)
            for index, (reward, name) in enumerate(zip(config.score.rewards, reward_names(config.score), strict=True))
        ),
    )


def _prompt_source(name: str, key: str, maker: models.Maker) -> PromptSource:
    path = models.resolve(name, key=key, maker=maker, hub=False)
    return PromptSource(path, key, source_sha256(path))


def _evaluation_source(evaluate: EvaluateConfig, config: Config, maker: models.Maker) -> PromptSource:
    if evaluate.path is None:
        return _prompt_source(config.prompts.path, "prompts.path", maker)
    return _prompt_source(evaluate.path, "evaluate.path", maker)


def _reward_source(reward: ModelReward | FunctionReward, name: str, key: str, maker: models.Maker) -> RewardSource:
    if isinstance(reward, FunctionReward):
        module = sys.modules[find_function(reward.target).__module__].__file__
        return RewardSource(reward, name, key, None, file_sha256(Path(module)) if module else "built in")
    folder = models.resolve(reward.path, key=f"{key}.path", maker=maker)
    models.check_reward(folder, key=f"{key}.path")
    return RewardSource(reward, name, f"{key}.path", folder, f"{weights_sha256(folder)} {files_sha256(folder)}")


@dataclass(frozen=True, slots=True)
class Layout:
    """Who gets what: Ray resources of each worker, and the threads it may use where it has no GPU.

    Attributes:
        workers: how many of each kind there are at once, a task among them.
    """

    sampler: Resources
    scorer: Resources
    trainer: Resources
    task: Resources
    threads: int
    trainer_threads: int
    workers: Sequence[tuple[int, Resources]]


def lay_out(config: Config, devices: Devices) -> Layout:
    """Shares of the machine such that everyone holds theirs at once (placement ``split``).

    Cores are dealt in equal shares to all workers and one spare for tasks, so that Ray never waits for cores that the
    run's own actors hold; stages take turns, so that each may use all threads. GPUs are dealt whole where there are
    enough, else in shares.

    Raises:
        ConfigError: if workers would have to share GPUs that cannot share one.
    """
    sample, update = config.sample, config.update
    num_workers = sample.engines * sample.tensor_parallel_size + 1 + update.workers + 1
    cpus = min(1.0, math.floor(100 * devices.cpus / num_workers) / 100)
    models_score = any(isinstance(reward, ModelReward) for reward in config.score.rewards)
    train_on_gpu = devices.gpus > 0 and update.device != "cpu"
    wanted = sample.engines * sample.tensor_parallel_size + models_score + update.workers * train_on_gpu
    gpu = 0.0 if devices.gpus == 0 else min(1.0, math.floor(100 * devices.gpus / wanted) / 100)
    if devices.gpus and gpu < 1 and sample.tensor_parallel_size > 1:
        raise ConfigError(
            "sample.tensor_parallel_size",
            wanted=f"{wanted} GPUs for engines, reward model and training workers, one each",
            got=f"{devices.gpus}; the ranks of an engine cannot share one",
            fix="--set sample.tensor_parallel_size=1, or fewer workers",
        )
    if train_on_gpu and gpu < 1 and update.workers > 1:
        raise ConfigError(
            "update.workers",
            wanted=f"{wanted} GPUs for engines, reward model and training workers, one each",
            got=f"{devices.gpus}; training workers cannot share one",
            fix="--set update.workers=1, or --set update.device=cpu for a small model",
        )
    if update.device == "cuda" and not train_on_gpu:
        raise ConfigError("update.device", wanted="a GPU", got="none here", fix="--set update.device=auto")
    sampler = Resources(cpus, gpu * sample.tensor_parallel_size)
    scorer = Resources(cpus, gpu if models_score else 0.0)
    trainer = Resources(cpus, gpu if train_on_gpu else 0.0)
    task = Resources(cpus, 0.0)
    return Layout(
        sampler=sampler,
        scorer=scorer,
        trainer=trainer,
        task=task,
        threads=max(1, devices.cpus // sample.engines),
        trainer_threads=max(1, devices.cpus // update.workers),
        workers=[(sample.engines, sampler), (1, scorer), (update.workers, trainer), (1, task)],
    )

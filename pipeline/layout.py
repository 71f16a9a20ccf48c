"""Who gets which share of the machine, as a function of the config and of the devices there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.resources import Devices, Resources
from pipeline.config import Config
from stages.errors import ConfigError
from stages.score.config import ModelReward


@dataclass(frozen=True, slots=True)
class Layout:
    """Who gets what: the Ray resources of each worker, the same in every round of a run.

    Attributes:
        workers: how many of each kind there are at once, a task among them, in the round that has most.
    """

    sampler: Resources
    scorer: Resources
    trainer: Resources
    task: Resources
    workers: Sequence[tuple[int, Resources]]


def lay_out(config: Config, devices: Devices) -> Layout:
    """Shares of the machine such that everyone holds theirs at once, in every round (placement ``split``).

    Cores are dealt in equal shares to all workers and one spare for tasks, so that Ray never waits for cores that the
    run's own actors hold; stages take turns, so that each may use all threads. GPUs are dealt whole where there are
    enough, else in shares. A round with other numbers of workers changes no share: workers of two rounds would else
    wait for each other.

    Raises:
        ConfigError: if workers would have to share GPUs that cannot share one.
    """
    rounds = config.every_round()
    spans = max(found.num_engines * found.sample.tensor_parallel_size for found in rounds)
    engines, trainers = max(found.num_engines for found in rounds), max(found.update.workers for found in rounds)
    span = max(found.sample.tensor_parallel_size for found in rounds)
    scorers = int(engines > 0)
    cpus = min(1.0, math.floor(100 * devices.cpus / (spans + scorers + trainers + 1)) / 100)
    models_score = scorers and any(isinstance(reward, ModelReward) for found in rounds for reward in found.rewards)
    train_on_gpu = devices.gpus > 0 and any(found.update.device != "cpu" for found in rounds)
    wanted = spans + models_score + trainers * train_on_gpu
    # A share is of one GPU: three workers on two GPUs have halves, since of 0.66 each only two would find room.
    gpu = 0.0 if devices.gpus == 0 else math.floor(100 / max(1, math.ceil(wanted / devices.gpus))) / 100
    if devices.gpus and gpu < 1 and span > 1:
        raise ConfigError(
            "sample.tensor_parallel_size",
            wanted=f"{wanted} GPUs for engines, reward model and training workers, one each",
            got=f"{devices.gpus}; the ranks of an engine cannot share one",
            fix="--set sample.tensor_parallel_size=1, or fewer workers",
        )
    if train_on_gpu and gpu < 1 and trainers > 1:
        raise ConfigError(
            "update.workers",
            wanted=f"{wanted} GPUs for engines, reward model and training workers, one each",
            got=f"{devices.gpus}; training workers cannot share one",
            fix="--set update.workers=1, or --set update.device=cpu for a small model",
        )
    if not train_on_gpu and any(found.update.device == "cuda" for found in rounds):
        raise ConfigError("update.device", wanted="a GPU", got="none here", fix="--set update.device=auto")
    sampler = Resources(cpus, gpu * span)
    scorer = Resources(cpus, gpu if models_score else 0.0)
    trainer = Resources(cpus, gpu if train_on_gpu else 0.0)
    task = Resources(cpus, 0.0)
    return Layout(
        sampler=sampler,
        scorer=scorer,
        trainer=trainer,
        task=task,
        workers=[(engines, sampler), (scorers, scorer), (trainers, trainer), (1, task)],
    )

"""Who gets which share of the machine, as a function of the config and of the devices there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.resources import Devices, Resources
from pipeline.config import Config
from stages.errors import ConfigError
from stages.score.config import ModelReward

_ENGINE_SHARE, _TRAINER_SHARE, _SCORER_SHARE = 0.51, 0.25, 0.2
"""Of a GPU, under ``colocate``: no two engines fit on one, nor two trainers beside an engine; one of each kind does."""


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


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The most workers of each kind that any round has at once.

    Attributes:
        span: GPUs of the widest engine.
        spans: GPUs of all engines together.
        scorers: with a model.
        trainers: on GPUs.
    """

    engines: int
    span: int
    spans: int
    scorers: int
    trainers: int

    @property
    def all(self) -> int:
        return self.spans + self.scorers + self.trainers


def lay_out(config: Config, devices: Devices) -> Layout:
    """Shares of the machine such that everyone holds theirs at once, in every round.

    Cores are dealt in equal shares to all workers and one spare for tasks, so that Ray never waits for cores that the
    run's own actors hold, even where one of several machines is lost; stages take turns, so that each may use all
    threads. GPUs are dealt as the placement says. A round with other numbers of workers changes no share: workers of
    two rounds would else wait for each other.

    Raises:
        ConfigError: if workers would have to share GPUs that cannot share one.
    """
    rounds = config.every_round()
    spans = max(found.num_engines * found.sample.tensor_parallel_size for found in rounds)
    engines, trainers = max(found.num_engines for found in rounds), max(found.update.workers for found in rounds)
    scorers = max(found.num_scorers for found in rounds)
    models_score = scorers > 0 and any(isinstance(reward, ModelReward) for found in rounds for reward in found.rewards)
    train_on_gpu = devices.gpus > 0 and any(found.update.device != "cpu" for found in rounds)
    if not train_on_gpu and any(found.update.device == "cuda" for found in rounds):
        raise ConfigError("update.device", wanted="a GPU", got="none here", fix="--set update.device=auto")
    on_gpu = _Numbers(
        engines=engines,
        span=max(found.sample.tensor_parallel_size for found in rounds),
        spans=spans,
        scorers=scorers * models_score,
        trainers=trainers * train_on_gpu,
    )
    shares = (0.0, 0.0, 0.0)
    if devices.gpus:
        shares = (_split if config.cluster.placement == "split" else _colocated)(on_gpu, devices.gpus)
    cpus = devices.share_of_cpus(spans + scorers + trainers + 1)
    sampler = Resources(cpus, shares[0])
    scorer = Resources(cpus, shares[1] if models_score else 0.0)
    trainer = Resources(cpus, shares[2] if train_on_gpu else 0.0)
    task = Resources(cpus, 0.0)
    return Layout(
        sampler=sampler,
        scorer=scorer,
        trainer=trainer,
        task=task,
        workers=[(engines, sampler), (scorers, scorer), (trainers, trainer), (1, task)],
    )


def _split(wanted: _Numbers, num_gpus: int) -> tuple[float, float, float]:
    """GPUs of an engine, a scorer and a trainer that share none: whole ones where there are enough, else parts."""
    # A share is of one GPU: three workers on two GPUs have halves, since of 0.66 each only two would find room.
    gpu = math.floor(100 / max(1, math.ceil(wanted.all / num_gpus))) / 100
    told = f"{wanted.all} GPUs for engines, reward models and training workers, one each"
    if gpu < 1 and wanted.span > 1:
        raise ConfigError(
            "sample.tensor_parallel_size",
            wanted=told,
            got=f"{num_gpus}; the ranks of an engine cannot share one",
            fix="--set sample.tensor_parallel_size=1, or fewer workers",
        )
    if gpu < 1 and wanted.trainers > 1:
        raise ConfigError(
            "update.workers",
            wanted=told,
            got=f"{num_gpus}; training workers cannot share one",
            fix="--set update.workers=1, or --set update.device=cpu for a small model",
        )
    return gpu * wanted.span, gpu, gpu


def _colocated(wanted: _Numbers, num_gpus: int) -> tuple[float, float, float]:
    """GPUs of an engine, the scorer and a trainer that take turns on the same ones, one of each kind on a GPU.

    Ray fills one GPU with shares before it takes the next. Trainers are kept apart by the engines, which come first
    and leave room for one on each GPU: with several GPUs every one has its engine.
    """
    if wanted.span > 1:
        raise ConfigError(
            "sample.tensor_parallel_size",
            wanted="1 with cluster.placement colocate: Ray gives shares of one GPU, or whole ones",
            got=str(wanted.span),
            fix="--set sample.tensor_parallel_size=1, or --set cluster.placement=split",
        )
    if wanted.scorers > 1:
        raise ConfigError(
            "score.workers",
            wanted="1 with cluster.placement colocate: two reward models might share a GPU",
            got=str(wanted.scorers),
            fix="--set score.workers=1, or --set cluster.placement=split",
        )
    if wanted.trainers > num_gpus:
        raise ConfigError(
            "update.workers",
            wanted=f"at most {num_gpus}, one on each GPU",
            got=str(wanted.trainers),
            fix=f"--set update.workers={num_gpus}",
        )
    if wanted.engines and wanted.engines != num_gpus:
        raise ConfigError(
            "sample.engines",
            wanted=f"{num_gpus} with cluster.placement colocate, one on each GPU",
            got=str(wanted.engines),
            fix=f"--set sample.engines={num_gpus}",
        )
    if not wanted.engines:  # ready pairs: the trainers keep themselves apart
        return 0.0, 0.0, _ENGINE_SHARE
    return _ENGINE_SHARE, _SCORER_SHARE, _TRAINER_SHARE

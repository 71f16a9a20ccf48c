"""What a config will do, before it does it: each round in a sentence, rows, steps, workers, memory and disk.

A config and some hardware in, one record out. Nothing is started, made or fetched; the figures are upper bounds where
they depend on what is sampled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.config import Config
from pipeline.lineage import Lineage
from pipeline.plan.fit import Shortage, Worker, shortages_of, workers_of
from pipeline.plan.hardware import Hardware
from pipeline.plan.memory import size
from pipeline.plan.model_facts import bytes_of
from pipeline.plan.round_outlook import RoundOutlook, evaluation_bytes, round_outlook
from pipeline.plan.survey import Model, Survey
from pipeline.schedule import asked_rounds
from stages.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Outlook:
    """A whole run, before it runs.

    Attributes:
        policy: the model to align, as found.
        hardware: what it is held against; None where that is not known.
        workers: who works, and what each needs; of the round that needs most.
        policy_bytes: on disk, of one round's policy with its master; None where the model is not known.
        tables_bytes: on disk, of all tables yet to be written.
        disk_bytes: of all that is yet to be written; None where the model is not known.
        free_bytes: free where the run's folder lies; None where that is another machine.
        unknown: in words, what cannot be known here.
        shortages: what is too little.
    """

    name: str
    config: Config
    rounds: Sequence[RoundOutlook]
    policy: Model
    hardware: Hardware | None
    workers: Sequence[Worker]
    policy_bytes: int | None
    tables_bytes: int
    disk_bytes: int | None
    free_bytes: int | None
    unknown: Sequence[str]
    shortages: Sequence[Shortage]


def rounds_of(config: Config) -> Iterator[tuple[int, Config]]:
    """Each round's number, with the config that holds in it."""
    for number in range(1, asked_rounds(config.folder(), config.num_rounds) + 1):
        yield number, config.for_round(number)


def distinct(configs: Iterable[Config]) -> Iterator[Config]:
    """Each config that differs from the one before it: most runs have one for all rounds."""
    last = None
    for config in configs:
        if config != last:
            yield config
        last = config


def look_ahead(config: Config, survey: Survey, hardware: Hardware | None, *, elsewhere: bool) -> Outlook:
    """The outlook of a run.

    Args:
        survey: what lies here of what the config names.
        hardware: what to hold it against; None where it is not known.
        elsewhere: it is for machines other than this one, whose disk is not known.
    """
    settled = num_settled(config)
    rounds = [round_outlook(number, found, survey, finished=number <= settled) for number, found in rounds_of(config)]
    ahead = [found for found in rounds if not found.finished]
    tables = sum(found.tables_bytes for found in ahead) + (len(ahead) + 1) * evaluation_bytes(config, survey)
    a_policy = _policy_bytes(config, survey)
    num_policies = sum(1 + _num_mixtures(config.for_round(found.number)) for found in ahead)
    free = None if elsewhere else _free_bytes(config.folder())
    workers, shortages = _held_against(config, survey, hardware) if hardware else ([], [])
    disk = None if a_policy is None else tables + num_policies * a_policy
    if disk is not None and free is not None and disk > free:
        shortages.append(_disk_shortage(config, disk, num_policies * (a_policy or 0), free))
    return Outlook(
        name=config.run.name,
        config=config,
        rounds=rounds,
        policy=survey.policy,
        hardware=hardware,
        workers=workers,
        policy_bytes=a_policy,
        tables_bytes=tables,
        disk_bytes=disk,
        free_bytes=free,
        unknown=_unknown(survey, hardware, workers, elsewhere=elsewhere),
        shortages=shortages,
    )


def _held_against(config: Config, survey: Survey, hardware: Hardware) -> tuple[list[Worker], list[Shortage]]:
    """The workers of the round that needs most, and each shortage of any round once; settled rounds need nothing."""
    most: list[Worker] = []
    shortages: dict[str, Shortage] = {}
    settled = num_settled(config)
    for found in distinct(found for number, found in rounds_of(config) if number > settled):
        try:
            workers = workers_of(found, survey, hardware, whole=config)
        except ConfigError as error:
            shortages.setdefault(error.where, Shortage(error.where, error.wanted, error.got, error.fix, True))
            continue
        for shortage in shortages_of(found, survey, hardware, workers):
            shortages.setdefault(shortage.where, shortage)
        most = max(workers, most, key=_total_need)
    return most, list(shortages.values())


def _total_need(workers: Sequence[Worker]) -> int:
    return sum(need.total for worker in workers for need in (worker.on_gpu, worker.on_host) if need is not None)


def num_settled(config: Config) -> int:
    """How many rounds of the run are settled, from its folder."""
    return len(Lineage.read(config.folder() / "run.json").rounds)


# ---- disk -----------------------------------------------------------------------------------------------------------


def _policy_bytes(config: Config, survey: Survey) -> int | None:
    """A policy in its dtype, and its float32 master where that is another."""
    facts, dtype = survey.policy.facts, config.policy.dtype
    if facts is None:
        return None
    return facts.num_parameters * (bytes_of(dtype) + (0 if dtype == "float32" else 4))


def _num_mixtures(config: Config) -> int:
    """Policies that a round writes besides its result: its start by momentum, an average to refer to."""
    return int(config.momentum > 0) + int("ema" in config.references)


def _free_bytes(folder: Path) -> int:
    """Free where a folder is, or will be."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(there).free


def _disk_shortage(config: Config, disk: int, certain: int, free: int) -> Shortage:
    return Shortage(
        f"disk under run.dir {config.run.dir}",
        f"{size(disk)}, of which {size(certain)} are policies",
        f"{size(free)} free",
        "make room, or name another place: --set run.dir=…",
        certain > free,
    )


# ---- what is not known ----------------------------------------------------------------------------------------------


def _unknown(survey: Survey, hardware: Hardware | None, workers: Sequence[Worker], *, elsewhere: bool) -> list[str]:
    """In words, what cannot be known here."""
    unknown = list(survey.missing)
    if survey.policy.facts is None:
        unknown.append("without the policy's files: parameters, context, chat template, memory, disk of a policy")
    elif survey.policy.facts.context is None:
        unknown.append("the policy's context: its config.json does not say")
    if hardware is None:
        unknown.append("the cluster's machines: name them with --devices, for example --devices 8x80GB")
    elif hardware.ram_bytes is None:
        unknown.append("memory of the machines beside their GPUs" if hardware.gpu_bytes else "memory of the machine")
    if elsewhere:
        unknown.append("free disk there")
    return unknown


def as_json(outlook: Outlook) -> str:
    """The record for machines."""
    config = outlook.config
    plain = {
        "name": outlook.name,
        "policy": asdict(outlook.policy),
        "loss_type": list(config.update.loss_types),
        "rounds": [{"sentence": found.sentence} | asdict(found) for found in outlook.rounds],
        "hardware": outlook.hardware.told if outlook.hardware else None,
        "workers": [asdict(worker) for worker in outlook.workers],
        "policy_bytes": outlook.policy_bytes,
        "tables_bytes": outlook.tables_bytes,
        "disk_bytes": outlook.disk_bytes,
        "free_bytes": outlook.free_bytes,
        "unknown": list(outlook.unknown),
        "shortages": [asdict(shortage) for shortage in outlook.shortages],
    }
    return json.dumps(plain, indent=2, ensure_ascii=False)

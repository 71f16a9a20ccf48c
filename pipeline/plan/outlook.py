"""What a config will do, before it does it: each round in a sentence, rows, steps, workers, memory and disk.

A config and some hardware in, one record out. Nothing is started, made or fetched; the figures are upper bounds where
they depend on what is sampled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.config import Config
from pipeline.plan.fit import Shortage, Worker, lengths_of, shortages_of, workers_of
from pipeline.plan.hardware import Hardware
from pipeline.plan.memory import size
from pipeline.plan.model_facts import bytes_of
from pipeline.plan.rounds import (
    ID_BYTES,
    LOGP_BYTES,
    ROW_BYTES,
    TEXT_BYTES,
    RoundOutlook,
    distinct,
    num_settled,
    round_outlook,
    rounds_of,
)
from pipeline.plan.survey import Model, Survey
from stages.errors import ConfigError

_COLOCATE = "--set cluster.placement=colocate has room, since stages then take turns on the same devices"


@dataclass(frozen=True, slots=True)
class Outlook:
    """A whole run, before it runs.

    Attributes:
        policy: the model to align, as found.
        hardware: what it is held against; None where that is not known.
        placement: in words, how workers share the hardware, and which other way has room; empty where it is not known.
        workers: who works, and what each needs; of the round that needs most.
        policy_bytes: on disk, of one policy with its master; None where the model is not known.
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
    placement: str
    workers: Sequence[Worker]
    policy_bytes: int | None
    tables_bytes: int
    disk_bytes: int | None
    free_bytes: int | None
    unknown: Sequence[str]
    shortages: Sequence[Shortage]

    @property
    def num_policies(self) -> int:
        """How many are yet to be written."""
        return sum(found.num_policies for found in self.rounds if not found.finished)


def look_ahead(config: Config, survey: Survey, hardware: Hardware | None, *, elsewhere: bool) -> Outlook:
    """The outlook of a run.

    Args:
        survey: what lies here of what the config names.
        hardware: what to hold it against; None where it is not known.
        elsewhere: it is for machines other than this one, whose disk is not known.
    """
    settled = num_settled(config)
    rounds = [
        round_outlook(number, found, survey, whole=config, finished=number <= settled)
        for number, found in rounds_of(config)
    ]
    ahead = [found for found in rounds if not found.finished]
    tables = sum(found.tables_bytes for found in ahead) + (len(ahead) + 1) * _evaluation_bytes(config, survey)
    a_policy = _policy_bytes(config, survey)
    free = None if elsewhere else _free_bytes(config.folder())
    workers, shortages, placement = _placed(config, survey, hardware) if hardware else ([], [], "")
    policies = None if a_policy is None else sum(found.num_policies for found in ahead) * a_policy
    disk = None if policies is None else tables + policies
    if disk is not None and free is not None and disk > free:
        shortages.append(_disk_shortage(config, disk, policies or 0, free))
    return Outlook(
        name=config.run.name,
        config=config,
        rounds=rounds,
        policy=survey.policy,
        hardware=hardware,
        placement=placement,
        workers=workers,
        policy_bytes=a_policy,
        tables_bytes=tables,
        disk_bytes=disk,
        free_bytes=free,
        unknown=_unknown(survey, hardware, workers, elsewhere=elsewhere),
        shortages=shortages,
    )


def _placed(config: Config, survey: Survey, hardware: Hardware) -> tuple[list[Worker], list[Shortage], str]:
    """As `_held_against`, with the placement in words; where stages that take turns had room, the fixes say so."""
    workers, shortages = _held_against(config, survey, hardware)
    if config.cluster.placement == "colocate":
        told = "stages take turns; a device has to hold the largest of them, and what the others keep at rest"
        return workers, shortages, f"colocate: {told}"
    told = "split: every worker holds its own share for the whole run"
    if not shortages or config.cluster.streaming == "on":
        return workers, shortages, told
    in_turn = config.cluster.model_copy(update={"placement": "colocate"})
    _, others = _held_against(config.model_copy(update={"cluster": in_turn}), survey, hardware)
    left, here = {found.where for found in others}, {found.where for found in shortages}
    if not left < here:
        return workers, shortages, told
    mended = [
        found if found.where in left else replace(found, fix=f"{_COLOCATE}; or: {found.fix}") for found in shortages
    ]
    return workers, mended, f"{told}, which does not fit ({', '.join(sorted(here - left))}); {_COLOCATE}"


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


# ---- disk -----------------------------------------------------------------------------------------------------------


def _policy_bytes(config: Config, survey: Survey) -> int | None:
    """A policy in its dtype, and its float32 master where that is another."""
    facts, dtype = survey.policy.facts, config.policy.dtype
    if facts is None:
        return None
    return facts.num_parameters * (bytes_of(dtype) + (0 if dtype == "float32" else 4))


def _evaluation_bytes(config: Config, survey: Survey) -> int:
    if config.evaluate is None:
        return 0
    each = lengths_of(config, survey).answer * (ID_BYTES + TEXT_BYTES + LOGP_BYTES) + 2 * ROW_BYTES
    return config.evaluate.num_prompts * each


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
        "placement": outlook.placement,
        "workers": [asdict(worker) for worker in outlook.workers],
        "policy_bytes": outlook.policy_bytes,
        "tables_bytes": outlook.tables_bytes,
        "disk_bytes": outlook.disk_bytes,
        "free_bytes": outlook.free_bytes,
        "unknown": list(outlook.unknown),
        "shortages": [asdict(shortage) for shortage in outlook.shortages],
    }
    return json.dumps(plain, indent=2, ensure_ascii=False)

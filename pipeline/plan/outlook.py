"""What a config will do, before it does it: each round in a sentence, rows, steps, workers, memory and disk.

A config and some hardware in, one record out. Nothing is started, made or fetched; the figures are upper bounds where
they depend on what is sampled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from pipeline.config import Config
from pipeline.plan.disk import Disk, disk_of, disk_shortage
from pipeline.plan.fit import Filled, Shortage, Worker, fullest, shortages_of, workers_of
from pipeline.plan.hardware import Hardware
from pipeline.plan.memory import size
from pipeline.plan.rates import Rates
from pipeline.plan.rounds import RoundOutlook, distinct, num_settled, round_outlook, rounds_of
from pipeline.plan.survey import Model, Survey
from pipeline.plan.times import StageTime, held_devices, times_of
from stages.errors import ConfigError

_COLOCATE = "--set cluster.placement=colocate has room, since stages then take turns on the same devices"


@dataclass(frozen=True, slots=True)
class Outlook:
    """A whole run, before it runs.

    Attributes:
        policy: the model to align, as found.
        hardware: what it is held against; None where that is not known.
        placement: in words, how workers share the hardware, and why, or which other way has room; empty where it is not
            known.
        times: the stages of the largest round to come; empty where it is not known what works.
        device: what a device-hour is an hour of.
        rates: that the times are from; None where none are known.
        nearest: words for ``--set`` that make it fit; empty where it fits, None where none were found or looked for.
        workers: who works, and what each needs; of the round that needs most.
        disk: what is yet to be written.
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
    disk: Disk
    unknown: Sequence[str]
    shortages: Sequence[Shortage]
    times: Sequence[StageTime] = ()
    device: str = ""
    rates: Rates | None = None
    nearest: tuple[str, ...] | None = None


def look_ahead(
    config: Config, survey: Survey, hardware: Hardware | None, *, elsewhere: bool, rates: Rates | None = None
) -> Outlook:
    """The outlook of a run.

    Args:
        survey: what lies here of what the config names.
        hardware: what to hold it against; None where it is not known.
        elsewhere: it is for machines other than this one, whose disk is not known.
        rates: how fast its stages work on the hardware, as far as that was measured.
    """
    settled = num_settled(config)
    rounds = [
        round_outlook(number, found, survey, whole=config, finished=number <= settled)
        for number, found in rounds_of(config)
    ]
    ahead = [found for found in rounds if not found.finished]
    disk = disk_of(config, survey, ahead, elsewhere=elsewhere)
    workers, shortages, placement = _placed(config, survey, hardware) if hardware else ([], [], "")
    if too_little := disk_shortage(config, disk):
        shortages.append(too_little)
    times, device = _times(config, survey, hardware, workers, ahead, rates)
    return Outlook(
        times=times,
        device=device,
        rates=rates,
        nearest=None if shortages else (),
        name=config.run.name,
        config=config,
        rounds=rounds,
        policy=survey.policy,
        hardware=hardware,
        placement=placement,
        workers=workers,
        disk=disk,
        unknown=_unknown(survey, hardware, workers, elsewhere=elsewhere),
        shortages=shortages,
    )


def _placed(config: Config, survey: Survey, hardware: Hardware) -> tuple[list[Worker], list[Shortage], str]:
    """As `_held_against`, with the placement in words; where stages that take turns had room, the fixes say so."""
    workers, shortages = _held_against(config, survey, hardware)
    full = "".join(f"; the {_fullest_told(found)}" for found in fullest(config, hardware, workers))
    if config.cluster.placement == "colocate":
        told = "stages take turns; a device has to hold the largest of them, and what the others keep at rest"
        at_once = config.cluster.model_copy(update={"placement": "split"})
        _, others = _held_against(config.model_copy(update={"cluster": at_once}), survey, hardware)
        why = f"split lacks room ({', '.join(found.where for found in others)})" if others else "split has room too"
        return workers, shortages, f"colocate: {told}{full}; {why}"
    told = f"split: every worker holds its own share for the whole run{full}"
    if not shortages or config.cluster.streaming == "on" or config.max_staleness:
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


def _fullest_told(found: Filled) -> str:
    room = "" if found.room is None else f" of {size(found.room)}"
    return f"fullest {found.where.removeprefix('memory of a ')} holds {size(found.bytes)}{room}"


def _times(
    config: Config,
    survey: Survey,
    hardware: Hardware | None,
    workers: Sequence[Worker],
    ahead: Sequence[RoundOutlook],
    rates: Rates | None,
) -> tuple[list[StageTime], str]:
    """The stages of the largest round to come, and what a device is."""
    if hardware is None or not workers or not ahead:
        return [], ""
    largest = max(ahead, key=lambda found: (found.num_prompts * found.num_generations, found.most_pairs))
    held, device = held_devices(hardware, workers)
    return times_of(largest, config.for_round(largest.number), survey, rates, workers, held), device


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
    config, disk = outlook.config, outlook.disk
    plain = {
        "name": outlook.name,
        "policy": asdict(outlook.policy),
        "loss_type": list(config.update.loss_types),
        "rounds": [{"sentence": found.sentence} | asdict(found) for found in outlook.rounds],
        "hardware": outlook.hardware.told if outlook.hardware else None,
        "placement": outlook.placement,
        "workers": [asdict(worker) for worker in outlook.workers],
        "disk": asdict(outlook.disk) | {"total_bytes": disk.total_bytes, "cleaned_bytes": disk.cleaned_bytes},
        "times": [asdict(time) for time in outlook.times],
        "device": outlook.device,
        "rates": asdict(outlook.rates) if outlook.rates else None,
        "unknown": list(outlook.unknown),
        "shortages": [asdict(shortage) for shortage in outlook.shortages],
        "nearest": None if outlook.nearest is None else list(outlook.nearest),
    }
    return json.dumps(plain, indent=2, ensure_ascii=False)

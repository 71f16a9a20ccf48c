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
from pipeline.plan.fit import Shortage, Worker, lengths_of, shortages_of, workers_of
from pipeline.plan.hardware import Hardware
from pipeline.plan.memory import size
from pipeline.plan.model_facts import bytes_of
from pipeline.plan.survey import Model, Survey
from pipeline.schedule import asked_rounds
from stages.errors import ConfigError
from stages.update.batching import num_steps

_ID_BYTES = 4  # a token's id
_LOGP_BYTES = 4
_TEXT_BYTES = 4  # a token's text, roughly
_ROW_BYTES = 300  # ids, counts and rewards of a row


@dataclass(frozen=True, slots=True)
class RoundOutlook:
    """One round, before it runs.

    Attributes:
        start: the policy that samples and is trained, in words.
        reference: what the objective refers to, in words.
        ready_pairs: where they come from, if none are sampled.
        finished: it is settled already.
        made: what it makes of the candidates: pairs or groups.
        most_pairs, most_steps: upper bounds; of groups, where it makes these.
        tables_bytes: of its tables, at most and roughly.
    """

    number: int
    start: str
    reference: str
    finished: bool
    num_prompts: int
    num_generations: int
    ready_pairs: str | None
    made: str
    most_pairs: int
    most_steps: int
    tables_bytes: int

    @property
    def sentence(self) -> str:
        if self.finished:
            return f"is finished: it started from {self.start}"
        if self.ready_pairs is not None:
            return (
                f"trains {self.start} on the ready pairs of {self.ready_pairs}, at most {self.most_pairs:,}, "
                f"in at most {self.most_steps:,} steps, against {self.reference}"
            )
        return (
            f"samples {self.num_prompts:,} prompts x {self.num_generations} answers from {self.start}, "
            f"makes at most {self.most_pairs:,} {self.made}, "
            f"and trains it on them in at most {self.most_steps:,} steps, against {self.reference}"
        )


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
    rounds = [_round(number, found, survey, finished=number <= settled) for number, found in rounds_of(config)]
    ahead = [found for found in rounds if not found.finished]
    tables = sum(found.tables_bytes for found in ahead) + (len(ahead) + 1) * _evaluation_bytes(config, survey)
    a_policy = _policy_bytes(config, survey)
    free = None if elsewhere else _free_bytes(config.folder())
    workers, shortages = _held_against(config, survey, hardware) if hardware else ([], [])
    disk = None if a_policy is None else tables + len(ahead) * a_policy
    if disk is not None and free is not None and disk > free:
        shortages.append(_disk_shortage(config, disk, len(ahead) * (a_policy or 0), free))
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


# ---- rounds ---------------------------------------------------------------------------------------------------------


def _round(number: int, config: Config, survey: Survey, *, finished: bool) -> RoundOutlook:
    update, file = config.update, survey.data_of(config)
    num_prompts = config.prompts.per_round if config.prompts is not None else (file.num_rows or 0) if file else 0
    lengths = lengths_of(config, survey)
    answer = lengths.answer * (_ID_BYTES + _TEXT_BYTES)
    num_generations = config.sample.num_generations if config.pairs is None else 0
    candidates = num_prompts * num_generations
    most_pairs = num_prompts * (config.pair.most_pairs(num_generations) if config.pairs is None else 1)
    made = "groups" if config.pairs is None and config.pair.strategy == "groups" else "pairs"
    pair = lengths.prompt * (_ID_BYTES + _TEXT_BYTES) + (num_generations if made == "groups" else 2) * answer
    return RoundOutlook(
        number=number,
        start=_result_of(number - 1),
        reference=_reference(number, config.reference),
        finished=finished,
        num_prompts=num_prompts,
        num_generations=num_generations,
        ready_pairs=config.pairs.path if config.pairs is not None else None,
        made=made,
        most_pairs=most_pairs,
        most_steps=num_steps(most_pairs, size=update.global_batch_size, num_epochs=update.num_train_epochs),
        tables_bytes=candidates * (answer + lengths.answer * _LOGP_BYTES + 2 * _ROW_BYTES)
        + most_pairs * (pair + _ROW_BYTES),
    )


def _result_of(number: int) -> str:
    return f"round {number}'s result" if number else "the first policy"


def _reference(number: int, kind: str) -> str:
    if kind == "initial":
        return "the first policy"
    if kind == "previous" and number > 1:
        return _result_of(number - 2)
    return "itself as the round starts"


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


def _evaluation_bytes(config: Config, survey: Survey) -> int:
    if config.evaluate is None:
        return 0
    each = lengths_of(config, survey).answer * (_ID_BYTES + _TEXT_BYTES + _LOGP_BYTES) + 2 * _ROW_BYTES
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
        "loss_type": config.update.loss_type,
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

"""``prefloop plan``: an outlook in words or JSON, and the refusal of what cannot be held. `run` refuses by it too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.console import Console
from pipeline.plan.fit import Shortage, Worker
from pipeline.plan.hardware import Hardware, here, named
from pipeline.plan.memory import Need, size
from pipeline.plan.model_facts import ModelFacts
from pipeline.plan.outlook import Outlook, as_json, look_ahead
from pipeline.plan.rounds import distinct, rounds_of
from pipeline.plan.survey import look
from stages.errors import ConfigError

_TEMPLATE = {True: "a chat template", False: "no chat template", None: "no tokenizer here"}


def show_plan(config_file: Path, overrides: Sequence[str], *, devices: str | None, in_json: bool) -> None:
    """Print what a config will do on the devices named, else on what is here.

    Raises:
        ConfigError: if they cannot hold it, or by the estimate will not.
        PrefloopError: for a file that is here and cannot be used.
    """
    config = load_config(config_file, overrides)
    outlook = outlook_of(config, devices, beside=config_file.absolute().parent)
    console = Console()
    if in_json:
        console.text(as_json(outlook))
    else:
        for label, text in _lines(outlook):
            console.text(f"{label:<11}{text}".rstrip())
    if outlook.shortages:
        raise _refusal(outlook.shortages)


def outlook_of(config: Config, devices: str | None = None, *, beside: Path | None = None) -> Outlook:
    """The outlook on the devices named, else on this machine; a cluster elsewhere is not known.

    Args:
        beside: the config file's folder, where it is not on Python's path yet.
    """
    hardware: Hardware | None = None
    if devices is not None:
        hardware = named(devices)
    elif config.cluster.address == "local":
        hardware = here(config.cluster)
    configs = list(distinct(found for _, found in rounds_of(config)))
    survey = look(configs or [config], beside=beside)
    return look_ahead(config, survey, hardware, elsewhere=devices is not None)


def refuse_what_cannot_be_held(config: Config) -> list[Shortage]:
    """Refuse a run, before anything is started, that its machine cannot hold for certain.

    Returns:
        What by the estimate will be too little, for the run to say.

    Raises:
        ConfigError: with everything that is too little for certain.
    """
    shortages = outlook_of(config).shortages
    if certain := [shortage for shortage in shortages if shortage.certain]:
        raise _refusal(certain)
    return list(shortages)


def _refusal(shortages: Sequence[Shortage]) -> ConfigError:
    """The first shortage, those that are certain before those that are estimated, and how many more there are."""
    first, *others = sorted(shortages, key=lambda shortage: not shortage.certain)
    more = f" ({len(others)} more: {', '.join(other.where for other in others)})" if others else ""
    return ConfigError(first.where, wanted=first.wanted, got=first.got, fix=first.fix + more)


# ---- in words -------------------------------------------------------------------------------------------------------


def _lines(outlook: Outlook) -> Iterator[tuple[str, str]]:
    config = outlook.config
    rounds = f"{len(outlook.rounds)} round{'s' * (len(outlook.rounds) != 1)}"
    yield "plan", f"{outlook.name}: {rounds} of {config.update.told} on {config.policy.path}"
    if outlook.policy.facts is not None:
        yield "policy", _facts(outlook.policy.facts, config.policy.dtype)
    for found in outlook.rounds:
        yield f"round {found.number}", found.sentence
    if config.evaluate is not None:
        asked = f"at most {config.evaluate.num_prompts:,} held-out prompts"
        yield "evaluate", f"{asked}, one answer each, before the first round and after every round"
    yield "rows", _rows(outlook)
    if outlook.hardware is not None:
        yield "devices", outlook.hardware.told
        yield "placement", outlook.placement
    for label, worker in zip(["workers", *[""] * len(outlook.workers)], outlook.workers, strict=False):
        yield label, _worker(worker)
    yield from _memory(outlook)
    yield "disk", outlook.disk.told
    for label, words in zip(["not known", *[""] * len(outlook.unknown)], outlook.unknown, strict=False):
        yield label, words
    for shortage in outlook.shortages:
        label = "no room" if shortage.certain else "tight"
        yield label, f"{shortage.where}: wanted {shortage.wanted.splitlines()[0]}, got {shortage.got}"
    if not outlook.shortages:
        yield "it fits", "as far as is known" if outlook.unknown else "by these estimates"


def _facts(facts: ModelFacts, dtype: str) -> str:
    context = f"context {facts.context:,}" if facts.context else "context not told"
    return (
        f"{facts.num_parameters / 1e6:,.1f} million parameters, {size(facts.weights_bytes(dtype))} in {dtype}; "
        f"{context}; KV cache {facts.kv_bytes(dtype):,} bytes a token; "
        f"{_TEMPLATE[facts.chat_template]}"
    )


def _rows(outlook: Outlook) -> str:
    if not outlook.rounds:
        return "none: no round"
    most = max(outlook.rounds, key=lambda found: (found.num_prompts * found.num_generations, found.most_pairs))
    candidates = most.num_prompts * most.num_generations
    paired = candidates if most.made == "groups" else 2 * most.most_pairs
    return (
        f"a round at most: {most.num_prompts:,} prompts, {candidates:,} candidates with rewards, "
        f"{most.most_pairs:,} {most.made}, {most.num_references * min(paired, candidates or paired):,} "
        "reference log-probs"
    )


def _worker(worker: Worker) -> str:
    asked = f"{worker.resources.cpus:g} core{'s' * (worker.resources.cpus > 1)}"
    if worker.resources.gpus:
        asked += f" and {worker.resources.gpus:g} GPU{'s' * (worker.resources.gpus > 1)}"
    return f"{worker.count} {worker.kind}{'s' * (worker.count > 1)}, {asked} each"


def _memory(outlook: Outlook) -> Iterator[tuple[str, str]]:
    """What each kind of worker needs, largest parts first; what is below a hundredth is left out."""
    label, rest = "memory", outlook.config.cluster.placement == "colocate"
    for worker in outlook.workers:
        for need, device in ((worker.on_gpu, "of each GPU"), (worker.on_host, "of its machine")):
            if need is not None:
                need = max(need, need.at_rest(), key=lambda each: each.total) if rest else need
                yield label, f"a {need.who} takes {size(need.total)} {device}: {_parts(need)}"
                label = ""


def _parts(need: Need) -> str:
    parts = sorted(need.parts, key=lambda part: -part.bytes)
    return ", ".join(f"{size(part.bytes)} {part.what}" for part in parts if 100 * part.bytes >= need.total)

"""An outlook in words, a label and a line each."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config import Config
from pipeline.plan import times
from pipeline.plan.fit import Worker
from pipeline.plan.memory import Need, size
from pipeline.plan.model_facts import ModelFacts
from pipeline.plan.outlook import Outlook

_TEMPLATE = {True: "a chat template", False: "no chat template", None: "no tokenizer here"}


def lines(outlook: Outlook) -> Iterator[tuple[str, str]]:
    """What a person reads, in order."""
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
        yield label, _worker(worker, outlook.config)
    yield from _memory(outlook)
    yield "disk", outlook.disk.told
    yield from _time(outlook)
    for label, words in zip(["not known", *[""] * len(outlook.unknown)], outlook.unknown, strict=False):
        yield label, words
    for shortage in outlook.shortages:
        label = "no room" if shortage.certain else "tight"
        missing = shortage.missing_bytes
        by = "" if missing is None else f": {size(missing)} too little"
        yield label, f"{shortage.where}: wanted {shortage.wanted.splitlines()[0]}, got {shortage.got}{by}"
    if outlook.shortages and outlook.nearest is not None:
        yield "nearest", f"fits with {set_words(outlook.nearest)}"
    if not outlook.shortages:
        yield "it fits", "as far as is known" if outlook.unknown else "by these estimates"


def _time(outlook: Outlook) -> Iterator[tuple[str, str]]:
    """What a round takes, by the rates that there are; no time is told without."""
    if not outlook.times:
        return
    if outlook.rates is None:
        tokens = ", ".join(f"{time.stage} {time.tokens:,}" for time in outlook.times)
        yield "tokens", f"a round at most: {tokens}"
        yield "time", "not known: prefloop plan --calibrate measures it where it runs, in some seconds of work a stage"
        return
    yield "time", times.told(outlook.times, outlook.rates, outlook.device)
    yield "", f"by {outlook.rates.source}"
    for words in outlook.rates.missing:
        yield "", f"not known: {words}"


def set_words(words: tuple[str, ...]) -> str:
    """As a person pastes them."""
    return " ".join(f"--set {word}" for word in words)


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


def _worker(worker: Worker, config: Config) -> str:
    asked = f"{worker.resources.cpus:g} core{'s' * (worker.resources.cpus > 1)}"
    if worker.resources.gpus:
        asked += f" and {worker.resources.gpus:g} GPU{'s' * (worker.resources.gpus > 1)}"
    shared = ""
    if worker.kind == "sampler" and config.sample.tensor_parallel_size > 1:
        shared = f", tensor parallel size {config.sample.tensor_parallel_size}"
    if worker.kind == "trainer":
        shared = f", under ZeRO {config.update.zero_stage}"
    return f"{worker.count} {worker.kind}{'s' * (worker.count > 1)}, {asked} each{shared}"


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

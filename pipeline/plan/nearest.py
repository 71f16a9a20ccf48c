"""The nearest setting that fits where a config does not: the fewest changes, as words for ``--set``.

Changes that leave the result as it is come first: where workers run, in which pieces they compute, how weights are
shared out. Only where none of these are enough does it look at those that make another policy: adapters, bfloat16,
shorter answers. Each step changes one setting; of all combinations the most promising few are followed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.config import Config
from pipeline.plan.fit import Shortage
from pipeline.plan.hardware import Hardware
from stages.errors import ConfigError

Words = tuple[str, ...]
Look = Callable[[Words], tuple[Config, Sequence[Shortage]]]
"""What a config with these words set is, and what is too little for it; a `ConfigError` where it is refused."""

_FOLLOWED = 5  # combinations, of each number of changes
_MOST_CHANGES = 6
_SET = re.compile(r"--set ([\w.]+=[\w.-]+)(?=[,;. ]|$)")
_MOST_LOOKS = 300
_NO_BYTES = 1 << 60  # what counts for a shortage that is no matter of bytes


@dataclass(frozen=True, slots=True)
class _Tried:
    """A combination that does not fit yet: what is missing, its words, what it is and why it does not fit."""

    missing: int
    words: Words
    config: Config
    shortages: Sequence[Shortage]


def nearest_fit(look: Look, hardware: Hardware) -> Words | None:
    """Words that make it fit; None where none were found. They are empty where it fits as it is."""
    for levers in (_same_result, _any_result):
        if (found := _search(look, hardware, levers)) is not None:
            return found
    return None


def _search(look: Look, hardware: Hardware, levers: Callable[[Config, Hardware], Iterator[Words]]) -> Words | None:
    config, shortages = look(())
    if not shortages:
        return ()
    followed = [_Tried(_missing(shortages), (), config, shortages)]
    seen: set[frozenset[str]] = {frozenset()}
    for _ in range(_MOST_CHANGES):
        better: list[_Tried] = []
        for at in followed:
            for step in (*_asked(at.shortages), *levers(at.config, hardware)):
                words = _merged(at.words, step)
                if frozenset(words) in seen or len(seen) > _MOST_LOOKS:
                    continue
                seen.add(frozenset(words))
                try:
                    config, shortages = look(words)
                except ConfigError:
                    continue
                if not shortages:
                    return words
                if _missing(shortages) < at.missing:
                    better.append(_Tried(_missing(shortages), words, config, shortages))
        followed = sorted(better, key=lambda tried: tried.missing)[:_FOLLOWED]
    return None


def _asked(shortages: Sequence[Shortage]) -> Iterator[Words]:
    """What shortages that are no matter of bytes say would mend them; a GPU that is there is not left idle."""
    for found in shortages:
        if found.missing_bytes is None:
            yield from ((word,) for word in _SET.findall(found.fix) if word != "update.device=cpu")


def _merged(words: Words, step: Words) -> Words:
    """Words with those of a step in the place of others for the same settings."""
    changed = {word.partition("=")[0] for word in step}
    return (*(word for word in words if word.partition("=")[0] not in changed), *step)


def _missing(shortages: Sequence[Shortage]) -> int:
    return sum(_NO_BYTES if found.missing_bytes is None else found.missing_bytes for found in shortages)


# ---- steps ----------------------------------------------------------------------------------------------------------


def _same_result(config: Config, hardware: Hardware) -> Iterator[Words]:
    """Steps from a config that change where and how fast it runs, mild ones first."""
    yield from _of_update(config, hardware)
    yield from _of_sample(config, hardware)
    gpus = hardware.devices.gpus
    if config.cluster.placement == "split":
        in_turn = (f"sample.engines={gpus}", "sample.tensor_parallel_size=1") if gpus else ()
        yield ("cluster.placement=colocate", *in_turn)


def _of_update(config: Config, hardware: Hardware) -> Iterator[Words]:
    update, gpus = config.update, hardware.devices.gpus
    if update.micro_batch_size > 1:
        yield (f"update.micro_batch_size={update.micro_batch_size // 2}",)
        yield ("update.micro_batch_size=1",)
    if not update.gradient_checkpointing:
        yield ("update.gradient_checkpointing=true",)
    for stage in range(4):
        if stage != update.zero_stage:
            yield (f"update.zero_stage={stage}",)
    counts = {update.workers // 2, 2 * update.workers, 1, *((gpus, gpus // 2) if gpus else ())}
    for count in sorted(counts - {update.workers, 0}):
        yield (f"update.workers={count}",)
        yield (f"update.workers={count}", "update.zero_stage=3")
    if gpus and not update.offload_optimizer:
        yield ("update.offload_optimizer=true", *(("update.zero_stage=2",) if update.zero_stage == 0 else ()))


def _of_sample(config: Config, hardware: Hardware) -> Iterator[Words]:
    sample = config.sample
    if not config.num_engines:
        return
    if hardware.devices.gpus:
        for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
            if share != sample.gpu_memory_utilization:
                yield (f"sample.gpu_memory_utilization={share}",)
        for ranks in (2, 4, 8):
            if ranks > sample.tensor_parallel_size:
                yield (f"sample.tensor_parallel_size={ranks}",)
        if sample.tensor_parallel_size > 1:
            yield ("sample.tensor_parallel_size=1",)
    elif sample.kv_cache_gib > 1:
        yield (f"sample.kv_cache_gib={sample.kv_cache_gib // 2}",)
        yield ("sample.kv_cache_gib=1",)
    for count in sorted({1, sample.engines // 2} - {sample.engines, 0}, reverse=True):
        yield (f"sample.engines={count}",)


def _any_result(config: Config, hardware: Hardware) -> Iterator[Words]:
    """Those steps too that lead to another policy."""
    yield from _same_result(config, hardware)
    if config.update.lora is None:
        yield ("update.lora.r=16",)
    if config.policy.dtype == "float32":
        yield ("policy.dtype=bfloat16",)
    for place, reward in enumerate(config.rewards):
        if getattr(reward, "dtype", None) == "float32":
            yield (f"score.rewards.{place}.dtype=bfloat16",)
    if config.num_engines and config.sample.max_new_tokens > 1:
        yield (f"sample.max_new_tokens={config.sample.max_new_tokens // 2}",)

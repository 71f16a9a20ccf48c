"""How much memory each worker of a run needs, estimated from sizes alone.

Every need is a list of parts in plain words. A part is certain where the worker cannot do without those bytes
(weights, gradients, optimizer); the rest are estimates, made to come out too high rather than too low. What a training
rank needs is in `pipeline.plan.training`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.plan.model_facts import ModelFacts, bytes_of
from stages.sample.config import SampleConfig
from stages.score.config import ModelReward
from stages.update.config import UpdateConfig

GIB = 1 << 30
PROCESS_BYTES = GIB  # libraries, and on a GPU the context
_ENGINE_BYTES = 2 * GIB  # an engine's graphs and activations


@dataclass(frozen=True, slots=True)
class Part:
    """Some bytes that a worker needs; `certain`: it cannot do without them."""

    what: str
    bytes: int
    certain: bool


@dataclass(frozen=True, slots=True)
class Need:
    """What one worker needs on its device (for an engine over several GPUs: on each).

    Attributes:
        parts: what it holds at its fullest moment.
        resting: what it keeps under placement ``colocate`` while others have their turn.
        sure: the certain parts of the moment that has most of these; empty: those among `parts`.
    """

    who: str
    parts: tuple[Part, ...]
    resting: tuple[Part, ...] = (Part("libraries", PROCESS_BYTES, False),)
    sure: tuple[Part, ...] = ()

    def at_rest(self) -> Need:
        """What it needs while others have their turn."""
        return Need(f"{self.who} at rest", self.resting)

    @property
    def certain(self) -> tuple[Part, ...]:
        """What it cannot do without."""
        return self.sure or tuple(part for part in self.parts if part.certain)

    @property
    def least(self) -> int:
        """Bytes that it cannot do without."""
        return sum(part.bytes for part in self.certain)

    @property
    def total(self) -> int:
        """All bytes, estimates too."""
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a prompt and of an answer, at most or as estimated."""

    prompt: int
    answer: int

    @property
    def total(self) -> int:
        return self.prompt + self.answer


def size(num_bytes: int) -> str:
    """``1.9 MiB``, ``26.2 GiB``."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 2 else f"{num_bytes / (1 << 20):.1f} MiB"


# ---- engine ---------------------------------------------------------------------------------------------------------


def engine_on_gpu(facts: ModelFacts | None, sample: SampleConfig, *, dtype: str, gpu_bytes: int) -> Need:
    """An engine on each of its GPUs: it takes its share of the memory, and caches in what the weights leave of it."""
    ranks, share = sample.tensor_parallel_size, int(sample.gpu_memory_utilization * gpu_bytes)
    weights = 0 if facts is None else facts.weights_bytes(dtype) // ranks
    cache = share - weights - _ENGINE_BYTES
    if facts is None or cache <= 0:
        whole = Part(f"sample.gpu_memory_utilization {sample.gpu_memory_utilization:g}", share, True)
        return Need("sampler", (whole,))
    tokens = cache * min(ranks, facts.num_kv_heads) // facts.kv_bytes(dtype)
    return Need(
        "sampler",
        (
            Part(f"weights in {dtype}" + (f" / {ranks}" if ranks > 1 else ""), weights, True),
            Part("graphs and activations", _ENGINE_BYTES, True),
            Part(f"KV cache of {tokens:,} tokens", cache, True),
        ),
    )


def engine_inside(facts: ModelFacts, sample: SampleConfig, *, dtype: str) -> Need:
    """What must find room within an engine's share of each of its GPUs, for one answer of full length at a time."""
    ranks = sample.tensor_parallel_size
    length = min(sample.max_model_len or facts.context or 0, facts.context or sample.max_model_len or 0)
    cache = length * facts.kv_bytes(dtype) // min(ranks, facts.num_kv_heads)
    return Need(
        "sampler",
        (
            Part(
                f"weights in {dtype}" + (f" / {ranks}" if ranks > 1 else ""), facts.weights_bytes(dtype) // ranks, True
            ),
            Part(f"KV cache of one answer with its prompt, {length:,} tokens", cache, True),
            Part("graphs and activations", _ENGINE_BYTES, False),
        ),
    )


def engine_on_cpu(facts: ModelFacts, sample: SampleConfig, *, dtype: str) -> Need:
    """An engine in a machine's memory; its cache is as large as the config says."""
    return Need(
        "sampler",
        (
            Part(f"weights in {dtype}", facts.weights_bytes(dtype), True),
            Part(f"sample.kv_cache_gib {sample.kv_cache_gib}", sample.kv_cache_gib * GIB, False),
            Part("libraries", PROCESS_BYTES, False),
        ),
    )


# ---- trainer's machine ----------------------------------------------------------------------------------------------


def host_of_trainer(facts: ModelFacts, update: UpdateConfig, *, num_trained: int) -> Need:
    """What a rank on a GPU needs beside it, in the machine's memory: all weights in float32 while a policy is saved,
    and the optimizer where it is offloaded."""
    parts = [Part("all weights in float32, while a policy is saved", facts.num_parameters * 4, True)]
    if update.offload_optimizer:
        state = num_trained * 16 // update.workers  # four float32 numbers each
        parts.append(Part("float32 masters, AdamW's moments and gradients, offloaded", state, True))
    return Need("trainer", (*parts, Part("libraries", PROCESS_BYTES, False)))


def host_of_resting(who: str, weights: list[Part]) -> Need:
    """What an engine or a reward model on a GPU keeps beside it, in the machine's memory, while others have it."""
    return Need(who, (Part("libraries", PROCESS_BYTES, False),), (*weights, Part("libraries", PROCESS_BYTES, False)))


def overhead() -> Need:
    """What a machine needs besides the run's workers."""
    return Need("machine", (Part("Ray, the driver and tasks", 2 * PROCESS_BYTES, False),))


# ---- reward model ---------------------------------------------------------------------------------------------------


def scorer(models: list[tuple[ModelReward, ModelFacts]]) -> Need:
    """The actor that holds every reward model."""
    parts = []
    for reward, facts in models:
        widest = 4 * facts.hidden_size + 3 * facts.intermediate_size
        batch = reward.batch_tokens * widest * bytes_of(reward.dtype)
        parts += [
            Part(f"{reward.path} in {reward.dtype}", facts.weights_bytes(reward.dtype), True),
            Part(f"a layer's activations of {reward.batch_tokens:,} tokens", batch, False),
        ]
    return Need("scorer", (*parts, Part("libraries", PROCESS_BYTES, False)))

"""How much memory each worker of a run needs, estimated from sizes alone.

Every need is a list of parts in plain words. A part is certain where the worker cannot do without those bytes
(weights, gradients, optimizer); the rest are estimates, made to come out too high rather than too low. Training was
measured on a Llama of 59 million parameters under ZeRO 0 to 3, one worker and two, float32 and bfloat16: the sum of
the parts was between a tenth below and a fifth above the peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.plan.model_facts import ModelFacts, bytes_of
from stages.sample.config import SampleConfig
from stages.score.config import ModelReward
from stages.update.config import CHUNK_BYTES, KEPT_BYTES, UpdateConfig

GIB = 1 << 30
_MASTER_AND_MOMENTS = 12  # bytes a parameter: float32 weights, and AdamW's two moments
_SUM = 4  # bytes a parameter: gradients add up in float32
_BUCKET = 500_000_000  # parameters in a bucket of DeepSpeed's, whose size this project leaves as it is
_GATHERED = 1_000_000_000  # parameters that ZeRO 3 holds whole at once, at most
_PROCESS_BYTES = GIB  # libraries, and on a GPU the context
_CHUNKS = 4  # of logits at a time: those of one chunk, their log-probs, and what the backward makes of them
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
        resting: what it keeps under placement ``colocate`` while others have their turn.
    """

    who: str
    parts: tuple[Part, ...]
    resting: tuple[Part, ...] = (Part("libraries", _PROCESS_BYTES, False),)

    def at_rest(self) -> Need:
        """What it needs while others have their turn."""
        return Need(f"{self.who} at rest", self.resting)

    @property
    def least(self) -> int:
        """Bytes that it cannot do without."""
        return sum(part.bytes for part in self.parts if part.certain)

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
            Part("libraries", _PROCESS_BYTES, False),
        ),
    )


# ---- trainer --------------------------------------------------------------------------------------------------------


def trainer(facts: ModelFacts, update: UpdateConfig, *, dtype: str, lengths: Lengths, on_cpu: bool) -> Need:
    """One rank of the training group, at the peak of a step; or while it loads or saves, if that takes more."""
    num, each, ranks, stage = facts.num_parameters, bytes_of(dtype), update.workers, update.zero_stage
    num_trained = trained_parameters(facts, update)

    def split(what: str, size: int, *, from_stage: int) -> Part:
        if stage < from_stage or ranks == 1:
            return Part(what, size, True)
        return Part(f"{what} / {ranks} workers", size // ranks, True)

    weights = split(f"weights in {dtype}", num * each, from_stage=3)
    of_adapters = " of the adapters" if update.lora is not None else ""
    gradients = split(f"gradients{of_adapters} in float32", num_trained * _SUM, from_stage=2)
    state = split(f"float32 masters{of_adapters} and AdamW's moments", num_trained * _MASTER_AND_MOMENTS, from_stage=1)
    parts = [weights, gradients] if update.offload_optimizer and not on_cpu else [weights, gradients, state]
    least = sum(part.bytes for part in parts)
    if num * each > least:
        parts.append(Part("the rest of the weights, whole on every rank while it loads", num * each - least, True))
    elif on_cpu and num * 4 > gradients.bytes:
        beyond = num * 4 - gradients.bytes  # a step's gradients are gone by then
        parts.append(Part("the rest of the weights, in float32 on every rank while it saves", beyond, True))
    num_tokens, recomputed = tokens_a_forward(update, lengths), update.gradient_checkpointing
    parts += [
        Part("a step's scratch and DeepSpeed's buckets", _scratch_bytes(facts, update, dtype=dtype), False),
        Part(
            f"activations of {num_tokens:,} tokens",
            activation_bytes(facts, num_tokens=num_tokens, dtype=dtype, recomputed=recomputed),
            False,
        ),
        Part(
            f"chunks of logits over {facts.vocab_size:,} tokens",
            head_bytes(facts, update, num_tokens=num_tokens),
            False,
        ),
        Part("libraries", _PROCESS_BYTES, False),
    ]
    return Need("trainer", tuple(parts))


def trained_parameters(facts: ModelFacts, update: UpdateConfig) -> int:
    """How many numbers the optimizer moves; of adapters as many as on all linear maps of a layer like Llama's."""
    if update.lora is None:
        return facts.num_parameters
    hidden, heads = facts.hidden_size, facts.num_heads * facts.head_size
    keys = facts.num_kv_heads * facts.head_size
    a_layer = 2 * (hidden + heads) + 2 * (hidden + keys) + 3 * (hidden + facts.intermediate_size)
    return min(facts.num_parameters, update.lora.r * facts.num_layers * a_layer)


def _scratch_bytes(facts: ModelFacts, update: UpdateConfig, *, dtype: str) -> int:
    num, stage = trained_parameters(facts, update), update.zero_stage
    if stage < 1:
        return num * _SUM
    buckets = min(num, _BUCKET) * 4 * (3 if stage == 3 else 2)
    gathered = min(facts.num_parameters, _GATHERED) * bytes_of(dtype) if stage == 3 else 0
    return num * _SUM // update.workers + buckets + gathered


def tokens_a_forward(update: UpdateConfig, lengths: Lengths) -> int:
    """The most tokens in one forward pass; a pair shares its prompt, and is never parted."""
    pair = lengths.prompt + 2 * lengths.answer
    return max(pair, min(update.micro_batch_size * pair, update.max_tokens_per_batch))


def activation_bytes(facts: ModelFacts, *, num_tokens: int, dtype: str, recomputed: bool = False) -> int:
    """What all layers keep for the backward pass.

    Counted by hooks on Llama, Qwen2 and GPT-2: a layer keeps 8 to 12 numbers a hidden unit, 4 an inner unit of its
    feed-forward part, and 2 a key and value. Computed again, each layer's input is kept, and one layer at a time whole.
    """
    a_layer = 12 * facts.hidden_size + 4 * facts.intermediate_size + 2 * facts.num_kv_heads * facts.head_size
    each = facts.num_layers * facts.hidden_size + a_layer if recomputed else facts.num_layers * a_layer
    return num_tokens * each * bytes_of(dtype)


def head_bytes(facts: ModelFacts, update: UpdateConfig, *, num_tokens: int) -> int:
    """Logits in chunks, of which some are kept for the backward pass; and the output embedding's float32 gradient."""
    logits = 4 * num_tokens * facts.vocab_size
    gradient = 4 * facts.hidden_size * facts.vocab_size if update.lora is None else 0
    return min(logits, KEPT_BYTES) + _CHUNKS * min(logits, CHUNK_BYTES) + gradient


def host_of_trainer(facts: ModelFacts, update: UpdateConfig) -> Need:
    """What a rank on a GPU needs beside it, in the machine's memory: all weights in float32 while a policy is saved,
    and the optimizer where it is offloaded."""
    parts = [Part("all weights in float32, while a policy is saved", facts.num_parameters * 4, True)]
    if update.offload_optimizer:
        state = trained_parameters(facts, update) * (_MASTER_AND_MOMENTS + _SUM) // update.workers
        parts.append(Part("float32 masters, AdamW's moments and gradients, offloaded", state, True))
    return Need("trainer", (*parts, Part("libraries", _PROCESS_BYTES, False)))


def host_of_resting(who: str, weights: list[Part]) -> Need:
    """What an engine or a reward model on a GPU keeps beside it, in the machine's memory, while others have it."""
    return Need(who, (Part("libraries", _PROCESS_BYTES, False),), (*weights, Part("libraries", _PROCESS_BYTES, False)))


def overhead() -> Need:
    """What a machine needs besides the run's workers."""
    return Need("machine", (Part("Ray, the driver and tasks", 2 * _PROCESS_BYTES, False),))


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
    return Need("scorer", (*parts, Part("libraries", _PROCESS_BYTES, False)))

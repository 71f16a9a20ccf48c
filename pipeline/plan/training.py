"""How much memory a training rank needs, counted from sizes: what it holds at the fullest moment of a round's update.

A rank loads, computes forwards, goes back through them, reduces gradients, and saves. What it holds at each of these
moments is written down here as the trainer, torch and DeepSpeed 0.19.8 allocate it; the need is that of the fullest.
`benchmarks/memory.py` measures beside it.

On a CPU the trainer has glibc keep what is freed in blocks below `KEPT_BLOCK_BYTES` (`stages.update.allocation`): a
forward's activations stay in memory while gradients are reduced, and without ZeRO's buffers one step's gradients leave
holes that the next step's activations do not fit into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pipeline.plan.memory import PROCESS_BYTES, Lengths, Need, Part
from pipeline.plan.model_facts import ModelFacts, bytes_of
from stages.update.allocation import KEPT_BLOCK_BYTES
from stages.update.config import CHUNK_BYTES, KEPT_BYTES, UpdateConfig

FLOAT = 4  # bytes: gradients add up in float32, and masters and moments are float32
_BUCKET = 500_000_000  # parameters in a bucket of DeepSpeed's, whose size this project leaves as it is
_GATHERED = 1_000_000_000  # parameters that ZeRO 3 holds whole at once, at most
_CHUNKS = 2  # of logits at a time: the logits, and their log-probs


def trainer(facts: ModelFacts, update: UpdateConfig, *, dtype: str, lengths: Lengths, on_cpu: bool) -> Need:
    """One rank of the training group, at the fullest moment of a round's update."""
    rank = _Rank(facts, update, dtype, lengths, on_cpu)
    moments: Sequence[Callable[[], list[Part]]] = (
        rank.loading,
        rank.computing,
        rank.going_back,
        rank.reducing,
        rank.saving,
    )
    libraries = Part("libraries", PROCESS_BYTES, False)
    needs = [Need("trainer", (*(part for part in moment() if part.bytes), libraries)) for moment in moments]
    sure = max(needs, key=lambda need: need.least).certain
    return replace(max(needs, key=lambda need: need.total), sure=sure)


def trained_parameters(facts: ModelFacts, update: UpdateConfig) -> int:
    """How many numbers the optimizer moves; of adapters as many as on all linear maps of a layer like Llama's."""
    if update.lora is None:
        return facts.num_parameters
    hidden, heads = facts.hidden_size, facts.num_heads * facts.head_size
    keys = facts.num_kv_heads * facts.head_size
    a_layer = 2 * (hidden + heads) + 2 * (hidden + keys) + 3 * (hidden + facts.intermediate_size)
    return min(facts.num_parameters, update.lora.r * facts.num_layers * a_layer)


def pair_tokens(lengths: Lengths) -> int:
    """Tokens of a pair in a forward: its answers share the prompt."""
    return lengths.prompt + 2 * lengths.answer


def tokens_a_forward(update: UpdateConfig, lengths: Lengths) -> int:
    """The most tokens in one forward pass; a pair is never parted."""
    pair = pair_tokens(lengths)
    return max(pair, min(update.micro_batch_size * pair, update.max_tokens_per_batch))


def activation_bytes(facts: ModelFacts, *, num_tokens: int, dtype: str, recomputed: bool = False) -> int:
    """What all layers keep for the backward pass.

    Counted by hooks on Llama, Qwen2 and GPT-2: a layer keeps 8 to 12 numbers a hidden unit, 4 an inner unit of its
    feed-forward part, and 2 a key and value. Computed again, each layer's input is kept, and one layer at a time whole.
    """
    a_layer = 12 * facts.hidden_size + 4 * facts.intermediate_size + 2 * facts.num_kv_heads * facts.head_size
    each = facts.num_layers * facts.hidden_size + a_layer if recomputed else facts.num_layers * a_layer
    return num_tokens * each * bytes_of(dtype)


@dataclass(frozen=True, slots=True)
class _Rank:
    """One rank of an update, and what it holds at each moment."""

    facts: ModelFacts
    update: UpdateConfig
    dtype: str
    lengths: Lengths
    on_cpu: bool

    # ---- moments ----------------------------------------------------------------------------------------------------

    def loading(self) -> list[Part]:
        """Whole weights are read on every rank, and DeepSpeed makes flat copies of those that are trained."""
        copies = self._trained * self._each if self._stage in (1, 2) else 0
        whole = Part(f"weights in {self.dtype}, whole while it loads", self._num * self._each, True)
        return [whole, Part("flat copies of the weights", copies, True), self._masters()]

    def computing(self) -> list[Part]:
        """The end of a forward, where the way back through the head begins."""
        before = self._gradients() if self._accumulates else Part("", 0, False)
        bucket = Part("", 0, False) if self.on_cpu else self._bucket()  # on a CPU its pages are not touched yet
        return [*self._held(), before, *self._activations(), self._vocabulary(1), bucket, self._holes()]

    def going_back(self) -> list[Part]:
        """The end of a backward: the embedding's gradient is there beside those that add up.

        From stage 2 on no gradient is left of the forward before, and torch copies the new one for DeepSpeed to take.
        """
        beside = (2 if self._stage > 1 else int(self._accumulates)) + int(self.facts.tied)
        return [*self._held(), self._gradients(), self._bucket(), self._vocabulary(beside), *self._kept()]

    def reducing(self) -> list[Part]:
        """Gradients are averaged over the ranks, and what is this rank's is taken out."""
        return [*self._held(), self._gradients(), self._bucket(), self._reduced(), *self._kept()]

    def saving(self) -> list[Part]:
        """Rank 0 gathers all weights in float32, and rounds them where the policy's dtype is another."""
        if not self.on_cpu:
            return []  # they are gathered in the machine's memory: `memory.host_of_trainer`
        rounded = self._num * self._each if self._each < FLOAT else 0
        copies = Part("all weights in float32, while they are saved", self._num * FLOAT, False)
        return [*self._held(), copies, Part(f"their roundings to {self.dtype}", rounded, False), *self._kept()]

    # ---- what is held through the update ----------------------------------------------------------------------------

    def _held(self) -> list[Part]:
        weights = self._shared(f"weights in {self.dtype}", self._num * self._each, from_stage=3)
        if self.update.offload_optimizer and not self.on_cpu:
            return [weights]
        moments = self._shared(f"AdamW's moments{self._of_adapters}", self._trained * 2 * FLOAT, from_stage=1)
        return [weights, self._masters(), moments]

    def _masters(self) -> Part:
        """ZeRO has copies of the weights that it steps, in float32 too; without it only rounded ones have masters."""
        if (self._stage == 0 and self.dtype == "float32") or (self.update.offload_optimizer and not self.on_cpu):
            return Part("", 0, False)
        return self._shared(f"float32 masters{self._of_adapters}", self._trained * FLOAT, from_stage=1)

    def _gradients(self) -> Part:
        """Those that add up over a step's forwards."""
        if self.update.offload_optimizer and not self.on_cpu:
            return Part("", 0, False)
        return self._shared(f"gradients{self._of_adapters} in float32", self._trained * FLOAT, from_stage=2)

    # ---- a forward and its backward ---------------------------------------------------------------------------------

    def _activations(self) -> list[Part]:
        num_tokens, facts = tokens_a_forward(self.update, self.lengths), self.facts
        layers = activation_bytes(
            facts, num_tokens=num_tokens, dtype=self.dtype, recomputed=self.update.gradient_checkpointing
        )
        predicted = FLOAT * num_tokens * facts.vocab_size * 2 * self.lengths.answer // pair_tokens(self.lengths)
        logits = min(predicted, KEPT_BYTES) + _CHUNKS * min(predicted, CHUNK_BYTES)
        return [
            Part(f"activations of {num_tokens:,} tokens", layers, False),
            Part(f"chunks of logits over {facts.vocab_size:,} tokens", logits, False),
        ]

    def _vocabulary(self, count: int) -> Part:
        """Whole gradients of the embedding, or the head, beside those that add up."""
        num = 0 if self.update.lora is not None else count * self.facts.hidden_size * self.facts.vocab_size
        return Part("a backward's gradients of embedding and head", num * FLOAT, False)

    def _kept(self) -> list[Part]:
        """What glibc keeps of a forward when it is over."""
        if not self.on_cpu:
            return []
        num_tokens = tokens_a_forward(self.update, self.lengths)
        block = num_tokens * self.facts.intermediate_size * self._each
        layers, logits = self._activations()
        small = layers if block < KEPT_BLOCK_BYTES else Part("", 0, False)
        return [small, logits, self._holes()]

    def _holes(self) -> Part:
        """What the gradients of the step before leave; under ZeRO 2 and 3 they lie in buffers of many."""
        if not self.on_cpu or self._stage > 1 or self.update.lora is not None:
            return Part("", 0, False)
        facts, matrices = self.facts, 1 if self.facts.tied else 2
        layers = facts.num_parameters - matrices * facts.hidden_size * facts.vocab_size
        block = facts.hidden_size * facts.intermediate_size * FLOAT
        num = max(0, layers) if block < KEPT_BLOCK_BYTES else 0
        return Part("holes of an earlier step's gradients", num * FLOAT, False)

    # ---- reduction --------------------------------------------------------------------------------------------------

    def _bucket(self) -> Part:
        """DeepSpeed's, which gradients are copied to; on a GPU it is as large as it may get, on a CPU as it is used."""
        if self._stage == 0:
            return Part("", 0, False)
        num = min(self._trained, _BUCKET) if self.on_cpu else _BUCKET
        each = self._each if self._stage == 2 else FLOAT
        buckets = 2 if self._stage == 3 else 1
        return Part("DeepSpeed's bucket of gradients", buckets * num * each, False)

    def _reduced(self) -> Part:
        """Copies of what is sent to each rank, or what is taken out for this one.

        Rounded gradients under stage 2 are put in one piece, and that is copied to float32.
        """
        num, ranks = min(self._trained, _BUCKET), self.update.workers
        if self._stage == 0:
            return Part("gradients in one piece, to be reduced", num * FLOAT if ranks > 1 else 0, False)
        if self._stage == 3:
            gathered = min(self._num, _GATHERED) * self._each
            return Part("parameters that ZeRO 3 gathers, and gradients to be reduced", gathered + num * FLOAT, False)
        if self._stage == 1 and ranks == 1:
            return Part("", 0, False)
        rounded = self._each if self._stage == 2 and self._each < FLOAT else 0
        copies = 2 if self.on_cpu and ranks > 1 else 1  # gloo's thread still holds the one before
        return Part("gradients of a rank, reduced", copies * num * (FLOAT + rounded) // ranks, False)

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @property
    def _num(self) -> int:
        return self.facts.num_parameters

    @property
    def _trained(self) -> int:
        return trained_parameters(self.facts, self.update)

    @property
    def _each(self) -> int:
        """Bytes of a weight."""
        return bytes_of(self.dtype)

    @property
    def _stage(self) -> int:
        return self.update.zero_stage

    @property
    def _of_adapters(self) -> str:
        return "" if self.update.lora is None else " of the adapters"

    @property
    def _accumulates(self) -> bool:
        """Whether a step has several forwards, each beside the gradients of those before it."""
        pairs = tokens_a_forward(self.update, self.lengths) // pair_tokens(self.lengths)
        return self.update.global_batch_size > pairs * self.update.workers

    def _shared(self, what: str, num_bytes: int, *, from_stage: int) -> Part:
        """A part that the ranks share out from a ZeRO stage on; certain."""
        ranks = self.update.workers
        if self._stage < from_stage or ranks == 1:
            return Part(what, num_bytes, True)
        return Part(f"{what} / {ranks} workers", num_bytes // ranks, True)

"""Whether some hardware can hold a run: its workers, and the memory that they need where they are placed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.resources import Place, Resources, place
from pipeline.config import Config
from pipeline.layout import lay_out
from pipeline.plan import memory, training
from pipeline.plan.hardware import Hardware
from pipeline.plan.memory import Lengths, Need, size
from pipeline.plan.model_facts import ModelFacts
from pipeline.plan.survey import Survey
from stages.score.config import ModelReward

_UNKNOWN_PROMPT_TOKENS = 512
_TEMPLATE_TOKENS = 16
_BYTES_A_TOKEN = 3  # of text, cautiously; with a vocabulary of single characters, 1
_SMALL_VOCABULARY = 5000


@dataclass(frozen=True, slots=True)
class Shortage:
    """Something that cannot be held (`certain`), or by an estimate will not.

    Attributes:
        missing_bytes: by how much; None where it is no matter of bytes.
    """

    where: str
    wanted: str
    got: str
    fix: str
    certain: bool
    missing_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Worker:
    """One kind of worker: how many, what each asks for, and its needs where they are known.

    Attributes:
        on_gpu: on each GPU that it holds; None without GPUs, or where the model is not known.
        on_host: in its machine's memory.
    """

    kind: str
    count: int
    resources: Resources
    on_gpu: Need | None
    on_host: Need | None


def workers_of(config: Config, survey: Survey, hardware: Hardware, *, whole: Config) -> list[Worker]:
    """Who works in a round of the run of `whole`, and what each needs.

    Raises:
        ConfigError: if the workers cannot share the GPUs there are.
    """
    layout, facts, dtype = lay_out(whole, hardware.devices), survey.policy.facts, config.policy.dtype
    sampler = scorer = trainer = beside = None
    if layout.sampler.gpus and hardware.gpu_bytes is not None:
        sampler = memory.engine_on_gpu(facts, config.sample, dtype=dtype, gpu_bytes=hardware.gpu_bytes)
    elif facts is not None:
        sampler = memory.engine_on_cpu(facts, config.sample, dtype=dtype)
    if facts is not None:
        lengths = lengths_of(config, survey)
        on_cpu = not layout.trainer.gpus
        trainer = training.trainer(facts, config.update, dtype=dtype, lengths=lengths, on_cpu=on_cpu)
        beside = (
            None
            if on_cpu
            else memory.host_of_trainer(
                facts, config.update, num_trained=training.trained_parameters(facts, config.update)
            )
        )
    models = [reward for reward in config.rewards if isinstance(reward, ModelReward)]
    known = [(reward, found) for reward in models if (found := survey.rewards[reward.path].facts) is not None]
    if len(known) == len(models):
        scorer = memory.scorer(known)
    num_engines, asleep = config.num_engines, None
    if config.cluster.placement == "colocate" and facts is not None:
        weights = memory.Part(f"weights in {dtype}, while it sleeps", facts.weights_bytes(dtype), True)
        asleep = memory.host_of_resting("sampler", [weights])
    workers = [
        _worker("sampler", num_engines, layout.sampler, sampler, asleep),
        _worker("scorer", config.num_scorers, layout.scorer, scorer, _host_of_scorer(config, known)),
        _worker("trainer", config.update.workers, layout.trainer, trainer, beside),
        Worker("task", 1, layout.task, None, None),
    ]
    return [worker for worker in workers if worker.count]


def _host_of_scorer(config: Config, known: Sequence[tuple[ModelReward, ModelFacts]]) -> Need | None:
    """What reward models keep beside a GPU that they share in turn."""
    if config.cluster.placement != "colocate":
        return None
    weights = [
        memory.Part(f"{reward.path}, while others have the GPU", facts.weights_bytes(reward.dtype), True)
        for reward, facts in known
    ]
    return memory.host_of_resting("scorer", weights)


def _worker(kind: str, count: int, resources: Resources, need: Need | None, beside: Need | None) -> Worker:
    return (
        Worker(kind, count, resources, need, beside) if resources.gpus else Worker(kind, count, resources, None, need)
    )


def lengths_of(config: Config, survey: Survey) -> Lengths:
    """Tokens of the longest prompt, estimated from its bytes, and of the longest answer; both within the context."""
    file = survey.data_of(config)
    return _lengths(config, survey, None if file is None else file.longest_bytes)


def mean_lengths_of(config: Config, survey: Survey) -> Lengths:
    """The same with prompts of mean length."""
    file = survey.data_of(config)
    return _lengths(config, survey, None if file is None else file.mean_bytes)


def _lengths(config: Config, survey: Survey, prompt_bytes: int | None) -> Lengths:
    facts = survey.policy.facts
    prompt = _UNKNOWN_PROMPT_TOKENS
    if prompt_bytes is not None:
        prompt = _tokens(prompt_bytes, facts.vocab_size if facts else None)
    context = config.sample.max_model_len or (facts.context if facts else None)
    if config.pairs is not None:  # estimated from whole rows: half of each is taken for the prompt
        whole = min(prompt, config.pairs.max_length or prompt, context or prompt)
        return Lengths(max(1, whole // 2), max(1, whole - whole // 2))
    answer = config.sample.max_new_tokens
    if context is not None:
        prompt = max(1, min(prompt, context - answer))
    return Lengths(prompt, answer)


def _tokens(num_bytes: int, vocab_size: int | None) -> int:
    each = 1 if vocab_size is not None and vocab_size < _SMALL_VOCABULARY else _BYTES_A_TOKEN
    return -(-num_bytes // each) + _TEMPLATE_TOKENS


# ---- shortages ------------------------------------------------------------------------------------------------------


def shortages_of(config: Config, survey: Survey, hardware: Hardware, workers: Sequence[Worker]) -> list[Shortage]:
    """Everything in a round that the hardware, or the models, cannot hold."""
    found = _beyond_model(config, survey)
    each = [worker for worker in workers for _ in range(worker.count)]
    places = place(hardware.nodes, [worker.resources for worker in each])
    if places is None:
        asked = ", ".join(
            f"{w.count} x {w.kind} ({w.resources.cpus:g} cores, {w.resources.gpus:g} GPUs)" for w in workers
        )
        fix = "fewer sample.engines or update.workers, or more machines"
        return [*found, Shortage("workers", f"each whole on one machine: {asked}", hardware.told, fix, True)]
    found += _engine_too_small(config, survey, hardware, workers)
    return found + _memory_shortages(config, _fullest(config, hardware, list(zip(each, places, strict=True))))


def _beyond_model(config: Config, survey: Survey) -> list[Shortage]:
    """Settings that the models or the prompts, as far as they are here, do not allow."""
    facts, file, sample = survey.policy.facts, survey.data_of(config), config.sample
    found, asked = [], config.prompts.per_round if config.prompts is not None else 0
    if file is not None and file.num_rows and file.num_rows < asked:
        wanted = f"at most the {file.num_rows:,} prompts there are"
        fix = f"--set prompts.per_round={file.num_rows}"
        found.append(Shortage("prompts.per_round", wanted, f"{asked:,}", fix, True))
    if facts is None:
        return found
    if file is not None and file.chats and facts.chat_template is False:
        wanted, got = "a chat template, since the prompts are chats", "a tokenizer without one"
        fix = "use a model with a chat template, or a column of text"
        found.append(Shortage(f"policy.path {config.policy.path}", wanted, got, fix, True))
    if facts.context is not None and (sample.max_model_len or 0) > facts.context:
        wanted, fix = f"at most the model's context {facts.context:,}", f"--set sample.max_model_len={facts.context}"
        found.append(Shortage("sample.max_model_len", wanted, f"{sample.max_model_len:,}", fix, True))
    if config.num_engines and facts.context is not None and sample.max_new_tokens >= facts.context:
        wanted, fix = (
            f"less than the model's context {facts.context:,}",
            f"--set sample.max_new_tokens={facts.context // 2}",
        )
        found.append(Shortage("sample.max_new_tokens", wanted, f"{sample.max_new_tokens:,}", fix, True))
    if facts.num_heads % sample.tensor_parallel_size:
        wanted = f"a divisor of the model's {facts.num_heads} attention heads"
        largest = max(n for n in range(1, sample.tensor_parallel_size) if facts.num_heads % n == 0)
        fix = f"--set sample.tensor_parallel_size={largest}"
        got = str(sample.tensor_parallel_size)
        found.append(Shortage("sample.tensor_parallel_size", wanted, got, fix, True))
    return found


def _engine_too_small(config: Config, survey: Survey, hardware: Hardware, workers: Sequence[Worker]) -> list[Shortage]:
    """Whether an engine's share of its GPUs holds the weights and one answer."""
    facts, share = survey.policy.facts, workers[0].on_gpu if config.num_engines else None
    if facts is None or share is None:
        return []
    inside = memory.engine_inside(facts, config.sample, dtype=config.policy.dtype)
    if inside.total <= share.total:
        return []
    where = "sample: an engine's memory on each GPU"
    fix = "raise sample.tensor_parallel_size or sample.gpu_memory_utilization, or lower sample.max_model_len"
    return [_shortage(where, [inside], share.total, fix)]


@dataclass(frozen=True, slots=True)
class Filled:
    """The fullest of some devices: what it holds, and its room; None where that is not known."""

    where: str
    needs: Sequence[Need]
    room: int | None

    @property
    def bytes(self) -> int:
        return sum(need.total for need in self.needs)


def fullest(config: Config, hardware: Hardware, workers: Sequence[Worker]) -> list[Filled]:
    """The fullest GPU and the fullest machine; none where the workers find no place, or nothing is known of them."""
    each = [worker for worker in workers for _ in range(worker.count)]
    places = place(hardware.nodes, [worker.resources for worker in each])
    return [] if places is None else _fullest(config, hardware, list(zip(each, places, strict=True)))


def _memory_shortages(config: Config, found: Sequence[Filled]) -> list[Shortage]:
    """Devices that overflow."""
    return [
        _shortage(full.where, full.needs, full.room, _advice(config, full.needs))
        for full in found
        if full.room is not None and full.bytes > full.room
    ]


def _fullest(config: Config, hardware: Hardware, placed: Sequence[tuple[Worker, Place]]) -> list[Filled]:
    on_gpu: dict[tuple[int, int], list[Need]] = defaultdict(list)
    on_host: dict[int, list[Need]] = defaultdict(list)
    for worker, spot in placed:
        for gpu in spot.gpus if worker.on_gpu is not None else ():
            on_gpu[spot.node, gpu].append(worker.on_gpu)  # type: ignore[arg-type]
        if worker.on_host is not None:
            on_host[spot.node].append(worker.on_host)
    at_once = _fullest_turn if config.cluster.placement == "colocate" else list
    found = []
    for where, groups, room in (
        ("memory of a GPU", [at_once(needs) for needs in on_gpu.values()], hardware.gpu_bytes),
        (
            "memory of a machine",
            [[*at_once(needs), memory.overhead()] for needs in on_host.values()],
            hardware.ram_bytes,
        ),
    ):
        needs = max(groups, key=lambda needs: sum(need.total for need in needs), default=[])
        if needs:
            found.append(Filled(where, needs, room))
    return found


def _fullest_turn(needs: Sequence[Need]) -> list[Need]:
    """What a device has to hold when the kind of worker that fills it most has its turn, and the others rest."""
    turns = (
        [need if need.who == kind else need.at_rest() for need in needs] for kind in sorted({n.who for n in needs})
    )
    return max(turns, key=lambda turn: sum(need.total for need in turn))


def _shortage(where: str, needs: Sequence[Need], room: int, fix: str) -> Shortage:
    certain = sum(need.least for need in needs) > room
    parts = [
        (f"{need.who}: {part.what}", part.bytes) for need in needs for part in (need.certain if certain else need.parts)
    ]
    total = sum(number for _, number in parts)
    listed = "".join(f"\n{size(number):>10}  {what}" for what, number in parts if 100 * number >= total)
    wanted = f"{size(total)}{' at the least' if certain else ', by an estimate'}{listed}"
    return Shortage(where, wanted, size(room), fix, certain, missing_bytes=sum(need.total for need in needs) - room)


def _advice(config: Config, needs: Sequence[Need]) -> str:
    """What to change, beginning with whoever needs most."""
    largest = max(needs, key=lambda need: need.total)
    update, advice = config.update, []
    if largest.who == "trainer":
        if update.zero_stage < 3 and update.workers > 1:
            advice.append("--set update.zero_stage=3")
        if largest.total > largest.least and update.micro_batch_size > 1:
            advice.append(f"a smaller update.micro_batch_size than {update.micro_batch_size}")
        if update.lora is None:
            advice.append("--set update.lora.r=16")
        advice.append("more update.workers on devices of their own")
    elif largest.who == "sampler":
        advice.append("a smaller sample.gpu_memory_utilization where GPUs are shared, or fewer sample.engines")
    else:
        advice.append("a smaller reward model, or its dtype: bfloat16")
    return ", ".join([*advice, "a smaller policy, or larger devices"])

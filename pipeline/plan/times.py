"""How long a round takes by stage, from the rates that are known: seconds, tokens and accelerator-hours, at most.

Answers are taken to be as long as allowed and every prompt to make its pairs, so that a round takes less where they are
shorter. Stages are told one after another; what overlaps, what starts and publishes, and rewards that are no models are
not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.config import Config
from pipeline.console import duration
from pipeline.plan.fit import Worker, mean_lengths_of
from pipeline.plan.hardware import Hardware
from pipeline.plan.rates import Rates
from pipeline.plan.rounds import RoundOutlook
from pipeline.plan.survey import Survey
from stages.score.config import ModelReward

_HOUR = 3600


@dataclass(frozen=True, slots=True)
class StageTime:
    """One stage of a round.

    Attributes:
        rows: that it works on: candidates, answers or pairs.
        tokens: that it puts through the model, or samples.
        seconds: None where its rate is not known.
        device_hours: of all devices that the run holds meanwhile.
    """

    stage: str
    rows: int
    tokens: int
    seconds: float | None
    device_hours: float | None


def times_of(
    found: RoundOutlook, config: Config, survey: Survey, rates: Rates | None, workers: Sequence[Worker], held: int
) -> list[StageTime]:
    """The stages of a round, in their order.

    Args:
        config: that holds in it.
        held: how many devices the run holds.
    """
    counts = {worker.kind: worker.count for worker in workers}

    def timed(stage: str, works: Sequence[_Work], rows: int, tokens: int) -> StageTime:
        each = [_seconds(work, rates, max(1, counts.get(_WHO[work.rate], 1))) for work in works]
        seconds = None if None in each else sum(each_s or 0.0 for each_s in each)
        if stage == "update" and seconds is not None and rates is not None:
            seconds += found.most_steps * rates.step_s
        return StageTime(stage, rows, tokens, seconds, None if seconds is None else seconds * held / _HOUR)

    times = [timed(work.rate, [work], work.rows, work.tokens) for work in _works(found, config, survey)]
    if config.evaluate is not None:
        works = [*_evaluation(config, survey)]
        times.append(timed("evaluate", works, works[0].rows, sum(work.tokens for work in works)))
    return times


@dataclass(frozen=True, slots=True)
class _Work:
    """Rows with their tokens, at a rate."""

    rate: str
    rows: int
    tokens: int


_WHO = {"prompt": "sampler", "sample": "sampler", "score": "scorer", "reference": "trainer", "update": "trainer"}


def _works(found: RoundOutlook, config: Config, survey: Survey) -> Iterator[_Work]:
    """A round's stages in their order."""
    lengths = mean_lengths_of(config, survey)
    pair, answers = lengths.prompt + 2 * lengths.answer, found.num_prompts * found.num_generations
    if answers:
        yield _Work("prompt", found.num_prompts, found.num_prompts * lengths.prompt)
        yield _Work("sample", answers, answers * lengths.answer)
        if models := _num_models(config):
            yield _Work("score", answers, models * answers * lengths.total)
    rows, tokens = found.most_pairs, found.most_pairs * pair
    if found.made == "groups":
        tokens = found.most_pairs * (lengths.prompt + found.num_generations * lengths.answer)
    if found.num_references:
        yield _Work("reference", found.num_references * rows, found.num_references * tokens)
    epochs = config.update.num_train_epochs
    yield _Work("update", epochs * rows, epochs * tokens)


def _evaluation(config: Config, survey: Survey) -> Iterator[_Work]:
    """One answer to each held-out prompt, its rewards, and its log-probs under the policy and the first one."""
    lengths, num = mean_lengths_of(config, survey), config.evaluate.num_prompts if config.evaluate else 0
    yield _Work("prompt", num, num * lengths.prompt)
    yield _Work("sample", num, num * lengths.answer)
    if models := _num_models(config):
        yield _Work("score", num, models * num * lengths.total)
    yield _Work("reference", 2 * num, 2 * num * lengths.total)


def _num_models(config: Config) -> int:
    return sum(isinstance(reward, ModelReward) for reward in config.rewards)


def _seconds(work: _Work, rates: Rates | None, workers: int) -> float | None:
    if rates is None or (work.rate not in rates.of and work.rate != "prompt"):
        return None
    rate = rates.of.get(work.rate)
    if rate is None:
        return 0.0  # a run's report counts it under sample
    return (work.rows if rate.unit == "rows" else work.tokens) / rate.per_s / workers


def held_devices(hardware: Hardware, workers: Sequence[Worker]) -> tuple[int, str]:
    """How many devices the run holds, GPUs where it has any, and what they are called."""
    gpus = sum(worker.count * worker.resources.gpus for worker in workers)
    if gpus:
        return min(hardware.devices.gpus, round(gpus + 0.49)), "GPU"
    return hardware.devices.cpus, "core"


def told(times: Sequence[StageTime], rates: Rates, device: str) -> str:
    """A round's stages in a sentence."""
    parts, known = [], [time for time in times if time.seconds is not None]
    for time in times:
        if time.stage == "prompt" and not time.seconds:
            continue
        spent = "not known" if time.seconds is None else duration(time.seconds)
        hours = "" if time.device_hours is None else f", {time.device_hours:.2g} {device}-hours"
        parts.append(f"{time.stage} {spent} ({time.tokens:,} tokens{hours})")
    seconds, all_hours = sum(t.seconds or 0 for t in known), sum(t.device_hours or 0 for t in known)
    whole = "" if len(known) == len(times) else ", without what is not known"
    return f"{duration(seconds)} and {all_hours:.2g} {device}-hours a round at most{whole}: {', '.join(parts)}"

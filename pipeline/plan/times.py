"""How long a round takes by stage, from the rates that are known: seconds, tokens and accelerator-hours, at most.

Answers are taken to be as long as allowed and every prompt to make its pairs, so that a round takes less where they are
shorter. Stages are told one after another; what overlaps, and what starts and publishes, is not counted.
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
    works = [*_works(found, config, survey)]
    times = []
    for stage, rows, tokens, kind in works:
        seconds = _seconds(stage, rows, tokens, rates, max(1, counts.get(kind, 1)))
        if stage == "update" and seconds is not None and rates is not None:
            seconds += found.most_steps * rates.step_s
        hours = None if seconds is None else seconds * held / _HOUR
        times.append(StageTime(stage, rows, tokens, seconds, hours))
    return times


def _works(found: RoundOutlook, config: Config, survey: Survey) -> Iterator[tuple[str, int, int, str]]:
    """Each stage with its rows, its tokens, and who works."""
    lengths = mean_lengths_of(config, survey)
    pair, answers = lengths.prompt + 2 * lengths.answer, found.num_prompts * found.num_generations
    if answers:
        yield "prompt", found.num_prompts, found.num_prompts * lengths.prompt, "sampler"
        yield "sample", answers, answers * lengths.answer, "sampler"
        if models := sum(isinstance(reward, ModelReward) for reward in config.rewards):
            yield "score", answers, models * answers * lengths.total, "scorer"
    rows, tokens = found.most_pairs, found.most_pairs * pair
    if found.made == "groups":
        tokens = found.most_pairs * (lengths.prompt + found.num_generations * lengths.answer)
    if found.num_references:
        yield "reference", found.num_references * rows, found.num_references * tokens, "trainer"
    epochs = config.update.num_train_epochs
    yield "update", epochs * rows, epochs * tokens, "trainer"


def _seconds(stage: str, rows: int, tokens: int, rates: Rates | None, workers: int) -> float | None:
    if rates is None or (stage not in rates.of and stage != "prompt"):
        return None
    rate = rates.of.get(stage)
    if rate is None:
        return 0.0  # a run's report counts it under sample
    return (rows if rate.unit == "rows" else tokens) / rate.per_s / workers


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
        parts.append(f"{time.stage} {spent} ({time.tokens:,} tokens)")
    seconds, hours = sum(t.seconds or 0 for t in known), sum(t.device_hours or 0 for t in known)
    whole = "" if len(known) == len(times) else ", without what is not known"
    return f"{duration(seconds)} and {hours:.2f} {device}-hours a round at most{whole}: {', '.join(parts)}"

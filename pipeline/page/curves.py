"""The curves over optimizer steps, from their metrics, and what each says in plain words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.console import share
from pipeline.numbers import finite
from pipeline.page.charts import Chart, Series
from pipeline.reading import round_settings
from stages.errors import InputError

_NO_PREFERENCE = (math.log(2), "ln 2: no preference")
_NEAR = 1e-3  # above what rounding in bfloat16 adds
_MAX_POINTS = 160  # a curve; more steps are averaged in groups

Report = Mapping[str, Any]
Step = dict[str, float | None]


def read_steps(file: Path) -> list[Step]:
    """The metrics of a round's optimizer steps; none where there is no such file.

    Raises:
        InputError: for a line that is no JSON object.
    """
    if not file.exists():
        return []
    steps = []
    for place, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found = json.loads(line)
            steps.append({name: finite(value) for name, value in found.items()})
        except (ValueError, AttributeError):
            raise InputError(
                f"{file} line {place}", wanted="a step's metrics as JSON", got=line[:80], fix="restore the file"
            ) from None
    return steps


def step_curves(steps: Mapping[int, Sequence[Step]], settings: Mapping[str, Any]) -> list[Chart]:
    """What happened in training: loss, log-ratios, the gate and accuracy over all rounds' optimizer steps."""
    steps = {round: found for round, found in steps.items() if found}
    if not steps:
        return []
    size = -(-sum(map(len, steps.values())) // _MAX_POINTS)
    x, points, marks = _points(steps, size)
    averaged = f"; each point is the mean of up to {size} steps" if size > 1 else ""

    def values(name: str) -> list[float | None]:
        return [step.get(name) for _, step in points]

    def log_ratios(side: str) -> Series:
        name = f"log_ratios/{side}"
        ends = zip(values(f"{name}/p10"), values(f"{name}/p90"), strict=True)
        band = [None if low is None or high is None else (low, high) for low, high in ends]
        return Series(side, values(name), band=band)

    def curve(title: str, unit: str, *series: Series, **more: Any) -> Chart:
        return Chart(title, unit + averaged, x, "step", list(series), marks=marks, **more)

    charts = [
        curve(
            "Log-ratios",
            "log of policy / reference, nats an answer, mean over the step's pairs; shaded: all but the lowest and the "
            "highest tenth",
            log_ratios("chosen"),
            log_ratios("rejected"),
            baseline=(0.0, "as the reference"),
            note=_about_log_ratios(steps),
        ),
        curve(
            "Margin of the objective",
            "mean over the step's pairs",
            Series("margin", values("margins/objective")),
            baseline=(0.0, "no preference"),
            note="By how much the objective takes the chosen answer for the better one. It grows as the pairs are "
            "learnt; rewards and win rate on held-out prompts say whether that helps.",
        ),
        curve(
            "Rejected answers above their reference",
            "share of the step's pairs",
            Series("above", values("rejected_active")),
            percent=True,
            note=_about_the_gate(steps, settings),
        ),
        curve(
            "Loss",
            "mean over the step's pairs",
            Series("loss", values("loss")),
            baseline=_NO_PREFERENCE if _begins_without_preference(steps) else None,
        ),
        curve(
            "Pairs in the right order",
            "share of the step's pairs whose chosen answer has the higher log-ratio",
            Series("in order", values("rewards/accuracies")),
            percent=True,
        ),
    ]
    return [chart for chart in charts if not chart.is_empty()]


def _begins_without_preference(steps: Mapping[int, Sequence[Step]]) -> bool:
    """Whether ln 2 means anything in these losses: it is the first one of most objectives of a pair, but not of all."""
    first = steps[min(steps)][0].get("loss")
    return first is not None and math.isclose(first, math.log(2), rel_tol=_NEAR)


def _points(
    steps: Mapping[int, Sequence[Step]], size: int
) -> tuple[list[float], list[tuple[int, Step]], list[tuple[float, str]]]:
    """Where each point stands, the point with its round, and where rounds begin; `size` steps make a point."""
    x, points, marks, before = [], [], [], 0
    for round, found in sorted(steps.items()):
        marks.append((float(before + 1), f"round {round}"))
        for start, group in _groups(found, size):
            x.append(float(before + start + 1))
            points.append((round, group))
        before += len(found)
    return x, points, marks


def _groups(steps: Sequence[Step], size: int) -> Iterator[tuple[int, Step]]:
    """Means over `size` steps each, with the number of steps before; the last group may be smaller."""
    for start in range(0, len(steps), size):
        group = steps[start : start + size]
        names = {name for step in group for name in step}
        yield start, {name: _mean([step.get(name) for step in group]) for name in names}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _about_log_ratios(steps: Mapping[int, Sequence[Step]]) -> str:
    told = (
        "How much likelier an answer has become than under its round's reference: 0 is as likely, +0.69 twice as "
        "likely, -0.69 half as likely."
    )
    last = max(steps)
    end = steps[last][-1]
    chosen, rejected = end.get("log_ratios/chosen"), end.get("log_ratios/rejected")
    if chosen is None or rejected is None:
        return told
    told += (
        f" In the last step of round {last} the chosen answers stood at {chosen:+.2f} and the rejected ones at "
        f"{rejected:+.2f}."
    )
    if chosen < 0 and rejected < 0:
        told += " Both have become less likely: the probability went to other answers."
    return told


def _about_the_gate(steps: Mapping[int, Sequence[Step]], settings: Mapping[str, Any]) -> str:
    known = [value for found in steps.values() for step in found if (value := step.get("rejected_active")) is not None]
    if not known:
        return ""
    here = f" On average over all steps it was {share(sum(known), len(known))}, in the last one {share(known[-1], 1)}."
    if round_settings(settings, max(steps)).get("update", {}).get("loss_type") != "minor_dpo":
        return "A rejected answer above its reference has become likelier than the reference finds it." + here
    return (
        "Only these are still pushed down: MinorDPO leaves a rejected answer alone once the policy likes it no better "
        "than the reference does, and learns from the chosen answer alone. Near 0% the update works by the chosen "
        "answers; a share that stays high says that rejected answers rise along with them." + here
    )


def about_falling(steps: Mapping[int, Sequence[Step]]) -> str:
    """Whether falling log-ratios are a bug, asked by everybody who sees them first; empty where there are none."""
    ends = [(end["log_ratios/chosen"], end["log_ratios/rejected"]) for end in _ends(steps)]
    known = [(chosen, rejected) for chosen, rejected in ends if chosen is not None and rejected is not None]
    if not known:
        return ""
    told = (
        "Is it a bug when these fall? Not by itself. An update widens the distance between chosen and rejected "
        "answers, and both may fall while it does: what they lose goes to answers that are in no pair. (DPO's rewards "
        "are these log-ratios times beta.) Look twice where the chosen ones fall and the reward on held-out prompts "
        "does not rise, or where given texts become less likely. "
    )
    fell = sum(chosen < 0 for chosen, _ in known)
    apart = sum(chosen > rejected for chosen, rejected in known)
    here = "Here the chosen answers ended below their reference in"
    return told + f"{here} {fell} of {len(known)} rounds, and above the rejected ones in {apart}."


def _ends(steps: Mapping[int, Sequence[Step]]) -> list[Step]:
    """Each round's last step that has log-ratios."""
    sides = ("log_ratios/chosen", "log_ratios/rejected")
    with_both = [[step for step in found if all(side in step for side in sides)] for found in steps.values()]
    return [found[-1] for found in with_both if found]

"""Who worked at which stage of a round and when none did, as a drawing: a lane for each, one scale for all rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline import figures
from pipeline.console import share
from pipeline.spans import Span, idle_stretches, joined

WIDTH, LANE, LABEL, END = 900, 22, 90, 60  # of the drawing, in its own units; END: room for the last number
_STAGES = ("prompts", "sample", "score", "pair", "reference", "update", "publish", "swap", "evaluate", "other")
_MOST_LANES = 16  # of one stage
_MIN_IDLE = 0.01  # of a round; shorter stretches are not drawn


@dataclass(frozen=True, slots=True)
class Bar:
    """A stage at work; `text` says when."""

    x: float
    width: float
    text: str


@dataclass(frozen=True, slots=True)
class Lane:
    """A worker at a stage of a round, or the round's idling, with its bars.

    Attributes:
        label: the stage, with a number where several worked at it.
    """

    label: str
    bars: list[Bar]
    idle: bool = False


@dataclass(frozen=True, slots=True)
class RoundLine:
    """A round's time line: its lanes, where the round ends, and what it comes to in words."""

    round: int
    told: str
    lanes: list[Lane]
    end: float
    seconds: float


def timelines(reports: Sequence[Mapping[str, Any]]) -> list[RoundLine]:
    """The settled rounds that have a time line; those that were only picked up again have none."""
    known = [report for report in reports if report["round"] and report.get("timeline") and report.get("seconds")]
    longest = max((report["seconds"] for report in known), default=1.0)
    return [_line(report, (WIDTH - LABEL - END) / longest) for report in known]


def _line(report: Mapping[str, Any], scale: float) -> RoundLine:
    def bar(what: str, start: float, end: float) -> Bar:
        return Bar(LABEL + scale * start, max(1.0, scale * (end - start)), f"{what} {start:.1f} to {end:.1f} s")

    drawn = []
    for stage, lanes in _by_stage(report).items():
        for number, (worker, spans) in enumerate(sorted(lanes.items())):
            what = f"{stage} ({worker})" if worker else stage
            bars = [bar(what, span.start_s, span.end_s) for span in spans]
            drawn.append(Lane(f"{stage} {number}" if len(lanes) > 1 else stage, bars))
    if stretches := [(a, b) for a, b in _idle(report) if b - a >= _MIN_IDLE * report["seconds"]]:
        drawn.append(Lane("idle", [bar("idle", *stretch) for stretch in stretches], idle=True))
    return RoundLine(report["round"], _told(report), drawn, LABEL + scale * report["seconds"], report["seconds"])


def _spans(report: Mapping[str, Any]) -> list[Span]:
    return [Span(**span) for span in report["timeline"]]


def _by_stage(report: Mapping[str, Any]) -> dict[str, dict[str, list[Span]]]:
    """The spans of each stage by who worked; all in one lane where there are more than can be told apart."""
    stages: dict[str, dict[str, list[Span]]] = {stage: {} for stage in _STAGES}
    for span in _spans(report):
        stages.setdefault(span.stage, {}).setdefault(span.worker, []).append(span)
    crowded = {stage for stage, lanes in stages.items() if len(lanes) > _MOST_LANES}
    for stage in crowded:
        told = f"{len(stages[stage])} workers"
        stages[stage] = {told: joined([replace(s, worker=told) for spans in stages[stage].values() for s in spans])}
    return stages


def _idle(report: Mapping[str, Any]) -> list[tuple[float, float]]:
    return idle_stretches(_spans(report), report["seconds"])


def _told(report: Mapping[str, Any]) -> str:
    told = "carried on, the last call alone: " if report.get("is_carried_on") else ""
    told += f"{report['seconds']:.1f} s; no stage worked in {share(report['idle_share'], 1)} of them"
    if stretches := _idle(report):
        start, end = max(stretches, key=lambda stretch: stretch[1] - stretch[0])
        told += f", {end - start:.1f} s of it at once from {start:.1f} s on"
    if "first_answers_s" in report:
        told += f"; first answers by the new weights {report['first_answers_s']:.2f} s after the last optimizer step"
    if syncs := figures.engine_sync(report.get("engine_sync") or []).strip():
        told += f"; {syncs}"
    return told

"""When which stage of a round worked, as a drawing: a lane a stage, on one scale for all rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import figures
from pipeline.console import share

WIDTH, LANE, LABEL, END = 900, 22, 90, 60  # of the drawing, in its own units; END: room for the last number


@dataclass(frozen=True, slots=True)
class Bar:
    """A stage at work; `text` says when."""

    x: float
    width: float
    text: str


@dataclass(frozen=True, slots=True)
class Lane:
    """A stage of a round, with its bars."""

    stage: str
    bars: list[Bar]


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
    lanes: dict[str, list[Bar]] = {}
    for span in report["timeline"]:
        start, end = span["start_s"], span["end_s"]
        bar = Bar(LABEL + scale * start, max(1.0, scale * (end - start)), f"{span['stage']} {start:.1f} to {end:.1f} s")
        lanes.setdefault(span["stage"], []).append(bar)
    drawn = [Lane(stage, bars) for stage, bars in lanes.items()]
    return RoundLine(report["round"], _told(report), drawn, LABEL + scale * report["seconds"], report["seconds"])


def _told(report: Mapping[str, Any]) -> str:
    told = f"{report['seconds']:.1f} s; no stage worked in {share(report['idle_share'], 1)} of them"
    if "first_answers_s" in report:
        told += f"; first answers by the new weights {report['first_answers_s']:.2f} s after the last optimizer step"
    if syncs := figures.engine_sync(report.get("engine_sync") or []).strip():
        told += f"; {syncs}"
    return told

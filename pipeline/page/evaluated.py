"""How good the policy was after each round, on held-out prompts, as curves with 95% intervals.

Means come from the rounds' reports; the intervals of single rewards and of lengths from the evaluations' own tables,
and are left out where those are gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pipeline import student_t
from pipeline.evaluate import mean_with_error
from pipeline.numbers import finite
from pipeline.page.charts import Chart, Series
from pipeline.page.curves import Report
from pipeline.reading import published_files, rows

_INTERVAL = "bars: 95% interval"
HalfWidths = dict[str, float | None]


def round_curves(reports: Sequence[Report], folders: Mapping[int, Path]) -> list[Chart]:
    """Curves by round; none where nothing was evaluated."""
    evaluated = [report for report in reports if report.get("evaluate")]
    figures = [report["evaluate"] for report in evaluated]
    holdout = sorted({name for found in figures for name in found.get("holdout", {})})
    x = [float(report["round"]) for report in evaluated]
    widths = [_half_widths(folders[report["round"]] / "evaluation") for report in evaluated]

    def values(name: str) -> list[float | None]:
        return [finite(found.get(name)) for found in figures]

    def curve(title: str, unit: str, series: Series, **more: Any) -> Chart:
        return Chart(title, unit, x, "round (0: before the first)", [series], **more)

    charts = [
        curve(
            "Reward",
            f"mean over held-out prompts; {_INTERVAL}",
            Series("reward", values("reward"), [_reward_width(found) for found in figures]),
        ),
        *[
            curve(
                name,
                f"mean over held-out prompts; a reward that training never sees; {_INTERVAL}",
                Series(name, [_holdout(found, name) for found in figures], [width.get(name) for width in widths]),
            )
            for name in holdout
        ],
        curve(
            "Win rate",
            f"share of held-out prompts answered with a higher reward than the first policy's, ties half; {_INTERVAL}",
            Series("win rate", values("win_rate"), [_win_rate_width(found) for found in figures]),
            baseline=(0.5, "no better"),
            percent=True,
        ),
        curve(
            "Length",
            f"mean tokens an answer; {_INTERVAL}",
            Series("length", values("length"), [width.get("length") for width in widths]),
            note="A reward that rises with the length alone may pay for words.",
        ),
        curve(
            "Distance from the first policy",
            "KL divergence, nats an answer",
            Series("kl", values("kl")),
            note="How far the policy has moved. A reward that rises only as this grows fast may be gamed.",
        ),
        curve(
            "Given texts",
            "mean negative log-likelihood, nats a token",
            Series("texts_nll", values("texts_nll")),
            note="How well the policy still explains texts that it did not write; a rise means that it forgets them.",
        ),
    ]
    return [chart for chart in charts if not chart.is_empty()]


def _holdout(figures: Report, name: str) -> float | None:
    return finite(figures.get("holdout", {}).get(name))


def _reward_width(figures: Report) -> float | None:
    """Half of the mean reward's 95% interval."""
    se, num = finite(figures.get("reward_se")), figures.get("num_prompts", 0)
    return None if se is None or num < 2 else student_t.quantile(0.025, df=num - 1) * se


def _win_rate_width(figures: Report) -> float | None:
    """Half of the interval against the first policy; none for that policy itself."""
    found = figures.get("against", {}).get("first", {}).get("win_rate", {})
    low, high = finite(found.get("low")), finite(found.get("high"))
    return None if low is None or high is None else (high - low) / 2


def _half_widths(evaluation: Path) -> HalfWidths:
    """Half of the 95% interval of each single reward, by name, and of ``length``."""
    samples: dict[str, list[float]] = {}
    for row in rows(published_files(evaluation / "scored"), columns=["rewards"]):
        for reward in row["rewards"]:
            if (value := finite(reward["value"])) is not None:
                samples.setdefault(reward["name"], []).append(value)
    length = {"length": pc.list_value_length(pc.field("response_token_ids"))}
    samples["length"] = [
        float(row["length"]) for row in rows(published_files(evaluation / "candidates"), columns=length)
    ]
    found = {name: mean_with_error(sample) for name, sample in samples.items()}
    return {name: None if of["low"] is None else (of["high"] - of["low"]) / 2 for name, of in found.items()}

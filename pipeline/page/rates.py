"""How fast a run sampled and trained, by round, in tokens a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.page.charts import Chart, Series
from pipeline.page.curves import Step
from pipeline.spans import Span, busy_s


def rate_curves(reports: Sequence[Mapping[str, Any]], steps: Mapping[int, Sequence[Step]]) -> list[Chart]:
    """Tokens a second of the settled rounds; nothing where no time was taken."""
    settled = [report for report in reports if report["round"]]
    x = [float(report["round"]) for report in settled]
    sampled = [_sampled(report) for report in settled]
    charts = [
        Chart(
            "Sampling",
            "tokens a second, all engines together",
            x,
            "round",
            [
                Series("while sampling", [while_sampling for while_sampling, _ in sampled]),
                Series("over the whole round", [whole for _, whole in sampled]),
            ],
            note="The second line is what a round yields for its time; the gap is scoring, training and waiting.",
        ),
        Chart(
            "Training",
            "tokens a second through the model, all workers together",
            x,
            "round",
            [Series("in optimizer steps", [_trained(steps.get(report["round"], [])) for report in settled])],
        ),
    ]
    return [chart for chart in charts if not chart.is_empty()]


def _sampled(report: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Sampled tokens a second while an engine sampled, and over the whole round."""
    tokens = (report.get("sample") or {}).get("num_tokens")
    if not tokens:
        return None, None
    busy = busy_s([Span(**span) for span in report.get("timeline", []) if span["stage"] == "sample"])
    whole = report.get("seconds")
    return tokens / busy if busy else None, tokens / whole if whole else None


def _trained(steps: Sequence[Step]) -> float | None:
    timed = [(step.get("tokens/processed"), step.get("step_s")) for step in steps]
    known = [(tokens, seconds) for tokens, seconds in timed if tokens is not None and seconds is not None]
    seconds = sum(seconds for _, seconds in known)
    return sum(tokens for tokens, _ in known) / seconds if seconds else None

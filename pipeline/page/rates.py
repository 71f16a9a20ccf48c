"""How fast a run sampled and trained, by round, in tokens a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.page.charts import Chart, Series
from pipeline.page.curves import Step


def rate_curves(
    reports: Sequence[Mapping[str, Any]], steps: Mapping[int, Sequence[Step]], settings: Mapping[str, Any]
) -> list[Chart]:
    """Tokens a second of the settled rounds; nothing where no time was taken."""
    settled = [report for report in reports if report["round"]]
    x = [float(report["round"]) for report in settled]
    over_rounds = [None if settings.get("max_staleness") else _over_round(report) for report in settled]
    charts = [
        Chart(
            "Sampling",
            "tokens a second, all engines together",
            x,
            "round",
            [
                Series("while sampling", [_while_sampling(report) for report in settled]),
                Series("over the whole round", over_rounds),
            ],
            note="The second line is what a round yields for its time; the gap is scoring, training and waiting. It "
            "has no point where a round was carried on, and none with max_staleness, where the next round is sampled "
            "in its time.",
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


def _while_sampling(report: Mapping[str, Any]) -> float | None:
    """Tokens a second while an engine sampled the round's answers, of those that the round's last call sampled."""
    tokens, seconds = (report.get("sample") or {}).get("num_tokens_now"), report.get("sampling_s")
    return tokens / seconds if tokens and seconds else None


def _over_round(report: Mapping[str, Any]) -> float | None:
    """Tokens a second of the round's time, where that is the time of all its work."""
    tokens, seconds = (report.get("sample") or {}).get("num_tokens"), report.get("seconds")
    return tokens / seconds if tokens and seconds and not report.get("is_carried_on") else None


def _trained(steps: Sequence[Step]) -> float | None:
    timed = [(step.get("tokens/processed"), step.get("step_s")) for step in steps]
    known = [(tokens, seconds) for tokens, seconds in timed if tokens is not None and seconds is not None]
    seconds = sum(seconds for _, seconds in known)
    return sum(tokens for tokens, _ in known) / seconds if seconds else None

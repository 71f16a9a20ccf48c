"""Several runs side by side: what differs in their configs, their figures, their curves, and their answers.

Comes in: the runs' folders. Goes out: texts and charts for the terminal and the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.console import duration
from pipeline.evaluate import mean_with_error
from pipeline.files import read_json
from pipeline.gate import is_promoted
from pipeline.lineage import read_records, standing_round
from pipeline.numbers import percent, three_decimals, with_error
from pipeline.page.charts import Chart, Series
from pipeline.page.curves import Step, read_steps
from pipeline.page.evaluated import round_curves
from pipeline.page.rows import Column, Prompt, Room, held_out_rows
from pipeline.reading import round_folders, run_settings

_NAMES_ALONE = {"run.name", "run.dir"}  # differ between any two runs
_MAX_POINTS = 160  # a curve; more steps are averaged in groups
_OVER_STEPS = (
    ("Log-ratio of the chosen answers", "log_ratios/chosen", "nats an answer, mean over the step's pairs"),
    ("Log-ratio of the rejected answers", "log_ratios/rejected", "nats an answer, mean over the step's pairs"),
    ("Margin of the objective", "margins/objective", "mean over the step's pairs"),
    ("Rejected answers above their reference", "rejected_active", "share of the step's pairs"),
)


@dataclass(frozen=True, slots=True)
class Run:
    """A run as it is compared; `result` is the round that made the policy that it stands behind."""

    name: str
    folder: Path
    settings: Mapping[str, Any]
    reports: Sequence[Mapping[str, Any]]
    folders: Mapping[int, Path]
    result: int

    @property
    def settled(self) -> list[Mapping[str, Any]]:
        return [report for report in self.reports if report["round"]]

    def evaluation(self, round: int) -> Mapping[str, Any]:
        """A round's figures on held-out prompts; empty where there are none."""
        return next((report.get("evaluate") or {} for report in self.reports if report["round"] == round), {})


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in some folders, under names that tell them apart.

    Raises:
        InputError: if one holds no run, or a file of it cannot be read.
        ContractError: if a lineage was changed.
    """
    found = []
    for folder in folders:
        rounds, settings = round_folders(folder), run_settings(folder)
        reports = [read_json(path / "report.json") for path in rounds.values() if (path / "report.json").exists()]
        result = standing_round(read_records(folder / "run.json")) or 0
        found.append(Run(folder.resolve().name, folder, settings, reports, rounds, result))
    names = [run.name for run in found]
    told = [run.name if names.count(run.name) == 1 else str(run.folder) for run in found]
    told = [name if told.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(told, start=1)]
    return [replace(run, name=name) for run, name in zip(found, told, strict=True)]


# ---- configs and figures --------------------------------------------------------------------------------------------


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """The keys in which the configs differ, each with every run's value."""
    flat = [dict(_flat(run.settings)) for run in runs]
    keys = sorted({key for values in flat for key in values} - _NAMES_ALONE)
    rows = [[key, *[values.get(key, "not set") for values in flat]] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            told = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
            found.append((prefix + key, told))
    return found


def figures(runs: Sequence[Run]) -> list[list[str]]:
    """What came of the runs, a figure a row, each with every run's value; rows that no run has are left out."""
    named = [_figures(run) for run in runs]
    keys = list(dict.fromkeys(key for found in named for key in found))
    rows = [[key, *[found.get(key, "") for found in named]] for key in keys]
    return [row for row in rows if any(row[1:])]


def _figures(run: Run) -> dict[str, str]:
    before, after = run.evaluation(0), run.evaluation(run.result)
    updates = [report.get("update") or {} for report in run.settled]
    made = sum((r.get(kind) or {}).get(f"num_{kind}", 0) for r in run.settled for kind in ("pairs", "groups"))
    seconds = sum(report.get("seconds") or 0 for report in run.settled)
    num_carried_on = sum(bool(report.get("is_carried_on")) for report in run.settled)
    tokens = 0 if num_carried_on else sum((r.get("sample") or {}).get("num_tokens", 0) for r in run.settled)
    return {
        "stands behind": f"round {run.result}" if run.result else "the first policy",
        "rounds": f"{len(run.settled)}, {sum(map(is_promoted, run.settled))} promoted",
        "reward before": with_error(before.get("reward"), before.get("reward_se")),
        "reward": with_error(after.get("reward"), after.get("reward_se")),
        "win rate against its first policy": percent(after.get("win_rate")),
        **{name: three_decimals(value) for name, value in (after.get("holdout") or {}).items()},
        "KL, nats": three_decimals(after.get("kl")),
        "tokens an answer": three_decimals(after.get("length")),
        "given texts, nats a token": three_decimals(after.get("texts_nll")),
        "pairs or groups": f"{made:,}" if made else "",
        "steps": f"{sum(update.get('num_steps', 0) for update in updates):,}",
        "time in rounds": duration(seconds) + _last_calls(num_carried_on) if seconds else "",
        "sampled tokens a second of it": f"{tokens / seconds:,.0f}" if seconds and tokens else "",
    }


def _last_calls(num_carried_on: int) -> str:
    """That the time of interrupted rounds is known of the call that ended them."""
    return f" (of {num_carried_on} carried on, the last call alone)" if num_carried_on else ""


# ---- curves ---------------------------------------------------------------------------------------------------------


def curves(runs: Sequence[Run]) -> list[Chart]:
    """The curves by round, and those over steps, with a line a run."""
    return [*_by_round(runs), *_by_step(runs)]


def _by_round(runs: Sequence[Run]) -> list[Chart]:
    of_runs = [{chart.title: chart for chart in round_curves(run.reports, run.folders)} for run in runs]
    joined = []
    for title in dict.fromkeys(title for charts in of_runs for title in charts):
        known = [charts[title] for charts in of_runs if title in charts]
        x = sorted({at for chart in known for at in chart.x})
        lines = []
        for run, charts in zip(runs, of_runs, strict=True):
            values, errors = _by_place(charts.get(title))
            lines.append(Series(run.name, [values.get(at) for at in x], [errors.get(at) for at in x]))
        first = known[0]
        joined.append(Chart(title, first.unit, x, first.x_label, lines, baseline=first.baseline, percent=first.percent))
    return joined


def _by_place(chart: Chart | None) -> tuple[dict[float, float | None], dict[float, float | None]]:
    """A chart's only line and its errors; nothing for a run that has no such chart, whose line keeps its colour."""
    if chart is None:
        return {}, {}
    (line,) = chart.series
    errors = line.errors or [None] * len(chart.x)
    return dict(zip(chart.x, line.values, strict=True)), dict(zip(chart.x, errors, strict=True))


def _by_step(runs: Sequence[Run]) -> list[Chart]:
    steps = [_steps(run) for run in runs]
    longest = max(map(len, steps), default=0)
    size = max(1, -(-longest // _MAX_POINTS))
    x = [float(at + 1) for at in range(0, longest, size)]
    more = f"; each point is the mean of up to {size} steps" if size > 1 else ""
    charts = [
        Chart(
            title,
            unit + more,
            x,
            "step",
            [Series(run.name, _means(found, key, size, len(x))) for run, found in zip(runs, steps, strict=True)],
            percent=key == "rejected_active",
        )
        for title, key, unit in _OVER_STEPS
    ]
    return [chart for chart in charts if not chart.is_empty()]


def _steps(run: Run) -> list[Step]:
    return [step for report in run.settled for step in read_steps(run.folders[report["round"]] / "metrics.jsonl")]


def _means(steps: Sequence[Step], key: str, size: int, count: int) -> list[float | None]:
    """Means over `size` steps each; None where a run has no more steps."""
    groups = [[step.get(key) for step in steps[at * size : (at + 1) * size]] for at in range(count)]
    known = [[value for value in group if value is not None] for group in groups]
    return [sum(group) / len(group) if group else None for group in known]


# ---- answers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answers:
    """Held-out prompts with each run's answer by the policy that it stands behind; in words, what they are worth."""

    prompts: list[Prompt]
    told: str


def answers(runs: Sequence[Run], room: Room) -> Answers:
    """The held-out prompts that the runs have in common, the first run's order; none where they have none."""
    share_of_room = Room(room.rows, room.characters // len(runs))
    of_runs = []
    for run in runs:
        standing = {run.result: run.folders[run.result]} if run.evaluation(run.result) else {}
        shown = held_out_rows(run.folder, standing, share_of_room)
        of_runs.append({prompt.prompt_id: (prompt, column) for prompt in shown for column in prompt.columns})
    common = [key for key in of_runs[0] if all(key in found for found in of_runs)]
    prompts = []
    for key in common:
        first = of_runs[0][key][0]
        columns = [
            Column(f"{run.name}, {found[key][1].title}", *found[key][1][1:])
            for run, found in zip(runs, of_runs, strict=True)
        ]
        prompts.append(Prompt(first.prompt_id, first.said, first.truth, columns))
    return Answers(prompts, _about(runs, prompts))


def _about(runs: Sequence[Run], prompts: Sequence[Prompt]) -> str:
    """How the other runs' rewards stand against the first one's, prompt by prompt, where the rewards are the same."""
    if not prompts:
        return "The runs have no held-out prompt in common, so their answers and figures cannot be set side by side."
    told = f"{len(prompts):,} held-out prompts that all runs answered."
    rewards = [(run.settings.get("score") or {}).get("rewards") for run in runs]
    for at, run in enumerate(runs[1:], start=1):
        if rewards[at] != rewards[0]:
            told += f" {run.name} was judged by other rewards than {runs[0].name}: the two scales differ."
            continue
        pairs = [(prompt.columns[at].answers[0].reward, prompt.columns[0].answers[0].reward) for prompt in prompts]
        found = mean_with_error([mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None])
        if found["low"] is not None:
            interval = f"{found['mean']:+.3g} [{found['low']:+.3g}, {found['high']:+.3g}]"
            told += f" Reward of {run.name} less that of {runs[0].name}: {interval}, the 95% interval."
    return told

"""``docs/robustness.md`` and its figures, from finished cells alone."""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.robustness.chart import Line, Plot, svg
from benchmarks.robustness.grid import BETAS, KINDS, LEFT_OUT, METHODS, OTHERS, RATES, STAGES, Point, Stage
from benchmarks.robustness.recipes import NUM_ROUNDS, REVERSE, ROUND_PROMPTS, STORIES
from benchmarks.robustness.store import Figures
from benchmarks.robustness.study import Study
from benchmarks.robustness.verdict import REGIONS, Finding, Results, findings, points_of, values

NAMES = {"dpo": "DPO", "dpop": "DPOP", "minor_dpo": "MinorDPO"}
EVERYWHERE = {"all points": REGIONS["all points"]}


def write_page(study: Study, docs: Path) -> Path:
    """Write the page and its figures; its path."""
    figures = docs / "robustness"
    figures.mkdir(parents=True, exist_ok=True)
    parts = [
        _INTRO,
        *_verdict(study),
        *_grid(study, figures),
        *_rounds(study, figures),
        *_stories(study),
        *_others(study),
        *_conditions(study),
    ]
    page = docs / "robustness.md"
    page.write_text("\n\n".join(part.strip("\n") for part in parts) + "\n", encoding="utf-8")
    return page


_INTRO = f"""
# Is MinorDPO robust where DPO breaks?

MinorDPO is said to be robust where DPO breaks: at high learning rates, at small betas, and where chosen and rejected
answers are nearly alike. `make reproduce` puts that to the test, offline and in one process, against DPO and DPOP, and
writes this page; nothing on it is written by hand.

**The task** is the quickstart's: a Llama of 0.5 million parameters reverses five digits, and a judge that was taught
apart likes right answers. The policy samples {REVERSE.num_generations} answers to each prompt once; from them come
tables of {REVERSE.num_pairs} pairs, one for each seed, on which every method trains: {REVERSE.epochs} epochs,
{REVERSE.batch} pairs a step. The chosen answer is the judge's best. The rejected one differs from it in one token
(*alike*) or in as many as any of the worse answers does, two or more of five digits (*unlike*); both tables have the
same prompts and chosen answers. 1x is the quickstart's learning rate, {REVERSE.learning_rate:g}.

**Measured** on {REVERSE.num_held_out} held-out prompts, by plain transformers: the *accuracy*, the share of answers
sampled at temperature 1 that are exactly right, which the judge cannot fake; the same of *greedy* answers; the
log-likelihood of the true answers in nats a token (*truth*); the mean log-ratios to the start policy of the chosen and
the rejected answers trained on, in nats an answer; the divergence from the start policy on sampled answers (*KL*), in
nats an answer.
"""


# ---- verdict --------------------------------------------------------------------------------------------------------


def _verdict(study: Study) -> Iterator[str]:
    yield "## Verdict"
    yield (
        "By rules fixed beforehand (`benchmarks/robustness/verdict.py`): at a point MinorDPO is *better* if its worst\n"
        "seed is above the other method's best one, *worse* the other way round, else *even*. In a region the claim\n"
        "*holds* if MinorDPO is better at half of the points or more and worse at none; there is *no difference* if\n"
        "all points are even; it *does not hold* if MinorDPO is worse at as many points as better, or more; else the\n"
        "result is *mixed*. A method *breaks* at a point if its mean is below the start policy's figure."
    )
    if told := _reservations(study):
        yield told
    asked: list[tuple[Stage, str, str, Any]] = [
        ("grid", "exact", "On fixed tables, by accuracy", REGIONS),
        ("rounds", "exact", f"On policy, by the accuracy after {NUM_ROUNDS} rounds", EVERYWHERE),
        ("stories", "truth", "On TinyStories, by the likelihood of real stories", EVERYWHERE),
        ("stories", "reward", "On TinyStories, by the reward trained on, which more damage may buy", EVERYWHERE),
    ]
    for stage, measure, title, regions in asked:
        start = study.start(stage)
        found = findings(study.results(stage), measure, start[measure], regions=regions) if start else []
        if found:
            yield f"**{title}** (start policy: {start[measure]:.3f})"  # type: ignore[index]
            yield _findings(found)
        else:
            yield f"**{title}**: no complete comparison yet."


def _reservations(study: Study) -> str:
    """What a reader must know before the verdict counts; empty where nothing is missing."""
    parts = []
    if len(study.seeds) < 3:
        parts.append(f"with {len(study.seeds)} of 3 seeds, a spread says little or nothing")
    if any(len(study.results(stage)) < len(study.cells(stage)) for stage in STAGES) or not study.cells("rounds"):
        parts.append("cells are missing (below, under Conditions), and the comparisons are of what is there")
    return f"**Not the whole study**: {'; '.join(parts)}." if parts else ""


def _findings(found: Sequence[Finding]) -> str:
    rows = [
        [
            f.region,
            NAMES[f.rival],
            f"**{f.verdict}**",
            f"{f.better} / {f.even} / {f.worse}",
            f"{f.broken['minor_dpo']} / {f.broken[f.rival]} of {f.num_points}",
        ]
        for f in found
    ]
    head = ["region", "against", "the claim", "points better / even / worse", "breaks: MinorDPO / the other"]
    return _table(head, rows)


# ---- stages ---------------------------------------------------------------------------------------------------------


def _grid(study: Study, figures: Path) -> Iterator[str]:
    results, start = study.results("grid"), study.start("grid")
    yield "## Fixed tables"
    if start is None:
        yield "Not run yet."
        return
    yield f"The start policy: accuracy {start['exact']:.3f}, greedy {start['greedy']:.3f}, truth {start['truth']:.3f}."
    plots = [_grid_plot(results, kind, beta, start["exact"]) for kind in KINDS for beta in BETAS]
    text = svg(
        plots, columns=len(BETAS), unit="accuracy: mean, and the seeds' range", along="learning rate", low=0, high=1
    )
    (figures / "grid.svg").write_text(text, encoding="utf-8")
    yield "![Accuracy by learning rate, beta and kind of pairs, dotted: the start policy](robustness/grid.svg)"
    yield "Accuracy: mean over the seeds, and their range."
    yield _compared(results, "exact")
    yield _details("Everything else that was measured, means over the seeds", _all_measures(results, start))


def _grid_plot(results: Results, kind: str, beta: float, start: float) -> Plot:
    points = [Point(rate, beta, kind) for rate in RATES]  # type: ignore[arg-type]
    lines = [Line(NAMES[method], [_spread(results, method, point, "exact") for point in points]) for method in METHODS]
    return Plot(f"{kind}, beta {beta:g}", [f"{rate}x" for rate in RATES], lines, baseline=start)


def _rounds(study: Study, figures: Path) -> Iterator[str]:
    results, start = study.results("rounds"), study.start("grid")
    yield "## On policy"
    yield (
        f"{NUM_ROUNDS} rounds through the stages, each of {ROUND_PROMPTS} prompts sampled, scored and paired (best "
        "against worst) with the policy of the round before, which is the reference too. The points: the quickstart's "
        "own, and those at which the mean accuracy of MinorDPO less that of DPO on the fixed tables is greatest and "
        "least."
    )
    if not results or start is None:
        yield "Not run yet."
        return
    points = list(dict.fromkeys(cell.point for cell in results))
    plots = [_rounds_plot(results, point, start["exact"]) for point in points]
    text = svg(plots, columns=len(plots), unit="accuracy: mean, and the seeds' range", along="round", low=0, high=1)
    (figures / "rounds.svg").write_text(text, encoding="utf-8")
    yield "![Accuracy by round](robustness/rounds.svg)"
    yield _compared(results, "exact")
    yield _details("Everything else that was measured after the last round", _all_measures(results, start))


def _rounds_plot(results: Results, point: Point, start: float) -> Plot:
    lines = []
    for method in METHODS:
        runs = [f["rounds"] for c, f in results.items() if (c.method, c.point) == (method, point) and "rounds" in f]
        by_round = [[run[number]["exact"] for run in runs] for number in range(NUM_ROUNDS)] if runs else []
        spreads = [(fmean(found), min(found), max(found)) for found in by_round]
        lines.append(Line(NAMES[method], [(start, start, start), *(spreads or [None] * NUM_ROUNDS)]))
    title = point.name.removesuffix(", on policy")
    return Plot(title, [str(number) for number in range(NUM_ROUNDS + 1)], lines, baseline=start)


def _stories(study: Study) -> Iterator[str]:
    results, start = study.results("stories"), study.start("stories")
    yield "## TinyStories"
    yield (
        f"A real story model of 260 thousand parameters, and a reward that is easily gamed: happy words per 100 words. "
        f"A quarter of the grid, 1x being {STORIES.learning_rate:g}; {STORIES.num_pairs} pairs of answers of "
        f"{STORIES.max_new_tokens} tokens, in an *alike* pair with the first two thirds in common. Damage is measured "
        f"by *truth*, the log-likelihood of {STORIES.num_truths} real stories in nats a token."
    )
    if start is None:
        yield "Not run yet."
        return
    yield f"The start policy: truth {start['truth']:.3f}, reward {start['reward']:.2f}."
    yield "Truth:"
    yield _compared(results, "truth")
    yield "Reward:"
    yield _compared(results, "reward")
    yield _details("Everything else that was measured, means over the seeds", _all_measures(results, start))


def _others(study: Study) -> Iterator[str]:
    results = study.results("others")
    yield "## The other objectives at the default point"
    yield "Rate 1x, each objective's own beta. Accuracy: mean over the seeds, and their range."
    points = list(dict.fromkeys(cell.point for cell in results))
    if not points:
        yield "Not run yet."
        return
    rows = [[f"`{method}`", *(_cell(results, method, point, "exact") for point in points)] for method in OTHERS]
    yield _table(["objective", *(point.kind for point in points)], rows)
    yield "Left out: " + "; ".join(f"`{name}` {why}" for name, why in LEFT_OUT.items()) + "."


def _conditions(study: Study) -> Iterator[str]:
    yield "## Conditions"
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "deepspeed")
    )
    yield (
        f"{len(os.sched_getaffinity(0))} cores without a GPU, float32, {versions}; seeds "
        f"{', '.join(map(str, study.seeds))}, each with its own table and order of pairs."
    )
    rows = []
    for stage in STAGES:
        cells, results = study.cells(stage), study.results(stage)
        minutes = sum(figures["seconds"] for figures in results.values()) / 60
        missing = [cell for cell in cells if cell not in results]
        named = "; ".join(f"{cell.method} at {cell.point.name}, seed {cell.seed}" for cell in missing[:6])
        more = f"; and {len(missing) - 6} more" if len(missing) > 6 else ""
        waits = "its points are chosen once the grid is complete" if stage == "rounds" and not cells else "none"
        rows.append([stage, f"{len(results)} of {len(cells)}", f"{minutes:.1f}", named + more or waits])
    yield _table(["stage", "cells done", "minutes", "missing"], rows)


# ---- tables ---------------------------------------------------------------------------------------------------------


def _compared(results: Results, measure: str) -> str:
    points = list(dict.fromkeys(cell.point for cell in results))
    rows = [[_where(point), *(_cell(results, method, point, measure) for method in METHODS)] for point in points]
    return _table(["point", *(NAMES[method] for method in METHODS)], rows)


def _where(point: Point) -> str:
    return point.name.removesuffix(", on policy")


def _cell(results: Results, method: str, point: Point, measure: str) -> str:
    found = values(results, method, point, measure)
    if not found:
        return "missing"
    diverged = sum(math.isinf(value) for value in found)
    finite = [value for value in found if not math.isinf(value)]
    if not finite:
        return "diverged"
    told = f"{fmean(finite):.3f} ({min(finite):.3f} to {max(finite):.3f})"
    return told + (f", {diverged} diverged" if diverged else "")


def _spread(results: Results, method: str, point: Point, measure: str) -> tuple[float, float, float] | None:
    """Mean, least and greatest; a diverged update counts as 0."""
    found = [max(0.0, value) for value in values(results, method, point, measure)]
    return (fmean(found), min(found), max(found)) if found else None


_MEASURES = {
    "greedy": "greedy",
    "truth": "truth",
    "reward": "reward",
    "ratio_chosen": "log-ratio chosen",
    "ratio_rejected": "log-ratio rejected",
    "kl": "KL",
    "rejected_active": "rejected above reference, last step",
}


def _all_measures(results: Results, start: Figures) -> str:
    finished = {cell: figures for cell, figures in results.items() if not figures.get("diverged")}
    measures = [name for name in _MEASURES if any(name in figures for figures in finished.values())]
    rows = []
    for point in points_of(results):
        for method in METHODS:
            seeds = [f for c, f in finished.items() if (c.method, c.point) == (method, point)]
            rows.append([_where(point), NAMES[method], *(_mean(seeds, name) for name in measures)])
    return _table(["point", "method", *(_MEASURES[name] for name in measures)], rows)


def _mean(seeds: Sequence[Mapping[str, Any]], measure: str) -> str:
    found = [figures[measure] for figures in seeds if figures.get(measure) is not None]
    return f"{fmean(found):.3f}" if found else "-"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _details(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"

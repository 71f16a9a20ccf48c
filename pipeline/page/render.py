"""A run's page: everything gathered from its folder, and put into the template.

The texts on it were sampled by a model and may be anything; `pipeline.page.templating` and `pipeline.page.packed` see
to it that they stay texts. The same folder always gives the same page.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.addresses import place_of_run
from pipeline.files import read_json
from pipeline.lineage import shown_records, standing_round
from pipeline.page import spreads, summary
from pipeline.page.curves import about_falling, read_steps, step_curves
from pipeline.page.decisions import decisions
from pipeline.page.evaluated import round_curves
from pipeline.page.examples import examples
from pipeline.page.packed import pack
from pipeline.page.rates import rate_curves
from pipeline.page.rows import PAGE_ROOM, Room, browser_rows
from pipeline.page.templating import filled
from pipeline.page.timelines import LABEL, LANE, WIDTH, timelines
from pipeline.reading import num_rounds, reason_stopped, round_folders, run_settings


def page(folder: Path, reports: Sequence[Mapping[str, Any]], *, room: Room = PAGE_ROOM) -> str:
    """The page of the run in `folder`, whose rounds' reports are `reports`, as HTML.

    Args:
        room: how many rows its browser may hold.

    Raises:
        InputError: if the folder holds no run, or a file of it cannot be read.
        ContractError: if its lineage was changed.
    """
    folders, settings = round_folders(folder), run_settings(folder)
    settled = [report["round"] for report in reports if report["round"]]
    asked, stopped = num_rounds(folder, settings), reason_stopped(folder, settings, reports)
    records, final = shown_records(folder / "run.json"), folder / "final.json"
    standing = standing_round(records)
    result = read_json(final) if final.exists() else None
    steps = {round: read_steps(folders[round] / "metrics.jsonl") for round in settled}
    rows = browser_rows(folder, {report["round"]: folders[report["round"]] for report in reports}, room)
    command_folder = _as_configured(folder, settings)
    return filled(
        "page.html.jinja",
        name=settings.get("run", {}).get("name", folder.name),
        command_folder=command_folder,
        facts=summary.facts(settings, len(settled), asked),
        headline=summary.headline(reports, standing),
        warnings=summary.warnings(reports, standing),
        stopped=stopped,
        unfinished=_unfinished(asked, len(settled)) if stopped is None else "",
        rounds=summary.round_table(reports),
        round_charts=round_curves(reports, folders),
        step_charts=step_curves(steps, settings),
        about_falling=about_falling(steps),
        decisions=decisions(reports),
        timelines=timelines(reports),
        rate_charts=rate_curves(reports, steps, settings),
        lane=(WIDTH, LANE, LABEL),
        fates=summary.fates(reports),
        spreads=spreads.spreads(rows.prompts),
        spread_lane=(spreads.WIDTH, spreads.LANE, spreads.LABEL),
        rows=rows,
        packed=pack(rows.prompts),
        whole_page=room == PAGE_ROOM,
        trace=f"prefloop trace {command_folder}",
        examples=examples({round: folders[round] for round in settled}),
        lineage=records,
        result=result,
    )


def _as_configured(folder: Path, settings: Mapping[str, Any]) -> str:
    """The run's folder as its config writes it, fit for a shell: the page says the same wherever it is made."""
    run = settings.get("run", {})
    return shlex.quote(place_of_run(run["dir"], run["name"]) if "dir" in run and "name" in run else folder.name)


def _unfinished(asked: int | None, num_settled: int) -> str:
    if asked is None:
        return "No round is settled yet: figures and rows appear here with the first one."
    return f"{num_settled} of {asked} rounds are settled." if num_settled < asked else ""

"""A run's page: everything gathered from its folder, and put into the template.

The texts on it were sampled by a model and may be anything. Every value that enters the template is first made visible
(`pipeline.texts.visible`) and then escaped, both in one place, and the page's own policy forbids scripts and every
request to elsewhere. The same folder always gives the same page.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.files import read_json
from pipeline.lineage import read_records
from pipeline.page import charts, summary
from pipeline.page.curves import read_steps, round_curves, step_curves
from pipeline.page.examples import examples
from pipeline.page.timelines import LABEL, LANE, WIDTH, timelines
from pipeline.reading import num_rounds, round_folders, run_settings
from pipeline.texts import visible

_TEMPLATES = Path(__file__).parent / "templates"


def page(folder: Path, reports: Sequence[Mapping[str, Any]]) -> str:
    """The page of the run in `folder`, whose rounds' reports are `reports`, as HTML.

    Raises:
        InputError: if the folder holds no run, or a file of it cannot be read.
        ContractError: if its lineage was changed.
    """
    import jinja2
    from markupsafe import Markup

    folders, settings = round_folders(folder), run_settings(folder)
    settled = [report["round"] for report in reports if report["round"]]
    asked = num_rounds(folder, settings)
    final = folder / "final.json"
    result = read_json(final) if final.exists() else None
    steps = {round: read_steps(folders[round] / "metrics.jsonl") for round in settled}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters |= {"number": charts.number, "draw": charts.draw}
    edges = ("WIDTH", "HEIGHT", "LEFT", "RIGHT", "TOP", "BOTTOM")
    environment.globals |= {edge.lower(): getattr(charts, edge) for edge in edges}
    return environment.get_template("page.html.jinja").render(
        name=settings.get("run", {}).get("name", folder.name),
        command_folder=_as_configured(folder, settings),
        facts=summary.facts(settings, len(settled), asked),
        headline=summary.headline(reports, result["round"] if result else None),
        warnings=summary.warnings(reports),
        unfinished=_unfinished(asked, len(settled)),
        rounds=summary.round_table(reports),
        round_charts=round_curves(reports),
        step_charts=step_curves(steps, settings),
        timelines=timelines(reports),
        lane=(WIDTH, LANE, LABEL),
        fates=summary.fates(reports),
        examples=examples({round: folders[round] for round in settled}),
        lineage=read_records(folder / "run.json"),
        result=result,
    )


def _as_configured(folder: Path, settings: Mapping[str, Any]) -> str:
    """The run's folder as its config writes it, fit for a shell: the page says the same wherever it is made."""
    run = settings.get("run", {})
    return shlex.quote(str(Path(run["dir"]) / run["name"]) if "dir" in run and "name" in run else folder.name)


def _unfinished(asked: int | None, num_settled: int) -> str:
    if asked is None:
        return "No round is settled yet: figures and rows appear here with the first one."
    return f"{num_settled} of {asked} rounds are settled." if num_settled < asked else ""

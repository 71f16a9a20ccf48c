"""How far a run is, read from its folder alone: no Ray, no model."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from pipeline.artifacts import MANIFEST
from pipeline.console import Console
from pipeline.reading import round_folders
from pipeline.report import result_table, round_reports

_STAGES = ("prompts", "candidates", "scored", "pairs", "groups", "reference_logps", "policy", "evaluation/scored")

_MADE = ("pairs", "groups")  # a round makes one of the two


def show_status(folder: Path) -> None:
    """Print which stages of which rounds are done, and the rounds' figures.

    Raises:
        InputError: if the folder holds no run.
    """
    rounds = round_folders(folder)
    console, table = Console(), Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("")
    made = {stage for stage in _MADE if any((path / stage).exists() for path in rounds.values())} or {"pairs"}
    stages = [stage for stage in _STAGES if stage in made or stage not in _MADE]
    for stage in stages:
        table.add_column(stage.removesuffix("_logps").removesuffix("/scored"), no_wrap=True)
    for number, path in rounds.items():
        states = [_state(path / stage) if number or stage.startswith("evaluation") else "" for stage in stages]
        table.add_row(f"round {number}" if number else "before", *states)
    console.table(table)
    if reports := round_reports(folder):
        console.text()
        console.table(result_table(reports))


def _state(stage: Path) -> str:
    if (stage / MANIFEST).exists():
        return "done"
    published = len(list((stage / "_shards").glob("part-*.json")))
    return f"{published} shards" if published else "-"

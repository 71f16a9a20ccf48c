"""How far a run is, read from its folder alone: no Ray, no model."""

from __future__ import annotations

from pathlib import Path

from pipeline.console import Console
from pipeline.progress import stage_table, stages_of
from pipeline.reading import num_rounds, reason_stopped, round_folders, run_settings
from pipeline.report import result_table, round_reports


def show_status(folder: Path) -> None:
    """Print which stages of which rounds are done, and the rounds' figures.

    Raises:
        InputError: if the folder holds no run, or a file of it cannot be read.
    """
    console, rounds = Console(), round_folders(folder)
    console.table(stage_table({number: stages_of(path, number) for number, path in rounds.items()}))
    if reports := round_reports(folder):
        console.text()
        console.table(result_table(reports))
    settings = run_settings(folder)
    if reason := reason_stopped(folder, settings, reports):
        settled = sum(report["round"] > 0 for report in reports)
        console.text(f"\nstopped after {settled} of {num_rounds(folder, settings)} rounds: {reason}")

"""``prefloop compare``: several runs side by side, as tables in the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from pipeline.console import Console
from pipeline.files import write_text
from pipeline.page import comparison
from pipeline.page.packed import pack
from pipeline.page.rows import Room
from pipeline.page.templating import filled
from pipeline.texts import cut, visible
from stages.errors import InputError, StageError

_CELL_CHARS = 60  # of a config's value in the terminal
_ROOM = Room(20_000, 20_000_000)


def show_comparison(folders: Sequence[Path], out: Path) -> None:
    """Print how runs differ, in their configs and in what came of them, and write the page with curves and answers.

    Raises:
        InputError: if there are fewer than two, a folder holds no run, or a file of it cannot be read.
        StageError: if the page cannot be written.
    """
    if len(folders) < 2:
        raise InputError(
            "prefloop compare", wanted="two runs or more", got=str(len(folders)), fix="prefloop report RUN shows one"
        )
    runs = comparison.read_runs(folders)
    differences, figures = comparison.differences(runs), comparison.figures(runs)
    answers = comparison.answers(runs, _ROOM)
    text = filled(
        "compare.html.jinja",
        runs=runs,
        differences=differences,
        figures=figures,
        charts=comparison.curves(runs),
        answers=answers,
        packed=pack(answers.prompts),
    )
    try:
        write_text(out, text)
    except OSError as error:
        raise StageError(
            str(out), wanted="a file to write the page to", got=str(error), fix="name another place: --out FILE"
        ) from None
    console, names = Console(), [run.name for run in runs]
    console.table(_table("config", names, differences or [["no difference", *[""] * len(runs)]]))
    console.text()
    console.table(_table("result", names, figures))
    console.text(f"\n{visible(answers.told)}")
    console.text(f"{out}   ({len(text.encode()) / 1000:,.0f} kB; curves and answers, for a browser)")


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column(title)
    for name in names:
        table.add_column(visible(name), justify="right", overflow="fold")
    for key, *cells in rows:
        table.add_row(visible(key), *[visible(cut(cell, _CELL_CHARS)) for cell in cells])
    return table

"""The undisturbed run that all others are compared with, and the table of cells at the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from faulty_run import FaultyRun, refuse_late_scratch
from matrix import WHEN, WHO

_TABLE = pytest.StashKey[dict]()
_LINES = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    kept = os.environ.get("PREFLOOP_FAULTS_RUNS")
    return Path(kept) if kept else tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def undisturbed(runs) -> FaultyRun:
    run = FaultyRun(runs, "undisturbed").finish(at_most=1)
    assert run.calls[0].code == 0, run.calls[0].err
    refuse_late_scratch(run)
    return run


@pytest.fixture
def note(request):
    """Puts a result into the table at the end: of a cell, or a line below."""

    def note(cell: tuple[str, str] | None, text: str) -> None:
        if cell is None:
            request.config.stash.setdefault(_LINES, []).append(text)
        else:
            request.config.stash.setdefault(_TABLE, {}).setdefault(cell, []).append(text)

    return note


def pytest_terminal_summary(terminalreporter, config) -> None:
    table, lines = config.stash.get(_TABLE, {}), config.stash.get(_LINES, [])
    if not table and not lines:
        return
    terminalreporter.section("kill matrix")
    width = 24
    terminalreporter.write_line("".join(text.ljust(width) for text in ("", *WHEN)))
    for who in WHO:
        cells = ["; ".join(table.get((who, when), ["not run"])) for when in WHEN]
        terminalreporter.write_line("".join(text.ljust(width) for text in (who, *cells)))
    for line in lines:
        terminalreporter.write_line(line)

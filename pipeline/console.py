"""What a person reads while a run works: one line a stage, a progress bar where there is a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

_PREFIX_CHARS = 22
_FILE_WIDTH = 140  # where output goes to a file


class Bar:
    """A progress bar that is there only on a terminal."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float) -> None:
        self._progress.advance(self._task, amount)

    def at(self, done: float, total: float | None = None) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def say(self, text: str) -> None:
        self._progress.update(self._task, description=text)


class Console:
    """Standard output, for people."""

    def __init__(self) -> None:
        self._rich = RichConsole(highlight=False, soft_wrap=True, markup=False)  # a text may hold [/INST]
        if not self._rich.is_terminal:
            self._rich.width = _FILE_WIDTH

    @property
    def width(self) -> int:
        """Characters a line."""
        return self._rich.width

    def line(self, where: str, what: str, text: str) -> None:
        """One finished stage: ``round 2/3  sample   512 prompts -> 4,096 candidates   31 s``."""
        self._rich.print(f"{where:<10} {what:<10} {text}", markup=False)

    def text(self, text: str = "") -> None:
        self._rich.print(text, markup=False)

    def table(self, table: Table) -> None:
        self._rich.print(table)

    @contextmanager
    def bar(self, text: str, total: float | None) -> Iterator[Bar]:
        """A bar that goes away when the block ends; nothing at all where output is not a terminal."""
        columns = (
            TextColumn(f"{{task.description:<{_PREFIX_CHARS}}}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._rich, transient=True, disable=not self._rich.is_terminal) as progress:
            yield Bar(progress, progress.add_task(text, total=total))


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started


def duration(seconds: float) -> str:
    """``4.2 s``, ``31 s``, ``2 min 05 s``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def share(part: float, whole: float) -> str:
    """``61.3%``."""
    return f"{100 * part / whole:.1f}%" if whole else "0%"

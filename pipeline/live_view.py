"""A run in a terminal, drawn anew every second: its rounds, what is under way and how fast, its workers, time to go."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.console import duration
from pipeline.live import Snapshot, snapshot
from pipeline.progress import Progress, round_name, stage_table
from pipeline.report import result_table

_EVERY_S = 1.0
_SHOWN = 8  # rounds, the last ones
_STEP = ("loss", "rewards/accuracies", "rewards/margins", "rejected_active", "grad_norm")


def show_live(folder: Path) -> None:
    """Show a run until it is finished, or Ctrl-C; where output is no terminal, once.

    Raises:
        InputError: if the folder holds no run.
    """
    console = RichConsole(highlight=False, markup=False)
    found = snapshot(folder)
    if not console.is_terminal:
        console.width = 120
        console.print(view(found))
        return
    with Live(view(found), console=console, auto_refresh=False) as live:
        while not found.is_finished:
            time.sleep(_EVERY_S)
            found = snapshot(folder)
            live.update(view(found), refresh=True)


def view(found: Snapshot) -> Group:
    """A run at one moment, as rich draws it."""
    shown = dict(sorted(found.rounds.items())[-_SHOWN:])
    parts: list[Text | Table] = [_headline(found), Text(), stage_table(shown)]
    moving = [(at, p) for at, stages in found.under_way.items() for p in stages if p.done and not p.is_closed]
    if moving:
        parts += [Text(), _under_way(moving)]
    if found.step and not found.is_finished:
        told = [f"{name} {found.step[name]:.3f}" for name in _STEP if isinstance(found.step.get(name), float)]
        parts += [Text(), Text(f"step {found.step['step']}/{found.step['steps']}   {'   '.join(told)}")]
    if found.workers:
        parts += [Text(), Text("workers   " + "   ".join(f"{name} {told}" for name, told in found.workers.items()))]
    if found.reports:
        parts += [Text(), result_table(found.reports[-_SHOWN:])]
    return Group(*parts)


def _headline(found: Snapshot) -> Text:
    rounds = f"{found.num_settled} of {found.num_asked or '?'} rounds settled"
    if found.is_finished:
        return Text(f"{found.folder.name}: finished   {rounds}" + (f"; {found.stopped}" if found.stopped else ""))
    state = {True: "at work", False: "no process of this machine works on it", None: "going on"}[found.works]
    known = found.to_go_s is not None
    to_go = f"about {duration(found.to_go_s or 0)} to go" if known else "time to go is known after the first round"
    told = f"{found.folder.name}: {state}   {rounds}   {to_go}"
    return Text(told + (f"   last change {duration(found.quiet_s)} ago" if found.quiet_s > 10 else ""))


def _under_way(moving: list[tuple[int, Progress]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2), show_header=False)
    for number, progress in moving:
        rate = f"{progress.rate:,.0f} {progress.unit}/s" if progress.rate is not None else ""
        to_go = f"{duration(progress.to_go_s)} to go" if progress.to_go_s is not None else ""
        bar = ProgressBar(total=progress.total or None, completed=progress.done, width=30, pulse=not progress.total)
        table.add_row(round_name(number), progress.stage, bar, progress.told, rate, to_go)
    return table

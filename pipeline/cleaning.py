"""Freeing a run's disk: the weights of rounds that nothing goes on from. What is dropped stands in the lineage.

Kept are the last rounds' (``run.keep``), those of the policy that the run stands behind and of the one before it in its
line, with the mixtures made of these: all that the next round may start from or refer to. So are the same of the best
policy, which the gate may roll back to. Of the others policy, float32 master, optimizer state and mixtures lose their
weights; config, tokenizer and manifest stay, and so do all tables, figures, value heads and adapters.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.console import Console
from pipeline.gate import best_round
from pipeline.lineage import Lineage
from pipeline.mirror import place_of, remove, sizes
from pipeline.model_folders import OPTIMIZER
from pipeline.reading import round_folders, run_settings
from pipeline.report import round_reports
from pipeline.run_folder import only_run
from pipeline.sections import RunSection

_HEAVY = ("policy", "master", OPTIMIZER, "start/policy", "start/master", "ema/policy", "ema/master")


def clean(folder: Path, *, keep: int | None, yes: bool) -> None:
    """Show what a run would drop, and drop it if `yes`.

    Args:
        keep: how many of the last rounds stay; None: the config's ``run.keep``.

    Raises:
        InputError: if the folder holds no run.
        StageError: if a process works on the run.
    """
    rounds, console = round_folders(folder), Console()
    with only_run(folder):
        lineage = Lineage.read(folder / "run.json")
        last = keep or run_settings(folder).get("run", {}).get("keep", RunSection.model_fields["keep"].default)
        stay = kept_rounds(lineage, best=best_round(round_reports(folder)), last=last)
        heavy = {
            record.round: files
            for record in lineage.rounds
            if record.round not in stay and record.round in rounds and (files := weights_in(rounds[record.round]))
        }
        size = _told(sum(sizes(file.parent)[file.name] for files in heavy.values() for file in files))
        console.text(
            f"stay      the weights of {', '.join(f'round {number}' for number in sorted(stay)) or 'no round'}"
        )
        for number, files in heavy.items():
            names = dict.fromkeys(file.parent.relative_to(rounds[number]).as_posix() for file in files)
            console.text(f"{'dropped' if yes else 'to drop':<9} round {number}: {', '.join(names)}")
        if yes:
            lineage.drop(heavy.keys())  # first: what is gone must not be missed
            for file in (file for files in heavy.values() for file in files):
                remove(file)
        if not heavy:
            console.text("nothing to free")
        else:
            command = f"prefloop clean {place_of(folder)} --yes"
            console.text(f"freed     {size}" if yes else f"in all    {size}; to free it: {command}")


def _told(size_bytes: int) -> str:
    """``1.2 GB``, ``340 MB``."""
    return f"{size_bytes / 1e9:,.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:,.1f} MB"


def kept_rounds(lineage: Lineage, *, best: int, last: int) -> set[int]:
    """The rounds whose weights stay."""
    settled = len(lineage.rounds)
    lines = {*lineage.line(settled)[:2], *lineage.line(best)[:2]}
    needed = {best, *lines, *(number + 1 for number in lines), *range(settled - last + 1, settled + 1)}
    return {number for number in needed if 1 <= number <= settled}


def weights_in(round_folder: Path) -> list[Path]:
    """The files of weights that a round may lose."""
    folders = [round_folder / name for name in _HEAVY]
    return sorted(folder / file for folder in folders for file in sizes(folder) if file.endswith(".safetensors"))

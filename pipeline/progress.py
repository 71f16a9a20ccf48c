"""How far the stages of a run's rounds are, by what they published, and the table of it.

Nothing is asked of the run and nothing is written. Rates are of what was published: a stage's parts and the times at
which their entries appeared, the optimizer steps in ``metrics.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.artifacts import MANIFEST
from pipeline.files import read_json

STAGES: Mapping[str, tuple[str, ...]] = {
    "prompts": ("prompts",),
    "sample": ("candidates",),
    "score": ("scored",),
    "pair": ("pairs", "groups"),
    "reference": ("reference_logps*",),
    "update": ("policy",),
    "evaluate": ("evaluation/scored",),
}
"""A round's stages in their order, and the folders of what each comes to; of two names a round has one."""

_ENTRIES = "_shards/part-*.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """A stage of a round.

    Attributes:
        done, total: parts, or optimizer steps; `total` 0 where it is not known yet.
        rate: a second, of `unit`; None before there are two points in time.
    """

    stage: str
    done: int
    total: int
    is_closed: bool
    rate: float | None = None
    unit: str = ""
    pace: float = 0.0  # parts or steps a second

    @property
    def to_go_s(self) -> float | None:
        """Seconds that it still takes at its own pace; None where that cannot be told."""
        left = self.total - self.done
        return left / self.pace if left > 0 and self.pace and not self.is_closed else None

    @property
    def told(self) -> str:
        """``done``, ``3/8``, or ``-`` before it has begun."""
        if self.is_closed:
            return "done"
        return f"{self.done}/{self.total or '?'}" if self.done else "-"


def stages_of(folder: Path, number: int, *, since: float | None = None) -> list[Progress]:
    """The stages of a round; of round 0, the evaluation before the first.

    Args:
        since: when the work that goes on began, in seconds since 1970: rates leave out what was done before. None: no
            rates.
    """
    parts = len(list((folder / "prompts").glob(_ENTRIES)))
    names = STAGES if number else ("evaluate",)
    return [_update(folder) if name == "update" else _tables(folder, name, parts, since) for name in names]


def stage_table(rounds: Mapping[int, Sequence[Progress]]) -> Table:
    """A row for each round, a column for each stage."""
    table, row = Table(box=None, pad_edge=False, padding=(0, 2)), dict.fromkeys(STAGES, "")
    for name in ("", *STAGES):
        table.add_column(name, no_wrap=True)
    for number, stages in rounds.items():
        table.add_row(round_name(number), *(row | {found.stage: found.told for found in stages}).values())
    return table


def round_name(number: int) -> str:
    """What a round's row is called."""
    return f"round {number}" if number else "before"


def newest_step(folder: Path) -> dict[str, Any]:
    """The metrics of a round's newest optimizer step, of which a whole line is there; empty before there is one."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return next(whole_lines(reversed(lines[-2:])), {})


def whole_lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """What the lines of a file say that a process may be writing, or could not write to their end."""
    for line in lines:
        with suppress(ValueError):
            yield dict(json.loads(line))


def _tables(folder: Path, name: str, parts: int, since: float | None) -> Progress:
    """A stage that publishes parts; its rate is in rows, of candidates in tokens."""
    stages = [found for pattern in STAGES[name] for found in sorted(folder.glob(pattern))]
    entries = [entry for stage in stages for entry in sorted(stage.glob(_ENTRIES))]
    closed, done = bool(stages) and all((stage / MANIFEST).exists() for stage in stages), len(entries)
    total = done if closed else 0 if name == "evaluate" else parts * len(stages)
    if closed or since is None:
        return Progress(name, done, total, closed)
    claims = [time_of(stage / "fingerprint.json") for stage in stages if (stage / "fingerprint.json").exists()]
    times = {entry: time_of(entry) for entry in entries}
    began = max(since, min(claims, default=0.0))
    fresh = [entry for entry in entries if times[entry] > began]
    if not fresh:
        return Progress(name, done, total, closed)
    took = max(times[entry] for entry in fresh) - began
    amount = sum(_size(entry, tokens=name == "sample") for entry in fresh)
    return Progress(
        name, done, total, closed, amount / took, "tokens" if name == "sample" else "rows", len(fresh) / took
    )


def _update(folder: Path) -> Progress:
    """The training, by its steps; what an ended update left is closed too."""
    closed = (folder / "policy" / MANIFEST).exists() or (folder / "update_ended.json").exists()
    step = newest_step(folder)
    if not step:
        return Progress("update", 0, 0, closed)
    step_s = float(step.get("step_s") or 0.0)
    rate = step.get("num_tokens", 0.0) / step_s if step_s else None
    done, total = int(step["step"]), int(step["steps"])
    return Progress("update", done, total, closed, rate, "tokens", 1 / step_s if step_s else 0.0)


def _size(entry: Path, *, tokens: bool) -> float:
    found = read_json(entry)
    return float(found["stats"].get("tokens", 0) if tokens else found["rows"])


def time_of(file: Path) -> float:
    """When a file was changed last, in seconds since 1970."""
    return file.stat().st_mtime

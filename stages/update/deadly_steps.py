"""Which optimizer steps kill their ranks: known from a journal that outlives them.

Rank 0 notes every step that begins and every one that is survived. A new group of ranks notes that it is there; the
step that the group before it was in has then cost one group more. A step that cost several is not made again: its
batch is told of like one that the guard did not take, and the update goes on with the next.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FEWEST_DEATHS = 3
"""Groups that a step has to cost before it is passed over."""

MOST_PASSED_OVER = 4
"""Steps of one update. Where more of them kill their ranks, the fault is not their rows'."""


@dataclass(frozen=True, slots=True)
class StepJournal:
    """The journal of one update, a line for each thing that happened.

    A process that dies loses nothing that it has written, so that lines are not synced.

    Attributes:
        call: of the command. What another call left counts for nothing, wherever it is: it may have been interrupted
            in a step again and again.
    """

    file: Path
    call: str

    def drop(self) -> None:
        """Forget all: an update begins, or is done."""
        self.file.unlink(missing_ok=True)

    def new_group(self) -> dict[int, str]:
        """Note that a new group of ranks begins; the steps to pass over, counted from 0, each with its reason."""
        self._note({"group": "begins"})
        return {step: f"{count} groups of ranks died in it" for step, count in self._deadly().items()}

    def begins(self, step: int) -> None:
        """Note that a step begins."""
        self._note({"begins": step})

    def survived(self, step: int) -> None:
        """Note that a step has ended."""
        self._note({"survived": step})

    def can_go_on(self) -> bool:
        """Whether the step in which the last group died is now one to pass over, and few are."""
        steps = self._last_steps()
        return bool(steps) and steps[-1] in (deadly := self._deadly()) and len(deadly) <= MOST_PASSED_OVER

    def _deadly(self) -> dict[int, int]:
        counts = Counter(step for step in self._last_steps() if step is not None)
        return {step: count for step, count in counts.items() if count >= FEWEST_DEATHS}

    def _last_steps(self) -> list[int | None]:
        """The step that each group was in when it ended; None: in none."""
        found: list[int | None] = []
        for line in self._lines():
            if "group" in line:
                found.append(None)
            elif found:
                found[-1] = line.get("begins")
        return found

    def _lines(self) -> list[dict[str, Any]]:
        text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
        return [line for line in lines if line.get("call") == self.call]

    def _note(self, line: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(
                "\n" + json.dumps(line | {"call": self.call})
            )  # what a death tore off stays on a line of its own

"""What becomes of a run's workers: a line in ``workers.jsonl`` for each that came up or died, and deaths told aloud."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import WorkerLost
from pipeline.console import Console


@dataclass(frozen=True, slots=True)
class WorkerLog:
    """Kept in the log folder of one call.

    Attributes:
        folder: made if need be.
        console: where deaths are told.
    """

    folder: Path
    console: Console

    def came_up(self, name: str, start_s: float, job_s: float) -> None:
        """A worker has done its first job (an engine's begins with its weights), `start_s` after it was asked for."""
        seconds = {"start_s": round(start_s, 3), "first_job_s": round(job_s, 3)}
        self._note({"worker": name, "event": "came up"} | seconds)

    def died(self, lost: WorkerLost) -> None:
        """A worker died and is replaced."""
        self._note({"worker": lost.name, "event": "died", "reason": lost.reason})
        self.console.line("", "restarted", f"{lost.name}: {lost.reason} (log: {lost.log})")

    def _note(self, event: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "workers.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3)} | event) + "\n")

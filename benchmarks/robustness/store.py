"""Finished cells, a JSON line each, appended as they come; what is there is not done again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.robustness.grid import Cell

Figures = dict[str, Any]


class Store:
    """The file of finished cells.

    Args:
        recipes: by stage, what a cell's result depends on besides the cell itself.
    """

    def __init__(self, file: Path, recipes: Mapping[str, Mapping[str, Any]]) -> None:
        self._file, self._recipes = file, recipes
        self._found: dict[str, Figures] = {}
        if file.exists():
            whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")  # a line that was cut off does not count
            file.write_text(whole + "\n" * bool(whole), encoding="utf-8")
            for line in whole.splitlines():
                row = json.loads(line)
                self._found[row["key"]] = row["figures"]

    def get(self, cell: Cell) -> Figures | None:
        return self._found.get(self._key(cell))

    def add(self, cell: Cell, figures: Figures) -> None:
        key = self._key(cell)
        self._found[key] = figures
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **asdict(cell), "figures": figures}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        return [cell for cell in cells if self.get(cell) is None]

    def _key(self, cell: Cell) -> str:
        return cell.key(self._recipes[cell.stage])

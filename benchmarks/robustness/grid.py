"""Which cells the study has: a cell is one method trained once at one point with one seed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from stages.seeds import row_id

Stage = Literal["grid", "stories", "others", "rounds"]
Kind = Literal["alike", "unlike", "on_policy"]

STAGES: tuple[Stage, ...] = ("grid", "stories", "others", "rounds")
METHODS = ("dpo", "dpop", "minor_dpo")
RATES = (1, 3, 10, 30)
BETAS = (0.01, 0.1, 1.0)
KINDS: tuple[Kind, ...] = ("alike", "unlike")
DEFAULT_RATE, DEFAULT_BETA = 1, 0.1
OTHERS = ("rpo", "exo_pair", "chi_po", "ipo", "hinge", "robust", "sppo", "simpo", "nca_pair", "sft")
LEFT_OUT = {
    "exo": "trains on groups, not on pairs",
    "mpo": "needs answers drawn from the reference beside the pairs",
    "hpo": "needs an auxiliary reward and a value head",
    "mrpo": "needs several references",
}


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """Where methods are compared.

    Attributes:
        rate: how many times the task's learning rate.
        beta: None: each objective's own default.
    """

    rate: int
    beta: float | None
    kind: Kind

    @property
    def name(self) -> str:
        beta = "own beta" if self.beta is None else f"beta {self.beta:g}"
        return f"{self.rate}x, {beta}, {self.kind.replace('_', ' ')}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One method, trained once."""

    stage: Stage
    method: str
    point: Point
    seed: int

    def key(self, recipe: Mapping[str, Any]) -> str:
        """What a result is found again by: everything that it depends on.

        Args:
            recipe: the task's numbers.
        """
        return row_id(sorted(asdict(self).items()), sorted(recipe.items()))


def grid_points() -> list[Point]:
    return [Point(rate, beta, kind) for kind, beta, rate in itertools.product(KINDS, BETAS, RATES)]


def stories_points() -> list[Point]:
    """A quarter of the grid: two rates, every beta, and the kinds in turn, so that each level is met equally often."""
    rates = (RATES[0], RATES[2])
    return [Point(rate, beta, KINDS[(i + j) % 2]) for i, rate in enumerate(rates) for j, beta in enumerate(BETAS)]


def cells_of(stage: Stage, seeds: Sequence[int], *, points: Sequence[Point] = ()) -> list[Cell]:
    """A stage's cells, a whole comparison of all methods after another, one seed after another.

    Args:
        points: of `rounds`, which are chosen from the grid's results.
    """
    if stage == "others":
        where = [Point(DEFAULT_RATE, None, kind) for kind in KINDS]
        return [Cell(stage, method, point, seed) for seed in seeds for point in where for method in OTHERS]
    found = {"grid": grid_points, "stories": stories_points}.get(stage, lambda: list(points))()
    return [Cell(stage, method, point, seed) for seed in seeds for point in found for method in METHODS]

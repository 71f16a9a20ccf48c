"""What the results say about the claim, by rules written down before them; pure functions of finished cells.

The claim: MinorDPO is robust where DPO breaks, at high learning rates, at small betas, and where chosen and rejected
answers are nearly alike.

- At a point, a method is *better* than another if its worst seed is above the other's best; *worse* the other way
  round; else *even*: the seeds' spread covers the difference.
- A method *breaks* at a point if the mean over its seeds is below the start policy's figure.
- In a region, the claim *holds* against another method if MinorDPO is better at half of the points or more, and worse
  at none. There is *no difference* if all points are even. The claim *does not hold* if MinorDPO is worse at as many
  points as it is better, or at more; else the result is *mixed*.
- An update that ended in numbers that are not finite is below every figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from benchmarks.robustness.grid import METHODS, Cell, Point

CLAIMED = "minor_dpo"
Comparison = Literal["better", "even", "worse"]
Results = Mapping[Cell, Mapping[str, Any]]

REGIONS: dict[str, Callable[[Point], bool]] = {
    "high learning rate (10x and 30x)": lambda point: point.rate >= 10,
    "small beta (0.01)": lambda point: point.beta == 0.01,
    "chosen and rejected alike": lambda point: point.kind == "alike",
    "none of these (1x and 3x, beta 0.1 and 1, unlike)": lambda point: (
        point.rate < 10 and point.beta != 0.01 and point.kind == "unlike"
    ),
    "all points": lambda point: True,
}


def values(results: Results, method: str, point: Point, measure: str) -> list[float]:
    """A figure of every seed; minus infinity where the update diverged."""
    found = sorted(
        (cell.seed, -math.inf if figures.get("diverged") else figures[measure])
        for cell, figures in results.items()
        if (cell.method, cell.point) == (method, point)
    )
    return [value for _, value in found]


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """How one method stands to another at a point, by the seeds' spread."""
    if min(ours) > max(theirs):
        return "better"
    return "worse" if max(ours) < min(theirs) else "even"


@dataclass(frozen=True, slots=True)
class Finding:
    """How MinorDPO stands to another method in a region.

    Attributes:
        better, even, worse: numbers of points.
        broken: by method, the number of points at which it breaks.
    """

    region: str
    rival: str
    better: int
    even: int
    worse: int
    broken: Mapping[str, int]

    @property
    def num_points(self) -> int:
        return self.better + self.even + self.worse

    @property
    def verdict(self) -> Literal["holds", "no difference", "does not hold", "mixed"]:
        if 2 * self.better >= self.num_points and self.worse == 0:
            return "holds"
        if self.even == self.num_points:
            return "no difference"
        return "does not hold" if self.worse >= self.better else "mixed"


def findings(
    results: Results, measure: str, start: float, *, regions: Mapping[str, Callable[[Point], bool]] | None = None
) -> list[Finding]:
    """Every region against every other method, where there are points with results of all methods.

    Args:
        start: the start policy's figure.
    """
    complete = points_of(results)
    found = []
    for region, inside in (regions or REGIONS).items():
        points = [point for point in complete if inside(point)]
        sides = {method: [values(results, method, point, measure) for point in points] for method in METHODS}
        broken = {method: sum(fmean(seeds) < start for seeds in sides[method]) for method in METHODS}
        for rival in (method for method in METHODS if method != CLAIMED and points):
            told = [compare(ours, theirs) for ours, theirs in zip(sides[CLAIMED], sides[rival], strict=True)]
            counts = {word: told.count(word) for word in ("better", "even", "worse")}
            found.append(Finding(region, rival, **counts, broken=broken))
    return found


def points_of(results: Results) -> list[Point]:
    """The points at which every method has a result, in the cells' order."""
    seen = dict.fromkeys(cell.point for cell in results)
    methods = {point: {cell.method for cell in results if cell.point == point} for point in seen}
    return [point for point in seen if methods[point].issuperset(METHODS)]


def chosen_points(results: Results, default: Point, measure: str = "exact") -> list[Point]:
    """The three points that are gone on with on policy: the quickstart's own, and the claim's best and worst case.

    Best and worst are by the mean difference of MinorDPO and DPO over both kinds and all seeds; of equal ones, the
    smaller rate and beta. Pairs are made anew in every round there, so that a point is a rate and a beta.
    """
    gaps: dict[tuple[int, float], list[float]] = {}
    for point in points_of(results):
        ours, theirs = (fmean(_bounded(values(results, method, point, measure))) for method in (CLAIMED, "dpo"))
        gaps.setdefault((point.rate, point.beta or 0.0), []).append(ours - theirs)
    gaps.pop((default.rate, default.beta or 0.0), None)
    order = sorted(gaps, key=lambda place: (-fmean(gaps[place]), place))
    ends = [order[0], order[-1]] if len(order) > 1 else order
    return [default, *(Point(rate, beta, default.kind) for rate, beta in ends)]


def _bounded(found: Sequence[float]) -> list[float]:
    """A diverged update counts as 0."""
    return [max(0.0, value) for value in found]

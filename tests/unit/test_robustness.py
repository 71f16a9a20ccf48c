"""The robustness study's rules: which cells there are, what is kept, and what follows from results."""

from __future__ import annotations

import pytest

from benchmarks.robustness.grid import METHODS, Cell, Point, cells_of, grid_points, stories_points
from benchmarks.robustness.recipes import recipes
from benchmarks.robustness.store import Store
from benchmarks.robustness.verdict import chosen_points, compare, findings

SEEDS = range(3)
DEFAULT = Point(1, 0.1, "on_policy")


def results(figure):
    """A grid in which a method's accuracy at a point with a seed is `figure` of them."""
    return {cell: {"exact": figure(cell.method, cell.point, cell.seed)} for cell in cells_of("grid", SEEDS)}


def test_the_grid_has_216_cells_and_the_stories_a_quarter_of_them_with_every_level():
    assert len(cells_of("grid", SEEDS)) == 216
    assert len(cells_of("stories", SEEDS)) == 54
    for name in ("rate", "beta", "kind"):
        levels = [getattr(point, name) for point in stories_points()]
        assert len({levels.count(level) for level in levels}) == 1


def test_fewer_seeds_begin_the_same_cells():
    assert cells_of("grid", range(1)) == cells_of("grid", SEEDS)[:72]


def test_a_finished_cell_is_found_again_and_a_line_cut_off_is_not(tmp_path):
    first, second, third = cells_of("grid", SEEDS)[:3]
    store = Store(tmp_path / "cells.jsonl", recipes())
    store.add(first, {"exact": 0.5})
    store.add(second, {"exact": 0.6})
    text = (tmp_path / "cells.jsonl").read_text()
    (tmp_path / "cells.jsonl").write_text(text[:-20])
    again = Store(tmp_path / "cells.jsonl", recipes())
    assert again.missing([first, second, third]) == [second, third]
    again.add(third, {"exact": 0.7})
    assert Store(tmp_path / "cells.jsonl", recipes()).get(third) == {"exact": 0.7}


def test_a_cell_under_other_numbers_is_another_one(tmp_path):
    cell = cells_of("grid", SEEDS)[0]
    Store(tmp_path / "cells.jsonl", recipes()).add(cell, {"exact": 0.5})
    other = {stage: {**recipe, "num_pairs": 1} for stage, recipe in recipes().items()}
    assert Store(tmp_path / "cells.jsonl", other).get(cell) is None


@pytest.mark.parametrize(
    ("ours", "theirs", "word"),
    [
        ([0.5, 0.6], [0.3, 0.4], "better"),
        ([0.5, 0.6], [0.4, 0.5], "even"),
        ([0.1, 0.2], [0.3, 0.4], "worse"),
        ([0.5], [float("-inf")], "better"),
    ],
)
def test_methods_are_compared_by_the_seeds_spread(ours, theirs, word):
    assert compare(ours, theirs) == word


def test_a_claim_holds_mixes_or_does_not():
    def at_high_rates(method, point, seed):
        return 0.9 if method == "minor_dpo" or (method == "dpo" and point.rate < 10) else 0.1 + 0.8 * (method == "dpop")

    found = {(f.region.split(" ")[0], f.rival): f for f in findings(results(at_high_rates), "exact", 0.5)}
    assert found["high", "dpo"].verdict == "holds"
    assert found["high", "dpo"].broken == {"dpo": 12, "dpop": 0, "minor_dpo": 0}
    assert found["high", "dpop"].verdict == "no difference"
    assert found["none", "dpo"].verdict == "no difference"
    assert found["all", "dpo"].verdict == "holds" and found["all", "dpo"].better == 12

    def sometimes_worse(method, point, seed):
        return 0.5 if method != "minor_dpo" else 0.4 if point.rate == 1 else 0.6

    (whole,) = [f for f in findings(results(sometimes_worse), "exact", 0.5) if f.region[:3] + f.rival == "alldpo"]
    assert (whole.better, whole.worse, whole.verdict) == (18, 6, "mixed")

    def often_worse(method, point, seed):
        return 0.5 if method != "minor_dpo" else 0.4 if point.rate > 1 else 0.6

    (whole,) = [f for f in findings(results(often_worse), "exact", 0.5) if f.region[:3] + f.rival == "alldpo"]
    assert (whole.better, whole.worse, whole.verdict) == (6, 18, "does not hold")


def test_an_update_that_diverged_is_below_every_figure():
    found = results(lambda *_: 0.0)
    found |= {cell: {"diverged": True} for cell in found if cell.method == "dpo"}
    assert all(f.verdict == "holds" for f in findings(found, "exact", 0.5) if f.rival == "dpo")


def test_a_point_without_every_method_is_not_counted():
    found = {
        cell: f for cell, f in results(lambda *_: 0.5).items() if cell.point.kind == "alike" or cell.method == "dpo"
    }
    assert {f.num_points for f in findings(found, "exact", 0.5) if f.region == "all points"} == {12}


def test_rounds_are_made_at_the_default_point_and_where_the_claim_does_best_and_worst():
    def figure(method, point, seed):
        gap = {(30, 0.01): 0.4, (3, 1.0): -0.3}.get((point.rate, point.beta), 0.0)
        return 0.5 + gap * (method == "minor_dpo")

    assert chosen_points(results(figure), DEFAULT) == [
        DEFAULT,
        Point(30, 0.01, "on_policy"),
        Point(3, 1.0, "on_policy"),
    ]


def test_every_point_of_the_grid_is_met_by_every_method():
    cells = cells_of("grid", range(1))
    assert {(cell.method, cell.point) for cell in cells} == {(m, p) for m in METHODS for p in grid_points()}
    assert len(set(cells)) == len(cells) == 72
    assert isinstance(cells[0], Cell)

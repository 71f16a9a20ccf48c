"""Several rewards as one number."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.contracts import SCORED
from stages.score.combine import Moments, Term, combined, with_rewards

VALUES = st.lists(st.floats(-1e3, 1e3) | st.none(), max_size=30)


def rewards(**values):
    return [{"name": name, "value": value, "role": "main"} for name, value in values.items()]


def table(rows):
    return SCORED.table(
        {"response_id": str(i), "prompt_id": "p", "round": 1, "reward": None, "rewards": row}
        for i, row in enumerate(rows)
    )


@given(st.lists(VALUES, max_size=6))
def test_moments_of_parts_merge_to_those_of_the_whole(parts):
    merged = Moments()
    for part in parts:
        merged = merged.merged(Moments.of(part))
    found = [value for part in parts for value in part if value is not None]
    assert merged.count == len(found)
    if found:
        assert merged.mean == pytest.approx(statistics.fmean(found), abs=1e-9)
        assert merged.squares / merged.count == pytest.approx(statistics.pvariance(found), rel=1e-6, abs=1e-6)


def test_a_missing_main_reward_leaves_the_sum_missing():
    assert combined(rewards(a=1.0, b=None), [Term("a", 1.0), Term("b", 1.0)]) is None
    assert combined(rewards(a=1.0, b=None), [Term("a", 2.0)]) == 2.0


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.floats(0.1, 10), st.floats(-50, 50))
def test_a_standardised_reward_does_not_depend_on_its_unit_or_offset(values, unit, offset):
    def standardised(found):
        moments = Moments.of(found)
        scaled = with_rewards(table([rewards(a=v) for v in found]), [Term("a", 1.0, moments.mean, moments.deviation)])
        return scaled["reward"].to_pylist()

    if statistics.pstdev(values) < 1e-3:
        return
    ours = standardised(values)
    assert statistics.fmean(ours) == pytest.approx(0, abs=1e-6)
    assert statistics.pstdev(ours) == pytest.approx(1, abs=1e-6)
    assert standardised([unit * v + offset for v in values]) == pytest.approx(ours, abs=1e-3)


def test_equal_values_standardise_to_nothing():
    moments = Moments.of([3.0, 3.0, 3.0])
    assert combined(rewards(a=3.0), [Term("a", 5.0, moments.mean, moments.deviation)]) == 0.0


def test_equal_values_whose_mean_is_rounded_count_as_equal():
    """0.1 six times has a spread of 1e-17 by rounding; an answer of 0.2 must not become 7e15."""
    assert Moments.of([0.1] * 6).deviation == 1.0
    assert Moments.of([0.1] * 3).merged(Moments.of([0.1] * 4)).deviation == 1.0

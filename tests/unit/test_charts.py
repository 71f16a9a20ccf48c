"""Curves: what is drawn of numbers, and that all of it lies inside of its plot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.page.charts import Chart, Series, draw, nice_ticks
from pipeline.page.curves import step_curves
from pipeline.reading import round_settings


def test_many_steps_become_few_points_with_the_same_mean():
    steps = {1: [{"loss": float(number % 7)} for number in range(700)], 2: [{"loss": 1.0}] * 300}
    settings = {"rounds": [{}, {"update": {"beta": 0.5}}], "update": {"beta": 0.1, "loss_type": "minor_dpo"}}
    (chart,) = step_curves(steps, settings)
    values = chart.series[0].values
    assert len(values) < 200
    assert chart.marks == [(1.0, "round 1"), (701.0, "round 2")]
    assert sum(values[:100]) / 100 == pytest.approx(3.0)
    assert round_settings(settings, 2)["update"] == {"beta": 0.5, "loss_type": "minor_dpo"}


def test_log_ratios_are_drawn_in_nats_with_the_band_between_their_tenths():
    step = {"log_ratios/chosen": 2.0, "log_ratios/chosen/p10": 1.0, "log_ratios/chosen/p90": 5.0}
    chart = step_curves({1: [step, step], 2: [{"log_ratios/rejected": -1.0}]}, {})[0]
    chosen, rejected = chart.series
    assert chosen.values == [2.0, 2.0, None] and rejected.values == [None, None, -1.0]
    assert chosen.band == [(1.0, 5.0), (1.0, 5.0), None] and rejected.band == [None] * 3
    drawn = draw(chart)
    assert [len(line.bands) for line in drawn.lines] == [1, 0]
    corners = [tuple(map(float, corner.split())) for corner in drawn.lines[0].bands[0].strip("MZ").split("L")]
    assert len(corners) == 4 and corners[0][1] == corners[1][1] < drawn.lines[0].points[0][1] < corners[2][1]


finite = st.floats(-1e6, 1e6)


@given(finite, finite, st.integers(2, 8))
def test_ticks_rise_and_hold_what_is_between_them(a, b, wanted):
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high, wanted)
    assert len(ticks) >= 2 and ticks == sorted(set(ticks))
    span = ticks[-1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * span and high - 1e-6 * span <= ticks[-1]


@given(st.lists(st.none() | finite, min_size=1, max_size=30))
def test_every_value_is_drawn_inside_of_its_chart(values):
    chart = Chart("t", "u", list(range(len(values))), "step", [Series("s", values)])
    if chart.is_empty():
        return
    (line,) = draw(chart).lines
    assert len(line.points) == sum(value is not None for value in values)
    assert all(54 <= x <= 426 and 17.9 <= y <= 190.1 for x, y in line.points)

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


cells = st.none() | st.tuples(finite, st.none() | st.floats(0, 1e6))


@given(st.lists(cells, min_size=1, max_size=30), st.booleans())
def test_every_value_is_drawn_inside_of_its_chart(cells, percent):
    """With its error bar and its band; an interval of shares that goes beyond 0 or 1 is cut there."""
    cells = [None if cell is None else (cell[0] % 1.0, cell[1]) for cell in cells] if percent else cells
    values, errors = ([None if cell is None else cell[part] for cell in cells] for part in (0, 1))
    band = [None if cell is None else (cell[0] - (cell[1] or 0), cell[0] + (cell[1] or 0)) for cell in cells]
    chart = Chart("t", "u", list(range(len(cells))), "step", [Series("s", values, errors, band)], percent=percent)
    if chart.is_empty():
        return
    (line,) = draw(chart).lines
    assert len(line.points) == sum(value is not None for value in values)
    assert len(line.bars) == sum(bool(error) for error in errors)
    corners = [corner.partition("h")[0] for path in line.bands for corner in path.strip("MZ").split("L")]
    ends = [end for _, *found in line.bars for end in found] + [float(corner.split()[1]) for corner in corners]
    assert all(54 <= x <= 426 and 17.9 <= y <= 190.1 for x, y in line.points)
    assert all(17.9 <= end <= 190.1 for end in ends)


@pytest.mark.parametrize(("first", "drawn"), [(0.6931471805599453, True), (0.25, False), (0.0, False), (None, False)])
def test_no_preference_is_drawn_for_losses_that_begin_there(first, drawn):
    chart = next(
        c for c in step_curves({1: [{"loss": first}, {"loss": 0.2}], 2: [{"loss": 0.5}]}, {}) if c.title == "Loss"
    )
    assert (chart.baseline is not None) == drawn

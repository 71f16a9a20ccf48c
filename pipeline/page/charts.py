"""The geometry of a line chart: numbers in, places in an SVG out; ``templates/chart.svg.jinja`` draws it.

Drawn by hand rather than by a plotting library: colours are left to the page's style sheet, so that one file is right
in light, in dark and on paper; text stays text; and every point tells its values under the pointer without a script.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.numbers import number

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 426, 18, 190
_MAX_VALUE_LABELS = 8
_MARK_NAME_WIDTH = 58


@dataclass(frozen=True, slots=True)
class Series:
    """One line; a value of None leaves a gap. `errors` are half-widths of error bars, `band` lower and upper ends."""

    name: str
    values: Sequence[float | None]
    errors: Sequence[float | None] = ()
    band: Sequence[tuple[float, float] | None] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """What to draw.

    Attributes:
        title, unit: above the plot; `unit` says what the vertical axis counts.
        x, x_label: where the values stand, and what the horizontal axis counts.
        baseline: a horizontal line to compare with, and its name.
        marks: where the lines begin anew, such as the first step of a round, with names.
        note: what a reader should take from it.
        percent: values are shares of 1, and the axis shows all of it; an interval beyond its ends is cut there.
    """

    title: str
    unit: str
    x: Sequence[float]
    x_label: str
    series: Sequence[Series]
    baseline: tuple[float, str] | None = None
    marks: Sequence[tuple[float, str]] = ()
    note: str = ""
    percent: bool = False

    def is_empty(self) -> bool:
        return not any(value is not None for series in self.series for value in series.values)


@dataclass(frozen=True, slots=True)
class Tick:
    """A label at a place on an axis."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Line:
    """A series in the plot: pieces of its path and band, points, their error bars (x, top, bottom), value labels."""

    name: str
    paths: list[str]
    bands: list[str]
    points: list[tuple[float, float]]
    bars: list[tuple[float, float, float]]
    labels: list[tuple[float, float, str]]


@dataclass(frozen=True, slots=True)
class Column:
    """A strip of the plot under the pointer (left edge, width), and what it tells."""

    at: float
    width: float
    text: str


@dataclass(frozen=True, slots=True)
class Drawing:
    """A chart with every place worked out."""

    chart: Chart
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    columns: list[Column]
    baseline: float | None
    marks: list[Tick]
    summary: str


def draw(chart: Chart) -> Drawing:
    """Work out a chart that is not empty."""
    y_ticks = _y_ticks(chart)
    x_low, x_high = min(chart.x), max(chart.x)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    pad = 12 if len(chart.x) <= _MAX_VALUE_LABELS else 0

    def place_x(value: float) -> float:
        return round(LEFT + pad + (value - x_low) / (x_high - x_low) * (RIGHT - LEFT - 2 * pad), 1)

    def place_y(value: float) -> float:
        inside = min(max(value, y_ticks[0]), y_ticks[-1])
        return round(BOTTOM - (inside - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (BOTTOM - TOP), 1)

    places = [place_x(value) for value in chart.x]
    whole = [value for value in nice_ticks(x_low, x_high, 6) if value == int(value) and x_low <= value <= x_high]
    decimals = _decimals(y_ticks)
    return Drawing(
        chart=chart,
        x_ticks=[Tick(place_x(value), f"{value:,.0f}") for value in whole],
        y_ticks=[Tick(place_y(value), _tick(value, decimals, chart.percent)) for value in y_ticks],
        lines=[_line(series, places, place_y, chart) for series in chart.series],
        columns=_columns(chart, places),
        baseline=place_y(chart.baseline[0]) if chart.baseline else None,
        marks=_marks([(place_x(at), name) for at, name in chart.marks]),
        summary=_summary(chart),
    )


def nice_ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` round numbers from at most `low` to at least `high`; nearly equal ends are spread first."""
    size = max(abs(low), abs(high))
    if size < 1e-9:
        low, high = -1.0, 1.0
    elif high - low < 1e-6 * size:
        low, high = low - size / 2, high + size / 2
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def table(chart: Chart) -> tuple[list[str], list[list[str]]]:
    """A chart's figures as a table: its columns' names, and a row of texts for each place."""
    rows = []
    for index, at in enumerate(chart.x):
        cells = [(series.values[index], series.errors[index] if series.errors else None) for series in chart.series]
        told = ["" if value is None else _with_error(value, error, chart.percent) for value, error in cells]
        rows.append([f"{at:,.0f}", *told])
    return [chart.x_label.partition(" (")[0], *[series.name for series in chart.series]], rows


def _marks(places: Sequence[tuple[float, str]]) -> list[Tick]:
    """Every mark, but names only where they do not run into the name before."""
    marks, free = [], 0.0
    for at, name in places:
        marks.append(Tick(at, name if at >= free and at + _MARK_NAME_WIDTH <= WIDTH else ""))
        if marks[-1].label:
            free = at + _MARK_NAME_WIDTH
    return marks


def _shown(value: float, percent: bool) -> str:
    return f"{100 * value:.1f}%" if percent else number(value)


def _with_error(value: float, error: float | None, percent: bool) -> str:
    return _shown(value, percent) + (f" ± {_shown(error, percent)}" if error else "")


def _y_ticks(chart: Chart) -> list[float]:
    """The axis: all values with their error bars and bands, and the baseline."""
    ends = [chart.baseline[0]] if chart.baseline else []
    for series in chart.series:
        ends += [end for found in series.band if found is not None for end in found]
        errors = series.errors or [None] * len(series.values)
        for value, error in zip(series.values, errors, strict=True):
            if value is not None:
                ends += [value - (error or 0), value + (error or 0)]
    if chart.percent:
        return [0.0, 0.25, 0.5, 0.75, 1.0]
    return nice_ticks(min(ends), max(ends), 4)


def _decimals(ticks: Sequence[float]) -> int:
    """Digits after the point that tell neighbouring ticks apart."""
    return max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))


def _tick(value: float, decimals: int, percent: bool) -> str:
    if percent:
        return f"{100 * value:.0f}%"
    return f"{value:.1e}" if decimals > 5 or abs(value) >= 1e7 else f"{value:,.{decimals}f}"


def _line(series: Series, places: Sequence[float], place_y: Callable[[float], float], chart: Chart) -> Line:
    """A series' way through the plot; it begins anew after a gap and at every mark."""
    pieces: list[list[tuple[float, float]]] = [[]]
    starts = {at for at, _ in chart.marks}
    bars, labels = [], []
    errors = series.errors or [None] * len(series.values)
    for x, at, value, error in zip(chart.x, places, series.values, errors, strict=True):
        if value is None or x in starts:
            pieces.append([])
        if value is None:
            continue
        pieces[-1].append((at, place_y(value)))
        top = place_y(value + (error or 0))
        if error:
            bars.append((at, top, place_y(value - error)))
        if len(places) <= _MAX_VALUE_LABELS and len(chart.series) == 1:
            labels.append((at, top - 6, _shown(value, chart.percent)))
    return Line(
        series.name,
        [_path(piece) for piece in pieces if piece],
        _bands(series, places, place_y, chart),
        [point for piece in pieces for point in piece],
        bars,
        labels,
    )


def _bands(series: Series, places: Sequence[float], place_y: Callable[[float], float], chart: Chart) -> list[str]:
    """The areas between a band's ends, parted like the line."""
    pieces: list[list[tuple[float, float, float]]] = [[]]
    starts = {at for at, _ in chart.marks}
    for x, at, found in zip(chart.x, places, series.band, strict=False):
        if found is None or x in starts:
            pieces.append([])
        if found is not None:
            pieces[-1].append((at, place_y(found[0]), place_y(found[1])))
    upper_and_back = [[(x, high) for x, _, high in p] + [(x, low) for x, low, _ in reversed(p)] for p in pieces]
    return [_path(corners) + "Z" for corners in upper_and_back if corners]


def _path(points: Sequence[tuple[float, float]]) -> str:
    """A line through some points; a dot where there is one alone."""
    return "M" + "L".join(f"{x} {y}" for x, y in points) + "h.1" * (len(points) == 1)


def _columns(chart: Chart, places: Sequence[float]) -> list[Column]:
    """One strip a place, from half-way to the place before to half-way to the next."""
    edges = [float(LEFT), *((a + b) / 2 for a, b in itertools.pairwise(places)), float(RIGHT)]
    columns = []
    for index, value in enumerate(chart.x):
        told = [f"{chart.x_label.partition(' (')[0]} {value:,.0f}"]
        for series in chart.series:
            if (found := series.values[index]) is not None:
                error = series.errors[index] if series.errors else None
                told.append(f"{series.name} {_with_error(found, error, chart.percent)}")
        columns.append(Column(round(edges[index], 1), round(edges[index + 1] - edges[index], 1), "\n".join(told)))
    return columns


def _summary(chart: Chart) -> str:
    """The chart in words, for those who do not see it."""
    told = []
    for series in chart.series:
        known = [value for value in series.values if value is not None]
        if known:
            first, last = _shown(known[0], chart.percent), _shown(known[-1], chart.percent)
            told.append(f"{series.name} from {first} to {last}")
    return f"{chart.title} by {chart.x_label}, in {chart.unit}: {'; '.join(told)}"

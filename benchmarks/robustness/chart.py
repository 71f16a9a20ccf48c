"""A figure of several small plots as one SVG: a line a method, its seeds' spread as a band. No library, no script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 250, 190  # of a plot with its margins
LEFT, TOP, RIGHT, BOTTOM = 42, 30, 12, 34
LEGEND = 26
COLOURS = ("#c2410c", "#6d6d6d", "#1d4ed8")
DASHES = ("6 3", "2 3", "none")
STYLE = """text { font: 11px sans-serif; fill: #333 } .title { font-weight: 600 }
.grid { stroke: #ddd } .start { stroke: #333; stroke-dasharray: 1 3 }"""


@dataclass(frozen=True, slots=True)
class Line:
    """One method: a mean, the least and the greatest value at each place, or None where there is no result."""

    name: str
    values: Sequence[tuple[float, float, float] | None]


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot.

    Attributes:
        places: names along the horizontal axis.
        baseline: the start policy's value.
    """

    title: str
    places: Sequence[str]
    lines: Sequence[Line]
    baseline: float | None = None


def svg(plots: Sequence[Plot], *, columns: int, unit: str, along: str, low: float, high: float) -> str:
    """All plots on one vertical scale from `low` to `high`; values beyond it are drawn at its ends."""
    rows = -(-len(plots) // columns)
    width, height = columns * WIDTH, LEGEND + rows * HEIGHT
    parts = [_legend(plots[0], unit)]
    for number, plot in enumerate(plots):
        at = number % columns * WIDTH, LEGEND + number // columns * HEIGHT
        parts.append(f'<g transform="translate({at[0]} {at[1]})">{_plot(plot, along, low, high)}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<style>{STYLE}</style><rect width="{width}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _legend(plot: Plot, unit: str) -> str:
    parts = [f'<text x="8" y="16">{escape(unit)}</text>']
    for number, line in enumerate(plot.lines):
        x = 330 + number * 110
        parts.append(f'<path d="M{x} 12h24" {_stroke(number)}/><text x="{x + 30}" y="16">{escape(line.name)}</text>')
    return "".join(parts)


def _stroke(number: int) -> str:
    return f'fill="none" stroke="{COLOURS[number]}" stroke-width="2" stroke-dasharray="{DASHES[number]}"'


def _plot(plot: Plot, along: str, low: float, high: float) -> str:
    inner, outer = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place_y(value: float) -> float:
        return round(outer - (min(max(value, low), high) - low) / (high - low) * (outer - TOP), 1)

    step = (inner - LEFT - 24) / max(1, len(plot.places) - 1)
    places = [round(LEFT + 12 + number * step, 1) for number in range(len(plot.places))]
    parts = [f'<text class="title" x="{LEFT}" y="20">{escape(plot.title)}</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = low + share * (high - low)
        y = place_y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{inner}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4}" text-anchor="end">{value:.2f}</text>')
    if plot.baseline is not None:
        parts.append(f'<path class="start" d="M{LEFT} {place_y(plot.baseline)}H{inner}"/>')
    for x, name in zip(places, plot.places, strict=True):
        parts.append(f'<text x="{x}" y="{outer + 15}" text-anchor="middle">{escape(name)}</text>')
    parts.append(f'<text x="{(LEFT + inner) / 2}" y="{outer + 29}" text-anchor="middle">{escape(along)}</text>')
    for number, line in enumerate(plot.lines):
        parts.append(_line(number, line, places, place_y))
    return "".join(parts)


def _line(number: int, line: Line, places: Sequence[float], place_y: Callable[[float], float]) -> str:
    known = [(x, *found) for x, found in zip(places, line.values, strict=True) if found is not None]
    if not known:
        return ""
    upper = [(x, place_y(high)) for x, _, _, high in known]
    lower = [(x, place_y(low)) for x, _, low, _ in reversed(known)]
    middle = [(x, place_y(mean)) for x, mean, _, _ in known]
    dots = "".join(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{COLOURS[number]}"/>' for x, y in middle)
    return (
        f'<path d="M{_path([*upper, *lower])}Z" fill="{COLOURS[number]}" opacity=".15"/>'
        f'<path d="M{_path(middle)}" {_stroke(number)}/>{dots}'
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x} {y}" for x, y in points)

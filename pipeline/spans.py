"""Spans of time in which stages worked, and the stretches between them in which none did."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_BETWEEN = ("publish", "swap", "other")
"""Work between stages, during which no stage works."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stage at work, in seconds since 1970 or since its round began."""

    stage: str
    start_s: float
    end_s: float


class Stretches:
    """Spans as they become known, those of one stage that touch or overlap kept as one.

    A round of a million jobs is a few stretches of work: memory grows with those and not with the jobs.

    Args:
        joined_s: spans of a stage that follow each other within this time are one.
    """

    def __init__(self, *, joined_s: float) -> None:
        self._joined_s = joined_s
        self._by_stage: dict[str, list[Span]] = {}  # by start, and, since they are apart, by end

    def add(self, span: Span) -> None:
        found = self._by_stage.setdefault(span.stage, [])
        first = bisect_left(found, span.start_s - self._joined_s, key=lambda known: known.end_s)
        last = first
        while last < len(found) and found[last].start_s <= span.end_s + self._joined_s:
            last += 1
        met = [*found[first:last], span]
        found[first:last] = [Span(span.stage, min(s.start_s for s in met), max(s.end_s for s in met))]

    def between(self, start: float, end: float) -> list[Span]:
        """What lies in a stretch of time, cut to it, in seconds since its start, in order of start."""
        inside = [span for span in self if span.end_s > start and span.start_s < end]
        cut = [Span(s.stage, max(0.0, s.start_s - start), min(end, s.end_s) - start) for s in inside]
        return sorted(cut, key=lambda span: (span.start_s, span.stage))

    def __iter__(self) -> Iterator[Span]:
        return (span for found in self._by_stage.values() for span in found)


def idle_share(spans: Sequence[Span], seconds: float) -> float:
    """The share of a time in which no stage works; the spans are in seconds since its start."""
    return sum(end - start for start, end in idle_stretches(spans, seconds)) / seconds if seconds > 0 else 0.0


def idle_stretches(spans: Sequence[Span], seconds: float) -> list[tuple[float, float]]:
    """From when to when no stage works, in seconds since the start of the time in which the spans lie."""
    stretches, until = [], 0.0
    for span in sorted(spans, key=lambda found: found.start_s):
        if span.stage not in _BETWEEN:
            if span.start_s > until:
                stretches.append((until, span.start_s))
            until = max(until, span.end_s)
    return [*stretches, (until, seconds)] if seconds > until else stretches

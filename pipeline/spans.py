"""Spans of time in which stages worked, and the stretches between them in which none did."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

_BETWEEN = ("publish", "swap", "other")
"""Work between stages, during which no stage works."""

_JOINED_S = 0.01  # jobs of a stage that follow each other within this time are one span in a report


@dataclass(frozen=True, slots=True)
class Span:
    """A stage at work, in seconds since 1970 or since its round began; `worker`: who did it, where that is known."""

    stage: str
    start_s: float
    end_s: float
    worker: str = ""


class Stretches:
    """Spans as they become known, those of one worker at one stage that touch or overlap kept as one.

    A round of a million jobs is a few stretches of work a worker: memory grows with those and not with the jobs.
    """

    def __init__(self) -> None:
        self._by_lane: dict[tuple[str, str], list[Span]] = {}  # by start, and, since they are apart, by end

    def add(self, span: Span) -> None:
        found = self._by_lane.setdefault((span.stage, span.worker), [])
        first = bisect_left(found, span.start_s - _JOINED_S, key=lambda known: known.end_s)
        last = first
        while last < len(found) and found[last].start_s <= span.end_s + _JOINED_S:
            last += 1
        met = [*found[first:last], span]
        found[first:last] = [replace(span, start_s=min(s.start_s for s in met), end_s=max(s.end_s for s in met))]

    def between(self, start: float, end: float) -> list[Span]:
        """What lies in a stretch of time, cut to it, in seconds since its start, in order of start."""
        inside = [span for span in self if span.end_s > start and span.start_s < end]
        cut = [replace(s, start_s=max(0.0, s.start_s - start), end_s=min(end, s.end_s) - start) for s in inside]
        return sorted(cut, key=lambda span: (span.start_s, span.stage, span.worker))

    def __iter__(self) -> Iterator[Span]:
        return (span for found in self._by_lane.values() for span in found)


def idle_share(spans: Sequence[Span], seconds: float) -> float:
    """The share of a time in which no stage works; the spans are in seconds since its start."""
    return sum(end - start for start, end in idle_stretches(spans, seconds)) / seconds if seconds > 0 else 0.0


def joined(spans: Sequence[Span]) -> list[Span]:
    """Spans in order of start, those of one worker at one stage that touch or overlap as one."""
    found = Stretches()
    for span in spans:
        found.add(span)
    return sorted(found, key=lambda span: span.start_s)


def busy_s(spans: Sequence[Span]) -> float:
    """Seconds in which at least one of some spans lies."""
    total, until = 0.0, 0.0
    for span in sorted(spans, key=lambda found: found.start_s):
        total += max(0.0, span.end_s - max(until, span.start_s))
        until = max(until, span.end_s)
    return total


def idle_stretches(spans: Sequence[Span], seconds: float) -> list[tuple[float, float]]:
    """From when to when no stage works, in seconds since the start of the time in which the spans lie."""
    stretches, until = [], 0.0
    for span in sorted(spans, key=lambda found: found.start_s):
        if span.stage not in _BETWEEN:
            if span.start_s > until:
                stretches.append((until, span.start_s))
            until = max(until, span.end_s)
    return [*stretches, (until, seconds)] if seconds > until else stretches

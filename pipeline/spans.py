"""Spans of time in which stages worked, and the stretches between them in which none did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_BETWEEN = ("publish", "swap", "other")
"""Work between stages, during which no stage works."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stage at work, in seconds since 1970 or since its round began."""

    stage: str
    start_s: float
    end_s: float


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

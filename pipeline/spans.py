"""Spans of time in which stages worked, and the stretches between them in which none did."""

from __future__ import annotations

from collections.abc import Sequence
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


def idle_share(spans: Sequence[Span], seconds: float) -> float:
    """The share of a time in which no stage works; the spans are in seconds since its start."""
    return sum(end - start for start, end in idle_stretches(spans, seconds)) / seconds if seconds > 0 else 0.0


def joined(spans: Sequence[Span]) -> list[Span]:
    """Spans in order of start, those of one worker at one stage that touch or overlap as one."""
    joined: list[Span] = []
    for span in sorted(spans, key=lambda found: (found.stage, found.worker, found.start_s)):
        last = joined[-1] if joined else None
        same = last is not None and (last.stage, last.worker) == (span.stage, span.worker)
        if last is not None and same and span.start_s <= last.end_s + _JOINED_S:
            joined[-1] = replace(last, end_s=max(last.end_s, span.end_s))
        else:
            joined.append(span)
    return sorted(joined, key=lambda found: found.start_s)


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

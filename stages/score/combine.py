"""Several rewards as one number: the weighted sum over role ``main``, each reward standardised first where asked.

Rewards of other roles are kept beside it and never enter it. A missing value leaves the sum missing; it never becomes
a zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

_ROUNDING = 1e-9  # of the mean: sums of equal numbers differ by less


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of some numbers; those of parts can be merged."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Moments:
        """Of the numbers among `values`."""
        found = [value for value in values if value is not None]
        if not found:
            return cls()
        mean = math.fsum(found) / len(found)
        return cls(len(found), mean, math.fsum((value - mean) ** 2 for value in found))

    def merged(self, other: Moments) -> Moments:
        """Of both parts together (Chan et al., 1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        gap = other.mean - self.mean
        return Moments(
            count,
            self.mean + gap * other.count / count,
            self.squares + other.squares + gap**2 * self.count * other.count / count,
        )

    @property
    def deviation(self) -> float:
        """The standard deviation; 1 where all numbers are equal but for rounding, which then scale to 0."""
        deviation = math.sqrt(self.squares / self.count) if self.count else 0.0
        return deviation if deviation > _ROUNDING * max(1.0, abs(self.mean)) else 1.0


@dataclass(frozen=True, slots=True)
class Term:
    """One summand: ``weight * (value - mean) / deviation`` of the reward called `name`."""

    name: str
    weight: float
    mean: float = 0.0
    deviation: float = 1.0


def combined(rewards: Sequence[Mapping[str, Any]], terms: Sequence[Term]) -> float | None:
    """The sum of `terms` over one answer's rewards; None if one of them has no value."""
    values = {reward["name"]: reward["value"] for reward in rewards}
    total = 0.0
    for term in terms:
        value = values.get(term.name)
        if value is None:
            return None
        total += term.weight * (value - term.mean) / term.deviation
    return total


def with_rewards(scored: pa.Table, terms: Sequence[Term]) -> pa.Table:
    """A table of `SCORED` with its ``reward`` summed anew."""
    rewards = [combined(row, terms) for row in scored["rewards"].to_pylist()]
    column = scored.schema.get_field_index("reward")
    return scored.set_column(column, scored.schema.field(column), pa.array(rewards, pa.float64()))

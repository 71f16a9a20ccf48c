"""Figures as people read them, the same wherever they stand; one that is missing or not finite is an empty text."""

from __future__ import annotations

import math
from typing import Any

from pipeline.console import share


def finite(value: Any) -> float | None:
    """A number, or None for anything that cannot be drawn."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def number(value: float) -> str:
    """A figure with as many digits as a reader wants: ``3.84``, ``0.0123``, ``12,300``."""
    if value == 0 or 0.1 <= abs(value) < 1000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def with_error(value: Any, error: Any = None) -> str:
    """``3.84 ± 0.13``; without the error where that is not known, as for a mean of one."""
    found, se = finite(value), finite(error)
    return "" if found is None else number(found) + (f" ± {number(se)}" if se is not None else "")


def three_decimals(value: Any) -> str:
    """``0.916``."""
    return "" if (found := finite(value)) is None else f"{found:.3f}"


def percent(value: Any) -> str:
    """A share of 1: ``61.3%``."""
    return "" if (found := finite(value)) is None else share(found, 1)


def count(value: Any) -> str:
    """``12,300``."""
    return "" if value is None else f"{value:,}"

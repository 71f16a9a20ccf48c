"""Student's t distribution: what an error that is estimated from few values is worth.

Plain arithmetic, since no dependency has it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

_LEAST_TAIL = 1e-300  # about 37 standard errors; no smaller one has a quantile here
_MOST_TERMS = 10_000
_EXACT = 1e-15


def upper_tail(t: float, *, df: int) -> float:
    """The probability of more than `t`, with `df` degrees of freedom."""
    if t < 0:
        return 1 - upper_tail(-t, df=df)
    share = 1 / (1 + t * t / df)
    return 0.5 * _regularised_beta(share, t * t / df * share, df / 2, 0.5)


@lru_cache(maxsize=1024)
def quantile(tail: float, *, df: int) -> float:
    """What is exceeded with a probability of `tail`, below one half."""
    low, high = 0.0, 1.0
    while upper_tail(high, df=df) > tail:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if upper_tail(middle, df=df) > tail else (low, middle)
    return high


def as_normal(t: float, *, df: int) -> float:
    """What is as unlikely, to the same side, where the error is known and not estimated."""
    if t < 0:
        return -as_normal(-t, df=df)
    return -NormalDist().inv_cdf(max(_LEAST_TAIL, upper_tail(t, df=df)))


def _regularised_beta(x: float, rest: float, a: float, b: float) -> float:
    """The regularised incomplete beta function at x = 1 - `rest`: DLMF 8.17.22, by Lentz's method.

    Each of the two is given, as neither can be told from the other where that is nearly 1.
    """
    if x == 0 or rest == 0:
        return float(rest == 0)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - _regularised_beta(rest, x, b, a)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest) - math.log(a)
    )
    value = c = 1.0
    d = 0.0
    for term in range(_MOST_TERMS):
        m = term // 2
        if term == 0:
            numerator = 1.0
        elif term % 2:
            numerator = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            numerator = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (1 + numerator * d)
        c = 1 + numerator / c
        value *= c * d
        if abs(c * d - 1) < _EXACT:
            break
    return front * (value - 1)

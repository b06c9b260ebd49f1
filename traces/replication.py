"""Means over repeated runs, with their confidence intervals: what several seeds of one experiment say together.

It knows nothing of what was measured. Intervals assume independent runs whose values are about normal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache


def mean_ci95(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, half width of the 95 % confidence interval by Student's t); the width of a single value is None.

    values must not be empty. Sums are exact (`math.fsum`), so that the order of the values does not matter.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, student_t(count - 1) * math.sqrt(variance / count)


@lru_cache
def student_t(freedom: int, two_sided: float = 0.95) -> float:
    """The t that a Student variable of `freedom` degrees stays within (+-) with probability `two_sided`."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < two_sided:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < two_sided else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| <= t) as a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total

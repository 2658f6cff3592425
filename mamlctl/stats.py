"""Intervals for means over tasks, and for shares."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def mean_ci95(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval by Student's t; of one value, the half width is infinite."""
    from scipy.special import stdtrit  # here, since scipy's import is slower than all of this module's users

    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2:
        return float(sample.mean()), float("inf")
    half = stdtrit(sample.size - 1, 0.975) * sample.std(ddof=1) / np.sqrt(sample.size)
    return float(sample.mean()), float(half)


def wilson95(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: within 0..1, and of some width even where all or none are right."""
    z = 1.959964  # normal quantile of 0.975
    share, weight = right / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return max(middle - half, 0.0), min(middle + half, 1.0)

"""Intervals for means over tasks."""

from __future__ import annotations

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

"""A number with its 95% interval: shares by Wilson's formula, means by a bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

ENOUGH = 10  # values, below which a bootstrap says little
RESAMPLES = 2000
Z = 1.959964  # of 95%


@dataclass(frozen=True)
class Estimate:
    """A share or a mean of `count` values; `low` and `high` are None where there are too few for an interval."""

    value: float
    count: int
    low: float | None = None
    high: float | None = None


def share(flags: Sequence[bool]) -> Estimate | None:
    """How many of the flags are set, as a share, with Wilson's interval; None of none."""
    n = len(flags)
    if not n:
        return None
    p = sum(flags) / n
    if n == 1:
        return Estimate(p, n)
    middle, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    return Estimate(p, n, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))


def mean(
    values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0, enough: int = ENOUGH
) -> Estimate | None:
    """The mean, weighted or not, with a percentile bootstrap's interval from `enough` values on; None of none.

    The same values and seed give the same interval. Values that are not finite give no interval.
    """
    n = len(values)
    if not n:
        return None
    x = torch.tensor(values, dtype=torch.float64)
    w = torch.ones_like(x) if weights is None else torch.tensor(weights, dtype=torch.float64)
    value = float((x * w).sum() / w.sum())
    if n < enough or not math.isfinite(value):
        return Estimate(value, n)
    drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
    means = ((x * w)[drawn].sum(1) / w[drawn].sum(1)).sort().values
    tail = round(0.025 * (RESAMPLES - 1))
    return Estimate(value, n, float(means[tail]), float(means[-1 - tail]))

"""Functions that the kernels share, in operations that Triton's interpreter has too (it lacks libdevice)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def at_least(x):
    """x, but −1e30 where it is less: a token ruled out by a bias of −inf must not make 0 · ∞. NaN stays, which a plain
    maximum would replace."""
    return tl.maximum(x, -1e30, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log_add(a, b):
    """log(eᵃ + eᵇ)."""
    top = tl.maximum(a, b)
    return top + log1p(tl.exp(tl.minimum(a, b) - top))


@triton.jit
def log1p(x):
    """log(1 + x) for x ≥ 0 with a relative error of a few 1e-7: the rounding of 1 + x is divided out."""
    u = 1.0 + x
    near = u - 1.0
    return tl.where(near == 0.0, x, tl.log(u) * (x / tl.where(near == 0.0, 1.0, near)))


@triton.jit
def growth_series(x):
    """(eˣ − 1 − x) / (x² / 2) for |x| < 0.4."""
    series = 1.0 + x * (1 / 7)
    series = 1.0 + x * (1 / 6) * series
    series = 1.0 + x * (1 / 5) * series
    series = 1.0 + x * (1 / 4) * series
    return 1.0 + x * (1 / 3) * series


@triton.jit
def growth(x):
    """eˣ − 1 − x, without cancellation; x above 60 counts as 60 so that it stays finite."""
    series = growth_series(x)
    return tl.where(tl.abs(x) < 0.4, 0.5 * x * x * series, tl.exp(tl.minimum(x, 60.0)) - 1.0 - x)


@triton.jit
def expm1(x):
    """eˣ − 1, without cancellation; −1 far below 0, where x would swallow it."""
    return tl.where(x < -60.0, -1.0, growth(x) + x)


@triton.jit
def shortfall_series(x):
    """x − log(1 + x) for |x| < 0.4, without cancellation: log(1 + x) is 2 artanh(x / (2 + x))."""
    s = x / (2.0 + x)
    q = s * s
    series = 1 / 9 + q * (1 / 11)
    series = 1 / 7 + q * series
    series = 1 / 5 + q * series
    series = 1 / 3 + q * series
    return s * (x - 2.0 * q * series)


@triton.jit
def soft_cap(z, cap):
    """cap · tanh(z / cap)."""
    t = tl.exp(-2.0 * tl.abs(z) / cap)
    return tl.where(z < 0.0, -cap, cap) * ((1.0 - t) / (1.0 + t))

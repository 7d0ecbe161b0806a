"""Kernels over rows of a chunk's logits [C, V]: the gradient by the logits in place, and what the divergence adds to
the statistics.

Logits arrive as in rows.py, and so does what `row_statistics` has left.
"""

from __future__ import annotations

import enum

import triton
import triton.language as tl
from torch import Tensor

from . import launcher
from .math import expm1, growth_series, log_add, shortfall_series
from .rows import (
    BLOCK,
    LOG_SUM,
    MISSED,
    OPTIONS,
    REF_LOG_SUM,
    REF_TOP,
    SHIFT,
    TOP,
    _finish,
    _gap,
    _logits,
    _products,
)


class Extended(enum.IntEnum):
    """Rows of `extended` [1, C]: what `directions` needs of the divergence of a token."""

    # Σ p log(p/m) = KL(p‖m), m = β p_ref + (1 − β) p, as it is with the error of SHIFT: in the direction that cancels.
    LOG_RATIO = 0


LOG_RATIO = tl.constexpr(int(Extended.LOG_RATIO))
# With a divergence: at more columns a thread, registers leave room for one program on a multiprocessor.
DIVERGENCE_BLOCK = 1024


@triton.jit
def _comparable_logits(
    z_ptr, r_ptr, columns, V, scale, softcap, reference_scale, reference_softcap,
    REFERENCE: tl.constexpr, DIFFERENCE: tl.constexpr, SOFTCAP: tl.constexpr, REFERENCE_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """`_logits`, but z from equal inputs is equal wherever it stands: of the two products of r · scale + z · scale,
    compilers round now one and now the other."""
    product, r = _products(
        z_ptr, r_ptr, columns, V, reference_scale, reference_softcap, REFERENCE, DIFFERENCE, SOFTCAP, REFERENCE_SOFTCAP
    )
    z, d = _finish(product, r, scale, softcap, DIFFERENCE, SOFTCAP)
    if DIFFERENCE and not SOFTCAP:
        z = tl.fma(product, scale, r)
    return z, d, r


@triton.jit
def _weight_of_own(beta):
    """Of KL(p‖m) in the divergence: 1 − β, but 1 where the divergence is KL(p‖p_ref)."""
    return tl.where(beta < 1.0, 1.0 - beta, 1.0)


@triton.jit
def _mixture(z, d, r, top, log_sum, ref_top, ref_log_sum, shift, missed, beta):
    """p, the addends of the divergence, and log(p/m); m = β p_ref + (1 − β) p.

    In terms of the larger of p and p_ref, `more`, and t = |log p − log p_ref|: the other is less = more · e⁻ᵗ, so
    nothing overflows and all are as accurate as d. With m = (1 + x) more = (1 + y) less, KL(more‖m) = Σ more · (x −
    log(1 + x)) and KL(less‖m) = Σ less · (y − log(1 + y)), whose addends are positive, and of second order near the
    reference.
    """
    moved = (d - shift) - missed
    t = tl.abs(moved)
    ahead = moved > 0.0
    of_less = tl.where(ahead, beta, 1.0 - beta)  # its weight in m
    of_more = tl.where(ahead, 1.0 - beta, beta)
    more = tl.exp(tl.where(ahead, (z - top) - log_sum, (r - ref_top) - ref_log_sum))
    e = tl.exp(-t)
    fall = tl.where(t < 0.4, 0.5 * t * t * growth_series(-t) - t, e - 1.0)  # e⁻ᵗ − 1
    x = of_less * fall
    y = -of_more * fall / e  # infinite or NaN where e⁻ᵗ is 0 in fp32
    # m ≥ less, there too.
    log = tl.maximum(tl.log(of_more + of_less * e), -t)
    x_short, y_short = shortfall_series(x), shortfall_series(y)
    x_short = tl.where(tl.abs(x) < 0.4, x_short, x - log)
    log_more = x - x_short  # log(m / more)
    log_less = tl.where(tl.abs(y) < 0.4, y - y_short, log_more + t)
    y_short = tl.where(tl.abs(y) < 0.4, e * y_short, -of_more * fall - e * log_less)  # times e⁻ᵗ
    own = _weight_of_own(beta)
    addend = more * (tl.where(ahead, own, beta) * x_short + tl.where(ahead, beta, own) * y_short)
    return tl.where(ahead, more, more * e), addend, -tl.where(ahead, log_more, log_less)


@triton.jit(do_not_specialize=["C"])
def extended_statistics_kernel(
    z_ptr, r_ptr, labels_ptr, rows_ptr, nll_ptr, log_p2_ptr, rank_ptr, divergence_ptr, extended_ptr, C, V,
    scale, softcap, reference_scale, reference_softcap, beta,
    BLOCK: tl.constexpr, REFERENCE: tl.constexpr, DIFFERENCE: tl.constexpr, SOFTCAP: tl.constexpr,
    REFERENCE_SOFTCAP: tl.constexpr, LOG_P2: tl.constexpr, RANK: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """One row a program, in one pass, from what `row_statistics` has left in rows and nll.

    log_p2 = log Σ p², rank = how many logits are above the label's, and with m = β p_ref + (1 − β) p divergence =
    β KL(p_ref‖m) + (1 − β) KL(p‖m), for β = 1 KL(p‖p_ref); each only where asked for.
    Traffic: 4·C·V bytes, 8·C·V with a divergence or `difference`. FLOP: about 10 a logit, 100 with a divergence, two
    exponentials, a logarithm and three divisions among them. Floor: the traffic over the memory bandwidth.
    """
    t = tl.program_id(0)
    z_ptr += t.to(tl.int64) * V
    if REFERENCE:
        r_ptr += t.to(tl.int64) * V
    label = tl.load(labels_ptr + t).to(tl.int32)
    one = tl.arange(0, 1)
    if RANK:
        label_z, _, _ = _comparable_logits(
            z_ptr, r_ptr, label + one, V, scale, softcap, reference_scale, reference_softcap,
            REFERENCE, DIFFERENCE, SOFTCAP, REFERENCE_SOFTCAP,
        )  # fmt: skip
        above = tl.zeros((BLOCK,), tl.int32)
    if LOG_P2 or DIVERGENCE:
        top = tl.load(rows_ptr + TOP * C + t)
        log_sum = tl.load(rows_ptr + LOG_SUM * C + t)
    if LOG_P2:
        squares = tl.zeros((BLOCK,), tl.float32)
    if DIVERGENCE:
        ref_top = tl.load(rows_ptr + REF_TOP * C + t)
        ref_log_sum = tl.load(rows_ptr + REF_LOG_SUM * C + t)
        shift = tl.load(rows_ptr + SHIFT * C + t)
        missed = tl.load(rows_ptr + MISSED * C + t)
        beta = tl.cast(beta, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        log_ratios = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z, d, r = _comparable_logits(
            z_ptr, r_ptr, columns, V, scale, softcap, reference_scale, reference_softcap,
            REFERENCE, DIFFERENCE, SOFTCAP, REFERENCE_SOFTCAP,
        )  # fmt: skip
        inside = columns < V
        other = inside & (columns != label)
        if RANK:
            above += (other & (z > label_z)).to(tl.int32)
        if DIVERGENCE:
            p, addend, log_ratio = _mixture(z, d, r, top, log_sum, ref_top, ref_log_sum, shift, missed, beta)
            total += tl.where(inside, addend, 0.0)
            log_ratios += tl.where(inside, p * log_ratio, 0.0)
        elif LOG_P2:
            p = tl.exp((z - top) - log_sum)
        if LOG_P2:
            squares += tl.where(other, p * p, 0.0)
    if RANK:
        tl.store(rank_ptr + t + one, tl.sum(above).to(tl.int64) + tl.zeros((1,), tl.int64))
    if LOG_P2:
        # The label's share by itself: where it is nearly 1 its logarithm is exact.
        tl.store(log_p2_ptr + t + one, log_add(-2.0 * tl.load(nll_ptr + t + one), tl.log(tl.sum(squares))))
    if DIVERGENCE:
        divergence = tl.sum(total) + tl.zeros((1,), tl.float32)
        tl.store(divergence_ptr + t + one, tl.where(divergence < 0, 0.0, divergence))
        tl.store(extended_ptr + LOG_RATIO * C + t + one, tl.sum(log_ratios) + tl.zeros((1,), tl.float32))


@launcher
def extended_statistics(
    z: Tensor, r: Tensor | None, difference: bool, labels: Tensor, scale: float, softcap: float, reference_scale: float,
    reference_softcap: float, beta: float, rows: Tensor, nll: Tensor, log_p2: Tensor | None, rank: Tensor | None,
    divergence: Tensor | None, extended: Tensor | None,
) -> None:  # fmt: skip
    """What `row_statistics` lacks, after it and from the same logits, its `rows` and its `nll`.

    log_p2, divergence [C] and extended [1, C] (`Extended`) in float32, rank [C] in int64; each may be None. divergence
    needs a reference, extended and beta in (0, 1]; without it these are not looked at.
    """
    count, vocabulary = z.shape
    if divergence is None and not difference:
        r = None  # not read
    extended_statistics_kernel[(count,)](
        z, r, labels, rows, nll, log_p2, rank, divergence, None if divergence is None else extended, count, vocabulary,
        scale, softcap, reference_scale, reference_softcap, None if divergence is None else float(beta),
        BLOCK=BLOCK if divergence is None else DIVERGENCE_BLOCK, REFERENCE=r is not None, DIFFERENCE=difference,
        SOFTCAP=softcap > 0, REFERENCE_SOFTCAP=reference_softcap > 0, LOG_P2=log_p2 is not None, RANK=rank is not None,
        DIVERGENCE=divergence is not None, **OPTIONS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["C"])
def directions_kernel(
    z_ptr, r_ptr, labels_ptr, rows_ptr, nll_ptr, a_ptr, b_ptr, out_ptr, kl_out_ptr, stride_out, stride_kl_out, C, V,
    scale, softcap, reference_scale, reference_softcap,
    entropy_weight_ptr, entropy_ptr, divergence_weight_ptr, extended_ptr, beta,
    BLOCK: tl.constexpr, REFERENCE: tl.constexpr, DIFFERENCE: tl.constexpr, SOFTCAP: tl.constexpr,
    REFERENCE_SOFTCAP: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr, SEPARATE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, HAS_DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """a ∂nll/∂z + b ∂kl/∂z + entropy_weight ∂entropy/∂z + divergence_weight ∂divergence/∂z in place of z, those that
    there are (SEPARATE: ∂nll/∂z in place of z, ∂kl/∂z in place of r, and no other), in the type of `out`.

    out shares z's memory: a row of 16-bit numbers overwrites the first half of the row of logits that it is made from.
    The program reads a block, all its threads wait, and only then it writes, to where nothing is unread.
    Traffic: 6·C·V bytes for a 16-bit result, 10·C·V with a reference, 12·C·V SEPARATE. FLOP: about 10 a logit, 30
    with a KL, 5 more with an entropy, 90 more with a divergence. Floor: the traffic over the memory bandwidth.
    """
    t = tl.program_id(0)
    z_ptr += t.to(tl.int64) * V
    out_ptr += t.to(tl.int64) * stride_out
    if REFERENCE:
        r_ptr += t.to(tl.int64) * V
    if SEPARATE:
        kl_out_ptr += t.to(tl.int64) * stride_kl_out
    label = tl.load(labels_ptr + t).to(tl.int32)
    at_label = expm1(-tl.load(nll_ptr + t))
    top = tl.load(rows_ptr + TOP * C + t)
    log_sum = tl.load(rows_ptr + LOG_SUM * C + t)
    if REFERENCE:
        ref_top = tl.load(rows_ptr + REF_TOP * C + t)
        ref_log_sum = tl.load(rows_ptr + REF_LOG_SUM * C + t)
        shift = tl.load(rows_ptr + SHIFT * C + t)
        missed = tl.load(rows_ptr + MISSED * C + t)
    if HAS_A:
        a = tl.load(a_ptr + t)
    if HAS_B:
        b = tl.load(b_ptr + t)
    if HAS_ENTROPY:
        entropy_weight = tl.load(entropy_weight_ptr + t)
        entropy = tl.load(entropy_ptr + t)
    if HAS_DIVERGENCE:
        beta = tl.cast(beta, tl.float32)
        divergence_weight = tl.load(divergence_weight_ptr + t) * _weight_of_own(beta)
        mean_log_ratio = tl.load(extended_ptr + LOG_RATIO * C + t)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z, d, r = _logits(
            z_ptr, r_ptr, columns, V, scale, softcap, reference_scale, reference_softcap,
            REFERENCE, DIFFERENCE, SOFTCAP, REFERENCE_SOFTCAP,
        )  # fmt: skip
        tl.debug_barrier()
        slope = z * 0.0 + 1.0
        if SOFTCAP:
            u = z / softcap
            slope = 1.0 - u * u
        first = tl.where(columns == label, at_label, tl.exp((z - top) - log_sum)) * slope
        if SEPARATE or HAS_B:
            gap, _ = _gap(z, d, r, top, log_sum, ref_top, ref_log_sum, shift, missed)
            gap *= slope
        if SEPARATE:
            tl.store(kl_out_ptr + columns, gap.to(kl_out_ptr.dtype.element_ty), mask=columns < V)
        elif HAS_A and HAS_B:
            first = a * first + b * gap
        elif HAS_B:
            first = b * gap
        elif HAS_A:
            first *= a
        else:
            first = tl.zeros((BLOCK,), tl.float32)
        if HAS_ENTROPY:
            log_p = (z - top) - log_sum
            first -= entropy_weight * (tl.exp(log_p) * (log_p + entropy) * slope)
        if HAS_DIVERGENCE:
            p, _, log_ratio = _mixture(z, d, r, top, log_sum, ref_top, ref_log_sum, shift, missed, beta)
            first += divergence_weight * (p * (log_ratio - mean_log_ratio) * slope)
        tl.store(out_ptr + columns, first.to(out_ptr.dtype.element_ty), mask=columns < V)


@launcher
def directions(
    z: Tensor, r: Tensor | None, difference: bool, labels: Tensor, scale: float, softcap: float, reference_scale: float,
    reference_softcap: float, rows: Tensor, nll: Tensor, a: Tensor | None, b: Tensor | None, out: Tensor,
    kl_out: Tensor | None, entropy_weight: Tensor | None = None, entropy: Tensor | None = None,
    divergence_weight: Tensor | None = None, extended: Tensor | None = None, beta: float = 0.0,
) -> None:  # fmt: skip
    """`out` (and `kl_out`, then the weights are not used): views of the memory of z and r in another dtype, or z and r.

    Weights [C] may be None, but not all. That of the entropy goes with the entropy [C]; that of the divergence, which
    needs a reference, with `extended` [1, C] and beta of `extended_statistics`.
    """
    count, vocabulary = z.shape
    has_entropy = entropy_weight is not None and kl_out is None
    has_divergence = divergence_weight is not None and kl_out is None
    directions_kernel[(count,)](
        z, r, labels, rows, nll, a, b, out, kl_out, out.stride(0), 0 if kl_out is None else kl_out.stride(0),
        count, vocabulary, scale, softcap, reference_scale, reference_softcap,
        entropy_weight if has_entropy else None, entropy if has_entropy else None,
        divergence_weight if has_divergence else None, extended if has_divergence else None,
        float(beta) if has_divergence else None,
        BLOCK=DIVERGENCE_BLOCK if has_divergence else BLOCK, REFERENCE=r is not None, DIFFERENCE=difference,
        SOFTCAP=softcap > 0, REFERENCE_SOFTCAP=reference_softcap > 0, HAS_A=a is not None, HAS_B=b is not None,
        SEPARATE=kl_out is not None, HAS_ENTROPY=has_entropy, HAS_DIVERGENCE=has_divergence, **OPTIONS,
    )  # fmt: skip

"""Kernels over rows of a chunk's logits [C, V], which cuBLAS has made: statistics, bits, gradients in place, tail
profile.

Logits arrive as raw products, with their bias but neither scaled nor capped; each kernel does that as it reads. Where
`difference` is set, z holds (x − x_ref) Wᵀ and the model's logits are r + z.
"""

from __future__ import annotations

import enum

import triton
import triton.language as tl
from torch import Tensor

from ..schemas import Row
from . import launcher
from .math import at_least, expm1, growth_series, log1p, log_add, shortfall_series, soft_cap
from .scan import _store_bits, _update
from .tiles import FUSED


class Extended(enum.IntEnum):
    """Rows of `extended` [1, C]: what `directions` needs of the divergence of a token."""

    # Σ p log(p/m) = KL(p‖m), m = β p_ref + (1 − β) p, as it is with the error of SHIFT: in the direction that cancels.
    LOG_RATIO = 0


TOP, LOG_SUM, REF_TOP, REF_LOG_SUM, SHIFT, REST, GAP, GAP_L1, TOTALS_SHIFT = (tl.constexpr(int(row)) for row in Row)
LOG_RATIO = tl.constexpr(int(Extended.LOG_RATIO))
LOWEST = tl.constexpr(-3e38)
BLOCK = 2048
# With a divergence: at more columns a thread, registers leave room for one program on a multiprocessor.
DIVERGENCE_BLOCK = 1024
OPTIONS = dict(num_warps=16, **FUSED)


@triton.jit
def _logits(
    z_ptr, r_ptr, columns, V, scale, softcap, reference_scale, reference_softcap,
    REFERENCE: tl.constexpr, DIFFERENCE: tl.constexpr, SOFTCAP: tl.constexpr, REFERENCE_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """z, d = z − r, r of some columns of a row; 0 beyond the last. Without a reference d and r are z."""
    z, r = _products(
        z_ptr, r_ptr, columns, V, reference_scale, reference_softcap, REFERENCE, DIFFERENCE, SOFTCAP, REFERENCE_SOFTCAP
    )
    z, d = _finish(z, r, scale, softcap, DIFFERENCE, SOFTCAP)
    return z, d, r


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
def _products(
    z_ptr, r_ptr, columns, V, reference_scale, reference_softcap,
    REFERENCE: tl.constexpr, DIFFERENCE: tl.constexpr, SOFTCAP: tl.constexpr, REFERENCE_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The products that z is made of, and r."""
    inside = columns < V
    z = tl.load(z_ptr + columns, mask=inside, other=0.0)
    r = z
    if REFERENCE:
        r = tl.load(r_ptr + columns, mask=inside, other=0.0)
        if DIFFERENCE and SOFTCAP:
            z += r
        r = at_least(r) * reference_scale
        if REFERENCE_SOFTCAP:
            r = soft_cap(r, reference_softcap)
    return z, r


@triton.jit
def _finish(z, r, scale, softcap, DIFFERENCE: tl.constexpr, SOFTCAP: tl.constexpr):
    """z and d = z − r of `_products`."""
    if DIFFERENCE and not SOFTCAP:
        d = z * scale
        z = r + d
    else:
        z = at_least(z) * scale
        if SOFTCAP:
            z = soft_cap(z, softcap)
        d = z - r
    return z, d


@triton.jit
def _gap(z, d, r, top, log_sum, ref_top, ref_log_sum, shift):
    """p − p_ref and p_ref·(d − shift); near each other through expm1, which keeps the relative accuracy."""
    p_ref = tl.exp((r - ref_top) - ref_log_sum)
    moved = d - shift
    near = p_ref * expm1(moved)
    gap = tl.where(tl.abs(moved) < 1.0, near, tl.exp((z - top) - log_sum) - p_ref)
    return gap, p_ref * moved


@triton.jit
def _nll(label_logit, top, total):
    """log(1 + Σ e / e^label_logit), Σ e = total · e^top over the others: accurate at both ends."""
    delta = (top - label_logit) + tl.log(total)
    return tl.maximum(delta, 0.0) + log1p(tl.exp(-tl.abs(delta)))


@triton.jit
def _sums(label_logit, top, total):
    """Largest logit, and log Σ exp(z − largest), of all ids; top and total are of all but the label."""
    largest = tl.maximum(top, label_logit)
    # The largest is 1 of the sum; the rest goes through log1p. `largest − largest` is NaN where it is infinite.
    others = tl.where(label_logit >= top, total * tl.exp(top - largest), total - 1.0 + tl.exp(label_logit - largest))
    return largest, log1p(others + (largest - largest))


@triton.jit(do_not_specialize=["C"])
def row_statistics_kernel(
    z_ptr, r_ptr, labels_ptr, nll_ptr, prediction_ptr, kl_ptr, entropy_ptr, reference_nll_ptr, reference_entropy_ptr,
    rows_ptr, C, V, scale, softcap, reference_scale, reference_softcap,
    BLOCK: tl.constexpr, REFERENCE: tl.constexpr, DIFFERENCE: tl.constexpr, SOFTCAP: tl.constexpr,
    REFERENCE_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, REFERENCE_ENTROPY: tl.constexpr,
):  # fmt: skip
    """One row a program: running sums in one pass, and with a reference a second one for p − p_ref.

    Traffic: 4·C·V bytes, with a reference 16·C·V (two passes over both). FLOP: about 25 a logit, 90 with a reference,
    one exponential of each kind among them. Floor: the traffic over the memory bandwidth.
    """
    t = tl.program_id(0)
    z_ptr += t.to(tl.int64) * V
    if REFERENCE:
        r_ptr += t.to(tl.int64) * V
    label = tl.load(labels_ptr + t).to(tl.int32)
    top = tl.full((1,), LOWEST, tl.float32)
    total = tl.zeros((1,), tl.float32)
    weighted = tl.zeros((1,), tl.float32)
    index = tl.zeros((1,), tl.int32)
    ref_top = tl.full((1,), LOWEST, tl.float32)
    ref_total = tl.zeros((1,), tl.float32)
    ref_weighted = tl.zeros((1,), tl.float32)
    ref_index = tl.zeros((1,), tl.int32)
    sloped = tl.zeros((1,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z, d, r = _logits(
            z_ptr, r_ptr, columns, V, scale, softcap, reference_scale, reference_softcap,
            REFERENCE, DIFFERENCE, SOFTCAP, REFERENCE_SOFTCAP,
        )  # fmt: skip
        other = (columns < V) & (columns != label)
        before = top
        top, total, weighted, index, e = _update(
            tl.where(other, z, -float("inf"))[None, :], start, top, total, weighted, index, ENTROPY
        )
        if SOFTCAP:
            u = z / softcap
            sloped = sloped * tl.exp(before - top) + tl.sum(e * (1 - u * u)[None, :], 1)
        if REFERENCE:
            ref_top, ref_total, ref_weighted, ref_index, e = _update(
                tl.where(other, r, -float("inf"))[None, :], start, ref_top, ref_total, ref_weighted, ref_index,
                REFERENCE_ENTROPY,
            )  # fmt: skip

    at_label = label + tl.zeros((1,), tl.int32)
    label_z, _, label_r = _logits(
        z_ptr, r_ptr, at_label, V, scale, softcap, reference_scale, reference_softcap,
        REFERENCE, DIFFERENCE, SOFTCAP, REFERENCE_SOFTCAP,
    )  # fmt: skip
    one = tl.arange(0, 1)
    largest, log_sum = _sums(label_z, top, total)
    nll = _nll(label_z, top, total) + (largest - largest)  # NaN where the largest logit is infinite
    share = tl.exp((top - largest) - log_sum)  # of e^TOP of the others
    tl.store(nll_ptr + t + one, nll)
    wins = (label_z > top) | ((label_z == top) & (at_label < index))
    tl.store(prediction_ptr + t + one, tl.where(wins, at_label, index).to(tl.int64))
    if ENTROPY:
        # Σ p (lse − z) over the others: every term is positive.
        entropy = share * (total * ((largest - top) + log_sum) - weighted) + tl.exp(-nll) * nll
        tl.store(entropy_ptr + t + one, entropy)
    out = rows_ptr + t + one
    tl.store(out + TOP * C, largest)
    tl.store(out + LOG_SUM * C, log_sum)
    if SOFTCAP:
        tl.store(out + REST * C, share * sloped)
    else:
        tl.store(out + REST * C, -expm1(-nll))
    if REFERENCE:
        ref_nll = _nll(label_r, ref_top, ref_total)
        ref_largest, ref_log_sum = _sums(label_r, ref_top, ref_total)
        shift = (largest - ref_largest) + (log_sum - ref_log_sum)
        gaps = tl.zeros((BLOCK,), tl.float32)
        sloped_gaps = tl.zeros((BLOCK,), tl.float32)
        sizes = tl.zeros((BLOCK,), tl.float32)
        expected = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z, d, r = _logits(
                z_ptr, r_ptr, columns, V, scale, softcap, reference_scale, reference_softcap,
                REFERENCE, DIFFERENCE, SOFTCAP, REFERENCE_SOFTCAP,
            )  # fmt: skip
            gap, moved = _gap(z, d, r, largest, log_sum, ref_largest, ref_log_sum, shift)
            gap = tl.where(columns < V, gap, 0.0)
            gaps += gap
            expected += tl.where(columns < V, moved, 0.0)
            if SOFTCAP:
                u = z / softcap
                gap *= 1 - u * u
            sloped_gaps += gap
            sizes += tl.abs(gap)
        # Σ gap is 0 up to rounding; with it the error of the shift cancels to first order.
        kl = tl.sum(gaps) - tl.sum(expected)
        tl.store(kl_ptr + t + one, tl.where(kl < 0, 0.0, kl) + tl.zeros((1,), tl.float32))
        tl.store(reference_nll_ptr + t + one, ref_nll)
        if REFERENCE_ENTROPY:
            ref_share = tl.exp((ref_top - ref_largest) - ref_log_sum)
            entropy = ref_share * (ref_total * ((ref_largest - ref_top) + ref_log_sum) - ref_weighted)
            tl.store(reference_entropy_ptr + t + one, entropy + tl.exp(-ref_nll) * ref_nll)
        tl.store(out + REF_TOP * C, ref_largest)
        tl.store(out + REF_LOG_SUM * C, ref_log_sum)
        tl.store(out + SHIFT * C, shift)
        tl.store(out + TOTALS_SHIFT * C, shift)
        tl.store(out + GAP * C, tl.sum(sloped_gaps) + tl.zeros((1,), tl.float32))
        tl.store(out + GAP_L1 * C, tl.sum(sizes) + tl.zeros((1,), tl.float32))


@launcher
def row_statistics(
    z: Tensor, r: Tensor | None, difference: bool, labels: Tensor, scale: float, softcap: float, reference_scale: float,
    reference_softcap: float, nll: Tensor, prediction: Tensor, kl: Tensor | None, entropy: Tensor | None,
    reference_nll: Tensor | None, reference_entropy: Tensor | None, rows: Tensor,
) -> None:  # fmt: skip
    """See `schemas.GPU_SCHEMAS`."""
    count, vocabulary = z.shape
    row_statistics_kernel[(count,)](
        z, r, labels, nll, prediction, kl, entropy, reference_nll, reference_entropy, rows, count, vocabulary,
        scale, softcap, reference_scale, reference_softcap,
        BLOCK=BLOCK, REFERENCE=r is not None, DIFFERENCE=difference, SOFTCAP=softcap > 0,
        REFERENCE_SOFTCAP=reference_softcap > 0, ENTROPY=entropy is not None,
        REFERENCE_ENTROPY=reference_entropy is not None, **OPTIONS,
    )  # fmt: skip


@triton.jit
def _weight_of_own(beta):
    """Of KL(p‖m) in the divergence: 1 − β, but 1 where the divergence is KL(p‖p_ref)."""
    return tl.where(beta < 1.0, 1.0 - beta, 1.0)


@triton.jit
def _mixture(z, d, r, top, log_sum, ref_top, ref_log_sum, shift, beta):
    """p, the addends of the divergence, and log(p/m); m = β p_ref + (1 − β) p.

    In terms of the larger of p and p_ref, `more`, and t = |log p − log p_ref|: the other is less = more · e⁻ᵗ, so
    nothing overflows and all are as accurate as d. With m = (1 + x) more = (1 + y) less, KL(more‖m) = Σ more · (x −
    log(1 + x)) and KL(less‖m) = Σ less · (y − log(1 + y)), whose addends are positive, and of second order near the
    reference.
    """
    moved = d - shift
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
            p, addend, log_ratio = _mixture(z, d, r, top, log_sum, ref_top, ref_log_sum, shift, beta)
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
def logit_bits_kernel(
    z_ptr, r_ptr, bounds_ptr, bits_ptr, C, V, words, scale, softcap, reference_scale, reference_softcap,
    BLOCK: tl.constexpr, REFERENCE: tl.constexpr, DIFFERENCE: tl.constexpr, SOFTCAP: tl.constexpr,
    REFERENCE_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """bits [C, words] of the logits above bounds[0, t], or r above bounds[1, t].

    Traffic: 4·C·V bytes, 8·C·V with r, and C·V/8 written. FLOP: 1 to 5 a logit. Floor: the traffic over the memory
    bandwidth.
    """
    t = tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    if REFERENCE:
        r_ptr += t.to(tl.int64) * V
    z, _, r = _logits(
        z_ptr + t.to(tl.int64) * V, r_ptr, columns, V, scale, softcap, reference_scale, reference_softcap,
        REFERENCE, DIFFERENCE, SOFTCAP, REFERENCE_SOFTCAP,
    )  # fmt: skip
    significant = z > tl.load(bounds_ptr + t)
    if REFERENCE:
        significant |= r > tl.load(bounds_ptr + C + t)
    _store_bits((significant & (columns < V))[None, :], bits_ptr, t + tl.zeros((1,), tl.int32), start, words)


@launcher
def logit_bits(
    z: Tensor, r: Tensor | None, difference: bool, bounds: Tensor, scale: float, softcap: float, reference_scale: float,
    reference_softcap: float, bits: Tensor,
) -> None:  # fmt: skip
    """bits [C, words], words a multiple of BLOCK / 32."""
    count, vocabulary = z.shape
    logit_bits_kernel[(count, triton.cdiv(vocabulary, BLOCK))](
        z, r, bounds, bits, count, vocabulary, bits.shape[1], scale, softcap, reference_scale, reference_softcap,
        BLOCK=BLOCK, REFERENCE=r is not None, DIFFERENCE=difference, SOFTCAP=softcap > 0,
        REFERENCE_SOFTCAP=reference_softcap > 0, **OPTIONS,
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
            gap, _ = _gap(z, d, r, top, log_sum, ref_top, ref_log_sum, shift)
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
            p, _, log_ratio = _mixture(z, d, r, top, log_sum, ref_top, ref_log_sum, shift, beta)
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


@triton.jit(do_not_specialize=["C", "first"])
def tail_profile_kernel(
    z_ptr, labels_ptr, lse_ptr, bits_ptr, profile_ptr, C, width, first, words, scale, softcap,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """profile[v] += Σ over C tokens of p·slope where neither the bit is set nor v the label.

    Traffic: 4·C·V bytes, and C·V/8 of bits. FLOP: about 10 a logit. Floor: the traffic over the memory bandwidth.
    """
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < width
    columns = first + offset
    total = tl.zeros((BLOCK,), tl.float32)
    for t in range(0, C):
        z = tl.load(z_ptr + offset, mask=inside, other=0.0)
        z = at_least(z) * scale
        slope = z * 0.0 + 1.0
        if SOFTCAP:
            z = soft_cap(z, softcap)
            u = z / softcap
            slope = 1.0 - u * u
        word = tl.load(bits_ptr + columns // 32, mask=inside, other=0)
        left = ((word >> (columns % 32)) & 1) == 0
        left &= columns != tl.load(labels_ptr + t).to(tl.int32)
        total += tl.where(left, tl.exp(z - tl.load(lse_ptr + t)) * slope, 0.0)
        z_ptr += width
        bits_ptr += words
    here = tl.load(profile_ptr + columns, mask=inside, other=0.0)
    tl.store(profile_ptr + columns, here + total, mask=inside)


@launcher
def tail_profile(
    z: Tensor, labels: Tensor, lse: Tensor, bits: Tensor, first: int, scale: float, softcap: float, profile: Tensor
) -> None:
    """z [C, width]: raw products of the columns from `first` on. bits [C, words] of all columns."""
    count, width = z.shape
    block = 128
    tail_profile_kernel[(triton.cdiv(width, block),)](
        z, labels, lse, bits, profile, count, width, first, bits.shape[1], scale, softcap,
        BLOCK=block, SOFTCAP=softcap > 0, num_warps=4, **FUSED,
    )  # fmt: skip

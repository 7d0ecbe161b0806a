"""Kernels over rows of a chunk's logits [C, V], which cuBLAS has made: statistics, bits, tail profile.

Logits arrive as raw products, with their bias but neither scaled nor capped; each kernel does that as it reads. Where
`difference` is set, z holds (x − x_ref) Wᵀ and the model's logits are r + z.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..schemas import Row
from . import launcher
from .math import at_least, expm1, log1p, soft_cap
from .scan import _no_sums, _store_bits, _update
from .tiles import FUSED

TOP, LOG_SUM, REF_TOP, REF_LOG_SUM, SHIFT, REST, GAP, GAP_L1, MISSED = (tl.constexpr(int(row)) for row in Row)
BLOCK = 2048
OPTIONS = dict(num_warps=16, **FUSED)
PROFILE = dict(BLOCK_C=32, BLOCK=64)  # of `tail_profile`


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
def _gap(z, d, r, top, log_sum, ref_top, ref_log_sum, shift, missed):
    """p − p_ref and p_ref·(d − shift − missed); near each other through expm1, which keeps the relative accuracy."""
    p_ref = tl.exp((r - ref_top) - ref_log_sum)
    moved = (d - shift) - missed
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


@triton.jit
def _row_sums(
    z_ptr, r_ptr, V, label, scale, softcap, reference_scale, reference_softcap,
    BLOCK: tl.constexpr, REFERENCE: tl.constexpr, DIFFERENCE: tl.constexpr, SOFTCAP: tl.constexpr,
    REFERENCE_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, REFERENCE_ENTROPY: tl.constexpr,
):  # fmt: skip
    """The sums of `_update` over a row's logits but the label's, Σ e·slope, and the sums of the reference."""
    top, total, weighted, index = _no_sums(1)
    ref_top, ref_total, ref_weighted, ref_index = _no_sums(1)
    sloped = weighted
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z, _, r = _logits(
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
    return top, total, weighted, index, sloped, ref_top, ref_total, ref_weighted


@triton.jit
def _gap_sums(
    z_ptr, r_ptr, V, scale, softcap, reference_scale, reference_softcap, top, log_sum, ref_top, ref_log_sum, shift,
    BLOCK: tl.constexpr, REFERENCE: tl.constexpr, DIFFERENCE: tl.constexpr, SOFTCAP: tl.constexpr,
    REFERENCE_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """By lanes [BLOCK]: the sums of p − p_ref, of the same times slope, of its size, and of p_ref (d − shift)."""
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
        gap, moved = _gap(z, d, r, top, log_sum, ref_top, ref_log_sum, shift, 0.0)
        gap = tl.where(columns < V, gap, 0.0)
        gaps += gap
        expected += tl.where(columns < V, moved, 0.0)
        if SOFTCAP:
            u = z / softcap
            gap *= 1 - u * u
        sloped_gaps += gap
        sizes += tl.abs(gap)
    return gaps, sloped_gaps, sizes, expected


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
    top, total, weighted, index, sloped, ref_top, ref_total, ref_weighted = _row_sums(
        z_ptr, r_ptr, V, label, scale, softcap, reference_scale, reference_softcap,
        BLOCK, REFERENCE, DIFFERENCE, SOFTCAP, REFERENCE_SOFTCAP, ENTROPY, REFERENCE_ENTROPY,
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
    prediction = tl.where(wins, at_label, index)
    tl.store(prediction_ptr + t + one, prediction.to(tl.int64))
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
        # The largest logit may be a rounded sum. Of its rounding log_sum has what is not its share of p.
        _, top_d, top_r = _logits(
            z_ptr, r_ptr, prediction, V, scale, softcap, reference_scale, reference_softcap,
            REFERENCE, DIFFERENCE, SOFTCAP, REFERENCE_SOFTCAP,
        )  # fmt: skip
        rounding = (largest - top_r) - top_d
        shift = ((largest - ref_largest) - tl.exp(-log_sum) * rounding) + (log_sum - ref_log_sum)
        gaps, sloped_gaps, sizes, expected = _gap_sums(
            z_ptr, r_ptr, V, scale, softcap, reference_scale, reference_softcap, largest, log_sum, ref_largest,
            ref_log_sum, shift, BLOCK, REFERENCE, DIFFERENCE, SOFTCAP, REFERENCE_SOFTCAP,
        )  # fmt: skip
        # Σ gap is expm1 of the error of the shift.
        gap_sum = tl.sum(gaps)
        missed = log1p(gap_sum + tl.zeros((1,), tl.float32))
        kl = missed - tl.sum(expected)
        tl.store(kl_ptr + t + one, tl.where(kl < 0, 0.0, kl))
        tl.store(reference_nll_ptr + t + one, ref_nll)
        if REFERENCE_ENTROPY:
            ref_share = tl.exp((ref_top - ref_largest) - ref_log_sum)
            entropy = ref_share * (ref_total * ((ref_largest - ref_top) + ref_log_sum) - ref_weighted)
            tl.store(reference_entropy_ptr + t + one, entropy + tl.exp(-ref_nll) * ref_nll)
        tl.store(out + REF_TOP * C, ref_largest)
        tl.store(out + REF_LOG_SUM * C, ref_log_sum)
        # Each gap is off by p times what the shift is: where one id has nearly all of p, that is more than its gap.
        tl.store(out + SHIFT * C, shift)
        tl.store(out + MISSED * C, missed)
        sloped_p = -expm1(-nll) + tl.exp(-nll)
        if SOFTCAP:
            u = label_z / softcap
            sloped_p = share * sloped + tl.exp(-nll) * (1 - u * u)
        tl.store(out + GAP * C, tl.sum(sloped_gaps) - gap_sum * sloped_p)
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


@triton.jit(do_not_specialize=["C"])
def gap_totals_kernel(
    z_ptr, r_ptr, rows_ptr, C, V, scale, softcap, reference_scale, reference_softcap,
    BLOCK: tl.constexpr, REFERENCE: tl.constexpr, DIFFERENCE: tl.constexpr, SOFTCAP: tl.constexpr,
    REFERENCE_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """GAP and GAP_L1 of a row from its other numbers, those of a normaliser that is not these logits' own; both as if
    MISSED were 0.

    Traffic: 8·C·V bytes. FLOP: about 40 a logit, two exponentials among them. Floor: the traffic over the memory
    bandwidth.
    """
    t = tl.program_id(0)
    out = rows_ptr + t + tl.arange(0, 1)
    _, sloped_gaps, sizes, _ = _gap_sums(
        z_ptr + t.to(tl.int64) * V, r_ptr + t.to(tl.int64) * V, V, scale, softcap, reference_scale, reference_softcap,
        tl.load(rows_ptr + TOP * C + t), tl.load(rows_ptr + LOG_SUM * C + t), tl.load(rows_ptr + REF_TOP * C + t),
        tl.load(rows_ptr + REF_LOG_SUM * C + t), tl.load(rows_ptr + SHIFT * C + t),
        BLOCK, REFERENCE, DIFFERENCE, SOFTCAP, REFERENCE_SOFTCAP,
    )  # fmt: skip
    tl.store(out + GAP * C, tl.sum(sloped_gaps) + tl.zeros((1,), tl.float32))
    tl.store(out + GAP_L1 * C, tl.sum(sizes) + tl.zeros((1,), tl.float32))


@launcher
def gap_totals(
    z: Tensor, r: Tensor, difference: bool, scale: float, softcap: float, reference_scale: float,
    reference_softcap: float, rows: Tensor,
) -> None:  # fmt: skip
    """Writes GAP and GAP_L1 of `rows` [9, C], as if MISSED were 0."""
    count, vocabulary = z.shape
    gap_totals_kernel[(count,)](
        z, r, rows, count, vocabulary, scale, softcap, reference_scale, reference_softcap,
        BLOCK=BLOCK, REFERENCE=True, DIFFERENCE=difference, SOFTCAP=softcap > 0,
        REFERENCE_SOFTCAP=reference_softcap > 0, **OPTIONS,
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


@triton.jit(do_not_specialize=["C", "first"])
def tail_profile_kernel(
    z_ptr, labels_ptr, lse_ptr, bits_ptr, profile_ptr, C, width, first, words, scale, softcap,
    BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """profile[v] += Σ over C tokens of p·slope where neither the bit is set nor v the label. Each token of a block has
    a sum of its own until the end: inside the loop no thread waits for another.

    Traffic: 4·C·V bytes, and C·V/8 of bits. FLOP: about 10 a logit. Floor: the traffic over the memory bandwidth.
    """
    offset = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    columns = first + offset
    row = tl.arange(0, BLOCK_C)[:, None]
    z_ptr += row.to(tl.int64) * width + offset
    bits_ptr += row.to(tl.int64) * words + columns // 32
    total = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    for start in range(0, C, BLOCK_C):
        t = start + row
        inside = (t < C) & (offset < width)
        z = tl.load(z_ptr, mask=inside, other=0.0)
        word = tl.load(bits_ptr, mask=inside, other=0)
        label = tl.load(labels_ptr + t, mask=t < C, other=0).to(tl.int32)
        lse = tl.load(lse_ptr + t, mask=t < C, other=float("inf"))  # p of no token is 0
        z = at_least(z) * scale
        if SOFTCAP:
            z = soft_cap(z, softcap)
        p = tl.exp(z - lse)
        if SOFTCAP:
            u = z / softcap
            p *= 1.0 - u * u
        left = (((word >> (columns % 32)) & 1) == 0) & (columns != label)
        total += tl.where(left, p, 0.0)
        z_ptr += BLOCK_C * width
        bits_ptr += BLOCK_C * words
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = tl.load(profile_ptr + first + offset, mask=offset < width, other=0.0)
    tl.store(profile_ptr + first + offset, here + tl.sum(total, 0), mask=offset < width)


@launcher
def tail_profile(
    z: Tensor, labels: Tensor, lse: Tensor, bits: Tensor, first: int, scale: float, softcap: float, profile: Tensor
) -> None:
    """z [C, width]: raw products of the columns from `first` on. bits [C, words] of all columns."""
    count, width = z.shape
    tail_profile_kernel[(triton.cdiv(width, PROFILE["BLOCK"]),)](
        z, labels, lse, bits, profile, count, width, first, bits.shape[1], scale, softcap,
        SOFTCAP=softcap > 0, num_warps=4, **PROFILE, **FUSED,
    )  # fmt: skip

"""The scan: logits of a chunk of tokens, their sums and their significance bits, and no logit ever in memory.

A program owns a block of tokens and a part of the vocabulary. It goes through the part tile by tile: a product of
[BLOCK_N, D] and [BLOCK_V, D] in registers, then the epilogue, which updates running sums and writes one bit per logit.
The epilogue takes the tile in SLICES, so that its temporaries fit beside the accumulator: whole, it spills. Parts are
joined afterwards, [parts, N] numbers each (`backends.gpu`).

With directions of the head, [V, K], the epilogue also sums what has no bit and is not the label, and multiplies it with
them, as attention does with its values: 2·N·V·K FLOP. It is taken as a part of exp(BOUND), so no sum of it is ever
rescaled, and the operand, a number in [−1, 1] times UNIT, has all its bits in half precision.

Operands may be of 8 bits (`quantized`), each row of either with a scale. What has a bit then is in no sum: its logits
are computed from the full rows, and `quantized.kept_sums` makes of them one part more.

Traffic, one pass over N tokens: the weight once from memory, 2·V·D bytes in bf16; N·V/8 bytes of bits; from the L2
cache 2·N·V·D·(1/BLOCK_N + 1/BLOCK_V) bytes. FLOP: 2·N·V·D, with a reference twice that. Floor: the FLOP over the
measured rate of a matrix product of that shape; at 128 × 256 the L2 cache must give 96 bytes for 64 kFLOP.
"""

from __future__ import annotations

import enum

import triton
import triton.language as tl

from .math import at_least, growth, soft_cap


class Sum(enum.IntEnum):
    """Rows of `partial` [parts, len(Sum), N], over all ids but the label; δ = z − r − shift."""

    TOP = 0  # largest z
    SUM = 1  # Σ e, e = exp(z − TOP)
    WEIGHTED = 2  # Σ e (z − TOP)
    SLOPED = 3  # Σ e (1 − (z/softcap)²)
    INDEX = 4  # where TOP is, the bits of an int32
    REF_TOP = 5  # largest r
    REF_SUM = 6  # Σ w, w = exp(r − REF_TOP)
    REF_WEIGHTED = 7  # Σ w (r − REF_TOP)
    SHIFTED = 8  # Σ w δ
    GROWTH = 9  # Σ w (exp(δ) − 1 − δ)
    GAP_L1 = 10  # Σ w |exp(δ) − 1|


class Left(enum.IntEnum):
    """Rows of `left` [parts, len(Left), N], over what is left out: u = exp(z − BOUND)·slope, and
    g = exp(r − REF_BOUND) (exp(δ) − 1)."""

    SUM = 0  # Σ u
    SQUARE = 1  # Σ u²
    GAP = 2  # Σ g
    GAP_SQUARE = 3  # Σ g²
    CROSS = 4  # Σ g u


class Known(enum.IntEnum):
    """Rows of `known` [3, N]."""

    BOUND = 0  # a bit is set where z is above
    REF_BOUND = 1  # or r above this
    SHIFT = 2  # about lse − lse of the reference


TOP, SUM, WEIGHTED, SLOPED, INDEX, REF_TOP, REF_SUM, REF_WEIGHTED, SHIFTED, GROWTH, GAP_L1 = (
    tl.constexpr(int(row)) for row in Sum
)
SUMS = tl.constexpr(len(Sum))
BOUND, REF_BOUND, SHIFT = (tl.constexpr(int(row)) for row in Known)
LEFT_SUM, LEFT_SQUARE, LEFT_GAP, LEFT_GAP_SQUARE, LEFT_CROSS = (tl.constexpr(int(row)) for row in Left)
LEFTS = tl.constexpr(len(Left))
UNIT = tl.constexpr(2.0**15)  # half precision ends at 65,504 and has all its bits down to 2⁻¹⁴
FARTHEST = tl.constexpr(80.0)  # eˣ is finite
LOWEST = tl.constexpr(-3e38)  # below every logit, and finite: a difference of two of them is not NaN


# What changes with the number of tokens is no reason to compile again.
@triton.jit(do_not_specialize=["N", "tiles_per_part"])
def scan(
    x, w, x_scale_ptr, w_scale_ptr, directions, bias_ptr, labels_ptr, known_ptr, bits_ptr, partial_ptr, left_ptr,
    low_ptr, scale, softcap, N, V, D, stride_xn, stride_wv, words, tiles_per_part,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    BITS: tl.constexpr, K: tl.constexpr, SCALES: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """x [N, D] · w [V, D]ᵀ as a stream of tiles; sums into partial [parts, SUMS, N], bits into [N, words].

    A bit is set where z > known[BOUND]. Taken from a probe over some ids and the label, that is a lower bound of
    lse + log(θ √(1 − p[label])), so no entry is missed. K > 0: directions [V, K]; of what has no bit and is not the
    label, sums into left [parts, LEFTS, N] and UNIT times the products with these into low [parts, 1, N, K].

    SCALES: operands of 8 bits, x_scale [N] and w_scale [V] of their rows; with BITS, partial is over ids without a bit.
    INT8: they are integers, summed in int32.

    Traffic: V·D numbers of w from memory (once, as all blocks of tokens sweep together), N·D of x, N·V/8 bytes of bits.
    FLOP: 2·N·V·(D + K). Floor: the FLOP over the rate of a matrix product of that shape.
    """
    row = tl.program_id(0) * BLOCK_N
    part = tl.program_id(1)
    rows = row + tl.arange(0, BLOCK_N)
    valid = rows < N
    label = tl.load(labels_ptr + rows, mask=valid, other=-1).to(tl.int32)
    top, total, weighted, index = _no_sums(BLOCK_N)
    sloped = weighted
    bound = top
    if BITS:
        bound = tl.load(known_ptr + BOUND * N + rows, mask=valid, other=0.0)
    if SCALES:
        x_scale = tl.load(x_scale_ptr + rows, mask=valid, other=0.0)
    if K > 0:
        left_sum, left_square = weighted, weighted
        low = tl.zeros((BLOCK_N, K), tl.float32)

    WIDTH: tl.constexpr = BLOCK_V // SLICES
    # Nothing is moved out of the loop: addresses kept over a product would not fit beside the accumulator.
    first = part * tiles_per_part
    for tile in tl.range(first, min(first + tiles_per_part, tl.cdiv(V, BLOCK_V)), disable_licm=True):
        acc = _product_tile(
            x, w, row, tile * BLOCK_V, N, V, D, stride_xn, stride_wv,
            BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS, INT8,
        )  # fmt: skip
        slices = _slices(acc, SLICES)
        for i in tl.static_range(SLICES):
            z = slices[i]
            column = tile * BLOCK_V + i * WIDTH
            columns = column + tl.arange(0, WIDTH)
            if SCALES:
                w_scale = tl.load(w_scale_ptr + columns, mask=columns < V, other=0.0)
                z = z.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
            z = _finish(z, bias_ptr, columns, V, scale, HAS_BIAS, SCALED)
            if SOFTCAP:
                z = soft_cap(z, softcap)
            z = tl.where((columns < V)[None, :], z, -float("inf"))
            if BITS:
                _store_bits(z > bound[:, None], bits_ptr, rows, column, words)
                if SCALES:
                    z = tl.where(z > bound[:, None], -float("inf"), z)
            z = tl.where(columns[None, :] == label[:, None], -float("inf"), z)
            before = top
            top, total, weighted, index, e = _update(z, column, top, total, weighted, index, ENTROPY)
            if SOFTCAP:
                u = tl.where(e > 0, z / softcap, 0.0)
                e *= 1.0 - u * u
                sloped = sloped * tl.exp(before - top) + tl.sum(e, 1)
            if K > 0:
                left = tl.where(z > bound[:, None], 0.0, e * _moved_to(bound, top)[:, None])
                left_sum += tl.sum(left, 1)
                left_square += tl.sum(left * left, 1)
                low = _times_directions(left, directions, column, columns, V, low, K, DESCRIPTORS)

    out = partial_ptr + part.to(tl.int64) * SUMS * N + rows
    _store_sums(out, N, valid, top, total, index)
    if ENTROPY:
        tl.store(out + WEIGHTED * N, weighted, mask=valid)
    if SOFTCAP:
        tl.store(out + SLOPED * N, sloped, mask=valid)
    if K > 0:
        out = left_ptr + part.to(tl.int64) * LEFTS * N + rows
        tl.store(out + LEFT_SUM * N, left_sum, mask=valid)
        tl.store(out + LEFT_SQUARE * N, left_square, mask=valid)
        _store_low(low, low_ptr, part, rows, N, K)


@triton.jit(do_not_specialize=["N", "tiles_per_part"])
def scan_with_reference(
    x, w, reference_x, reference_w, directions, bias_ptr, reference_bias_ptr, labels_ptr, known_ptr, bits_ptr,
    partial_ptr, left_ptr, low_ptr, scale, reference_scale, N, V, D, D_REF, stride_xn, stride_wv, stride_rn, stride_rv,
    words, tiles_per_part,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SHARED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_REFERENCE_BIAS: tl.constexpr,
    SCALED: tl.constexpr, ENTROPY: tl.constexpr, REFERENCE_ENTROPY: tl.constexpr, BITS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """`scan` of the model and of the reference together, for sums over p_ref of functions of z − r.

    SHARED: x holds the difference of the hidden states, w serves both, and z = r + x·w. δ = z − r − shift is small near
    the reference, where Σ w (eᵟ − 1 − δ), without cancellation, is what the KL is made of. Without soft-cap: with one,
    Σ |p − p_ref|·slope needs the final sums. K > 0: as in `scan`; low is [parts, 2, N, K], the products of g the second
    ones. As REF_BOUND is BOUND − SHIFT, so is u = exp(r − REF_BOUND) exp(δ).

    Traffic: as `scan`, of both models; a shared weight is read from the L2 cache the second time. FLOP: 4·N·V·(D + K).
    Floor: the FLOP over the rate of a matrix product of that shape.
    """
    row = tl.program_id(0) * BLOCK_N
    part = tl.program_id(1)
    rows = row + tl.arange(0, BLOCK_N)
    valid = rows < N
    label = tl.load(labels_ptr + rows, mask=valid, other=-1).to(tl.int32)
    top, total, weighted, index = _no_sums(BLOCK_N)
    ref_top, ref_total, ref_weighted, ref_index = _no_sums(BLOCK_N)
    shifted_sum, growth_sum, gap_sum = ref_weighted, ref_weighted, ref_weighted
    shift = tl.load(known_ptr + SHIFT * N + rows, mask=valid, other=0.0)
    bound, ref_bound = top, top
    if BITS:
        bound = tl.load(known_ptr + BOUND * N + rows, mask=valid, other=0.0)
        ref_bound = tl.load(known_ptr + REF_BOUND * N + rows, mask=valid, other=0.0)
    if K > 0:
        left_sum, left_square, left_cross = shifted_sum, shifted_sum, shifted_sum
        left_gap, left_gap_square = shifted_sum, shifted_sum
        low = tl.zeros((BLOCK_N, K), tl.float32)
        gap_low = tl.zeros((BLOCK_N, K), tl.float32)

    WIDTH: tl.constexpr = BLOCK_V // SLICES
    first = part * tiles_per_part
    for tile in tl.range(first, min(first + tiles_per_part, tl.cdiv(V, BLOCK_V)), disable_licm=True):
        ref_acc = _product_tile(
            reference_x, reference_w, row, tile * BLOCK_V, N, V, D_REF, stride_rn, stride_rv,
            BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS,
        )  # fmt: skip
        acc = _product_tile(
            x, w, row, tile * BLOCK_V, N, V, D, stride_xn, stride_wv, BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS
        )
        ref_slices = _slices(ref_acc, SLICES)
        slices = _slices(acc, SLICES)
        for i in tl.static_range(SLICES):
            column = tile * BLOCK_V + i * WIDTH
            columns = column + tl.arange(0, WIDTH)
            r = _finish(ref_slices[i], reference_bias_ptr, columns, V, reference_scale, HAS_REFERENCE_BIAS, SCALED)
            d = _finish(slices[i], bias_ptr, columns, V, scale, HAS_BIAS, SCALED)
            if not SHARED:
                d -= r
            inside = columns < V
            z = r + d
            if BITS:
                significant = ((z > bound[:, None]) | (r > ref_bound[:, None])) & inside[None, :]
                _store_bits(significant, bits_ptr, rows, column, words)
            other = inside[None, :] & (columns[None, :] != label[:, None])
            z = tl.where(other, z, -float("inf"))
            top, total, weighted, index, e = _update(z, column, top, total, weighted, index, ENTROPY)
            r = tl.where(other, r, -float("inf"))
            if K > 0:
                out = (z > bound[:, None]) | (r > ref_bound[:, None])
                left = tl.where(out, 0.0, e * _moved_to(bound, top)[:, None])
                left_sum += tl.sum(left, 1)
                left_square += tl.sum(left * left, 1)
                low = _times_directions(left, directions, column, columns, V, low, K, DESCRIPTORS)
            before = ref_top
            ref_top, ref_total, ref_weighted, ref_index, e = _update(
                r, column, ref_top, ref_total, ref_weighted, ref_index, REFERENCE_ENTROPY
            )
            shrink = tl.exp(before - ref_top)
            delta = tl.where(other, d - shift[:, None], 0.0)
            if K > 0:
                ref_left = tl.where(out, 0.0, e * _moved_to(ref_bound, ref_top)[:, None])
                gap = tl.where(tl.abs(delta) < 1.0, ref_left * (growth(delta) + delta), left - ref_left)
                left_gap += tl.sum(gap, 1)
                left_gap_square += tl.sum(gap * gap, 1)
                left_cross += tl.sum(gap * left, 1)
                gap_low = _times_directions(gap, directions, column, columns, V, gap_low, K, DESCRIPTORS)
            shifted_sum = shifted_sum * shrink + tl.sum(e * delta, 1)
            grown = growth(delta)
            growth_sum = growth_sum * shrink + tl.sum(e * grown, 1)
            gap_sum = gap_sum * shrink + tl.sum(e * tl.abs(grown + delta), 1)

    out = partial_ptr + part.to(tl.int64) * SUMS * N + rows
    _store_sums(out, N, valid, top, total, index)
    _store_reference_sums(out, N, valid, ref_top, ref_total, shifted_sum, growth_sum, gap_sum)
    if ENTROPY:
        tl.store(out + WEIGHTED * N, weighted, mask=valid)
    if REFERENCE_ENTROPY:
        tl.store(out + REF_WEIGHTED * N, ref_weighted, mask=valid)
    if K > 0:
        out = left_ptr + part.to(tl.int64) * LEFTS * N + rows
        tl.store(out + LEFT_SUM * N, left_sum, mask=valid)
        tl.store(out + LEFT_SQUARE * N, left_square, mask=valid)
        tl.store(out + LEFT_GAP * N, left_gap, mask=valid)
        tl.store(out + LEFT_GAP_SQUARE * N, left_gap_square, mask=valid)
        tl.store(out + LEFT_CROSS * N, left_cross, mask=valid)
        _store_low(low, low_ptr, 2 * part, rows, N, K)
        _store_low(gap_low, low_ptr, 2 * part + 1, rows, N, K)


@triton.jit
def _store_sums(out, N, valid, top, total, index):
    tl.store(out + TOP * N, top, mask=valid)
    tl.store(out + SUM * N, total, mask=valid)
    tl.store(out + INDEX * N, index.to(tl.float32, bitcast=True), mask=valid)


@triton.jit
def _store_reference_sums(out, N, valid, ref_top, ref_total, shifted_sum, growth_sum, gap_sum):
    tl.store(out + REF_TOP * N, ref_top, mask=valid)
    tl.store(out + REF_SUM * N, ref_total, mask=valid)
    tl.store(out + SHIFTED * N, shifted_sum, mask=valid)
    tl.store(out + GROWTH * N, growth_sum, mask=valid)
    tl.store(out + GAP_L1 * N, gap_sum, mask=valid)


@triton.jit
def _moved_to(bound, top):
    """exp(top − bound), by which a part of exp(top) is one of exp(bound); finite, as 0 · ∞ would be NaN."""
    return tl.exp(tl.minimum(top - bound, FARTHEST))


@triton.jit
def _times_directions(left, directions, column, columns, V, low, K: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """low + UNIT · left · directions[columns]."""
    if DESCRIPTORS:
        rows = directions.load([column, 0])
    else:
        offsets = columns[:, None] * K + tl.arange(0, K)[None, :]
        rows = tl.load(directions + offsets, mask=(columns < V)[:, None], other=0.0)
    return tl.dot((left * UNIT).to(rows.dtype), rows, low, input_precision="ieee")


@triton.jit
def _store_low(low, low_ptr, part, rows, N, K: tl.constexpr):
    where = low_ptr + (part.to(tl.int64) * N + rows)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(where, low, mask=(rows < N)[:, None])


@triton.jit
def _product_tile(
    a, b, row, column, N, V, D, stride_a, stride_b,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
    INT8: tl.constexpr = False,
):  # fmt: skip
    """a[row :] · b[column :]ᵀ, [BLOCK_N, BLOCK_V] in fp32, of integers in int32; 0 beyond the last row or column."""
    SUM_TYPE: tl.constexpr = tl.int32 if INT8 else tl.float32
    acc = tl.zeros((BLOCK_N, BLOCK_V), SUM_TYPE)
    if DESCRIPTORS:
        for k in range(0, tl.cdiv(D, BLOCK_D)):
            acc = tl.dot(a.load([row, k * BLOCK_D]), b.load([column, k * BLOCK_D]).T, acc, out_dtype=SUM_TYPE)
    else:
        rows = row + tl.arange(0, BLOCK_N)
        columns = column + tl.arange(0, BLOCK_V)
        ks = tl.arange(0, BLOCK_D)
        left_ptr = a + rows.to(tl.int64)[:, None] * stride_a + ks[None, :]
        right_ptr = b + columns.to(tl.int64)[:, None] * stride_b + ks[None, :]
        for k in range(0, tl.cdiv(D, BLOCK_D)):
            inside = ks < D - k * BLOCK_D
            left = tl.load(left_ptr, mask=(rows < N)[:, None] & inside[None, :], other=0)
            right = tl.load(right_ptr, mask=(columns < V)[:, None] & inside[None, :], other=0)
            acc = tl.dot(left, right.T, acc, input_precision="ieee", out_dtype=SUM_TYPE)
            left_ptr += BLOCK_D
            right_ptr += BLOCK_D
    return acc


@triton.jit
def _slices(tile, SLICES: tl.constexpr):
    """The tile's columns in SLICES (1, 2 or 4) equal slices, by selecting registers: no data moves."""
    if SLICES == 1:
        slices = (tile,)
    elif SLICES == 2:
        slices = _halves(tile)
    else:
        left, right = _halves(tile)
        a, b = _halves(left)
        c, d = _halves(right)
        slices = (a, b, c, d)  # type: ignore[assignment]
    return slices


@triton.jit
def _halves(tile):
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _finish(z, bias_ptr, columns, V, scale, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr):
    """scale · (z + bias)."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < V, other=0.0)
        z = at_least(z + bias[None, :])
    if SCALED:
        z *= scale
    return z


@triton.jit
def _no_sums(SIZE: tl.constexpr):
    """top, total, weighted and index of `_update` before any logit, [SIZE]."""
    zeros = tl.zeros((SIZE,), tl.float32)
    return tl.full((SIZE,), LOWEST, tl.float32), zeros, zeros, tl.zeros((SIZE,), tl.int32)


@triton.jit
def _update(z, column, top, total, weighted, index, ENTROPY: tl.constexpr):
    """Running maximum, where it is, Σ e and, for the entropy, Σ e (z − top); −inf where a logit does not count."""
    # NaN does not win a maximum, but enters the sums through exp.
    slice_top = tl.max(z, 1)
    # Fewer registers than a maximum with its index.
    slice_index = tl.min(tl.where(z == slice_top[:, None], tl.arange(0, z.shape[1])[None, :], 1 << 30), 1)
    index = tl.where(slice_top > top, slice_index + column, index)
    new_top = tl.maximum(top, slice_top)
    shrink = tl.exp(top - new_top)
    shifted = z - new_top[:, None]
    e = tl.exp(shifted)
    if ENTROPY:
        # What is summed is moved to the new top first. The maximum is for 0 · −∞.
        weighted = (weighted + total * tl.maximum(top - new_top, -1e30)) * shrink
        weighted += tl.sum(e * tl.maximum(shifted, -1e30), 1)
    total = total * shrink + tl.sum(e, 1)
    return new_top, total, weighted, index, e


@triton.jit
def _store_bits(significant, bits_ptr, rows, column, words):
    """Bit j of word k of a row is column 32 k + j. Whole tiles are written, so `bits` has room for them."""
    WORDS: tl.constexpr = significant.shape[1] // 32
    bits = tl.reshape(significant.to(tl.uint32), (significant.shape[0], WORDS, 32))
    packed = tl.sum(bits << tl.arange(0, 32).to(tl.uint32)[None, None, :], axis=2).to(tl.int32, bitcast=True)
    word = column // 32 + tl.arange(0, WORDS)
    where = bits_ptr + rows.to(tl.int64)[:, None] * words + word[None, :]
    tl.store(where, packed)

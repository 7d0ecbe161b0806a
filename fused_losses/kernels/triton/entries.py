"""Kernels over the entries of a sparse softmax: bits to columns, vocabulary attention, products of entries.

These are the ones that csrc/cuda has too; names and arguments are the same (`schemas.GPU_SCHEMAS`). Gathered rows come
8 or fewer at a time, whole: one program holds [GROUP, D] numbers of the weight, uses them for the dot products, and
again, still in registers, for what is accumulated.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import schemas
from . import launcher
from .math import at_least, expm1, soft_cap
from .rows import LOG_SUM, MISSED, REF_LOG_SUM, REF_TOP, SHIFT, TOP, _gap
from .tiles import FUSED, gather_tile

SPLIT = tl.constexpr(schemas.SPLIT)
WORDS, WORDS_WARPS = 256, 1  # of a block of bits
# Of `weighted_sum`: numbers of the matrix that a program takes at once, and programs, some 16 a multiprocessor.
SUMMED, SUMMED_WARPS, SUMMING = 4096, 4, 2048


@triton.jit
def _population(word):
    """Number of set bits."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _words(bits_ptr, label, at, words):
    """Words of a row, the label's bit set."""
    word = tl.load(bits_ptr + at, mask=at < words, other=0)
    return tl.where(at == label // 32, word | (1 << (label % 32)), word)


@triton.jit
def count_bits_kernel(bits_ptr, labels_ptr, counts_ptr, words, capacity, BLOCK: tl.constexpr):
    """Set bits of a row, the label's among them; −1 beyond the capacity.

    Traffic: N·V/8 bytes. Integer work only, about 12 operations a word. Floor: the traffic over the memory bandwidth.
    """
    t = tl.program_id(0)
    label = tl.load(labels_ptr + t).to(tl.int32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, words, BLOCK):
        count += _population(_words(bits_ptr + t.to(tl.int64) * words, label, start + tl.arange(0, BLOCK), words))
    total = tl.sum(count).to(tl.int64)
    tl.store(counts_ptr + t, tl.where(total > capacity, -1, total))


@launcher
def count_bits(bits: Tensor, labels: Tensor, capacity: int, counts: Tensor) -> None:
    count_bits_kernel[(len(bits),)](bits, labels, counts, bits.shape[1], capacity, BLOCK=1024, num_warps=4, **FUSED)


@triton.jit
def columns_of_bits_kernel(bits_ptr, labels_ptr, offsets_ptr, columns_ptr, words, WORDS: tl.constexpr):
    """The columns of a row's set bits, in order: a running offset, a cumulative sum inside a block of words, and the
    lowest bit of every word at once, until the block has none left.

    Traffic: N·V/8 bytes read, 4 bytes written per entry. Integer work only, about 30 operations a word and 10 more for
    each bit of the fullest word of a block. Floor: the traffic over the memory bandwidth.
    """
    t = tl.program_id(0)
    label = tl.load(labels_ptr + t).to(tl.int32)
    here = tl.load(offsets_ptr + t)
    bits_ptr += t.to(tl.int64) * words
    if tl.load(offsets_ptr + t + 1) > here:
        at = tl.arange(0, WORDS)
        coming = _words(bits_ptr, label, at, words)
        for _start in range(0, words, WORDS):
            word = coming
            coming = _words(bits_ptr, label, at + WORDS, words)  # on its way while this block is worked on
            count = _population(word)
            found = tl.cumsum(count, 0)
            out = found - count
            fullest = tl.max(count, 0)
            for _ in range(0, fullest):
                lowest = word & -word
                # The exponent of a power of two.
                bit = (lowest.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
                tl.store(columns_ptr + here + out, at * 32 + bit, mask=word != 0)
                out += 1  # beyond the last bit nothing is stored
                word &= word - 1
            here += tl.max(found, 0)
            at += WORDS


@launcher
def columns_of_bits(bits: Tensor, labels: Tensor, offsets: Tensor, columns: Tensor) -> None:
    columns_of_bits_kernel[(len(bits),)](
        bits, labels, offsets, columns, bits.shape[1], WORDS=WORDS, num_warps=WORDS_WARPS, **FUSED
    )


@triton.jit
def entry_logits_kernel(
    hidden_ptr, weight_ptr, bias_ptr, offsets_ptr, columns_ptr, out_ptr, D,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out[j] = hidden[t] · weight[columns[j]] + bias.

    Traffic: entries·D numbers of the weight, gathered. FLOP: 2·entries·D. Floor: entries·D·itemsize over the L2
    bandwidth.
    """
    t = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    hidden = tl.load(hidden_ptr + t.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
    end = tl.load(offsets_ptr + t + 1)
    for start in range(tl.load(offsets_ptr + t), end, GROUP):
        entry = start + tl.arange(0, GROUP)
        live = entry < end
        column = tl.load(columns_ptr + entry, mask=live, other=0)
        row = tl.load(
            weight_ptr + column.to(tl.int64)[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0
        )
        z = tl.sum(row.to(tl.float32) * hidden[None, :], 1)
        if HAS_BIAS:
            z = at_least(z + tl.load(bias_ptr + column, mask=live, other=0.0))
        tl.store(out_ptr + entry, z, mask=live)


@launcher
def entry_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, columns: Tensor, out: Tensor
) -> None:
    dim = weight.shape[1]
    entry_logits_kernel[(len(hidden),)](
        hidden, weight, bias, offsets, columns, out, dim, HAS_BIAS=bias is not None, **gather_tile(dim, 1)
    )


@triton.jit
def _logits_of_entries(
    row, hidden, moved, entry_reference_ptr, bias_ptr, entry, column, live, scale, softcap,
    DIFFERENCE: tl.constexpr, ENTRY_REFERENCE: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """z, z − r and r of a group of entries. Without a reference the last two are z."""
    z = tl.sum(row * hidden[None, :], 1)
    if HAS_BIAS:
        z = at_least(z + tl.load(bias_ptr + column, mask=live, other=0.0))
    z *= scale
    gap_d, r = z, z
    if DIFFERENCE:
        gap_d = scale * tl.sum(row * moved[None, :], 1)
        z = r + gap_d
    if SOFTCAP:
        z = soft_cap(z, softcap)
    if DIFFERENCE and SOFTCAP:
        r = soft_cap(r, softcap)
        gap_d = z - r
    if ENTRY_REFERENCE:
        r = tl.load(entry_reference_ptr + entry, mask=live, other=0.0)
        gap_d = z - r
    return z, gap_d, r


@triton.jit(do_not_specialize=["N"])
def attention_kernel(
    hidden_ptr, difference_ptr, entry_reference_ptr, weight_ptr, bias_ptr, labels_ptr, offsets_ptr, columns_ptr,
    rows_ptr, nll_ptr, nll_values_ptr, kl_values_ptr, kept_ptr, nll_rows_ptr, kl_rows_ptr, N, D, scale, softcap,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, DIFFERENCE: tl.constexpr,
    ENTRY_REFERENCE: tl.constexpr, SOFTCAP: tl.constexpr, NLL_ROWS: tl.constexpr, KL_ROWS: tl.constexpr,
):  # fmt: skip
    """Decode attention of one token over its entries, keys and values both the rows of the weight.

    Traffic: entries·D numbers of the weight, each row gathered once, frequent ones from the L2 cache; N·D of hidden
    read and, for the rows, written. FLOP: 4·entries·D, 8 with a reference. Floor: entries·D·itemsize over the L2
    bandwidth.
    """
    REFERENCE: tl.constexpr = DIFFERENCE or ENTRY_REFERENCE
    t = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    hidden = tl.load(hidden_ptr + t.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
    moved = hidden
    if DIFFERENCE:
        moved = tl.load(difference_ptr + t.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
    label = tl.load(labels_ptr + t).to(tl.int32)
    at_label = expm1(-tl.load(nll_ptr + t))
    top = tl.load(rows_ptr + TOP * N + t)
    log_sum = tl.load(rows_ptr + LOG_SUM * N + t)
    if REFERENCE:
        ref_top = tl.load(rows_ptr + REF_TOP * N + t)
        ref_log_sum = tl.load(rows_ptr + REF_LOG_SUM * N + t)
        shift = tl.load(rows_ptr + SHIFT * N + t)
        missed = tl.load(rows_ptr + MISSED * N + t)
    nll_row = tl.zeros((BLOCK_D,), tl.float32)
    kl_row = tl.zeros((BLOCK_D,), tl.float32)
    kept = tl.zeros((GROUP,), tl.float32)
    kept_gap = tl.zeros((GROUP,), tl.float32)
    kept_l1 = tl.zeros((GROUP,), tl.float32)
    kept_totals_l1 = tl.zeros((GROUP,), tl.float32)
    end = tl.load(offsets_ptr + t + 1)
    for start in range(tl.load(offsets_ptr + t), end, GROUP):
        entry = start + tl.arange(0, GROUP)
        live = entry < end
        column = tl.load(columns_ptr + entry, mask=live, other=0)
        row = tl.load(
            weight_ptr + column.to(tl.int64)[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0
        ).to(tl.float32)
        z, gap_d, r = _logits_of_entries(
            row, hidden, moved, entry_reference_ptr, bias_ptr, entry, column, live, scale, softcap,
            DIFFERENCE, ENTRY_REFERENCE, HAS_BIAS, SOFTCAP,
        )  # fmt: skip
        slope = tl.where(live, 1.0, 0.0)
        if SOFTCAP:
            u = z / softcap
            slope *= 1.0 - u * u
        # Lanes beyond the last entry hold a logit of 0, whose p may be infinite: chosen away, not multiplied.
        p = tl.where(live, tl.exp((z - top) - log_sum), 0.0) * slope
        kept += tl.where(column == label, 0.0, p)
        value = tl.where(column == label, at_label * slope, p)
        tl.store(nll_values_ptr + entry, value, mask=live)
        if NLL_ROWS:
            nll_row += tl.sum(row * value[:, None], 0)
        if REFERENCE:
            gap, _ = _gap(z, gap_d, r, top, log_sum, ref_top, ref_log_sum, shift, missed)
            gap = tl.where(live, gap, 0.0) * slope
            kept_gap += gap
            kept_l1 += tl.abs(gap)
            moved_gap = tl.exp((r - ref_top) - ref_log_sum) * expm1(gap_d - shift)
            kept_totals_l1 += tl.abs(tl.where(live, moved_gap, 0.0) * slope)
            tl.store(kl_values_ptr + entry, gap, mask=live)
            if KL_ROWS:
                kl_row += tl.sum(row * gap[:, None], 0)
    tl.store(kept_ptr + t, tl.sum(kept))
    if REFERENCE:
        tl.store(kept_ptr + N + t, tl.sum(kept_gap))
        tl.store(kept_ptr + 2 * N + t, tl.sum(kept_l1))
        tl.store(kept_ptr + 3 * N + t, tl.sum(kept_totals_l1))
    if NLL_ROWS:
        where = nll_rows_ptr + t.to(tl.int64) * D + d
        tl.store(where, nll_row.to(nll_rows_ptr.dtype.element_ty), mask=d < D)
    if KL_ROWS:
        where = kl_rows_ptr + t.to(tl.int64) * D + d
        tl.store(where, kl_row.to(kl_rows_ptr.dtype.element_ty), mask=d < D)


@launcher
def attention(
    hidden: Tensor, difference: Tensor | None, entry_reference: Tensor | None, weight: Tensor, bias: Tensor | None,
    labels: Tensor, offsets: Tensor, columns: Tensor, rows: Tensor, nll: Tensor, scale: float, softcap: float,
    nll_values: Tensor, kl_values: Tensor | None, kept: Tensor, nll_rows: Tensor | None, kl_rows: Tensor | None,
) -> None:  # fmt: skip
    count, dim = hidden.shape
    attention_kernel[(count,)](
        hidden, difference, entry_reference, weight, bias, labels, offsets, columns, rows, nll, nll_values, kl_values,
        kept, nll_rows, kl_rows, count, dim, scale, softcap,
        HAS_BIAS=bias is not None, DIFFERENCE=difference is not None, ENTRY_REFERENCE=entry_reference is not None,
        SOFTCAP=softcap > 0, NLL_ROWS=nll_rows is not None, KL_ROWS=kl_rows is not None,
        **gather_tile(dim, 1 + sum(t is not None for t in (difference, nll_rows, kl_rows))),
    )  # fmt: skip


@triton.jit
def _gathered(offset, end, columns_ptr, values_ptr, matrix_ptr, d, D, GROUP: tl.constexpr, BLOCK_D: tl.constexpr):
    """Σ values[j] · matrix[columns[j]] over the entries from `offset` to `end`, GROUP rows at a time."""
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(offset, end, GROUP):
        entry = start + tl.arange(0, GROUP)
        live = entry < end
        column = tl.load(columns_ptr + entry, mask=live, other=0).to(tl.int64)
        value = tl.load(values_ptr + entry, mask=live, other=0.0)
        row = tl.load(matrix_ptr + column[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(row.to(tl.float32) * value[:, None], 0)
    return total


@triton.jit
def _write(total, i, scale_ptr, vector_ptr, base_ptr, base_scale, out_ptr, d, D, HAS_BASE: tl.constexpr):
    total += tl.load(scale_ptr + i) * tl.load(vector_ptr + d, mask=d < D, other=0.0)
    if HAS_BASE:
        total += base_scale * tl.load(base_ptr + i * D + d, mask=d < D, other=0.0)
    tl.store(out_ptr + i * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


# Both vary from step to step, and are no strides: not worth another compilation when they are 1 or a multiple of 16.
@triton.jit(do_not_specialize=["segments", "hot"])
def segment_product_kernel(
    offsets_ptr, columns_ptr, values_ptr, matrix_ptr, scale_ptr, vector_ptr, base_ptr, base_scale, hot_ptr,
    hot_first_ptr, partial_ptr, out_ptr, segments, hot, D,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BASE: tl.constexpr,
):  # fmt: skip
    """Program i < segments: segment i, unless it is hot. The others: one slot of a hot segment each, into `partial`.

    Traffic: entries·D numbers of the matrix, gathered (from the L2 cache where it fits), I·D written once. FLOP:
    2·entries·D. Floor: entries·D·itemsize over the L2 bandwidth plus I·D·itemsize over the memory bandwidth.
    """
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    if i < segments:
        first = tl.load(offsets_ptr + i)
        end = tl.load(offsets_ptr + i + 1)
        if end - first <= SPLIT:
            total = _gathered(first, end, columns_ptr, values_ptr, matrix_ptr, d, D, GROUP, BLOCK_D)
            _write(total, i, scale_ptr, vector_ptr, base_ptr, base_scale, out_ptr, d, D, HAS_BASE)
    else:
        slot = i - segments
        low, high = 0, hot
        while high - low > 1:  # the last hot segment whose first slot is not behind this one
            middle = (low + high) // 2
            behind = tl.load(hot_first_ptr + middle) > slot
            high = tl.where(behind, middle, high)
            low = tl.where(behind, low, middle)
        segment = tl.load(hot_ptr + low)
        first = tl.load(offsets_ptr + segment) + SPLIT * (slot - tl.load(hot_first_ptr + low))
        end = min(first + SPLIT, tl.load(offsets_ptr + segment + 1))
        total = _gathered(first, end, columns_ptr, values_ptr, matrix_ptr, d, D, GROUP, BLOCK_D)
        tl.store(partial_ptr + slot * D + d, total, mask=d < D)


@triton.jit
def join_slots_kernel(
    hot_ptr, hot_first_ptr, partial_ptr, scale_ptr, vector_ptr, base_ptr, base_scale, out_ptr, D,
    BLOCK_D: tl.constexpr, HAS_BASE: tl.constexpr,
):  # fmt: skip
    """The slots of a hot segment, added in order.

    Traffic: 4·slots·D bytes. FLOP: slots·D. Floor: the traffic over the L2 bandwidth; there are few hot segments.
    """
    h = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for slot in range(tl.load(hot_first_ptr + h), tl.load(hot_first_ptr + h + 1)):
        total += tl.load(partial_ptr + slot * D + d, mask=d < D, other=0.0)
    _write(total, tl.load(hot_ptr + h), scale_ptr, vector_ptr, base_ptr, base_scale, out_ptr, d, D, HAS_BASE)


@launcher
def segment_product(
    offsets: Tensor, columns: Tensor, values: Tensor, matrix: Tensor, scale: Tensor, vector: Tensor,
    base: Tensor | None, base_scale: float, hot: Tensor, hot_first: Tensor, partial: Tensor, out: Tensor,
) -> None:  # fmt: skip
    segments, dim = out.shape
    tile = gather_tile(dim, 1)
    segment_product_kernel[(segments + len(partial),)](
        offsets, columns, values, matrix, scale, vector, base, base_scale, hot, hot_first, partial, out,
        segments, len(hot), dim, HAS_BASE=base is not None, **tile,
    )  # fmt: skip
    if len(hot):
        join_slots_kernel[(len(hot),)](
            hot, hot_first, partial, scale, vector, base, base_scale, out, dim,
            BLOCK_D=tile["BLOCK_D"], HAS_BASE=base is not None, num_warps=tile["num_warps"], **FUSED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count", "rows_per_part"])
def weighted_sum_kernel(
    matrix_ptr, scale_ptr, partial_ptr, count, D, rows_per_part, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """partial[part] = Σ scale[v] · matrix[v] over the part's rows. Each row of a block has a sum of its own until the
    end: inside the loop no thread waits for another.

    Traffic: count·D numbers of the matrix, once. FLOP: 2·count·D. Floor: the traffic over the memory bandwidth.
    """
    part = tl.program_id(1)
    d = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    row = tl.arange(0, BLOCK)[:, None]
    total = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    first = part * rows_per_part
    end = min(first + rows_per_part, count)
    matrix_ptr += first.to(tl.int64) * D + row * D + d
    for start in range(first, end, BLOCK):
        v = start + row
        scale = tl.load(scale_ptr + v, mask=v < end, other=0.0)
        numbers = tl.load(matrix_ptr, mask=(v < end) & (d < D), other=0.0)
        total += numbers.to(tl.float32) * scale
        matrix_ptr += BLOCK * D
    where = partial_ptr + part * D + tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.store(where, tl.sum(total, 0), mask=tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D) < D)


def sum_tile(dim: int) -> dict[str, int]:
    """Of `weighted_sum`: narrow matrices in more rows at a time, so that no lane is idle."""
    block_d = min(256, max(16, triton.next_power_of_2(dim)))
    return dict(BLOCK=SUMMED // block_d, BLOCK_D=block_d)


@launcher
def weighted_sum(matrix: Tensor, scale: Tensor) -> Tensor:
    """Σ_v scale[v] · matrix[v], [D], fp32; parts in a fixed order."""
    count, dim = matrix.shape
    tile = sum_tile(dim)
    blocks, wide = triton.cdiv(count, tile["BLOCK"]), triton.cdiv(dim, tile["BLOCK_D"])
    per_part = triton.cdiv(blocks, max(1, min(blocks, SUMMING // wide))) * tile["BLOCK"]
    parts = triton.cdiv(count, per_part)
    partial = scale.new_empty(parts, dim)
    weighted_sum_kernel[(wide, parts)](
        matrix, scale, partial, count, dim, per_part, num_warps=SUMMED_WARPS, **tile, **FUSED
    )
    return partial.sum(0)

"""What the entries of a sparse softmax leave out of a chunk's logits [C, V], in directions of the head.

The scan does the same in its epilogue, where it has no final sums yet; here they are known.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launcher
from .rows import LOG_SUM, MISSED, REF_LOG_SUM, REF_TOP, SHIFT, TOP, _gap, _logits
from .scan import LEFT_GAP, LEFT_GAP_SQUARE, LEFT_SQUARE, LEFT_SUM, LEFTS, Left
from .tiles import FUSED

BLOCKS = dict(BLOCK_C=32, BLOCK_V=32)
OPTIONS = dict(num_warps=2, **FUSED)
# So many logits beside each other, which one thread has, are added before they go into the running sums: in the loop no
# lanes exchange sums.
BESIDE = tl.constexpr(4)
# Programs that a chunk is divided among, for a GPU of some hundred multiprocessors.
PROGRAMS = 1024


def precision(of_amd: bool) -> str:
    """Of the products with the directions: on the tensor cores as three of tf32 numbers, which are off by some 2⁻²¹ of
    a number's size. AMD's matrix instructions take float32 itself."""
    return "ieee" if of_amd else "tf32x3"


@triton.jit
def _beside(x):
    """Sums of BESIDE numbers that lie beside each other; a thread has them all."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // BESIDE, BESIDE)), 2)


@triton.jit(do_not_specialize=["C", "blocks_per_part"])
def left_out_kernel(
    z_ptr, r_ptr, labels_ptr, bits_ptr, rows_ptr, directions_ptr, left_ptr, low_ptr, C, V, words, blocks_per_part,
    scale, softcap, reference_scale, reference_softcap,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, K: tl.constexpr, REFERENCE: tl.constexpr, DIFFERENCE: tl.constexpr,
    SOFTCAP: tl.constexpr, REFERENCE_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of p·slope, and of (p − p_ref)·slope, where neither the bit is set nor the label is: sums and sums of squares
    into left [parts, LEFTS, C], products with directions [V, K] into low [parts, 1 or 2, C, K].

    Traffic: 4·C·V bytes, 8·C·V with r, C·V/8 of bits, and C/BLOCK_C times the directions from the L2 cache. FLOP:
    C·V·(2·K + 15), with r twice that; tensor cores make the products in three. Floor: the traffic over the memory
    bandwidth.
    """
    rows = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    valid = rows < C
    label = tl.load(labels_ptr + rows, mask=valid, other=-1).to(tl.int32)
    top = tl.load(rows_ptr + TOP * C + rows, mask=valid, other=0.0)[:, None]
    log_sum = tl.load(rows_ptr + LOG_SUM * C + rows, mask=valid, other=0.0)[:, None]
    row = tl.where(valid, rows, 0).to(tl.int64)[:, None]  # what comes of rows beyond the last is not written
    z_ptr += row * V
    bits_ptr += row * words
    if REFERENCE:
        r_ptr += row * V
        ref_top = tl.load(rows_ptr + REF_TOP * C + rows, mask=valid, other=0.0)[:, None]
        ref_log_sum = tl.load(rows_ptr + REF_LOG_SUM * C + rows, mask=valid, other=0.0)[:, None]
        shift = tl.load(rows_ptr + SHIFT * C + rows, mask=valid, other=0.0)[:, None]
        missed = tl.load(rows_ptr + MISSED * C + rows, mask=valid, other=0.0)[:, None]
        gap_low = tl.zeros((BLOCK_C, K), tl.float32)
    low = tl.zeros((BLOCK_C, K), tl.float32)
    left_sum = tl.zeros((BLOCK_C, BLOCK_V // BESIDE), tl.float32)
    left_square, left_gap, left_gap_square = left_sum, left_sum, left_sum
    first = part * blocks_per_part
    for block in range(first, min(first + blocks_per_part, tl.cdiv(V, BLOCK_V))):
        column = block * BLOCK_V + tl.arange(0, BLOCK_V)
        columns = column[None, :]
        z, d, r = _logits(
            z_ptr, r_ptr, columns, V, scale, softcap, reference_scale, reference_softcap,
            REFERENCE, DIFFERENCE, SOFTCAP, REFERENCE_SOFTCAP,
        )  # fmt: skip
        tl.static_assert(BLOCK_V == 32, "a block of columns is one word of bits")
        out = (((tl.load(bits_ptr + block) >> (columns % 32)) & 1) != 0) | (columns == label[:, None]) | (columns >= V)
        slope = tl.where(out, 0.0, 1.0)
        if SOFTCAP:
            u = z / softcap
            slope *= 1.0 - u * u
        # Chosen away, not multiplied: what is beyond the last column may be infinite.
        left = tl.where(out, 0.0, tl.exp((z - top) - log_sum)) * slope
        left_sum += _beside(left)
        left_square += _beside(left * left)
        directions = tl.load(
            directions_ptr + column[:, None] * K + tl.arange(0, K)[None, :], mask=(column < V)[:, None], other=0.0
        )
        low = tl.dot(left, directions, low, input_precision=PRECISION)
        if REFERENCE:
            gap, _ = _gap(z, d, r, top, log_sum, ref_top, ref_log_sum, shift, missed)
            gap = tl.where(out, 0.0, gap) * slope
            left_gap += _beside(gap)
            left_gap_square += _beside(gap * gap)
            gap_low = tl.dot(gap, directions, gap_low, input_precision=PRECISION)
    where = left_ptr + part * LEFTS * C + rows
    tl.store(where + LEFT_SUM * C, tl.sum(left_sum, 1), mask=valid)
    tl.store(where + LEFT_SQUARE * C, tl.sum(left_square, 1), mask=valid)
    at = rows[:, None] * K + tl.arange(0, K)[None, :]
    if REFERENCE:
        tl.store(where + LEFT_GAP * C, tl.sum(left_gap, 1), mask=valid)
        tl.store(where + LEFT_GAP_SQUARE * C, tl.sum(left_gap_square, 1), mask=valid)
        tl.store(low_ptr + 2 * part * C * K + at, low, mask=valid[:, None])
        tl.store(low_ptr + (2 * part + 1) * C * K + at, gap_low, mask=valid[:, None])
    else:
        tl.store(low_ptr + part * C * K + at, low, mask=valid[:, None])


@launcher
def left_out(
    z: Tensor, r: Tensor | None, difference: bool, labels: Tensor, scale: float, softcap: float, reference_scale: float,
    reference_softcap: float, bits: Tensor, rows: Tensor, directions: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """left [len(Left), C] and low [1 or 2, C, K] of `left_out_kernel`, its parts added in order."""
    (count, vocabulary), width = z.shape, directions.shape[1]
    blocks, tiles = triton.cdiv(count, BLOCKS["BLOCK_C"]), triton.cdiv(vocabulary, BLOCKS["BLOCK_V"])
    per_part = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // blocks)))
    parts = triton.cdiv(tiles, per_part)
    left = z.new_empty(parts, len(Left), count)
    low = z.new_empty(parts, 1 if r is None else 2, count, width)
    left_out_kernel[(blocks, parts)](
        z, r, labels, bits, rows, directions, left, low, count, vocabulary, bits.shape[1], per_part, scale, softcap,
        reference_scale, reference_softcap, K=width, REFERENCE=r is not None, DIFFERENCE=difference,
        SOFTCAP=softcap > 0, REFERENCE_SOFTCAP=reference_softcap > 0,
        PRECISION=precision(torch.version.hip is not None), **BLOCKS, **OPTIONS,
    )  # fmt: skip
    return left.sum(0), low.sum(0)

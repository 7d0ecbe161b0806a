"""What a scan with operands of 8 bits needs beside itself: such operands, and the exact sums of what it keeps.

Each row has a scale of its own, so a number is wrong by at most 1/254 of the largest of its row in int8, by 1/16 of
itself in e4m3. That is enough where only sums are wanted; what has a bit is in none of the scan's sums, and its logits
are computed from the full rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launcher
from .math import soft_cap
from .scan import INDEX, SLOPED, SUM, TOP, WEIGHTED, _no_sums, _update
from .tiles import FUSED

BLOCKS = dict(ROWS=8, BLOCK=256)
KEPT_BLOCK = 128
OPTIONS = dict(num_warps=4, **FUSED)
LARGEST_INT8 = tl.constexpr(127.0)
LARGEST_FLOAT8 = tl.constexpr(448.0)  # of e4m3
SMALLEST = tl.constexpr(1e-37)  # of a scale: a row of zeros has one too
ROUND = tl.constexpr(1.5 * 2.0**23)  # a float32 plus this and minus this is the nearest integer, ties to the even one


@triton.jit
def quantize_rows_kernel(
    matrix_ptr, factor_ptr, out_ptr, scale_ptr, stride_row, rows, D, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_FACTOR: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """out [rows, width] · scale [rows] is about matrix [rows, D] · factor [D], with zeros from D on. A row with a NaN
    or an infinity has the scale NaN, so all of its logits are NaN.

    Traffic: the matrix, the second time from a cache, and its numbers as bytes. FLOP: about 6 a number. Floor: the
    traffic over the memory bandwidth.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    matrix_ptr += row.to(tl.int64)[:, None] * stride_row
    out_ptr += row.to(tl.int64)[:, None] * width
    largest = tl.zeros((ROWS, BLOCK), tl.float32)
    strange = tl.zeros((ROWS, BLOCK), tl.int32)
    for start in range(0, D, BLOCK):
        x = _numbers(matrix_ptr, factor_ptr, start + tl.arange(0, BLOCK), valid, D, HAS_FACTOR)
        largest = tl.maximum(largest, tl.abs(x))
        strange += tl.where(tl.abs(x) < float("inf"), 0, 1)
    scale = tl.maximum(tl.max(largest, 1) / (LARGEST_INT8 if INT8 else LARGEST_FLOAT8), SMALLEST)
    finite = tl.sum(strange, 1) == 0
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")), mask=valid)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = _numbers(matrix_ptr, factor_ptr, at, valid, D, HAS_FACTOR)
        y = tl.where(finite[:, None], x / scale[:, None], 0.0)
        if INT8:
            y = (y + ROUND) - ROUND
        else:
            y = tl.minimum(tl.maximum(y, -LARGEST_FLOAT8), LARGEST_FLOAT8)
        tl.store(out_ptr + at[None, :], y.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (at < width)[None, :])


@triton.jit
def _numbers(matrix_ptr, factor_ptr, at, valid, D, HAS_FACTOR: tl.constexpr):
    x = tl.load(matrix_ptr + at[None, :], mask=valid[:, None] & (at < D)[None, :], other=0.0).to(tl.float32)
    if HAS_FACTOR:
        x *= tl.load(factor_ptr + at, mask=at < D, other=0.0)[None, :]
    return x


@launcher
def quantize_rows(matrix: Tensor, factor: Tensor | None, out: Tensor, scale: Tensor) -> None:
    """matrix [rows, D] with its columns side by side, factor [D] float32; out [rows, width] int8 or float8_e4m3fn."""
    quantize_rows_kernel[(triton.cdiv(len(matrix), BLOCKS["ROWS"]),)](
        matrix, factor, out, scale, matrix.stride(0), len(matrix), matrix.shape[1], out.shape[1],
        HAS_FACTOR=factor is not None, INT8=not out.dtype.is_floating_point, **BLOCKS, **OPTIONS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def kept_sums_kernel(
    z_ptr, labels_ptr, offsets_ptr, columns_ptr, partial_ptr, N, scale, softcap,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The sums of `scan` over a token's entries but the label, in partial [SUMS, N], of z · scale.

    Traffic: 8 bytes an entry, 24 a token. FLOP: about 20 an entry. Floor: the traffic over the memory bandwidth.
    """
    t = tl.program_id(0)
    label = tl.load(labels_ptr + t).to(tl.int32)
    first, end = tl.load(offsets_ptr + t), tl.load(offsets_ptr + t + 1)
    top, total, weighted, index = _no_sums(1)
    sloped = weighted
    for start in range(first, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        live = entry < end
        z = tl.load(z_ptr + entry, mask=live, other=0.0) * scale
        if SOFTCAP:
            z = soft_cap(z, softcap)
        other = live & (tl.load(columns_ptr + entry, mask=live, other=0) != label)
        z = tl.where(other, z, -float("inf"))[None, :]
        before = top
        top, total, weighted, index, e = _update(z, (start - first).to(tl.int32), top, total, weighted, index, True)
        if SOFTCAP:
            u = tl.where(e > 0, z / softcap, 0.0)
            sloped = sloped * tl.exp(before - top) + tl.sum(e * (1.0 - u * u), 1)
    one = t + tl.arange(0, 1)
    # Entries are in the order of their ids, so the first of the largest has the lowest id.
    column = tl.load(columns_ptr + first + index, mask=first + index < end, other=0)
    tl.store(partial_ptr + TOP * N + one, top)
    tl.store(partial_ptr + SUM * N + one, total)
    tl.store(partial_ptr + WEIGHTED * N + one, weighted)
    if SOFTCAP:
        tl.store(partial_ptr + SLOPED * N + one, sloped)
    tl.store(partial_ptr + INDEX * N + one, column.to(tl.float32, bitcast=True))


@launcher
def kept_sums(
    z: Tensor, labels: Tensor, offsets: Tensor, columns: Tensor, scale: float, softcap: float | None, partial: Tensor
) -> None:
    kept_sums_kernel[(len(labels),)](
        z, labels, offsets, columns, partial, len(labels), scale, softcap or 0.0, BLOCK=KEPT_BLOCK,
        SOFTCAP=softcap is not None, **OPTIONS,
    )  # fmt: skip

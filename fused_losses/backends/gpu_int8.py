"""The scan with operands of 8 bits on a GPU, `scan="int8"`: the operands, exact sums of what is kept, and how far off
the nll is on some tokens.

Each token and each row of the head has a scale of its own (`kernels.triton.quantized`). A logit whose bit is set is in
none of the scan's sums: it is computed from the full rows, lse = log(Σ kept e^z + Σ rest e^ẑ).

Source: scales per row, per token and per channel are SmoothQuant's (arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.triton import quantized as kernels
from ..kernels.triton import tiles
from ..kernels.triton.scan import Sum
from ..problem import Problem, Statistics
from . import gpu_scan
from .int8 import MEASURED, MOST_ERROR, channel_of, squares_of, too_wide, too_wide_rows

CAPACITY = 4096  # entries of a token in such a pass; a token with more takes full products


class Eight(NamedTuple):
    """Operands of 8 bits, each row with zeros up to whole units of 16 bytes, and the tile for them."""

    tile: tiles.Scan
    hidden: Tensor  # [N, width]
    hidden_scale: Tensor  # [N]
    weight: Tensor  # [V, width]
    weight_scale: Tensor  # [V]

    def rows(self, index: Tensor) -> Eight:
        return self._replace(hidden=self.hidden[index], hidden_scale=self.hidden_scale[index])


def missing(problem: Problem, directed: bool = False) -> str | None:
    """Why a scan cannot take operands of 8 bits; None where it can."""
    if problem.has_reference:
        return "on a GPU products of 8-bit numbers are for losses without a reference"
    if gpu_scan.choose_tile(problem, directed) is None:
        return "this call has no scan: what it asks for, its dtype or its hidden size takes chunks of logits"
    return None


def begin(problem: Problem, directed: bool, values: Callable[[Problem, Eight | None], Statistics]) -> Eight | None:
    """The operands where 8 bits are asked for and do; None: full products, and `problem.int8.note` says why.

    `values`: statistics of some tokens by a scan, with operands of 8 bits, of which as many logits are exact as in the
    call, or with full ones.
    """
    record = problem.int8
    if record is None or not len(problem.labels):
        return None
    record.note = missing(problem, directed)
    if record.note is not None:
        return None
    channel = channel_of(problem) if problem.head.low_rank is None else None
    eight, count = quantize(problem, directed, channel), len(problem.labels)
    if eight.weight.dtype == torch.int8:  # numbers of fp8 have an exponent each
        head, inverse = problem.head, None if channel is None else channel.reciprocal()
        hidden = problem.hidden[:, : head.weight.shape[1]]
        wide = len(too_wide(hidden, inverse, squares_of(head.weight, channel)[0], head.logit_scale))
        if wide:
            record.note = f"8 bits are too few for {wide} of {count} hidden states"
            return None
        wide = len(too_wide_rows(hidden, inverse, eight.weight_scale, head.logit_scale))
        if wide:
            record.note = f"8 bits are too few for {wide} of {len(eight.weight)} rows of the head"
            return None
    measured = min(MEASURED, max(2, count // 64), count)
    sample = torch.arange(measured, device=problem.hidden.device) * count // measured
    some = problem.rows(sample).for_gradients()
    truth, found = values(some, None).nll, values(some, eight.rows(sample)).nll
    errors = torch.where(found.isfinite() | truth.isfinite(), (found - truth).abs(), 0)
    record.value_error = error = float(errors.mean())
    if error <= MOST_ERROR:
        return eight
    record.note = (
        f"the nll was off by {error:.2g} nats on average, more than {MOST_ERROR:g}, on the {measured} tokens that were "
        "measured"
    )
    return None


def quantize(problem: Problem, directed: bool = False, channel: Tensor | None = None) -> Eight:
    """x / channel and W · channel, [D] float32, in 8 bits; W whole: V·D bytes, for as long as the scan takes."""
    tile = gpu_scan.choose_tile(problem, directed, eight_bit=True)
    assert tile is not None
    dtype = torch.float8_e4m3fn if tile.architecture in tiles.FLOAT8 else torch.int8
    inverse = None if channel is None else channel.reciprocal()
    return Eight(tile, *rows_of(problem.hidden, inverse, dtype), *rows_of(problem.head.weight, channel, dtype))


def rows_of(matrix: Tensor, factor: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """matrix · factor in 8 bits, and the scale of each row."""
    matrix = matrix if matrix.stride(1) == 1 else matrix.contiguous()
    out = torch.empty(len(matrix), -(-matrix.shape[1] // 16) * 16, dtype=dtype, device=matrix.device)
    scale = torch.empty(len(matrix), dtype=torch.float32, device=matrix.device)
    kernels.quantize_rows(matrix, factor, out, scale)  # type: ignore[call-arg]
    return out, scale


def with_kept(
    operands: gpu_scan.Operands, gpu_kernels: Any, tokens: slice, found: gpu_scan.Columns, partial: Tensor
) -> Tensor:  # fmt: skip
    """`partial` [parts, len(Sum), C] and one part more, of the kept ids' exact logits; entries of a token in order."""
    problem, columns = operands.problem, found.columns
    z = torch.empty(len(columns), dtype=torch.float32, device=columns.device)
    gpu_kernels.entry_logits(
        operands.hidden[tokens].contiguous(), operands.weight.contiguous(), operands.bias, found.offsets, columns, z
    )
    kept = partial.new_empty(len(Sum), partial.shape[2])
    head, labels = problem.head, problem.labels[tokens].contiguous()
    kernels.kept_sums(z, labels, found.offsets, columns, head.logit_scale, head.softcap, kept)  # type: ignore[call-arg]
    return torch.cat([partial, kept[None]])


def put_in(out: Statistics, index: Tensor, exact: Statistics) -> None:
    """Statistics of some tokens in place of those that are there."""
    for name, values in vars(exact).items():
        if values is not None:
            getattr(out, name)[index] = values

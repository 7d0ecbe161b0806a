"""The losses in plain PyTorch operations, chunk by chunk, on any device.

A chunk of C tokens goes through four steps: logits (one GEMM, fp32), row statistics, the directions ∂nll/∂z, ∂kl/∂z,
... in place of the logits, products with the head's weight and with the hidden states. Inside a chunk, row statistics
run over blocks small enough for a CPU's cache. [N, V] never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields

import torch
from torch import Tensor

from ..problem import Entries, Gradients, Needs, Problem, Rows, Segments, Selection, Statistics, Tails, Upstream
from .chunks import (
    COLUMNS,
    Chunk,
    Product,
    Stage,
    by_column,
    empty_gradients,
    empty_rows,
    empty_statistics,
    logit_chunks,
    slices,
)
from .row_passes import row_passes
from .single import add_picked_

# The tail profile is made of so many tokens.
SAMPLED_TOKENS = 1024
# Whether `scan` takes what is left out in directions of the head, and in random ones for the weight's bound.
HAS_DIRECTIONS = True
HAS_SKETCH = True
# Numbers that a product gathers at a time.
GATHERED = 1 << 22

# The upstream weights of a chunk from its statistics; the slice says which tokens it has.
UpstreamOf = Callable[[Statistics, slice], Upstream]
# What `sweep` does; a backend may put another in its place.
Sweep = Callable[[Problem, Statistics, bool, "Product | None"], "Iterator[Chunk]"]


def sweep(problem: Problem, out: Statistics, directions: bool, product: Product | None = None) -> Iterator[Chunk]:
    """Go over the tokens: fill `out`, and with `directions` yield ∂nll/∂z, ∂kl/∂z, ... of each chunk.

    Without `directions` the chunks are yielded too, their buffers then hold nothing of use.
    """
    for chunk in logit_chunks(problem, product, narrow=directions):
        row_passes(problem, out.at(chunk.tokens), chunk, directions)
        yield chunk


def statistics(
    problem: Problem, keep_rows: bool = False, product: Product | None = None, sweep: Sweep = sweep
) -> tuple[Statistics, Rows]:
    """Per-token statistics: 1 GEMM, 2 with a reference.

    With `keep_rows` also ∂nll/∂x, ∂kl/∂x, ..., [N, D] each: a GEMM more for each of them, and none left for backward.
    """
    out = empty_statistics(problem)
    rows = empty_rows(problem, len(problem.labels)) if keep_rows else Rows()
    for chunk in sweep(problem, out, keep_rows, product):
        if keep_rows:
            keep_chunk_rows(problem, chunk, rows, chunk.tokens)
    return out, rows


def keep_chunk_rows(problem: Problem, chunk: Chunk, rows: Rows, at: slice) -> None:
    """∂nll/∂x, ∂kl/∂x, ... of a chunk's tokens, before any upstream weight."""
    for kept, direction in zip(rows.tensors(), chunk.directions(), strict=True):
        if kept is not None:
            kept[at] = chunk.times_weight(direction, exact=True).mul_(problem.head.logit_scale)


def gradients(
    problem: Problem, upstream: UpstreamOf, needs: Needs, product: Product | None = None, sweep: Sweep = sweep
) -> tuple[Statistics, Gradients]:
    """Statistics and Σ_t a_t ∂nll_t + b_t ∂kl_t + ... in one sweep: 3 GEMMs (2 where one gradient is not wanted).

    `upstream` is called with the statistics of each chunk. So the weights may depend on anything known of the tokens at
    hand. dW, db and dB accumulate in fp32 and stay so.
    """
    out = empty_statistics(problem)
    total = empty_gradients(problem, needs)
    for chunk in sweep(problem, out, True, product):
        here = out.at(chunk.tokens)
        add_chunk(problem, chunk, here, upstream(here, chunk.tokens), total)
    return out, total


def add_chunk(problem: Problem, chunk: Chunk, out: Statistics, upstream: Upstream, total: Gradients) -> None:
    """Σ_t a_t ∂nll_t + b_t ∂kl_t + ... of a chunk whose buffers hold the directions; they are used up.

    `out`, `upstream`: of the chunk's tokens.
    """
    if upstream.is_zero:
        if total.hidden is not None:
            total.hidden[chunk.tokens] = 0
        return
    add_direction(problem, chunk, *_combined(problem, chunk, out, upstream), total)


def add_direction(
    problem: Problem, chunk: Chunk, direction: Tensor, row_weight: Tensor | None, total: Gradients
) -> None:  # fmt: skip
    """The products of row_weight · direction with the head's weight and with the hidden states; it is used up.

    `row_weight` None: ones; then nothing is left to multiply that would reach beyond the range of a rounded operand.
    """
    chunk.enter(Stage.SPENT, Stage.DIRECTIONS)
    if row_weight is None:
        if total.bias is not None:
            total.bias += direction.sum(0)
        if total.hidden is not None:
            total.hidden[chunk.tokens] = chunk.times_weight(direction, exact=problem.head.shard is not None)
        if total.weight is not None:
            chunk.add_outer(total.weight, direction, None)
        if total.low_rank is not None:
            total.low_rank.addmm_(direction.t(), chunk.low_rank_rows.to(direction.dtype))
        return
    if total.bias is not None:
        total.bias.addmv_(direction.t(), row_weight)
    if chunk.rounds:
        # Relative to the largest power of two among them, so that fp16 neither overflows nor underflows.
        exponent = torch.frexp(row_weight.abs().amax()).exponent
        direction.mul_(torch.ldexp(row_weight, -exponent)[:, None])
        row_weight = torch.ldexp(torch.ones_like(row_weight), exponent)
    if total.hidden is not None:
        part = chunk.times_weight(direction, exact=problem.head.shard is not None)
        total.hidden[chunk.tokens] = part.mul_(row_weight[:, None])
    if total.weight is not None:
        chunk.add_outer(total.weight, direction, row_weight[:, None])
    if total.low_rank is not None:
        total.low_rank.addmm_(direction.t(), chunk.low_rank_rows.to(direction.dtype) * row_weight[:, None])


def _combined(problem: Problem, chunk: Chunk, out: Statistics, upstream: Upstream) -> tuple[Tensor, Tensor]:
    """A direction, in one of the chunk's buffers, and [C] row weights: their product is the gradient by x Wᵀ + b."""
    weights = (upstream.softmax, upstream.kl, upstream.entropy, upstream.divergence)
    (direction, weight), *others = [
        (part, weight) for part, weight in zip(chunk.directions(), weights, strict=True) if weight is not None
    ] or [(chunk.z.zero_(), torch.ones_like(out.nll))]
    scale = problem.head.logit_scale
    single = upstream.lse is not None or upstream.logits_at is not None
    if not others and not single:
        return direction, weight * scale
    direction.mul_(weight[:, None])
    for part, weight in others:
        direction.addcmul_(part, weight[:, None])
    if single:
        add_picked_(direction, problem.part(chunk.tokens), out, upstream)
    return direction, torch.full_like(weight, scale)


def scan(problem: Problem, out: Statistics, selection: Selection) -> Iterator[tuple[Chunk, Entries]]:
    """Sweep over the tokens for a sparse softmax: fill `out`, yield the entries of each chunk. 1 GEMM, 2 with a
    reference.

    The chunk's buffers hold what `dense_rows` and `add_dense` need.
    """
    sampled, selection = selection.sampled, selection.in_dtype(problem.accumulator)
    for chunk in logit_chunks(problem, narrow=True):
        parts: list[Entries] = []
        here = sampled[(sampled >= chunk.tokens.start) & (sampled < chunk.tokens.stop)] - chunk.tokens.start
        results = out.at(chunk.tokens)

        def take(
            rows: slice, chunk: Chunk = chunk, results: Statistics = results, parts: list[Entries] = parts,
            here: Tensor = here,
        ) -> None:  # fmt: skip
            labels, nll = problem.labels[chunk.tokens][rows], results.nll[rows]
            which = here[(here >= rows.start) & (here < rows.stop)] - rows.start
            r = None if chunk.r is None else chunk.r[rows]
            parts.append(compact(chunk.z[rows], r, labels, nll, which, selection))

        row_passes(problem, results, chunk, directions=True, then=take)
        yield chunk, joined(parts)


def dense_rows(problem: Problem, chunk: Chunk) -> Rows:
    """∂nll/∂x and ∂kl/∂x of a chunk of `scan`."""
    rows = empty_rows(problem, len(chunk.z))
    keep_chunk_rows(problem, chunk, rows, slice(None))
    return rows


# Of a chunk of `scan`, whose buffers hold the directions.
add_dense = add_chunk


def compact(
    z: Tensor, r: Tensor | None, labels: Tensor, nll: Tensor, sampled: Tensor, selection: Selection
) -> Entries:  # fmt: skip
    """The entries of a few rows whose directions are z and r; `labels` −1 where the label is none of the columns."""
    capacity = selection.capacity
    bound = (selection.threshold * torch.expm1(-nll).neg().sqrt())[:, None]
    keep = z > bound
    if r is not None:
        keep |= z - r > bound
    at = labels.clamp(min=0)[:, None]
    keep.scatter_(1, at, keep.gather(1, at) | (labels >= 0)[:, None])
    counts = keep.sum(1)
    keep &= (counts <= capacity)[:, None]
    left = z.masked_fill(keep, 0)
    tails = Tails(left.sum(1), z.abs().sum(1))
    if selection.directions is not None:
        tails.nll_low, tails.nll_square = left @ selection.directions, left.square().sum(1)
    sampled = sampled[(counts[sampled] <= capacity) & nll[sampled].isfinite()]
    selection.profile.add_(left[sampled].sum(0))
    if r is not None:
        left = r.masked_fill(keep, 0)
        tails.kl_left, tails.kl_left_l1, tails.kl_l1 = left.sum(1), left.abs().sum(1), r.abs().sum(1)
        if selection.directions is not None:
            tails.kl_low, tails.kl_square = left @ selection.directions, left.square().sum(1)
    columns = keep.nonzero()[:, 1].int()
    return Entries(torch.where(counts <= capacity, counts, -1), columns, z[keep], None if r is None else r[keep], tails)


def joined(parts: list[Entries]) -> Entries:
    def join(values: list[Tensor | None]) -> Tensor | None:
        return None if values[0] is None else torch.cat(values)

    tails = Tails(*(join([getattr(p.tails, f.name) for p in parts]) for f in fields(Tails)))
    names = ("counts", "columns", "nll_values", "kl_values")
    counts, columns, nll_values, kl_values = (join([getattr(p, name) for p in parts]) for name in names)
    return Entries(counts, columns, nll_values, kl_values, tails)


def rows_product(segments: Segments, matrix: Tensor, scale: Tensor, vector: Tensor, dtype: torch.dtype) -> Tensor:
    """out[t] = Σ_j values[j] · matrix[columns[j]] + scale[t] · vector over the entries j of row t, summed in fp32."""
    offsets, columns, values = segments
    out = torch.empty(len(offsets) - 1, matrix.shape[1], dtype=dtype, device=matrix.device)
    starts = offsets.tolist()
    first = 0
    while first < len(out):
        last = first + 1
        while last < len(out) and (starts[last + 1] - starts[first]) * matrix.shape[1] <= GATHERED:
            last += 1
        here = slice(starts[first], starts[last])
        gathered = matrix.index_select(0, columns[here]).to(values.dtype).mul_(values[here, None])
        at = offsets[first : last + 1] - offsets[first]
        sums = torch.segment_reduce(gathered, "sum", offsets=at, axis=0, initial=0)
        out[first:last] = sums.addcmul_(scale[first:last, None], vector)
        first = last
    return out


def columns_product(
    segments: Segments, matrix: Tensor, scale: Tensor, vector: Tensor, base: Tensor | None, base_scale: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """out[v] = base_scale · base[v] + Σ_j values[j] · matrix[row of j] + scale[v] · vector over the entries of column
    v."""
    starts, rows, order = by_column(segments.offsets, segments.columns, len(scale))
    wide = dtype if base is None else segments.values.dtype
    out = rows_product(Segments(starts, rows, segments.values[order]), matrix, scale, vector, wide)
    return out if base is None else out.add_(base, alpha=base_scale).to(dtype)


def weighted_sum(matrix: Tensor, scale: Tensor) -> Tensor:
    """Σ_v scale[v] · matrix[v], [D], in the dtype of scale."""
    out = scale.new_zeros(matrix.shape[1])
    for rows in slices(len(matrix), COLUMNS):
        out.addmv_(matrix[rows].to(scale.dtype).t(), scale[rows])
    return out

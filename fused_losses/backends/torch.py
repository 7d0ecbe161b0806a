"""The exact losses in plain PyTorch operations, chunk by chunk, on any device.

A chunk of C tokens goes through four steps: logits (one GEMM, fp32), row statistics, the two directions
∂nll/∂z and ∂kl/∂z in place of the logits, products with the head's weight and with the hidden states.
Inside a chunk, row statistics run over blocks small enough for a CPU's cache. [N, V] never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields

import torch
from torch import Tensor

from ..problem import Entries, Gradients, Problem, Statistics, Tails
from .chunks import (
    COLUMNS,
    Chunk,
    Product,
    by_column,
    empty_gradients,
    empty_rows,
    empty_statistics,
    logit_chunks,
    row_passes,
    slices,
)

# The tail profile is made of so many tokens.
SAMPLED_TOKENS = 1024
Upstream = Callable[[Statistics, slice], "tuple[Tensor | None, Tensor | None]"]
# What `sweep` does; a backend may put another in its place.
Sweep = Callable[[Problem, Statistics, bool, "Product | None"], "Iterator[Chunk]"]


def sweep(problem: Problem, out: Statistics, directions: bool, product: Product | None = None) -> Iterator[Chunk]:
    """Go over the tokens: fill `out`, and with `directions` yield ∂nll/∂z and ∂kl/∂z of each chunk.

    Without `directions` the chunks are yielded too, their buffers then hold nothing of use.
    """
    for chunk in logit_chunks(problem, product, narrow=directions):
        row_passes(problem, out.at(chunk.tokens), chunk, directions)
        yield chunk


def statistics(
    problem: Problem, keep_rows: bool = False, product: Product | None = None, sweep: Sweep = sweep
) -> tuple[Statistics, Gradients]:
    """Per-token statistics: 1 GEMM, 2 with a reference.

    With `keep_rows` also ∂nll/∂x and ∂kl/∂x, [N, D] each: 1 and 2 GEMMs more, and none left for backward.
    """
    out = empty_statistics(problem)
    rows = Gradients()
    if keep_rows:
        rows = empty_rows(problem, len(problem.labels))
    for chunk in sweep(problem, out, keep_rows, product):
        if keep_rows:
            keep_chunk_rows(problem, chunk, rows, chunk.tokens)
    return out, rows


def keep_chunk_rows(problem: Problem, chunk: Chunk, rows: Gradients, at: slice) -> None:
    """∂nll/∂x and ∂kl/∂x of a chunk's tokens, before any upstream weight."""
    scale = problem.head.logit_scale
    rows.nll[at] = chunk.times_weight(chunk.nll_direction, exact=True).mul_(scale)
    if rows.kl is not None:
        rows.kl[at] = chunk.times_weight(chunk.kl_direction, exact=True).mul_(scale)


def gradients(
    problem: Problem, upstream: Upstream, hidden: bool, weight: bool, bias: bool, low_rank: bool = False,
    product: Product | None = None, sweep: Sweep = sweep,
) -> tuple[Statistics, Gradients]:  # fmt: skip
    """Statistics and Σ_t a_t ∂nll_t + b_t ∂kl_t in one sweep: 3 GEMMs (2 where one gradient is not wanted).

    `upstream` is called with the statistics of each chunk and returns (a, b), [C] each or None for zeros. So the
    weights may depend on anything known of the tokens at hand. dW, db and dB accumulate in fp32 and stay so.
    """
    out = empty_statistics(problem)
    total = empty_gradients(problem, hidden, weight, bias, low_rank)
    for chunk in sweep(problem, out, True, product):
        add_chunk(problem, chunk, *upstream(out.at(chunk.tokens), chunk.tokens), total)
    return out, total


def add_chunk(problem: Problem, chunk: Chunk, a: Tensor | None, b: Tensor | None, total: Gradients) -> None:
    """Σ_t a_t ∂nll_t + b_t ∂kl_t of a chunk whose buffers hold the directions; they are used up."""
    scale = problem.head.logit_scale
    if a is None and b is None:
        if total.hidden is not None:
            total.hidden[chunk.tokens] = 0
        return
    if b is None:
        direction, row_weight = chunk.nll_direction, a * scale
    elif a is None:
        direction, row_weight = chunk.kl_direction, b * scale
    else:
        direction = chunk.nll_direction.mul_(a[:, None]).addcmul_(chunk.kl_direction, b[:, None])
        row_weight = torch.full_like(a, scale)
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


def scan(
    problem: Problem, out: Statistics, threshold: float, capacity: int, sampled: Tensor, profile: Tensor,
    with_rows: bool = False,
) -> Iterator[tuple[Chunk, Entries]]:  # fmt: skip
    """Sweep over the tokens for a sparse softmax: fill `out`, yield the entries of each chunk. 1 GEMM, 2 with a reference.

    An entry has p or p_ref > threshold · √(1 − p[label]), or is the label's. `profile` [V] gains Σ p over what the
    tokens `sampled` (ascending) leave out. The chunk's buffers hold what `dense_rows` and `add_dense` need. `with_rows`:
    the products of entries and weight are wanted too, of those backends that have them at hand; this one has not.
    """
    for chunk in logit_chunks(problem, narrow=True):
        parts: list[Entries] = []
        here = sampled[(sampled >= chunk.tokens.start) & (sampled < chunk.tokens.stop)] - chunk.tokens.start
        results = out.at(chunk.tokens)

        def compact(
            rows: slice, chunk: Chunk = chunk, results: Statistics = results, parts: list[Entries] = parts,
            here: Tensor = here,
        ) -> None:  # fmt: skip
            labels, nll = problem.labels[chunk.tokens][rows], results.nll[rows]
            which = here[(here >= rows.start) & (here < rows.stop)] - rows.start
            r = None if chunk.r is None else chunk.r[rows]
            parts.append(_compact(chunk.z[rows], r, labels, nll, threshold, capacity, which, profile))

        row_passes(problem, results, chunk, directions=True, then=compact)
        yield chunk, _joined(parts)


def dense_rows(problem: Problem, chunk: Chunk) -> Gradients:
    """∂nll/∂x and ∂kl/∂x of a chunk of `scan`."""
    rows = empty_rows(problem, len(chunk.z))
    keep_chunk_rows(problem, chunk, rows, slice(None))
    return rows


# Of a chunk of `scan`, whose buffers hold the directions.
add_dense = add_chunk


def _compact(
    z: Tensor, r: Tensor | None, labels: Tensor, nll: Tensor, threshold: float, capacity: int, sampled: Tensor,
    profile: Tensor,
) -> Entries:  # fmt: skip
    """The entries of a few rows whose directions are z and r."""
    bound = (threshold * torch.expm1(-nll).neg().sqrt())[:, None]
    keep = z > bound
    if r is not None:
        keep |= z - r > bound
    keep.scatter_(1, labels[:, None], True)
    counts = keep.sum(1)
    keep &= (counts <= capacity)[:, None]
    left = z.masked_fill(keep, 0)
    tails = Tails(left.sum(1), z.abs().sum(1))
    sampled = sampled[(counts[sampled] <= capacity) & nll[sampled].isfinite()]
    profile += left[sampled].sum(0)
    if r is not None:
        left = r.masked_fill(keep, 0)
        tails.kl, tails.kl_left, tails.kl_l1 = left.sum(1), left.abs().sum(1), r.abs().sum(1)
    columns = keep.nonzero()[:, 1].int()
    return Entries(torch.where(counts <= capacity, counts, -1), columns, z[keep], None if r is None else r[keep], tails)


def _joined(parts: list[Entries]) -> Entries:
    def join(values: list[Tensor | None]) -> Tensor | None:
        return None if values[0] is None else torch.cat(values)

    tails = Tails(*(join([getattr(p.tails, f.name) for p in parts]) for f in fields(Tails)))
    counts, columns, nll, kl = (join([getattr(p, name) for p in parts]) for name in ("counts", "columns", "nll", "kl"))
    return Entries(counts, columns, nll, kl, tails)


# Numbers that a product gathers at a time.
GATHERED = 1 << 22


def rows_product(
    offsets: Tensor, columns: Tensor, values: Tensor, matrix: Tensor, scale: Tensor, vector: Tensor, dtype: torch.dtype
) -> Tensor:
    """out[t] = Σ_j values[j] · matrix[columns[j]] + scale[t] · vector over the entries j of row t, summed in fp32."""
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
    offsets: Tensor, columns: Tensor, values: Tensor, matrix: Tensor, scale: Tensor, vector: Tensor,
    base: Tensor | None, base_scale: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """out[v] = base_scale · base[v] + Σ_j values[j] · matrix[row of j] + scale[v] · vector over the entries of column v."""
    starts, rows, order = by_column(offsets, columns, len(scale))
    wide = dtype if base is None else values.dtype
    out = rows_product(starts, rows, values[order], matrix, scale, vector, wide)
    return out if base is None else out.add_(base, alpha=base_scale).to(dtype)


def weighted_sum(matrix: Tensor, scale: Tensor) -> Tensor:
    """Σ_v scale[v] · matrix[v], [D], in the dtype of scale."""
    out = scale.new_zeros(matrix.shape[1])
    for rows in slices(len(matrix), COLUMNS):
        out.addmv_(matrix[rows].to(scale.dtype).t(), scale[rows])
    return out

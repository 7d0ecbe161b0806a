"""The chunked losses with the compiled kernels of csrc/cpu: logits in float32 from oneDNN's micro-kernels, row
statistics and compaction in three passes over a row in cache, and the two sparse products. What has no kernel is
`backends.torch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels import schemas
from ..problem import Entries, Gradients, Needs, Problem, Rows, Segments, Selection, Statistics, Tails, Upstream
from ..sparse.certificate import L1_SHARE
from . import chunks, half, int8, row_passes, single
from . import torch as chunked
from .chunks import Chunk, Product, Stage, empty_gradients, empty_rows, empty_statistics
from .torch import HAS_DIRECTIONS, HAS_SKETCH, SAMPLED_TOKENS, UpstreamOf

__all__ = [
    "HAS_DIRECTIONS", "HAS_SKETCH", "SAMPLED_TOKENS", "add_dense", "columns_product", "dense_rows", "empty_gradients",
    "empty_statistics", "gradients", "rows_product", "scan", "statistics", "weighted_sum",
]  # fmt: skip

HALF_OR_SINGLE = (torch.float32, torch.bfloat16)


def statistics(
    problem: Problem, keep_rows: bool = False, multiply: Product | None = None
) -> tuple[Statistics, Rows]:  # fmt: skip
    """1 GEMM, 2 with a reference; with `keep_rows` one more for each of ∂nll/∂x, ∂kl/∂x, ... `multiply`: in place of
    `product`."""
    if problem.accumulator != torch.float32:
        return chunked.statistics(problem, keep_rows)
    out = empty_statistics(problem)
    if problem.int8 is not None:
        assert not keep_rows
        for _ in scan(problem, out, _nothing_kept(problem)):
            pass
        return out, Rows()
    rows = empty_rows(problem, len(problem.labels)) if keep_rows else Rows()
    several = sum(kept is not None for kept in rows.tensors()) > 1
    for chunk in _exact_chunks(problem, keep_rows, 4 * problem.head.vocabulary * several, multiply):
        here = out.at(chunk.tokens)
        known = _exact_statistics(problem, chunk, here)
        if keep_rows:
            _keep_rows(problem, chunk, here, known, rows, chunk.tokens)
    return out, rows


def gradients(problem: Problem, upstream: UpstreamOf, needs: Needs) -> tuple[Statistics, Gradients]:
    """Statistics and Σ_t a_t ∂nll_t + b_t ∂kl_t + ...: 3 GEMMs, 2 where one gradient is not wanted, one more with a
    reference."""
    if problem.accumulator != torch.float32:
        return chunked.gradients(problem, upstream, needs)
    out, total = empty_statistics(problem), empty_gradients(problem, needs)
    budget = max(chunks.CHUNK_BYTES, chunks.bytes_of_rounding(problem, total.weight))
    for chunk in _exact_chunks(problem, narrow=True, budget=budget):
        here = out.at(chunk.tokens)
        known = _exact_statistics(problem, chunk, here)
        _add(problem, chunk, here, known, upstream(here, chunk.tokens), total)
    return out, total


def _exact_chunks(
    problem: Problem, narrow: bool, extra: int = 0, multiply: Product | None = None, budget: int | None = None
) -> Iterator[Chunk]:  # fmt: skip
    return chunks.logit_chunks(
        problem, multiply or product(problem), narrow=narrow, extra=extra, budget=budget, separate=False,
        kind=chunk_kind(),
    )  # fmt: skip


def _exact_statistics(problem: Problem, chunk: Chunk, out: Statistics) -> Tensor:
    """Fills `out` from a chunk of products, of which logits are made; returns what their directions need, [7, C]."""
    if chunk.stage is Stage.PRODUCTS:
        finish(problem, chunk)
    row_passes.more_statistics(problem, chunk, replace(out, rank=None, log_p2=None))
    known = torch.empty(len(schemas.ExactRow), len(chunk.z), dtype=torch.float32)
    torch.ops.fused_losses.exact_statistics(
        chunk.z, chunk.r, chunks.keeps_difference(problem, chunk), problem.labels[chunk.tokens].contiguous(),
        problem.beta or 0.0, out.nll, out.prediction, out.lse, out.kl, out.entropy, out.reference_nll,
        out.reference_entropy, out.log_p2, out.rank, out.divergence, known,
    )  # fmt: skip
    return known


def _direction(
    problem: Problem, chunk: Chunk, out: Statistics, known: Tensor, upstream: Upstream, target: Tensor
) -> Tensor:  # fmt: skip
    """The weighted sum of the directions, in `target`, which may be the chunk's z."""
    weights = (upstream.softmax, upstream.kl, upstream.entropy, upstream.divergence, upstream.lse)
    torch.ops.fused_losses.exact_directions(
        chunk.z, chunk.r, chunks.keeps_difference(problem, chunk), problem.labels[chunk.tokens].contiguous(),
        problem.head.softcap or 0.0, problem.beta or 0.0, out.nll, known,
        *(None if w is None else w.contiguous() for w in weights), target,
    )  # fmt: skip
    if upstream.logits_at is not None:
        single.add_picked_(target, problem.part(chunk.tokens), out, Upstream(logits_at=upstream.logits_at))
    return target


def _add(
    problem: Problem, chunk: Chunk, out: Statistics, known: Tensor, upstream: Upstream, total: Gradients
) -> None:  # fmt: skip
    add_directions(problem, chunk, upstream, total, lambda w: _direction(problem, chunk, out, known, w, chunk.z))


def add_directions(
    problem: Problem, chunk: Chunk, upstream: Upstream, total: Gradients, direction: Callable[[Upstream], Tensor]
) -> None:
    """Adds a chunk's gradients to `total`; `direction`: its weighted sum of directions, in the place of its logits."""
    if upstream.is_zero:
        if total.hidden is not None:
            total.hidden[chunk.tokens] = 0
        return
    scale = problem.head.logit_scale
    made = direction(upstream.each(lambda w: (w * scale).float()))
    chunk.enter(Stage.DIRECTIONS, Stage.LOGITS)
    chunked.add_direction(problem, chunk, made, None, total)


def _keep_rows(problem: Problem, chunk: Chunk, out: Statistics, known: Tensor, rows: Rows, at: slice) -> None:
    """∂nll/∂x, ∂kl/∂x, ... of a chunk of logits; the last direction is made in their place."""
    one = torch.full_like(out.nll, problem.head.logit_scale)
    kept = [(name, getattr(rows, name)) for name in ("entropy", "divergence", "kl", "nll")]
    other = None
    for name, part in kept:
        if part is None:
            continue
        if name != "nll" and other is None:
            other = torch.empty_like(chunk.z)
        target = chunk.z if name == "nll" else other
        direction = _direction(problem, chunk, out, known, Upstream(**{name: one}), target)
        part[at] = chunk.times_weight(direction, exact=True)
    chunk.enter(Stage.SPENT, Stage.LOGITS)


class _NarrowProducts(Chunk):
    """With the compiled products of directions, rounded where a chunk's are (`rounds`), but for their large numbers."""

    wide_sums = True
    _large: tuple[Tensor, Tensor] | None = None  # the direction of `times_weight`, and from where on it is large

    def _times_weight(self, direction: Tensor, exact: bool) -> Tensor:
        if not self.rounds:
            return super()._times_weight(direction, exact)
        large_from = _large_from(direction)
        self._large = direction, large_from
        out, lost = direction.new_empty(len(direction), self.weight.shape[1]), direction.new_empty(len(direction))
        torch.ops.fused_losses.times_weight(direction, large_from, self.weight, self.half, out, lost)
        return out if self.common is None else out.addr_(lost, self.common)

    def add_outer(self, total: Tensor, direction: Tensor, row_weight: Tensor | None) -> None:
        if not self.rounds or row_weight is not None:
            super().add_outer(total, direction, row_weight)
            return
        known, self._large = self._large, None
        large_from = known[1] if known is not None and known[0] is direction else _large_from(direction)
        torch.ops.fused_losses.add_outer(direction, large_from, self.hidden, total)


def _large_from(direction: Tensor) -> Tensor:
    out = direction.new_empty(len(direction))
    torch.ops.fused_losses.large_numbers(direction, out)
    return out


def chunk_kind() -> type[Chunk]:
    """Of this processor's."""
    return _NarrowProducts if schemas.has_narrow_products() else Chunk


def product(problem: Problem) -> Product | None:
    """The compiled product, where there is one for this dtype."""
    return _logits if schemas.has_logits(problem.dtype) else None


def _logits(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    torch.ops.fused_losses.logits(hidden.contiguous(), weight, None if bias is None else bias.float().contiguous(), out)


def scan(problem: Problem, out: Statistics, selection: Selection) -> Iterator[tuple[Chunk, Entries]]:
    if problem.accumulator != torch.float32:
        yield from chunked.scan(problem, out, selection)
        return
    values = 1 + problem.has_reference
    capacity = selection.capacity
    buffers: tuple[Tensor, ...] = ()
    sweep, rest = None, slice(0, len(problem.labels))
    if problem.int8 is not None:
        whole = product(problem) or chunks.project
        sweep = int8.Sweep(problem, whole, _statistics, gradients=capacity > 1)
        if sweep.halves:
            for chunk, entries in half.scan(problem, out, selection, sweep):
                rest = slice(chunk.tokens.stop, rest.stop)
                yield chunk, entries
                del chunk, entries  # their memory is another chunk's
    multiply = product(problem) if sweep is None else sweep.product
    was_flat = sweep is not None and sweep.product.flat
    budget, extra = None if sweep is None else sweep.chunk_bytes, capacity * 4 * (1 + values)
    for chunk in chunks.logit_chunks(
        problem, multiply, narrow=True, extra=extra, budget=budget, tokens=rest, kind=chunk_kind()
    ):
        size = len(chunk.z)
        if not buffers:
            buffers = (
                torch.empty(size, capacity, dtype=torch.int32),
                *(torch.empty(size, capacity, dtype=torch.float32) for _ in range(values)),
            )
        here = [b[:size] for b in buffers]
        entries = _of_flat(problem, out.at(chunk.tokens), chunk, selection) if was_flat else None
        yield chunk, entries or _compact(problem, out.at(chunk.tokens), chunk, selection, here, sweep)
        # Where an exact gradient took this chunk's full products, that of the next is likely to take its own.
        was_flat = chunk.stage is not Stage.LOGITS
        if sweep is not None:
            sweep.product.flat = was_flat


def _statistics(problem: Problem, multiply: Product) -> Statistics:
    return statistics(problem, multiply=multiply)[0]


def _nothing_kept(problem: Problem) -> Selection:
    """Of a scan for its statistics alone."""
    profile = torch.zeros(problem.head.vocabulary)
    return Selection(int8.THRESHOLD / int8.REFINED, 1, torch.empty(0, dtype=torch.int64), profile, False)


def _of_flat(problem: Problem, out: Statistics, chunk: Chunk, selection: Selection) -> Entries | None:
    """No entries and the statistics of exact mode, of a chunk most of whose tokens are to be exact for sure; else None.

    Their largest p is so small that what the capacity lets a token keep leaves out more than the bound allows.
    """
    allowed = L1_SHARE * (problem.tolerance or 1)
    if problem.has_reference or chunk.refill is not None or 2 * allowed >= 1:
        return None
    chunk.exact = out, _exact_statistics(problem, chunk, out)
    log_largest_p = -chunk.exact[1][schemas.ExactRow.LOG_SUM]
    if not float(log_largest_p.median()) < math.log((1 - 2 * allowed) / selection.capacity):
        return None
    counts, zeros = torch.full_like(out.prediction, -1), torch.zeros_like(out.nll)
    tails = Tails(zeros, zeros)
    if selection.directions is not None:
        tails.nll_low, tails.nll_square = zeros.new_zeros(len(zeros), selection.directions.shape[1]), zeros
    return Entries(counts, counts.new_empty(0, dtype=torch.int32), zeros[:0], None, tails)


def _compact(
    problem: Problem, out: Statistics, chunk: Chunk, selection: Selection, buffers: list[Tensor],
    sweep: int8.Sweep | None,
) -> Entries:  # fmt: skip
    """The statistics and the entries of a chunk of products, of which logits are made."""
    if chunk.stage is Stage.PRODUCTS:
        finish(problem, chunk)
    labels, softcap = problem.labels[chunk.tokens].contiguous(), problem.head.softcap or 0.0
    logits = (chunk.z, chunk.r, chunks.keeps_difference(problem, chunk), labels, softcap)
    columns, nll_values, *kl_values = buffers
    size, with_kl = len(chunk.z), bool(kl_values)
    rows, counts = torch.empty(8, size, dtype=torch.float32), torch.empty(size, dtype=torch.int64)
    directions = selection.directions
    tails = Tails(rows[schemas.TAIL], rows[schemas.NLL_L1])
    squares = None
    if directions is not None:
        width = directions.shape[1]
        tails.nll_low = torch.empty(size, width, dtype=torch.float32)
        tails.kl_low = torch.empty(size, width, dtype=torch.float32) if with_kl else None
        squares = torch.empty(2, size, dtype=torch.float32)
        tails.nll_square, tails.kl_square = squares[0], squares[1] if with_kl else None
    torch.ops.fused_losses.compact(
        *logits, selection.threshold, out.nll, out.prediction, out.kl, out.entropy, out.reference_nll,
        out.reference_entropy, rows, counts, columns, nll_values, kl_values[0] if with_kl else None,
        directions, selection.pairs, tails.nll_low, tails.kl_low, squares,
        *(int8.NO_OPERANDS if sweep is None else sweep.operands(chunk)),
    )  # fmt: skip
    approximate = sweep is not None and not sweep.product.full
    if approximate and out.topk_entropy is not None:
        out.topk_entropy.copy_(sweep.top_entropies(chunk))
    # After the logits that are computed again.
    row_passes.more_statistics(problem, chunk, replace(out, topk_entropy=None) if approximate else out)
    out.lse.copy_(rows[schemas.LOG_SUM])
    if sweep is not None and sweep.is_off(out, chunk.tokens):
        chunk.refill(chunk)
        return _compact(problem, out, chunk, selection, buffers, sweep)
    sampled, tokens = selection.sampled, chunk.tokens
    here = sampled[(sampled >= tokens.start) & (sampled < tokens.stop)] - tokens.start
    here = here[(counts[here] >= 0) & out.nll[here].isfinite()]
    torch.ops.fused_losses.tail_profile(*logits, rows, here, selection.profile)
    if with_kl:
        tails.kl_left, tails.kl_left_l1 = rows[schemas.KL_TAIL], rows[schemas.KL_TAIL_L1]
        tails.kl_l1 = rows[schemas.KL_L1]
    return int8.packed(counts, buffers, tails)


def finish(problem: Problem, chunk: Chunk) -> None:
    """Products become logits, in a core's cache."""
    chunk.enter(Stage.LOGITS, Stage.PRODUCTS)
    heads = [head for head in (problem.head, problem.reference_head) if head is not None]
    if all(head.bias is None and head.logit_scale == 1 and head.softcap is None for head in heads):
        return
    for rows in chunks.slices(len(chunk.z), 16):
        chunks.finish(problem, chunk.z[rows], None if chunk.r is None else chunk.r[rows], chunk.difference)


def _whole(problem: Problem, chunk: Chunk) -> Iterator[tuple[Chunk, slice]]:
    """A chunk with exact logits, whatever the scan took, in one or several; and which of its tokens they have."""
    if chunk.pieces is None:
        if chunk.refill is not None:
            chunk.refill(chunk)
        yield chunk, slice(0, len(chunk.z))
        return
    chunk.enter(Stage.SPENT, Stage.LOGITS)
    for piece in chunk.pieces():
        yield piece, slice(piece.tokens.start - chunk.tokens.start, piece.tokens.stop - chunk.tokens.start)


def dense_rows(problem: Problem, chunk: Chunk) -> Rows:
    if problem.accumulator != torch.float32:
        return chunked.dense_rows(problem, chunk)
    rows = empty_rows(problem, len(chunk.z))
    if chunk.exact is not None:
        _keep_rows(problem, chunk, *chunk.exact, rows, slice(None))
        return rows
    again = empty_statistics(problem.part(chunk.tokens).for_gradients())
    for piece, at in _whole(problem, chunk):
        here = again.at(at)
        _keep_rows(problem, piece, here, _exact_statistics(problem, piece, here), rows, at)
    return rows


def add_dense(problem: Problem, chunk: Chunk, out: Statistics, upstream: Upstream, total: Gradients) -> None:
    if problem.accumulator != torch.float32:
        chunked.add_dense(problem, chunk, out, upstream, total)
        return
    if chunk.exact is not None:
        _add(problem, chunk, *chunk.exact, upstream, total)
        return
    again = empty_statistics(problem.part(chunk.tokens).for_gradients())  # only `known` is not there
    for piece, at in _whole(problem, chunk):
        here = again.at(at)
        _add(problem, piece, here, _exact_statistics(problem, piece, here), upstream.at(at), total)


def rows_product(segments: Segments, matrix: Tensor, scale: Tensor, vector: Tensor, dtype: torch.dtype) -> Tensor:
    if matrix.dtype not in HALF_OR_SINGLE or segments.values.dtype != torch.float32:
        return chunked.rows_product(segments, matrix, scale, vector, dtype)
    rows = len(segments.offsets) - 1
    out = torch.empty(rows, matrix.shape[1], dtype=dtype if dtype in HALF_OR_SINGLE else torch.float32)
    torch.ops.fused_losses.rows_product(*segments, matrix.contiguous(), scale, vector, out)
    return out.to(dtype)


def columns_product(
    segments: Segments, matrix: Tensor, scale: Tensor, vector: Tensor, base: Tensor | None, base_scale: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if matrix.dtype not in HALF_OR_SINGLE or segments.values.dtype != torch.float32:
        return chunked.columns_product(segments, matrix, scale, vector, base, base_scale, dtype)
    out = torch.empty(len(scale), matrix.shape[1], dtype=dtype if dtype in HALF_OR_SINGLE else torch.float32)
    torch.ops.fused_losses.columns_product(*segments, matrix.contiguous(), scale, vector, base, base_scale, out)
    return out.to(dtype)


def weighted_sum(matrix: Tensor, scale: Tensor) -> Tensor:
    if matrix.dtype not in HALF_OR_SINGLE or scale.dtype != torch.float32:
        return chunked.weighted_sum(matrix, scale)
    out = torch.empty(matrix.shape[1], dtype=torch.float32)
    torch.ops.fused_losses.weighted_sum(matrix.contiguous(), scale, out)
    return out

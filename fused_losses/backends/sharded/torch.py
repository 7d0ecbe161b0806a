"""A rank's rows in plain PyTorch operations, on any device; other backends take what they have no kernels for from
here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import shards
from ...problem import Entries, Gradients, Needs, Problem, Rows, Segments, Selection, Statistics, Upstream
from .. import Backend, chunks, row_passes
from .. import torch as chunked
from ..chunks import Chunk, Product, Stage
from ..torch import UpstreamOf
from .whole import Labels, Masses, combine, no_entries, of_all_ranks, part_of


class Sharded:
    """The functions of a backend. `local` has the products of entries, of this rank's rows."""

    HAS_DIRECTIONS = True

    empty_statistics = staticmethod(chunks.empty_statistics)
    empty_gradients = staticmethod(chunks.empty_gradients)

    def __init__(self, local: Backend) -> None:
        self.local = local
        self.SAMPLED_TOKENS, self.HAS_SKETCH = local.SAMPLED_TOKENS, local.HAS_SKETCH

    def statistics(self, problem: Problem, keep_rows: bool = False) -> tuple[Statistics, Rows]:
        out, rows = self._statistics(problem, keep_rows)
        return out, _summed(problem, rows)

    def gradients(self, problem: Problem, upstream: UpstreamOf, needs: Needs) -> tuple[Statistics, Gradients]:
        """Of weight and bias those of this rank's rows."""
        out, total = self._gradients(problem, upstream, needs)
        shards.summed_(problem.head.shard.group, total.hidden)
        return out, total

    def scan(self, problem: Problem, out: Statistics, selection: Selection) -> Iterator[tuple[Any, Entries]]:
        """That of backends/torch.py; what the entries leave out is that of all ranks."""
        for chunk, entries in self._scan(problem, out, selection):
            yield chunk, of_all_ranks(problem, entries)

    def dense_rows(self, problem: Problem, chunk: Any) -> Rows:
        return _summed(problem, self._dense_rows(problem, chunk))

    def add_dense(
        self, problem: Problem, chunk: Any, out: Statistics, upstream: Upstream, total: Gradients
    ) -> None:  # fmt: skip
        self._add_dense(problem, chunk, out, upstream, total)
        if total.hidden is not None:
            shards.summed_(problem.head.shard.group, total.hidden[chunk.tokens])

    def rows_product(
        self, segments: Segments, matrix: Tensor, scale: Tensor, vector: Tensor, dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        """Of this rank's rows, as the two that follow."""
        if not len(matrix):
            return (scale[:, None] * vector).to(dtype)
        return self.local.rows_product(segments, matrix, scale, vector, dtype)

    def columns_product(
        self, segments: Segments, matrix: Tensor, scale: Tensor, vector: Tensor, base: Tensor | None,
        base_scale: float, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        if not len(scale):
            return matrix.new_zeros(0, matrix.shape[1], dtype=dtype)
        return self.local.columns_product(segments, matrix, scale, vector, base, base_scale, dtype)

    def weighted_sum(self, matrix: Tensor, scale: Tensor) -> Tensor:
        return self.local.weighted_sum(matrix, scale) if len(matrix) else scale.new_zeros(matrix.shape[1])

    # --- of this rank alone

    def _statistics(self, problem: Problem, keep_rows: bool) -> tuple[Statistics, Rows]:
        return chunked.statistics(problem, keep_rows, sweep=sweep)

    def _gradients(self, problem: Problem, upstream: UpstreamOf, needs: Needs) -> tuple[Statistics, Gradients]:
        return chunked.gradients(problem, upstream, needs, sweep=sweep)

    def _scan(self, problem: Problem, out: Statistics, selection: Selection) -> Iterator[tuple[Any, Entries]]:
        selection = selection.in_dtype(problem.accumulator)
        for chunk in sweep(problem, out, directions=True):
            yield chunk, _entries(problem, chunk, out.at(chunk.tokens), selection)

    def _dense_rows(self, problem: Problem, chunk: Any) -> Rows:
        return chunked.dense_rows(problem, chunk)

    def _add_dense(
        self, problem: Problem, chunk: Any, out: Statistics, upstream: Upstream, total: Gradients
    ) -> None:  # fmt: skip
        chunked.add_dense(problem, chunk, out, upstream, total)


def _summed(problem: Problem, rows: Rows) -> Rows:
    for part in rows.tensors():
        shards.summed_(problem.head.shard.group, part)
    return rows


def sweep(problem: Problem, out: Statistics, directions: bool, product: Product | None = None) -> Iterator[Chunk]:
    """That of backends/torch.py, where the buffers hold this rank's entries and `out` the whole vocabulary's
    statistics."""
    rows = len(problem.head.weight)
    nearest = Labels.of(problem, slice(None)).nearest
    local = replace(problem, labels=nearest, ids=None, beta=None, entropy_gradient=False)
    for chunk in chunks.logit_chunks(problem, product, narrow=directions):
        here, labels = out.at(chunk.tokens), Labels.of(problem, chunk.tokens)
        part = part_of(problem, here)
        logits = _kept_logits(problem, chunk, here)
        if rows:
            row_passes.row_passes(local, part, replace(chunk, entropy=None, divergence=None), directions)
        chunk.stage = Stage.DIRECTIONS if directions else Stage.SPENT
        masses = combine(problem, part, labels.owner, here)
        if logits is not None:
            of_logits(problem, chunk.tokens, logits[0], here)
            if problem.has_dense_directions:
                _dense_directions(problem, chunk, logits, here, part, directions)
        if directions and rows:
            _whole_directions(problem, part, chunk, labels, here.nll, masses)
        yield chunk


def _entries(problem: Problem, chunk: Chunk, out: Statistics, selection: Selection) -> Entries:
    """Those of this rank's directions, in the chunk's buffers."""
    size, columns = chunk.z.shape
    if not columns:
        return no_entries(problem, size, selection.directions)
    labels, tokens = Labels.of(problem, chunk.tokens), chunk.tokens
    at = torch.where(labels.mine, labels.nearest, -1)
    here = selection.sampled[(selection.sampled >= tokens.start) & (selection.sampled < tokens.stop)] - tokens.start
    numbers = row_passes.BLOCK_NUMBERS.get(chunk.z.device.type, row_passes.BLOCK_NUMBERS_ELSEWHERE)
    parts = []
    for rows in chunks.slices(size, max(1, numbers // columns)):
        which = here[(here >= rows.start) & (here < rows.stop)] - rows.start
        r = None if chunk.r is None else chunk.r[rows]
        parts.append(chunked.compact(chunk.z[rows], r, at[rows], out.nll[rows], which, selection))
    return chunked.joined(parts)


def _whole_directions(
    problem: Problem, part: Statistics, chunk: Chunk, labels: Labels, nll: Tensor, masses: Masses
) -> None:  # fmt: skip
    """From the directions of this rank's rows alone, in the chunk's buffers, to its entries of those of the whole
    vocabulary."""
    z, r, nearest = chunk.z, chunk.r, labels.nearest[:, None]
    p = masses.log_p.exp().to(nll.dtype)
    slope = torch.ones_like(nll)
    if problem.head.softcap is not None:
        slope -= ((part.normaliser.sum(1) - part.nll) / problem.head.softcap) ** 2
    at_label = (-part.nll).exp()
    if r is not None:
        z.scatter_(1, nearest, (at_label * slope)[:, None])  # p_i, where the label's 1 had been taken off
        share, gap = masses.log_r.exp().to(nll.dtype), masses.gap.to(nll.dtype)
        r.mul_(share[:, None]).addcmul_(z, gap[:, None])
    at_label = torch.where(labels.mine, torch.expm1(-nll), at_label * p)
    z.mul_(p[:, None]).scatter_(1, nearest, (at_label * slope)[:, None])


# What is kept of a chunk's logits, this rank's columns: z, r, and d = z − r where the products were of x − x_ref.
Kept = tuple[Tensor, "Tensor | None", "Tensor | None"]


def _kept_logits(problem: Problem, chunk: Chunk, out: Statistics) -> Kept | None:
    """Copies of a chunk's logits, where something is wanted that needs the normalisers of all ranks, or single
    logits."""
    if not (problem.has_dense_directions or wants_logits(out)):
        return None
    z, r = chunk.z.clone(), None if chunk.r is None else chunk.r.clone()
    chunks.finish(problem, z, r, chunk.difference)
    if chunks.keeps_difference(problem, chunk):
        return z + r, r, z
    return z, r, None


def wants_logits(out: Statistics) -> bool:
    """Whether there are statistics that `of_logits` fills."""
    return out.logits_at is not None or out.rank is not None or out.log_p2 is not None


def of_logits(problem: Problem, tokens: slice, z: Tensor, out: Statistics) -> None:
    """Single logits, rank and log Σp² from this rank's logits; all ranks add up in one order."""
    shard = problem.head.shard
    group = shard.group
    if out.logits_at is not None:
        ids = problem.ids[tokens] - shard.start
        ids = ids.masked_fill((ids >= z.shape[1]) | (problem.ids[tokens] < 0), -1)
        at = row_passes.picked(z, ids) if z.shape[1] else torch.zeros_like(out.logits_at)
        out.logits_at.copy_(shards.gathered(group, at).sum(0))
    if out.rank is not None:
        label = (problem.labels[tokens] - shard.start)[:, None]
        mine = (label >= 0) & (label < z.shape[1])
        at = row_passes.picked(z, label.masked_fill(~mine, -1)) if z.shape[1] else torch.zeros_like(out.nll)[:, None]
        label_logit = shards.gathered(group, at).sum(0)
        out.rank.copy_(shards.gathered(group, row_passes.rank_of(z, label_logit)).sum(0))
    if out.log_p2 is not None:
        log_p = z - out.lse[:, None]
        squares = (2 * log_p).logsumexp(1) if z.shape[1] else torch.full_like(out.nll, -torch.inf)
        out.log_p2.copy_(shards.gathered(group, squares).logsumexp(0))


def _dense_directions(
    problem: Problem, chunk: Chunk, logits: Kept, out: Statistics, part: Statistics, directions: bool
) -> None:  # fmt: skip
    """The divergence, and the directions that are not of nll and kl."""
    group, (z, r, d) = problem.head.shard.group, logits
    log_p = z - out.lse[:, None]
    p, slope = log_p.exp(), None
    if directions and problem.head.softcap is not None:
        slope = (1 - (z / problem.head.softcap) ** 2).clamp_(min=0)
    if problem.entropy_gradient and directions:
        torch.add(log_p, out.entropy[:, None], out=chunk.entropy).mul_(p).neg_()
    if problem.beta is not None:
        ref_lse = _reference_lse(group, part)[:, None]
        log_r = r - ref_lse
        p_ref = log_r.exp()
        d = log_p - log_r if d is None else d - (out.lse[:, None] - ref_lse)
        gap = torch.where(d.abs() < 1, torch.expm1(d).mul_(p_ref), p - p_ref)
        sums = torch.stack(row_passes.mixture_sums(problem.beta, p, p_ref, d, gap))
        divergence, student = shards.gathered(group, sums).sum(0)
        out.divergence.copy_(divergence.clamp(min=0))
        if directions:
            chunk.divergence.copy_(row_passes.mixture_direction(problem.beta, p, d, student[:, None]))
    for direction in (chunk.entropy, chunk.divergence):
        if direction is not None and slope is not None:
            direction.mul_(slope)


def _reference_lse(group: object, part: Statistics) -> Tensor:
    top, log_sum, _ = shards.gathered(group, part.reference_normaliser).unbind(-1)
    return (top + log_sum).logsumexp(0)


backend = Sharded(chunked)  # type: ignore[arg-type]  # a module

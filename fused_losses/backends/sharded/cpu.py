"""A rank's rows with the compiled kernels of csrc/cpu.

`exact_statistics` takes a rank's logits for all there are; with the normalisers of all ranks in the place of its own
`exact_directions` gives this rank's columns of the whole. For entries `compact` has to see the whole: one column, the
label's or, of another rank's label, any, is replaced by log Σ exp of itself and the other ranks' logits. So its
log-sum-exp is that of all ranks, and p that of the whole at every other column. That column is always an entry, of
which nothing is left out; its values are put right afterwards. The kernel takes 1 − p of it for 1 − p[label], which is
at most that, so it keeps more than is wanted: what is below the bound goes back to what is left out (`_thinned`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels import schemas
from ...kernels.schemas import ExactRow
from ...problem import Entries, Gradients, Needs, Problem, Rows, Segments, Selection, Statistics, Tails, Upstream
from .. import chunks, cpu, int8, row_passes, single
from ..chunks import Chunk, Stage
from ..torch import UpstreamOf
from .torch import Sharded, of_logits, wants_logits
from .whole import Labels, Masses, combine, no_entries, part_of

# So many times the entries that the bound asks for a token may have before it is thinned.
CANDIDATES = 2
# As in csrc/cpu/rows.inc: where 1 − p[label] is 0.
LEAST_WRONG = 1e-30


@dataclass
class Held:
    """A chunk of logits, and what is known of its tokens."""

    tokens: slice
    chunk: Chunk
    labels: Labels
    known: Tensor  # [8, C] `ExactRow`, with the normalisers of all ranks
    masses: Masses
    out: Statistics


@dataclass
class Column:
    """One column of a chunk, [C] each in float64: its logits, and p and p_ref there."""

    at: Tensor  # [C, 1]
    z: Tensor  # z − r, where the chunk keeps that
    r: Tensor | None
    logits: Tensor
    slope: Tensor
    log_p: Tensor
    gap: Tensor | None  # p − p_ref

    @staticmethod
    def of(problem: Problem, held: Held) -> Column:
        chunk, at = held.chunk, held.labels.nearest[:, None]
        keeps = chunks.keeps_difference(problem, chunk)
        known = held.known.double()
        z = chunk.z.gather(1, at)[:, 0].double()
        r = None if chunk.r is None else chunk.r.gather(1, at)[:, 0].double()
        logits = z + r if keeps else z  # type: ignore[operator]
        softcap = problem.head.softcap
        slope = torch.ones_like(z) if softcap is None else (1 - (logits / softcap) ** 2).clamp(min=0)
        log_p, gap = (logits - known[ExactRow.TOP]) - known[ExactRow.LOG_SUM], None
        if r is not None:
            log_r = (r - known[ExactRow.REF_TOP]) - known[ExactRow.REF_LOG_SUM]
            d = z if keeps else (logits - known[ExactRow.TOP]) - (r - known[ExactRow.REF_TOP])
            d = d - known[ExactRow.SHIFT] - known[ExactRow.MISSED]
            gap = torch.where(d.abs() < 1, torch.expm1(d) * log_r.exp(), log_p.exp() - log_r.exp())
        return Column(at, z, r, logits, slope, log_p, gap)


class ShardedCpu(Sharded):
    def _statistics(self, problem: Problem, keep_rows: bool) -> tuple[Statistics, Rows]:
        if not _has_kernels(problem):
            return super()._statistics(problem, keep_rows)
        out = self.empty_statistics(problem)
        rows = chunks.empty_rows(problem, len(problem.labels)) if keep_rows else Rows()
        several = sum(kept is not None for kept in rows.tensors()) > 1
        extra, kind = 4 * problem.head.most_rows * several, cpu.chunk_kind()
        for chunk in chunks.logit_chunks(
            problem, _product(problem), narrow=keep_rows, extra=extra, separate=False, kind=kind
        ):
            held = _hold(problem, chunk, out.at(chunk.tokens))
            if keep_rows:
                _keep_rows(problem, held, rows, chunk.tokens)
        return out, rows

    def _gradients(self, problem: Problem, upstream: UpstreamOf, needs: Needs) -> tuple[Statistics, Gradients]:
        if not _has_kernels(problem):
            return super()._gradients(problem, upstream, needs)
        out, total = self.empty_statistics(problem), self.empty_gradients(problem, needs)
        budget = max(chunks.CHUNK_BYTES, chunks.bytes_of_rounding(problem, total.weight))
        for chunk in chunks.logit_chunks(
            problem, _product(problem), narrow=True, budget=budget, separate=False, kind=cpu.chunk_kind()
        ):
            held = _hold(problem, chunk, out.at(chunk.tokens))
            _add(problem, held, upstream(held.out, chunk.tokens), total)
        return out, total

    def _scan(self, problem: Problem, out: Statistics, selection: Selection) -> Iterator[tuple[Any, Entries]]:
        if not _has_kernels(problem):
            yield from super()._scan(problem, out, selection)
            return
        capacity, values = CANDIDATES * selection.capacity, 1 + problem.has_reference
        extra, kind = capacity * 4 * (1 + values), cpu.chunk_kind()
        for chunk in chunks.logit_chunks(problem, _product(problem), narrow=True, extra=extra, kind=kind):
            held = _hold(problem, chunk, out.at(chunk.tokens))
            if len(problem.head.weight):
                yield held, _compact(problem, held, selection, capacity)
            else:
                yield held, no_entries(problem, len(chunk.z), selection.directions)

    def _dense_rows(self, problem: Problem, chunk: Any) -> Rows:
        if not isinstance(chunk, Held):
            return super()._dense_rows(problem, chunk)
        rows = chunks.empty_rows(problem, len(chunk.chunk.z))
        _keep_rows(problem, chunk, rows, slice(None))
        return rows

    def _add_dense(
        self, problem: Problem, chunk: Any, out: Statistics, upstream: Upstream, total: Gradients
    ) -> None:  # fmt: skip
        if not isinstance(chunk, Held):
            super()._add_dense(problem, chunk, out, upstream, total)
        else:
            _add(problem, chunk, upstream, total)


def _has_kernels(problem: Problem) -> bool:
    """A divergence needs the normalisers of all ranks before it is summed, which no kernel is given."""
    return problem.accumulator == torch.float32 and problem.beta is None


def _product(problem: Problem) -> chunks.Product | None:
    return cpu.product(problem) if len(problem.head.weight) else None


def _hold(problem: Problem, chunk: Chunk, out: Statistics) -> Held:
    """Makes logits of a chunk of products and fills `out`."""
    cpu.finish(problem, chunk)
    labels, part = Labels.of(problem, chunk.tokens), part_of(problem, out)
    known = torch.zeros(len(ExactRow), len(chunk.z), dtype=torch.float32)
    keeps = chunks.keeps_difference(problem, chunk)
    if len(problem.head.weight):
        torch.ops.fused_losses.exact_statistics(
            chunk.z, chunk.r, keeps, labels.nearest, 0.0, part.nll, part.prediction, part.lse, part.kl, part.entropy,
            part.reference_nll, part.reference_entropy, None, None, None, known,
        )  # fmt: skip
        part.normaliser = torch.stack([known[ExactRow.TOP], known[ExactRow.LOG_SUM]], 1)
        if chunk.r is not None:
            shift = known[ExactRow.SHIFT] + known[ExactRow.MISSED]
            if not keeps:
                shift = shift + (known[ExactRow.TOP] - known[ExactRow.REF_TOP])
            names = (known[ExactRow.REF_TOP], known[ExactRow.REF_LOG_SUM], shift)
            part.reference_normaliser = torch.stack(names, 1)
        if part.top_logits is not None:
            _top_logits(problem, chunk, part.top_logits)
    masses = combine(problem, part, labels.owner, out)
    known[ExactRow.LOG_SUM] -= masses.log_p
    if masses.log_r is not None:
        known[ExactRow.REF_LOG_SUM] -= masses.log_r
        known[ExactRow.MISSED] -= masses.ratio
    if out.entropy is not None:
        known[ExactRow.ENTROPY] = out.entropy
    if wants_logits(out):
        of_logits(problem, chunk.tokens, chunk.z + chunk.r if keeps else chunk.z, out)
    return Held(chunk.tokens, chunk, labels, known, masses, out)


def _top_logits(problem: Problem, chunk: Chunk, out: Tensor) -> None:
    for rows in chunks.slices(len(out), max(1, row_passes.BLOCK_NUMBERS["cpu"] // chunk.z.shape[1])):
        z = chunk.z[rows] + chunk.r[rows] if chunks.keeps_difference(problem, chunk) else chunk.z[rows]
        out[rows] = z.topk(out.shape[1], dim=1).values


# Exact gradients


def _direction(problem: Problem, held: Held, upstream: Upstream, target: Tensor) -> Tensor:
    """This rank's columns of the weighted sum of the directions, in `target`, which may be the chunk's z."""
    chunk, labels = held.chunk, held.labels
    if not len(problem.head.weight):
        return target
    column = Column.of(problem, held)
    weights = (upstream.softmax, upstream.kl, upstream.entropy, None, upstream.lse)
    torch.ops.fused_losses.exact_directions(
        chunk.z, chunk.r, chunks.keeps_difference(problem, chunk), labels.nearest, problem.head.softcap or 0.0, 0.0,
        held.out.nll, held.known, *(None if w is None else w.contiguous() for w in weights), target,
    )  # fmt: skip
    # Of other ranks' labels the kernel has taken one of this rank's columns for the label.
    p, a = column.log_p.exp(), upstream.softmax
    value = torch.zeros_like(p) if a is None else a * p
    if upstream.kl is not None:
        value += upstream.kl * column.gap
    if upstream.entropy is not None:
        value -= upstream.entropy * p * (column.log_p.clamp(min=-1e30) + held.known[ExactRow.ENTROPY])
    value = (value * column.slope).to(target.dtype)[:, None]
    target.scatter_(1, column.at, torch.where(labels.mine[:, None], target.gather(1, column.at), value))
    if upstream.logits_at is not None:
        single.add_picked_(target, problem.part(held.tokens), held.out, Upstream(logits_at=upstream.logits_at))
    return target


def _add(problem: Problem, held: Held, upstream: Upstream, total: Gradients) -> None:
    chunk = held.chunk
    cpu.add_directions(problem, chunk, upstream, total, lambda w: _direction(problem, held, w, chunk.z))


def _keep_rows(problem: Problem, held: Held, rows: Rows, at: slice) -> None:
    """∂nll/∂x, ∂kl/∂x, ... of a chunk; the last direction is made in the place of its logits."""
    chunk = held.chunk
    one = torch.full_like(held.out.nll, problem.head.logit_scale)
    other = None
    for name in ("entropy", "kl", "nll"):
        part = getattr(rows, name)
        if part is None:
            continue
        if name != "nll" and other is None:
            other = torch.empty_like(chunk.z)
        target = chunk.z if name == "nll" else other
        part[at] = chunk.times_weight(_direction(problem, held, Upstream(**{name: one}), target), exact=True)
    chunk.enter(Stage.SPENT, Stage.LOGITS)


# Entries


def _compact(problem: Problem, held: Held, selection: Selection, capacity: int) -> Entries:
    chunk, labels = held.chunk, held.labels
    size, columns = chunk.z.shape
    capacity, with_kl = min(capacity, columns), chunk.r is not None
    column = Column.of(problem, held)
    lump, lump_gap = _put_lump(problem, held, column)
    softcap = problem.head.softcap or 0.0
    logits = (chunk.z, chunk.r, chunks.keeps_difference(problem, chunk), labels.nearest, softcap)
    buffers = [torch.empty(size, capacity, dtype=torch.int32)]
    buffers += [torch.empty(size, capacity, dtype=torch.float32) for _ in range(1 + with_kl)]
    rows, counts = torch.empty(8, size, dtype=torch.float32), torch.empty(size, dtype=torch.int64)
    tails = Tails(rows[schemas.TAIL], rows[schemas.NLL_L1])
    directions, squares = selection.directions, None
    if directions is not None:
        squares = torch.empty(2, size, dtype=torch.float32)
        tails.nll_low = torch.empty(size, directions.shape[1], dtype=torch.float32)
        tails.kl_low = torch.empty_like(tails.nll_low) if with_kl else None
        tails.nll_square, tails.kl_square = squares[0], squares[1] if with_kl else None
    lumped = torch.empty(3, size, dtype=torch.float32)  # statistics of no use: of a row with its lump
    reference = lumped[1:] if with_kl else (None, None)
    torch.ops.fused_losses.compact(
        *logits, selection.threshold, lumped[0], torch.empty(size, dtype=torch.int64), reference[0], None,
        reference[1], None, rows, counts, *buffers, *([] if with_kl else [None]), directions,
        selection.pairs, tails.nll_low, tails.kl_low, squares, *int8.NO_OPERANDS,
    )  # fmt: skip
    sampled, tokens = selection.sampled, chunk.tokens
    here = sampled[(sampled >= tokens.start) & (sampled < tokens.stop)] - tokens.start
    here = here[(counts[here] >= 0) & held.out.nll[here].isfinite()]
    torch.ops.fused_losses.tail_profile(*logits, rows, here, selection.profile)
    chunk.z.scatter_(1, column.at, column.z.float()[:, None])
    if with_kl:
        chunk.r.scatter_(1, column.at, column.r.float()[:, None])
    if with_kl:
        tails.kl_left, tails.kl_left_l1 = rows[schemas.KL_TAIL], rows[schemas.KL_TAIL_L1]
        tails.kl_l1 = (rows[schemas.KL_L1] - lump_gap).clamp(min=0)
    # Without the lump's own |p − 1|·slope.
    tails.nll_l1 = (rows[schemas.NLL_L1] + torch.expm1(-lumped[0]) * lump).clamp(min=0)
    return _thinned(_put_right(held, column, int8.packed(counts, buffers, tails)), held, selection, here)


def _put_lump(problem: Problem, held: Held, column: Column) -> tuple[Tensor, Tensor | None]:
    """Puts the other ranks' logits into a column; its slope, and |p − p_ref|·slope, as `compact` will have them."""
    chunk, masses = held.chunk, held.masses
    lump = torch.logaddexp(column.logits, masses.others)
    value, r = lump, None
    if column.r is not None:
        r = torch.logaddexp(column.r, masses.ref_others)
        if chunks.keeps_difference(problem, chunk):
            # log p − log p_ref of the lump from those of its parts, so that near the reference nothing cancels.
            parts = torch.stack([column.z + (column.r - r), masses.others_ratio + (masses.ref_others - r)])
            value = parts.logsumexp(0)
        chunk.r.scatter_(1, column.at, r.float()[:, None])
    chunk.z.scatter_(1, column.at, value.float()[:, None])
    slope = torch.ones_like(lump)
    if problem.head.softcap is not None:
        slope = (1 - (lump / problem.head.softcap) ** 2).clamp(min=0)
    gap = None
    if column.r is not None:
        # Σ over all columns of p − p_ref is 0, so the lump's is minus that of this rank's other columns.
        gap = ((masses.gap - column.gap).abs() * slope).float()
    return slope.float(), gap


def _put_right(held: Held, column: Column, entries: Entries) -> Entries:
    """The values at the column that was replaced."""
    size = len(entries.counts)
    counts = entries.counts.clamp(min=0)
    rows = torch.repeat_interleave(torch.arange(size), counts, output_size=len(entries.columns))
    places = (entries.columns == held.labels.nearest[rows]).nonzero().flatten()
    of = rows[places]
    value = torch.where(held.labels.mine, torch.expm1(-held.out.nll.double()), column.log_p.exp()) * column.slope
    entries.nll_values[places] = value.float()[of]
    tails = entries.tails
    tails.nll_l1 = tails.nll_l1 + value.abs().float()
    if column.gap is not None:
        gap = column.gap * column.slope
        entries.kl_values[places] = gap.float()[of]
        own = torch.segment_reduce(entries.kl_values.abs(), "sum", lengths=counts, initial=0)
        rough = tails.kl_l1 + gap.abs().float()  # where no entries are stored
        tails.kl_l1 = torch.where(entries.counts < 0, rough, own + tails.kl_left_l1)
    return entries


def _thinned(entries: Entries, held: Held, selection: Selection, sampled: Tensor) -> Entries:
    """The entries that one process would keep; the others are among what is left out. `sampled`: of this chunk."""
    size, counts = len(entries.counts), entries.counts.clamp(min=0)
    rows = torch.repeat_interleave(torch.arange(size), counts, output_size=len(entries.columns))
    least = selection.threshold * (-torch.expm1(-held.out.nll)).clamp(min=LEAST_WRONG).sqrt()
    values, kl_values = entries.nll_values, entries.kl_values
    keep = values > least[rows]
    if kl_values is not None:
        keep |= values - kl_values > least[rows]
    keep |= (entries.columns == held.labels.nearest[rows]) & held.labels.mine[rows]
    if bool(keep.all()):
        return entries
    gone = ~keep
    gone_counts = torch.zeros_like(counts).index_add_(0, rows[gone], torch.ones_like(rows[gone]))
    offsets = counts.new_zeros(size + 1)
    torch.cumsum(gone_counts, 0, out=offsets[1:])
    columns, tails = entries.columns[gone], entries.tails
    directions, none = selection.directions, torch.zeros(size)

    def sums(numbers: Tensor) -> Tensor:
        return torch.segment_reduce(numbers, "sum", lengths=gone_counts, initial=0)

    def low(numbers: Tensor) -> Tensor:
        vector = numbers.new_zeros(directions.shape[1])
        return cpu.rows_product(Segments(offsets, columns, numbers), directions, none, vector, torch.float32)

    left = values[gone]
    tails = replace(tails, nll_left=tails.nll_left + sums(left))
    if directions is not None:
        tails.nll_low, tails.nll_square = tails.nll_low + low(left), tails.nll_square + sums(left.square())
    is_sampled = torch.zeros(size, dtype=torch.bool).index_fill_(0, sampled, True)[rows[gone]]
    selection.profile.index_add_(0, columns[is_sampled].long(), left[is_sampled])
    if kl_values is not None:
        left = kl_values[gone]
        tails.kl_left, tails.kl_left_l1 = tails.kl_left + sums(left), tails.kl_left_l1 + sums(left.abs())
        if directions is not None:
            tails.kl_low, tails.kl_square = tails.kl_low + low(left), tails.kl_square + sums(left.square())
    return replace(
        entries, counts=torch.where(entries.counts < 0, entries.counts, counts - gone_counts),
        columns=entries.columns[keep], nll_values=values[keep],
        kl_values=None if kl_values is None else kl_values[keep], tails=tails,
    )  # fmt: skip


backend = ShardedCpu(cpu)  # type: ignore[arg-type]  # a module

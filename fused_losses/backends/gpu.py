"""The losses on a GPU over a set of kernels, Triton's or CUDA's: the same steps, other implementations of the entries'
part.

Sparse gradients: a scan without logits (`kernels.triton.scan`), or chunks of logits from cuBLAS where the table of
tiles has no scan; then for both bits → columns → vocabulary attention. Exact gradients: chunks of logits, statistics,
gradient in place, two products. What has no kernel (float64) is `backends.torch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.schemas import SPLIT, Row
from ..kernels.triton import directions as direction_kernels
from ..kernels.triton import rows as row_kernels
from ..kernels.triton import tiles
from ..kernels.triton.entries import weighted_sum as weighted_sum_kernel
from ..kernels.triton.scan import Known
from ..problem import (
    Entries,
    Gradients,
    Head,
    Needs,
    Problem,
    Rows,
    Segments,
    Selection,
    Statistics,
    Upstream,
)  # fmt: skip
from . import chunks, gpu_int8, gpu_scan, gpu_tails, int8, row_passes, single
from . import torch as chunked
from .chunks import empty_gradients, empty_rows, empty_statistics
from .gpu_products import in_memory_of, rounded, times_head
from .torch import UpstreamOf

# Logits of a chunk, fp32, of each model; with less than some 500 tokens the weight takes longer to read than a product.
LOGIT_BYTES = 256 << 20
# Significance bits of one chunk of the scan. Each chunk is some 130 small operations and two waits for the device: with
# four of 32 MiB at (8192, 4096, 128256) an H200 stood idle for 12 of 45 ms.
BIT_BYTES = 128 << 20
# So a token may have so many times the entries that the exact threshold is allowed.
CANDIDATES = 2
# Where 1 − p[label] is 0 in fp32, its logarithm would let every id through.
LEAST_WRONG = 1e-30


@dataclass
class Span:
    """A chunk of tokens whose logits are nowhere, and what the entries leave out of them in directions."""

    tokens: slice
    left_out: gpu_tails.LeftOut | None = None
    columns: gpu_scan.Columns | None = None  # where they were needed before the entries


class Gpu:
    """The functions of a backend. `kernels` has row_statistics, count_bits, columns_of_bits, entry_logits, attention,
    segment_product, as in `kernels.schemas.GPU_SCHEMAS`."""

    # The tail profile is made of so many tokens; each costs a row of logits.
    SAMPLED_TOKENS = 256
    HAS_DIRECTIONS, HAS_SKETCH = True, False

    empty_statistics = staticmethod(empty_statistics)
    empty_gradients = staticmethod(empty_gradients)

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    # --- exact

    def statistics(self, problem: Problem, keep_rows: bool = False) -> tuple[Statistics, Rows]:
        """1 GEMM, 2 with a reference; with `keep_rows` one more for each of ∂nll/∂x, ∂kl/∂x, ..."""
        _check(problem)
        if problem.accumulator != torch.float32:
            return chunked.statistics(problem, keep_rows)
        out = empty_statistics(problem)
        if not keep_rows:
            eight = None if problem.int8 is None else gpu_int8.begin(_cast(problem), False, self._values)
            return self._values(problem, eight, out), Rows()
        rows = empty_rows(problem, len(problem.labels))
        scale, dtype = problem.head.logit_scale, problem.dtype
        for chunk, facts, extended in self._logit_chunks(problem, out):
            here, logits = out.at(chunk.tokens), row_arguments(problem, chunk)
            one = torch.ones_like(here.nll)
            for name in ("entropy", "divergence"):
                kept = getattr(rows, name)
                if kept is not None:
                    other = torch.empty(chunk.z.shape, dtype=dtype, device=one.device)
                    more = _more(problem, here, extended, Upstream(**{name: one}))
                    direction_kernels.directions(*logits, facts, here.nll, None, None, other, None, **more)  # type: ignore
                    kept[chunk.tokens] = times_head(other, chunk).mul_(scale)
            z, r = in_memory_of(chunk.z, dtype), None if chunk.r is None else in_memory_of(chunk.r, dtype)
            direction_kernels.directions(*logits, facts, here.nll, one, None, z, r)  # type: ignore[call-arg]
            rows.nll[chunk.tokens] = times_head(z, chunk).mul_(scale)
            if r is not None:
                rows.kl[chunk.tokens] = times_head(r, chunk).mul_(scale)
        return out, rows

    def _values(
        self, problem: Problem, eight: gpu_int8.Eight | None, out: Statistics | None = None,
        threshold: float | None = None,
    ) -> Statistics:  # fmt: skip
        """Statistics alone, by a scan where there is a tile for one."""
        out = empty_statistics(problem) if out is None else out
        if eight is not None:
            threshold = int8.THRESHOLD if threshold is None else threshold
            for _ in self._bits_of_scan(_cast(problem), out, threshold, eight.tile, eight=eight):
                pass
        elif problem.labels.numel() and (tile := self._tile(problem)):
            self._scan_statistics(_cast(problem), out, tile)
        else:
            for _ in self._logit_chunks(problem, out):
                pass
        return out

    def gradients(self, problem: Problem, upstream: UpstreamOf, needs: Needs) -> tuple[Statistics, Gradients]:
        """Statistics and Σ_t a_t ∂nll_t + b_t ∂kl_t: 3 GEMMs, 2 where one gradient is not wanted, one more with a
        reference."""
        _check(problem)
        if problem.accumulator != torch.float32:
            return chunked.gradients(problem, upstream, needs)
        out, total = empty_statistics(problem), empty_gradients(problem, needs)
        self._sweep(problem, out, upstream, total)
        return out, total

    def _sweep(self, problem: Problem, out: Statistics, upstream_of: UpstreamOf, total: Gradients) -> None:
        dtype, scale = problem.dtype, problem.head.logit_scale
        for chunk, facts, extended in self._logit_chunks(problem, out, total):
            tokens = chunk.tokens
            here = out.at(tokens)
            upstream = upstream_of(here, tokens)
            if upstream.is_zero:
                if total.hidden is not None:
                    total.hidden[tokens] = 0
                continue
            upstream, factor = upstream.each(lambda w: (w * scale).float()), 1.0
            if dtype == torch.float16:
                upstream, factor = upstream.without_common_power()
            a, b = upstream.softmax, upstream.kl
            more = _more(problem, here, extended, upstream)
            if a is None and b is None and not more:
                a = torch.zeros_like(here.nll)
            weights = [None if w is None else w.contiguous() for w in (a, b)]
            has_single = upstream.lse is not None or upstream.logits_at is not None
            # The gradient of the bias is a sum of nothing else, so it is taken before any rounding; and what single
            # logits add may cancel against p, so it is added before that.
            wide = total.bias is not None or has_single
            direction = chunk.z if wide else in_memory_of(chunk.z, dtype)
            direction_kernels.directions(
                *row_arguments(problem, chunk), facts, here.nll, *weights, direction, None, **more
            )  # type: ignore[call-arg]
            if has_single:
                self._add_single(direction, problem, tokens, here, upstream)
            if total.bias is not None:
                total.bias.add_(direction.sum(0), alpha=factor)
            if wide and dtype != direction.dtype:
                direction = rounded(direction, dtype)
            if total.hidden is not None:
                total.hidden[tokens] = times_head(direction, chunk).mul_(factor)
            if total.weight is not None:
                chunks.add_product(total.weight, direction.t(), chunk.hidden, factor)
            if total.low_rank is not None:
                chunks.add_product(total.low_rank, direction.t(), chunk.low_rank_rows, factor)

    def _add_single(
        self, direction: Tensor, problem: Problem, tokens: slice, out: Statistics, upstream: Upstream
    ) -> None:  # fmt: skip
        single.add_picked_(direction, problem.part(tokens), out, upstream)

    def _tile(self, problem: Problem, directed: bool = False) -> tiles.Scan | None:
        """Of a scan; None: there is none, and logits are formed in chunks."""
        return None if gpu_scan.logits_are_faster(problem) else gpu_scan.choose_tile(problem, directed)

    def _logit_chunks(
        self, problem: Problem, out: Statistics, total: Gradients | None = None
    ) -> Iterator[tuple[chunks.Chunk, Tensor, Tensor | None]]:  # fmt: skip
        """Chunks with raw logits in their buffers, statistics filled in, and what else is known of their tokens: [9,
        C], and what the divergence's direction needs."""
        for chunk in chunks.logit_chunks(problem, narrow=False, budget=logit_bytes(problem, out, total)):
            here = out.at(chunk.tokens)
            facts = torch.empty(len(Row), len(chunk.z), dtype=torch.float32, device=chunk.z.device)
            z, r, difference, labels, *scales = row_arguments(problem, chunk)
            _of_products(problem, chunk, here)
            self.kernels.row_statistics(
                z, r, difference, labels, *scales, here.nll, here.prediction, here.kl, here.entropy,
                here.reference_nll, here.reference_entropy, facts,
            )  # fmt: skip
            torch.add(facts[Row.TOP], facts[Row.LOG_SUM], out=here.lse)
            extended = None
            if here.divergence is not None:
                extended = torch.empty(
                    len(direction_kernels.Extended), len(chunk.z), dtype=torch.float32, device=z.device
                )
            if here.rank is not None or here.log_p2 is not None or extended is not None:
                direction_kernels.extended_statistics(  # type: ignore[call-arg]
                    z, r, difference, labels, *scales, problem.beta or 0.0, facts, here.nll, here.log_p2, here.rank,
                    here.divergence, extended,
                )  # fmt: skip
            yield chunk, facts, extended

    # --- sparse

    def scan(self, problem: Problem, out: Statistics, selection: Selection) -> Iterator[tuple[Any, Entries]]:
        """Sweep over the tokens for a sparse softmax; see `backends.torch.scan`. With rows also Σ over entries, [C, D]
        each.

        More entries than the threshold asks for are kept, 1.2 to 1.4 times as many: the scan's bound is a lower one.
        """
        if problem.accumulator != torch.float32:
            yield from chunked.scan(problem, out, selection)
            return
        _check(problem)
        problem = _cast(problem)
        directed, capacity = selection.directions is not None, selection.capacity * CANDIDATES
        eight = gpu_int8.begin(problem, directed, partial(self._values, threshold=selection.threshold))
        tile = self._tile(problem, directed) if eight is None else eight.tile
        chosen: list[tuple[Tensor, ...]] = []
        if tile is None:
            spans = self._bits_of_logits(problem, out, selection.threshold, selection.directions)
        else:
            spans = self._bits_of_scan(problem, out, selection.threshold, tile, selection.directions, eight, capacity)
        sampled = selection.sampled
        for span, facts, bits in spans:
            entries = self._entries(problem, out, span, facts, bits, capacity, selection.with_rows)
            # Token i of `sampled` is i·N // len: which are of this chunk is known without waiting for the GPU.
            first, last = (-(-at * len(sampled) // len(out.nll)) for at in (span.tokens.start, span.tokens.stop))
            here = sampled[first:last]
            at = here - span.tokens.start
            lse = facts[Row.TOP, at] + facts[Row.LOG_SUM, at]
            usable = (entries.counts[at] >= 0) & out.nll[here].isfinite()
            chosen.append((here, lse, bits.index_select(0, at), usable))
            yield span, entries
        if chosen:
            *parts, usable = (torch.cat(parts) for parts in zip(*chosen, strict=True))
            gpu_tails.add_profile(problem, *(part[usable] for part in parts), selection.profile)  # type: ignore[call-arg]

    def _bits_of_logits(
        self, problem: Problem, out: Statistics, threshold: float, directions: Tensor | None = None
    ) -> Iterator[tuple[Span, Tensor, Tensor]]:
        words = -(-problem.head.vocabulary // row_kernels.BLOCK) * (row_kernels.BLOCK // 32)
        for chunk, facts, _ in self._logit_chunks(problem, out):
            z, r, difference, _, *scales = row_arguments(problem, chunk)
            lse = facts[Row.TOP] + facts[Row.LOG_SUM]
            wrong = -torch.expm1(-out.nll[chunk.tokens])
            least = math.log(threshold) + 0.5 * torch.log(wrong.clamp(min=LEAST_WRONG))
            bounds = torch.stack([lse + least, facts[Row.REF_TOP] + facts[Row.REF_LOG_SUM] + least])
            bits = torch.empty(len(z), words, dtype=torch.int32, device=z.device)
            row_kernels.logit_bits(z, r, difference, bounds, *scales, bits)  # type: ignore[call-arg]
            left_out = None
            if directions is not None:
                left_out = gpu_tails.of_logits(row_arguments(problem, chunk), bits, facts, directions)
            yield Span(chunk.tokens, left_out), facts, bits

    def _bits_of_scan(
        self, problem: Problem, out: Statistics, threshold: float, tile: tiles.Scan, directions: Tensor | None = None,
        eight: gpu_int8.Eight | None = None, capacity: int = gpu_int8.CAPACITY,
    ) -> Iterator[tuple[Span, Tensor, Tensor]]:  # fmt: skip
        """`capacity`: entries of a token; with `eight`, a token that has more gets its statistics from full
        products."""
        count, vocabulary = len(problem.labels), problem.head.vocabulary
        words = -(-vocabulary // tile.block_v) * tile.block_v // 32
        most = max(tile.block_n, BIT_BYTES // (4 * words) // tile.block_n * tile.block_n)
        size = -(-count // -(-count // most))  # even chunks of whole blocks
        size = -(-size // tile.block_n) * tile.block_n
        operands = gpu_scan.Operands(problem, tile, directions, eight)
        label = operands.label_logits(self.kernels)
        if problem.ids is not None:
            out.logits_at.copy_(operands.logits_at(self.kernels))
        known = gpu_scan.bounds(operands, label, threshold)
        bits = torch.empty(size, words, dtype=torch.int32, device=problem.hidden.device)  # one chunk after the other
        for start in range(0, count, size):
            tokens = slice(start, min(start + size, count))
            scanned = operands.run(tokens, known[:, tokens], bits, vocabulary)
            here, labels, sums, found = out.at(tokens), problem.labels[tokens], scanned.partial, None
            if eight is not None:
                found = gpu_scan.columns_of(self.kernels, labels.contiguous(), bits, min(capacity, vocabulary))
                sums = gpu_int8.with_kept(operands, self.kernels, tokens, found, sums)
            rows = gpu_scan.join(
                problem, sums, labels, [v[tokens] for v in label], known[Known.SHIFT, tokens], here
            )  # fmt: skip
            if found is not None and len(full := (found.counts < 0).nonzero().flatten()):
                gpu_int8.put_in(here, full, self._values(problem.part(tokens).rows(full), None))
            left_out = gpu_tails.of_scan(operands, scanned, known[:, tokens], rows)
            yield Span(tokens, left_out, found), rows, bits[: tokens.stop - tokens.start]

    def _scan_statistics(self, problem: Problem, out: Statistics, tile: tiles.Scan) -> None:
        operands = gpu_scan.Operands(problem, tile)
        label = operands.label_logits(self.kernels)
        if problem.ids is not None:
            out.logits_at.copy_(operands.logits_at(self.kernels))
        known = torch.zeros(3, len(problem.labels), dtype=torch.float32, device=problem.hidden.device)
        if problem.has_reference:
            known = gpu_scan.bounds(operands, label, 1.0)
        everything = slice(0, len(problem.labels))
        partial = operands.run(everything, known, None, problem.head.vocabulary).partial
        gpu_scan.join(problem, partial, problem.labels, label, known[Known.SHIFT], out)

    def _entries(
        self, problem: Problem, out: Statistics, span: Span, facts: Tensor, bits: Tensor, capacity: int, rows: bool
    ) -> Entries:
        head, kernels, tokens = problem.head, self.kernels, span.tokens
        labels, device = problem.labels[tokens].contiguous(), bits.device
        size, dim = len(labels), head.weight.shape[1]
        found = span.columns or gpu_scan.columns_of(kernels, labels, bits, min(capacity, head.vocabulary))
        span.columns = None
        counts, offsets, columns = found
        total = len(columns)

        def empty(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return torch.empty(shape, dtype=dtype, device=device) if wanted else None

        reference = problem.has_reference
        values, kl_values = empty(True, total), empty(reference, total)
        kept = torch.zeros(4, size, dtype=torch.float32, device=device)
        rows = rows and dim <= tiles.ROWS_UP_TO
        rows_dtype = problem.dtype if problem.hidden.dtype == problem.dtype else torch.float32
        nll_rows = empty(rows, size, dim, dtype=rows_dtype)
        kl_rows = empty(rows and reference, size, dim, dtype=rows_dtype)
        hidden, weight = problem.hidden[tokens].to(problem.dtype), head.weight.to(problem.dtype).contiguous()
        difference = entry_reference = None
        if problem.shared_head:
            other = problem.reference_hidden[tokens]
            difference = gpu_scan.difference_of(problem, tokens)
            hidden = other.to(problem.dtype)
        elif reference:
            own = problem.reference_head
            entry_reference = torch.empty(total, dtype=torch.float32, device=device)
            kernels.entry_logits(
                problem.reference_hidden[tokens].to(problem.dtype).contiguous(),
                own.weight.to(problem.dtype).contiguous(), gpu_scan.bias_of(own), offsets, columns, entry_reference,
            )  # fmt: skip
            entry_reference.mul_(own.logit_scale)
            if own.softcap is not None:
                entry_reference.div_(own.softcap).tanh_().mul_(own.softcap)
        kernels.attention(
            hidden.contiguous(), difference, entry_reference, weight, gpu_scan.bias_of(head), labels, offsets, columns,
            facts, out.nll[tokens].contiguous(), head.logit_scale, head.softcap or 0.0, values, kl_values, kept,
            nll_rows, kl_rows,
        )  # fmt: skip
        tails = gpu_tails.tails_of(problem, out.nll[tokens], labels, facts, kept, span.left_out)
        return Entries(counts, columns, values, kl_values, tails, nll_rows, kl_rows)

    def dense_rows(self, problem: Problem, span: Span) -> Rows:
        """∂nll/∂x and ∂kl/∂x of a chunk of `scan`, its logits computed once more."""
        return self.statistics(problem.part(span.tokens).for_gradients(), keep_rows=True)[1]

    def add_dense(
        self, problem: Problem, span: Span, out: Statistics, upstream: Upstream, total: Gradients
    ) -> None:  # fmt: skip
        part = problem.part(span.tokens).for_gradients()
        hidden = None if total.hidden is None else total.hidden[span.tokens]
        sums = Gradients(hidden, total.weight, total.bias, total.low_rank)
        self._sweep(part, empty_statistics(part), lambda _, at: upstream.at(at), sums)

    # --- products of entries

    def rows_product(
        self, segments: Segments, matrix: Tensor, scale: Tensor, vector: Tensor, dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        """out[t] = Σ_j values[j] · matrix[columns[j]] + scale[t] · vector over the entries of row t, summed in fp32."""
        if segments.values.dtype != torch.float32:
            return chunked.rows_product(segments, matrix, scale, vector, dtype)
        return self._segments(segments, matrix, scale, vector, None, 1.0, dtype)

    def columns_product(
        self, segments: Segments, matrix: Tensor, scale: Tensor, vector: Tensor, base: Tensor | None,
        base_scale: float, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """out[v] = base_scale · base[v] + Σ_j values[j] · matrix[row of j] + scale[v] · vector over the entries of
        column v."""
        if segments.values.dtype != torch.float32:
            return chunked.columns_product(segments, matrix, scale, vector, base, base_scale, dtype)
        starts, rows, order = chunks.by_column(segments.offsets, segments.columns, len(scale))
        turned = Segments(starts, rows.int(), segments.values[order])
        return self._segments(turned, matrix, scale, vector, base, base_scale, dtype)

    def _segments(
        self, segments: Segments, matrix: Tensor, scale: Tensor, vector: Tensor, base: Tensor | None,
        base_scale: float, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        counts = segments.offsets.diff()
        hot = (counts > SPLIT).nonzero().flatten()
        hot_first = counts.new_zeros(len(hot) + 1)
        torch.cumsum((counts[hot] + (SPLIT - 1)) // SPLIT, 0, out=hot_first[1:])
        slots = int(hot_first[-1]) if len(hot) else 0
        dim = matrix.shape[1]
        partial = torch.empty(slots, dim, dtype=torch.float32, device=matrix.device)
        out = torch.empty(len(counts), dim, dtype=dtype, device=matrix.device)
        self.kernels.segment_product(
            *segments, matrix.contiguous(), scale.contiguous(), vector.contiguous(), base, base_scale,
            hot, hot_first, partial, out,
        )  # fmt: skip
        return out

    def weighted_sum(self, matrix: Tensor, scale: Tensor) -> Tensor:
        if scale.dtype != torch.float32:
            return chunked.weighted_sum(matrix, scale)
        return weighted_sum_kernel(matrix.contiguous(), scale.contiguous())


def logit_bytes(problem: Problem, out: Statistics, total: Gradients | None) -> int:
    """Of a chunk; no more than usual for `topk_entropy`, which takes a copy of it."""
    usual = LOGIT_BYTES * (1 + problem.has_reference)
    if total is None or out.topk_entropy is not None:
        return usual
    return max(usual, chunks.bytes_of_rounding(problem, total.weight))


def row_arguments(problem: Problem, chunk: chunks.Chunk) -> Any:
    """The first arguments of the kernels over logits."""
    head, own = problem.head, problem.reference_head or problem.head
    return (
        chunk.z, chunk.r, chunk.difference, problem.labels[chunk.tokens].contiguous(), head.logit_scale,
        head.softcap or 0.0, own.logit_scale, own.softcap or 0.0,
    )  # fmt: skip


def _of_products(problem: Problem, chunk: chunks.Chunk, out: Statistics) -> None:
    """The statistics that no kernel has, in PyTorch's own operations; the products stay as they are."""
    if problem.ids is not None:
        ids = problem.ids[chunk.tokens]
        out.logits_at.copy_(finished(problem, chunk, lambda products: row_passes.picked(products, ids)))
        out.logits_at.masked_fill_(ids < 0, 0)
    if out.topk_entropy is not None:
        z = finished(problem, chunk, lambda products: products)
        out.topk_entropy.copy_(row_passes.entropy_of(z.topk(min(problem.top_k, z.shape[1]), dim=1).values))


def _more(problem: Problem, out: Statistics, extended: Tensor | None, upstream: Upstream) -> dict[str, Any]:
    """What `directions` takes besides nll and kl."""
    more: dict[str, Any] = {}
    if upstream.entropy is not None:
        more |= {"entropy_weight": upstream.entropy.contiguous(), "entropy": out.entropy}
    if upstream.divergence is not None:
        more |= {"divergence_weight": upstream.divergence.contiguous(), "extended": extended, "beta": problem.beta}
    return more


def finished(problem: Problem, chunk: chunks.Chunk, take: Callable[[Tensor], Tensor]) -> Tensor:
    """The logits of some products, in new tensors."""
    z, r = take(chunk.z).clone(), None if chunk.r is None else take(chunk.r).clone()
    chunks.finish(problem, z, r, chunk.difference)
    return z + r if chunks.keeps_difference(problem, chunk) else z


def _check(problem: Problem) -> None:
    if gpu_scan.INTERPRETED and problem.dtype == torch.bfloat16:
        raise TypeError(
            "backend='triton' in Triton's interpreter (TRITON_INTERPRET=1): expected float32 or float16, got "
            "bfloat16, which the interpreter computes wrongly; cast, or give another backend"
        )


def _cast(problem: Problem) -> Problem:
    """Heads in the operands' dtype: under autocast this is a copy, made once. So is [W, B], for rows [x, u], of a head
    with a low-rank part: V·(D + r) numbers."""
    own, reference = problem.reference_head, problem.reference_hidden

    def cast(head: Head) -> Head:
        parts = [part.to(problem.dtype) for part in (head.weight, head.low_rank) if part is not None]
        return head._replace(weight=parts[0] if len(parts) == 1 else torch.cat(parts, 1), low_rank=None)

    if problem.shared_head:
        reference = chunks.widened(reference, problem.head.width)
    return replace(
        problem, head=cast(problem.head), reference_head=None if own is None else cast(own), reference_hidden=reference
    )

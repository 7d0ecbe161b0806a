"""A rank's rows with the kernels for GPUs, Triton's or CUDA's, over chunks of its logits.

`row_statistics` takes a rank's logits for all there are. With the normalisers of all ranks in the place of its own, p
of the kernels after it is that of the whole vocabulary: `directions`, the bits, `left_out` and `attention`. To them a
label of another rank is no column at all (`ABSENT`). Σ p − p_ref and the sum of its sizes do not follow from a rank's
own: `gap_totals` sums them anew.

The scan is not taken: it chooses entries as it goes, before the other ranks' sums are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.schemas import ABSENT, Row
from ...kernels.triton import rows as row_kernels
from ...problem import Entries, Gradients, Needs, Problem, Rows, Selection, Statistics, Upstream
from .. import chunks, single
from ..gpu import Gpu, Span, finished, logit_bytes, row_arguments
from ..torch import UpstreamOf
from .torch import Sharded, of_logits, wants_logits
from .whole import Labels, Masses, combine, no_entries, part_of


class OfRank(Gpu):
    """The kernels over this rank's rows; `mine` is the problem as they are given it, `whole` that of all ranks."""

    def __init__(self, kernels: Any, whole: Problem) -> None:
        super().__init__(kernels)
        labels = Labels.of(whole, slice(None))
        self.whole, self.is_mine = whole, labels.mine
        self.mine = replace(
            whole, labels=torch.where(labels.mine, labels.nearest, ABSENT), head=whole.head._replace(shard=None),
            int8=None,
        )  # fmt: skip

    def _tile(self, problem: Problem, directed: bool = False) -> None:
        return None

    def _logit_chunks(
        self, problem: Problem, out: Statistics, total: Gradients | None = None
    ) -> Iterator[tuple[chunks.Chunk, Tensor, None]]:  # fmt: skip
        whole, columns = self.whole, len(problem.head.weight)
        spread = replace(problem, head=problem.head._replace(shard=whole.head.shard))  # as many tokens on all ranks
        for chunk in chunks.logit_chunks(spread, narrow=False, budget=logit_bytes(spread, out, total)):
            here, labels = out.at(chunk.tokens), Labels.of(whole, chunk.tokens)
            part = part_of(whole, here)
            facts = torch.zeros(len(Row), len(chunk.z), dtype=torch.float32, device=chunk.z.device)
            if columns:
                self._own_statistics(problem, chunk, labels, part, facts)
            masses = combine(whole, part, labels.owner, here)
            if wants_logits(here):
                of_logits(whole, chunk.tokens, _logits(problem, chunk), here)
            if columns:
                self._of_the_whole(problem, chunk, labels, part, masses, facts)
            yield chunk, facts, None

    def _own_statistics(
        self, problem: Problem, chunk: chunks.Chunk, labels: Labels, part: Statistics, facts: Tensor
    ) -> None:  # fmt: skip
        z, r, difference, _, *scales = row_arguments(problem, chunk)
        self.kernels.row_statistics(
            z, r, difference, labels.nearest.contiguous(), *scales, part.nll, part.prediction, part.kl, part.entropy,
            part.reference_nll, part.reference_entropy, facts,
        )  # fmt: skip
        part.normaliser = facts[[Row.TOP, Row.LOG_SUM]].t()
        if r is not None:
            shift = facts[Row.SHIFT] + facts[Row.MISSED]
            part.reference_normaliser = torch.stack([facts[Row.REF_TOP], facts[Row.REF_LOG_SUM], shift], 1)
        if part.top_logits is not None:
            part.top_logits.copy_(_logits(problem, chunk).topk(part.top_logits.shape[1], dim=1).values)

    def _of_the_whole(
        self, problem: Problem, chunk: chunks.Chunk, labels: Labels, part: Statistics, masses: Masses, facts: Tensor
    ) -> None:
        """Makes `facts` of this rank's rows, its own p among them, those of the whole vocabulary's p."""
        nearest = (-part.nll).exp()  # of the column that was taken for the label
        if problem.head.softcap is not None:
            logit = facts[Row.TOP] + facts[Row.LOG_SUM] - part.nll
            nearest *= (1 - (logit / problem.head.softcap) ** 2).clamp(min=0)
        mass = (facts[Row.REST] + nearest) * masses.log_p.exp()
        rest = facts[Row.REST] + nearest.masked_fill(labels.mine, 0)
        facts[Row.REST] = rest * masses.log_p.exp()
        facts[Row.LOG_SUM] -= masses.log_p
        if masses.log_r is None:
            return
        facts[Row.REF_LOG_SUM] -= masses.log_r
        ratio: Tensor = masses.ratio  # type: ignore[assignment]
        shift = facts[Row.SHIFT].to(ratio.dtype) + facts[Row.MISSED] - ratio
        facts[Row.SHIFT] = shift
        facts[Row.MISSED] = shift - facts[Row.SHIFT]
        z, r, difference, _, *scales = row_arguments(problem, chunk)
        row_kernels.gap_totals(z, r, difference, *scales, facts)  # type: ignore[call-arg]
        facts[Row.GAP] -= facts[Row.MISSED] * mass

    def _entries(
        self, problem: Problem, out: Statistics, span: Span, facts: Tensor, bits: Tensor, capacity: int, rows: bool
    ) -> Entries:
        entries = super()._entries(problem, out, span, facts, bits, capacity, rows)
        nll = out.nll[span.tokens]
        at_label = -torch.expm1(-nll)
        if problem.head.softcap is not None:
            logit = facts[Row.TOP] + facts[Row.LOG_SUM] - nll
            at_label = at_label * (1 - (logit / problem.head.softcap) ** 2).clamp(min=0)
        entries.tails.nll_l1 = facts[Row.REST] + at_label.masked_fill(~self.is_mine[span.tokens], 0)
        return entries

    def _add_single(
        self, direction: Tensor, problem: Problem, tokens: slice, out: Statistics, upstream: Upstream
    ) -> None:  # fmt: skip
        single.add_picked_(direction, self.whole.part(tokens), out, upstream)


class ShardedGpu(Sharded):
    """`local`: the backend whose kernels are taken."""

    local: Gpu

    def _of(self, problem: Problem) -> OfRank:
        return OfRank(self.local.kernels, problem)

    def _statistics(self, problem: Problem, keep_rows: bool) -> tuple[Statistics, Rows]:
        if not _has_kernels(problem):
            return super()._statistics(problem, keep_rows)
        rank = self._of(problem)
        if keep_rows and len(problem.head.weight):
            return rank.statistics(rank.mine, keep_rows=True)
        out = self.empty_statistics(problem)
        rows = chunks.empty_rows(problem, len(problem.labels)) if keep_rows else Rows()
        for kept in rows.tensors():
            if kept is not None:
                kept.zero_()
        for _ in rank._logit_chunks(rank.mine, out):
            pass
        return out, rows

    def _gradients(self, problem: Problem, upstream: UpstreamOf, needs: Needs) -> tuple[Statistics, Gradients]:
        if not _has_kernels(problem):
            return super()._gradients(problem, upstream, needs)
        out, total = self.empty_statistics(problem), self.empty_gradients(problem, needs)
        self._sweep(problem, out, upstream, total)
        return out, total

    def _sweep(self, problem: Problem, out: Statistics, upstream: UpstreamOf, total: Gradients) -> None:
        rank = self._of(problem)
        if len(problem.head.weight):
            rank._sweep(rank.mine, out, upstream, total)
            return
        for chunk, *_ in rank._logit_chunks(rank.mine, out, total):
            upstream(out.at(chunk.tokens), chunk.tokens)
            if total.hidden is not None:
                total.hidden[chunk.tokens] = 0

    def _scan(self, problem: Problem, out: Statistics, selection: Selection) -> Iterator[tuple[Any, Entries]]:
        if not _has_kernels(problem):
            yield from super()._scan(problem, out, selection)
            return
        rank = self._of(problem)
        if len(problem.head.weight):
            yield from rank.scan(rank.mine, out, selection._replace(with_rows=False))
            return
        for chunk, *_ in rank._logit_chunks(rank.mine, out):
            yield Span(chunk.tokens), no_entries(problem, len(chunk.z), selection.directions)

    def _dense_rows(self, problem: Problem, chunk: Any) -> Rows:
        if not isinstance(chunk, Span):
            return super()._dense_rows(problem, chunk)
        return self._statistics(problem.part(chunk.tokens).for_gradients(), keep_rows=True)[1]

    def _add_dense(
        self, problem: Problem, chunk: Any, out: Statistics, upstream: Upstream, total: Gradients
    ) -> None:  # fmt: skip
        if not isinstance(chunk, Span):
            super()._add_dense(problem, chunk, out, upstream, total)
            return
        part = problem.part(chunk.tokens).for_gradients()
        hidden = None if total.hidden is None else total.hidden[chunk.tokens]
        sums = Gradients(hidden, total.weight, total.bias, total.low_rank)
        self._sweep(part, self.empty_statistics(part), lambda _, at: upstream.at(at), sums)


def _has_kernels(problem: Problem) -> bool:
    """A divergence needs the normalisers of all ranks before it is summed, which no kernel is given."""
    return problem.accumulator == torch.float32 and problem.beta is None


def _logits(problem: Problem, chunk: chunks.Chunk) -> Tensor:
    """Of a chunk, in new memory."""
    return finished(problem, chunk, lambda products: products)

"""The autograd functions: save, call the backend, return. The mathematics is in the backends and in sparse/."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from . import shards
from .backends import Backend, chunks, int8
from .backends.single import picked_slopes, picked_weights
from .problem import DIFFERENTIABLE, OUTPUTS, TENSORS, Gradients, Int8, Needs, Problem, Rows, Statistics, Upstream
from .sparse import gradients as sparse_gradients
from .sparse import softmax
from .sparse.certificate import GradientReport
from .sparse.softmax import Builder, SparseSoftmax
from .sparse.weighted import Single, WeightedSparse, mostly_exact, mostly_sparse, single_rows, weigh

# Called with the report when backward has filled it in.
Publish = Callable[[GradientReport], None]
TokenLoss = Callable[[Statistics, slice], Tensor]


def _first_order(backward: Callable) -> Callable:
    """Refuse `create_graph=True`; `once_differentiable` would treat the gradient as a constant where the upstream is
    one."""

    @functools.wraps(backward)
    def call(ctx, *upstream):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_losses has no second derivatives (create_graph=True); backend='reference' has, with full logits"
            )
        batched = torch._C._functorch.is_legacy_batchedtensor  # that of is_grads_batched and vectorize=True
        if any(u is not None and batched(u) for u in upstream) and not _is_linear(ctx, upstream):
            raise NotImplementedError(
                "fused_losses has no batched backward (is_grads_batched, vectorize=True); call backward for one "
                "gradient after "
                "the other, or give backend='reference', with full logits"
            )
        return backward(ctx, *upstream)

    return call


def _is_linear(ctx, upstream: tuple[Tensor | None, ...]) -> bool:
    """Whether backward is a line of PyTorch's operations: rows are kept, and no single logits have a weight."""
    if not getattr(ctx, "keep_rows", False):
        return False
    given = upstream_of(upstream)
    return given.lse is None and given.logits_at is None


class TokenLossesFunction(torch.autograd.Function):
    """The statistics of tokens, of which nll, kl and others are differentiable, for upstream gradients that nobody
    knows yet.

    A trainable head: forward keeps the inputs, backward sweeps over the tokens again (4 GEMMs in all, 6 with a
    reference). A frozen head: forward keeps the rows ∂nll/∂x, ∂kl/∂x, ... (2 and 4 GEMMs in all), backward is
    one line, and a gather of rows of the head where single logits have upstream gradients.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, low_rank, problem: Problem, backend: Backend, grad: bool):
        ctx.set_materialize_grads(False)
        needs = Needs(*(grad and need for need in ctx.needs_input_grad[:4]))
        ctx.keep_rows = needs.hidden and not needs.head
        with _no_autocast(problem):
            out, rows = backend.statistics(problem, ctx.keep_rows)
        if ctx.keep_rows:
            ctx.save_for_backward(*problem.without_inputs().tensors(), *rows.tensors(), picked_slopes(problem, out))
            ctx.problem, ctx.backend, ctx.dtype = problem.without_tensors(), backend, hidden.dtype
        elif grad:
            ctx.save_for_backward(*problem.tensors())
            ctx.problem, ctx.backend = problem.without_tensors(), backend
        return _outputs(ctx, problem, out)

    @staticmethod
    @_first_order
    def backward(ctx, *gradients):
        upstream, saved = upstream_of(gradients), ctx.saved_tensors
        problem = ctx.problem.with_tensors(saved[:TENSORS])
        if ctx.keep_rows:
            *rows, slopes = saved[TENSORS:]
            with _no_autocast(problem):
                total = Rows(*rows).weighted(upstream)
                single = picked_weights(problem, slopes, upstream)
                if single is not None:
                    part = _single_rows(problem, ctx.backend, single)
                    total = part if total is None else total + part
            return None if total is None else total.to(ctx.dtype), *_nothing(6)
        with _no_autocast(problem):
            _, total = ctx.backend.gradients(
                problem.for_gradients(), lambda _, at: upstream.at(at), Needs(*ctx.needs_input_grad[:4])
            )
        head = problem.head
        pairs = (
            (total.hidden, problem.hidden), (total.weight, head.weight), (total.bias, head.bias),
            (total.low_rank, head.low_rank),
        )  # fmt: skip
        return *(None if part is None else part.to(like.dtype) for part, like in pairs), *_nothing(3)


class SummedLossFunction(torch.autograd.Function):
    """Σ_t loss(statistics of t): the upstream weights follow from each chunk's own statistics, so forward already
    takes the gradients, while the chunk's logits are at hand (3 GEMMs, 2 with a frozen head, one more with a
    reference). Backward scales them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, low_rank, problem: Problem, backend: Backend, grad: bool, loss: TokenLoss):
        needs = Needs(*(grad and need for need in ctx.needs_input_grad[:4]))
        sums: list[Tensor] = []

        upstream = _weights_of(loss, sums, problem)
        with _no_autocast(problem):
            if any(needs):
                _, total = backend.gradients(problem, upstream, needs)
                ctx.save_for_backward(total.hidden, total.weight, total.bias, total.low_rank)
                ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias, low_rank)]
            else:
                out, _ = backend.statistics(problem)
                sums.append(loss(out, slice(0, len(problem.labels))).sum())
        return torch.stack(sums).sum() if sums else hidden.new_zeros((), dtype=problem.accumulator)

    @staticmethod
    @_first_order
    def backward(ctx, upstream):
        return (
            *(
                None if total is None else chunks.scaled(total, upstream, dtype)  # new, so that backward may run again
                for total, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            ),
            *_nothing(4),
        )


class SparseTokenLossesFunction(torch.autograd.Function):
    """`TokenLossesFunction` with sparse-plus-rank-one gradients: 1 GEMM in all, 2 with a reference.

    Forward keeps the entries, which need no upstream gradients. With a frozen head, chunks that look too flat for that
    keep the rows ∂nll/∂x and ∂kl/∂x while their logits are at hand.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, low_rank, problem: Problem, backend: Backend, report: GradientReport,
        publish: Publish,
    ):  # fmt: skip
        ctx.set_materialize_grads(False)
        frozen = not any(ctx.needs_input_grad[1:4])
        dense: list[Rows] = []
        with _no_autocast(problem):
            out = backend.empty_statistics(problem)
            builder = Builder(problem, backend, Needs(*ctx.needs_input_grad[:4]))
            for chunk, entries in builder.scan(out):
                one = torch.ones_like(entries.tails.nll_left)
                guesses = [Upstream(nll=one), Upstream(kl=one)] if problem.has_reference else [Upstream(nll=one)]
                flat = frozen and any(mostly_exact(problem, entries, guess, None) for guess in guesses)
                if flat:
                    dense.append(backend.dense_rows(problem, chunk))
                builder.add(entries, done=flat)
                del chunk  # its buffers go before the entries are joined
            sparse = builder.finish()
            if builder.selection.threshold >= softmax.FINEST_HALF:
                sparse = sparse.halved()
            sparse = sparse.narrow()
        rows = [None if not dense or getattr(dense[0], name) is None else torch.cat([getattr(d, name) for d in dense])
                for name in ("nll", "kl")]  # fmt: skip
        report.entries, report.saved_bytes = _entries(problem, sparse.columns), sparse.nbytes + _nbytes(rows)
        ctx.save_for_backward(*problem.tensors(), picked_slopes(problem, out), *rows, *sparse.tensors())
        ctx.problem, ctx.backend = problem.without_tensors(), backend
        ctx.report, ctx.publish = report, publish
        return _outputs(ctx, problem, out)

    @staticmethod
    @_first_order
    def backward(ctx, *gradients):
        upstream = upstream_of(gradients)
        saved = ctx.saved_tensors
        problem, backend = ctx.problem.with_tensors(saved[:TENSORS]), ctx.backend
        slopes, nll_rows, kl_rows, *kept = saved[TENSORS:]
        sparse = SparseSoftmax.of_tensors(tuple(kept))
        dense = None
        with _no_autocast(problem):
            single = picked_weights(problem, slopes, upstream)
            if nll_rows is not None:
                dense = _dense_hidden(problem, backend, sparse.done, Rows(nll_rows, kl_rows), upstream, single)
            total = sparse_gradients.gradients(
                problem, backend, weigh(problem, backend, sparse, upstream, single), upstream,
                Needs(*ctx.needs_input_grad[:4]), ctx.report, dense,
            )  # fmt: skip
        ctx.publish(ctx.report)
        return total.hidden, total.weight, total.bias, total.low_rank, *_nothing(4)


class SparseSummedLossFunction(torch.autograd.Function):
    """`SummedLossFunction` with sparse-plus-rank-one gradients: 1 GEMM in all, 2 with a reference.

    The upstream weights are known in forward, so chunks too flat for a sparse softmax get their exact gradient while
    their logits are at hand (3 GEMMs, as in exact mode).
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, low_rank, problem: Problem, backend: Backend, report: GradientReport,
        publish: Publish, loss: TokenLoss,
    ):  # fmt: skip
        needs = Needs(*ctx.needs_input_grad[:4])
        sums: list[Tensor] = []
        weights_of = _weights_of(loss, sums, problem)
        weights: list[tuple[Upstream, slice]] = []
        dense: Gradients | None = None
        with _no_autocast(problem):
            out = backend.empty_statistics(problem)
            builder = Builder(problem, backend, needs)
            later: list[slice] = []  # whose weights are not wanted at once
            for chunk, entries in builder.scan(out):
                at, flat = chunk.tokens, False
                if mostly_sparse(problem, entries):
                    later.append(at)
                else:
                    here = out.at(at)
                    upstream = weights_of(here, at)
                    single = picked_weights(problem.part(at), picked_slopes(problem, here), upstream)
                    flat = mostly_exact(problem, entries, upstream, single)
                    if flat:
                        if dense is None:
                            dense = backend.empty_gradients(problem, needs)
                        backend.add_dense(problem, chunk, here, upstream, dense)
                    weights.append((upstream, at))
                builder.add(entries, done=flat)
                del chunk  # its buffers go before the entries are joined
            weights += [(weights_of(out.at(at), at), at) for at in _merged(later)]
            sparse, half = builder.finish(), builder.selection.threshold >= softmax.FINEST_HALF
            del builder, entries
            upstream = _joined(weights, out)
            single = picked_weights(problem, picked_slopes(problem, out), upstream)
            kept = weigh(problem, backend, sparse, upstream, single, half).narrow()
            del sparse
        weights_saved = (upstream.nll, upstream.kl, upstream.lse, upstream.logits_at)
        dense = dense or Gradients()
        sums_there = (dense.hidden, dense.weight, dense.bias, dense.low_rank)
        report.entries = _entries(problem, kept.columns)
        report.saved_bytes = kept.nbytes + _nbytes((*weights_saved, *sums_there))
        ctx.save_for_backward(*problem.tensors(), *weights_saved, *sums_there, *kept.tensors())
        ctx.problem, ctx.backend = problem.without_tensors(), backend
        ctx.report, ctx.publish = report, publish
        return torch.stack(sums).sum()

    @staticmethod
    @_first_order
    def backward(ctx, factor):
        saved = ctx.saved_tensors
        problem = ctx.problem.with_tensors(saved[:TENSORS])
        upstream, rest = Upstream(*saved[TENSORS : TENSORS + 4]), saved[TENSORS + 4 :]
        dense = Gradients(*rest[:4]) if any(t is not None for t in rest[:4]) else None
        with _no_autocast(problem):
            total = sparse_gradients.gradients(
                problem, ctx.backend, WeightedSparse.of_tensors(rest[4:]), upstream, Needs(*ctx.needs_input_grad[:4]),
                ctx.report, dense, float(factor),
            )  # fmt: skip
        ctx.publish(ctx.report)
        return total.hidden, total.weight, total.bias, total.low_rank, *_nothing(5)


def with_scan(problem: Problem, backend: str, gradient: bool, report: GradientReport) -> Problem:
    """With products of 8-bit numbers where they were asked for and can be had; else the report says why not."""
    if problem.int8 is None or not len(problem.labels):
        return replace(problem, int8=None)
    why = int8.missing(problem, backend)
    if why is None and gradient and problem.tolerance is None:
        why = "gradients are exact; 8 bits are for those of gradient='sparse'"
    report.scan_note = why
    return replace(problem, int8=Int8() if why is None else None)


def upstream_of(gradients: Iterable[Tensor | None]) -> Upstream:
    """From the gradients of a function's outputs."""
    named = dict(zip(OUTPUTS, gradients, strict=True))
    return Upstream(**{name: named[name] for name in DIFFERENTIABLE})


def _outputs(ctx, problem: Problem, out: Statistics) -> tuple[Tensor | None, ...]:
    """All statistics, some of which have a gradient."""
    outputs = {name: getattr(out, name) for name in OUTPUTS}
    differentiable = set(DIFFERENTIABLE) - (set() if problem.entropy_gradient else {"entropy"})
    ctx.mark_non_differentiable(*(v for name, v in outputs.items() if v is not None and name not in differentiable))
    return tuple(outputs.values())


def _nothing(count: int) -> tuple[None, ...]:
    return (None,) * count


def _nbytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def _entries(problem: Problem, columns: Tensor) -> int:
    """How many there are, on all ranks of a head that is spread over them."""
    if problem.head.shard is None:
        return len(columns)
    return int(shards.total(problem.head.shard, torch.tensor(len(columns), device=columns.device)))


def _single_rows(problem: Problem, backend: Backend, single: Single) -> Tensor:
    """∂/∂x of weighted single logits, [N, D]; over all ranks, of a head that is spread over them."""
    rows = single_rows(problem, backend, single).mul_(problem.head.logit_scale)
    if problem.head.shard is not None:
        shards.summed_(problem.head.shard.group, rows)
    return rows


def _dense_hidden(
    problem: Problem, backend: Backend, done: Tensor, rows: Rows, upstream: Upstream, single: Single | None
) -> Gradients:  # fmt: skip
    """The gradient of the hidden states of the tokens that are done."""
    hidden = torch.zeros_like(problem.hidden, dtype=problem.accumulator)
    index = done.nonzero().flatten()
    part = rows.weighted(upstream.rows(index))
    if part is not None:
        hidden[index] = part
    if single is not None:
        some = (single[0][index], single[1][index])
        hidden[index] += _single_rows(problem, backend, some)
    return Gradients(hidden=hidden)


def _weights_of(loss: TokenLoss, sums: list[Tensor], problem: Problem) -> Callable[[Statistics, slice], Upstream]:
    """A function of a chunk's statistics that appends Σ loss to `sums` and returns its derivatives."""
    names = [name for name in DIFFERENTIABLE if name != "entropy" or problem.entropy_gradient]

    def upstream(out: Statistics, at: slice) -> Upstream:
        leaves = {}
        given = copy.copy(out)
        for name in names:
            values = getattr(out, name)
            if values is not None:
                leaves[name] = values.detach().requires_grad_()
                setattr(given, name, leaves[name])
        with torch.enable_grad():
            total = loss(given, at).sum()
            sums.append(total.detach())
            if not total.requires_grad:
                return Upstream()
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return Upstream(**dict(zip(leaves, found, strict=True)))

    return upstream


def _merged(parts: list[slice]) -> list[slice]:
    """Ascending slices, those that follow one another as one."""
    merged: list[slice] = []
    for part in parts:
        if merged and merged[-1].stop == part.start:
            merged[-1] = slice(merged[-1].start, part.stop)
        else:
            merged.append(part)
    return merged


def _joined(parts: list[tuple[Upstream, slice]], out: Statistics) -> Upstream:
    """The chunks' upstream weights over all tokens, None where no chunk has any."""
    whole = Upstream()
    for name in DIFFERENTIABLE:
        if any(getattr(part, name) is not None for part, _ in parts):
            values = torch.zeros_like(getattr(out, name))
            for part, at in parts:
                if getattr(part, name) is not None:
                    values[at] = getattr(part, name)
            setattr(whole, name, values)
    return whole


def _no_autocast(problem: Problem) -> AbstractContextManager:
    return torch.autocast(problem.labels.device.type, enabled=False)

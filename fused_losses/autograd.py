"""The autograd functions: save, call the backend, return. The mathematics is in the backends and in sparse/."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .backends import Backend
from .problem import TENSORS, Gradients, Problem, Statistics
from .sparse import gradients as sparse_gradients
from .sparse import softmax
from .sparse.certificate import GradientReport, mostly_exact
from .sparse.softmax import Builder, SparseSoftmax

# Called with the report when backward has filled it in.
Publish = Callable[[GradientReport], None]
TokenLoss = Callable[[Statistics, slice], Tensor]


def _first_order(backward: Callable) -> Callable:
    """Refuse `create_graph=True`; `once_differentiable` would treat the gradient as a constant where the upstream is one."""

    @functools.wraps(backward)
    def call(ctx, *upstream):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_losses has no second derivatives (create_graph=True); backend='reference' has, with full logits"
            )
        batched = torch._C._functorch.is_legacy_batchedtensor  # that of is_grads_batched and vectorize=True
        if not getattr(ctx, "keep_rows", False) and any(u is not None and batched(u) for u in upstream):
            raise NotImplementedError(
                "fused_losses has no batched backward (is_grads_batched, vectorize=True); call backward for one "
                "gradient after "
                "the other, or give backend='reference', with full logits"
            )
        return backward(ctx, *upstream)

    return call


class TokenLossesFunction(torch.autograd.Function):
    """nll and kl per token, for upstream gradients that nobody knows yet.

    A trainable head: forward keeps the inputs, backward sweeps over the tokens again (4 GEMMs in all, 6 with a
    reference). A frozen head: forward keeps the rows ∂nll/∂x and ∂kl/∂x (2 and 4 GEMMs in all), backward is
    one line.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, low_rank, problem: Problem, backend: Backend, grad: bool):
        ctx.set_materialize_grads(False)
        need_hidden, *need_head = (grad and need for need in ctx.needs_input_grad[:4])
        ctx.keep_rows = need_hidden and not any(need_head)
        with _no_autocast(problem):
            out, rows = backend.statistics(problem, ctx.keep_rows)
        if ctx.keep_rows:
            ctx.save_for_backward(rows.nll, rows.kl)
            ctx.dtype = hidden.dtype
        elif grad:
            ctx.save_for_backward(*problem.tensors())
            ctx.problem, ctx.backend = problem.without_tensors(), backend
        return _outputs(ctx, out)

    @staticmethod
    @_first_order
    def backward(ctx, a, b, *_):
        if ctx.keep_rows:
            nll_rows, kl_rows = ctx.saved_tensors
            parts = [w[:, None] * rows for w, rows in ((a, nll_rows), (b, kl_rows)) if w is not None]
            hidden = sum(parts).to(ctx.dtype) if parts else None
            return hidden, None, None, None, None, None, None
        problem = ctx.problem.with_tensors(ctx.saved_tensors)
        with _no_autocast(problem):
            _, total = ctx.backend.gradients(
                problem,
                lambda _, at: (None if a is None else a[at], None if b is None else b[at]),
                *ctx.needs_input_grad[:4],
            )
        head = problem.head
        pairs = (
            (total.hidden, problem.hidden), (total.weight, head.weight), (total.bias, head.bias),
            (total.low_rank, head.low_rank),
        )  # fmt: skip
        return *(None if part is None else part.to(like.dtype) for part, like in pairs), None, None, None


class SummedLossFunction(torch.autograd.Function):
    """Σ_t loss(statistics of t): the upstream weights follow from each chunk's own statistics, so forward already
    takes the gradients, while the chunk's logits are at hand (3 GEMMs, 2 with a frozen head, one more with a
    reference). Backward scales them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, low_rank, problem: Problem, backend: Backend, grad: bool, loss: TokenLoss):
        needs = tuple(grad and need for need in ctx.needs_input_grad[:4])
        sums: list[Tensor] = []

        upstream = _weights_of(loss, sums)
        with _no_autocast(problem):
            if any(needs):
                _, total = backend.gradients(problem, upstream, *needs)
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
            *map(lambda total, dtype: _scaled(total, upstream, dtype), ctx.saved_tensors, ctx.dtypes),
            None,
            None,
            None,
            None,
        )


class SparseTokenLossesFunction(torch.autograd.Function):
    """`TokenLossesFunction` with sparse-plus-rank-one gradients: 1 GEMM in all, 2 with a reference.

    Forward keeps the entries, which need no upstream gradients. With a frozen head, chunks that look too flat for that keep
    the rows ∂nll/∂x and ∂kl/∂x while their logits are at hand.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, low_rank, problem: Problem, backend: Backend, report: GradientReport,
        publish: Publish,
    ):  # fmt: skip
        ctx.set_materialize_grads(False)
        frozen = not any(ctx.needs_input_grad[1:4])
        dense: list[Gradients] = []
        with _no_autocast(problem):
            out = backend.empty_statistics(problem)
            builder = Builder(problem, backend, rows=ctx.needs_input_grad[0])
            for chunk, entries in builder.scan(out):
                one = torch.ones_like(entries.tails.nll)
                guesses = [(one, None), (None, one)] if problem.has_reference else [(one, None)]
                flat = frozen and any(mostly_exact(entries, a, b, problem.tolerance) for a, b in guesses)
                if flat:
                    dense.append(backend.dense_rows(problem, chunk))
                builder.add(entries, done=flat)
                del chunk  # its buffers go before the entries are joined
            sparse = builder.finish()
            if builder.threshold >= softmax.FINEST_HALF:
                sparse = sparse.halved()
        rows = [None if not dense or getattr(dense[0], name) is None else torch.cat([getattr(d, name) for d in dense])
                for name in ("nll", "kl")]  # fmt: skip
        report.entries, report.saved_bytes = len(sparse.columns), sparse.nbytes + _nbytes(rows)
        ctx.save_for_backward(*problem.tensors(), *rows, *sparse.tensors())
        ctx.problem, ctx.backend = problem.without_tensors(), backend
        ctx.report, ctx.publish = report, publish
        return _outputs(ctx, out)

    @staticmethod
    @_first_order
    def backward(ctx, a, b, *_):
        saved = ctx.saved_tensors
        problem, sparse = ctx.problem.with_tensors(saved[:TENSORS]), SparseSoftmax.of_tensors(saved[TENSORS + 2 :])
        nll_rows, kl_rows = saved[TENSORS : TENSORS + 2]
        dense = None
        if nll_rows is not None:
            parts = [w[sparse.done, None] * rows for w, rows in ((a, nll_rows), (b, kl_rows)) if w is not None]
            dense = Gradients(hidden=torch.zeros_like(problem.hidden, dtype=problem.accumulator))
            if parts:
                dense.hidden[sparse.done] = sum(parts)
        with _no_autocast(problem):
            total = sparse_gradients.gradients(
                problem, ctx.backend, sparse, a, b, ctx.needs_input_grad[:4], ctx.report, dense
            )
        ctx.publish(ctx.report)
        return total.hidden, total.weight, total.bias, total.low_rank, None, None, None, None


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
        needs = ctx.needs_input_grad[:4]
        sums: list[Tensor] = []
        upstream = _weights_of(loss, sums)
        weights: list[tuple[list[Tensor | None], slice]] = []
        dense: Gradients | None = None
        with _no_autocast(problem):
            out = backend.empty_statistics(problem)
            builder = Builder(problem, backend, rows=ctx.needs_input_grad[0])
            for chunk, entries in builder.scan(out):
                a, b = upstream(out.at(chunk.tokens), chunk.tokens)
                flat = mostly_exact(entries, a, b, problem.tolerance)
                if flat:
                    if dense is None:
                        dense = backend.empty_gradients(problem, *needs)
                    backend.add_dense(problem, chunk, a, b, dense)
                builder.add(entries, done=flat)
                weights.append(([a, b], chunk.tokens))
                del chunk  # its buffers go before the entries are joined
            sparse = builder.finish()
        del builder, entries
        a, b = (_joined([(pair[i], at) for pair, at in weights], out.nll) for i in (0, 1))
        if sparse.kl is not None:
            sparse = sparse.with_weights(a, b)
        dense = dense or Gradients()
        sums_there = (dense.hidden, dense.weight, dense.bias, dense.low_rank)
        report.entries, report.saved_bytes = len(sparse.columns), sparse.nbytes + _nbytes((a, b, *sums_there))
        ctx.save_for_backward(*problem.tensors(), a, b, *sums_there, *sparse.tensors())
        ctx.problem, ctx.backend = problem.without_tensors(), backend
        ctx.report, ctx.publish = report, publish
        return torch.stack(sums).sum()

    @staticmethod
    @_first_order
    def backward(ctx, upstream):
        saved = ctx.saved_tensors
        problem, sparse = ctx.problem.with_tensors(saved[:TENSORS]), SparseSoftmax.of_tensors(saved[TENSORS + 6 :])
        a, b, *parts = saved[TENSORS : TENSORS + 6]
        dense = Gradients(*parts) if any(t is not None for t in parts) else None
        with _no_autocast(problem):
            if sparse.tails.error is None:
                sparse = sparse.with_weights(a, b)
            total = sparse_gradients.gradients(
                problem, ctx.backend, sparse, a, b, ctx.needs_input_grad[:4], ctx.report, dense, upstream
            )
        ctx.publish(ctx.report)
        return total.hidden, total.weight, total.bias, total.low_rank, None, None, None, None, None


def _outputs(ctx, out: Statistics) -> tuple[Tensor | None, ...]:
    """All statistics, of which nll and kl have a gradient."""
    fixed = (out.prediction, out.entropy, out.reference_nll, out.reference_entropy, out.topk_entropy)
    ctx.mark_non_differentiable(*(v for v in fixed if v is not None))
    return out.nll, out.kl, *fixed


def _nbytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def _weights_of(loss: TokenLoss, sums: list[Tensor]) -> Callable[[Statistics, slice], tuple]:
    """A function of a chunk's statistics that appends Σ loss to `sums` and returns its derivatives by nll and kl."""

    def upstream(out: Statistics, at: slice) -> tuple[Tensor | None, Tensor | None]:
        leaves = [out.nll.detach().requires_grad_()]
        out.nll = leaves[0]
        if out.kl is not None:
            leaves.append(out.kl.detach().requires_grad_())
            out.kl = leaves[1]
        with torch.enable_grad():
            total = loss(out, at).sum()
            sums.append(total.detach())
            ab = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else (None, None)
        return ab if len(ab) == 2 else (ab[0], None)

    return upstream


def _joined(parts: list[tuple[Tensor | None, slice]], like: Tensor) -> Tensor | None:
    """One vector over all tokens of the chunks' upstream weights, None where no chunk has any."""
    if all(part is None for part, _ in parts):
        return None
    whole = torch.zeros_like(like)
    for part, at in parts:
        if part is not None:
            whole[at] = part
    return whole


def _scaled(total: Tensor | None, upstream: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """A new tensor, so backward may run again. One rounding: a scalar tensor would be cast to a half dtype first."""
    if total is None:
        return None
    return torch.mul(total, upstream.reshape((1,) * total.dim()), out=torch.empty_like(total, dtype=dtype))


def _no_autocast(problem: Problem) -> AbstractContextManager:
    return torch.autocast(problem.hidden.device.type, enabled=False)

"""The gradients that follow from a sparse softmax: two sparse products, and exact gradients where the certificate asks for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..backends import Backend
from ..backends.torch import by_column
from ..problem import Gradients, Problem
from .certificate import GradientReport, select
from .softmax import SparseSoftmax


def gradients(
    problem: Problem,
    backend: Backend,
    sparse: SparseSoftmax,
    a: Tensor | None,
    b: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
    report: GradientReport,
    dense: Gradients | None = None,
    factor: Tensor | None = None,
) -> Gradients:
    """Σ_t a_t ∂nll_t + b_t ∂kl_t for hidden, weight, bias and low_rank, in the inputs' dtypes.

    `dense`: that of the tokens that are done. `factor`: a common factor of all weights, where `sparse` has them in itself
    (`with_weights`) and so has `dense`.
    """
    dense_scale = 1.0 if factor is None or dense is None else float(factor)
    if factor is not None:
        factor = factor.to(sparse.tails.nll.dtype).expand_as(sparse.tails.nll)
        a, b = (None if w is None else w * factor for w in (a, b))
    need_hidden, need_weight, need_bias, need_low_rank = needs
    head = problem.head
    if a is None and b is None:
        a = torch.zeros_like(sparse.tails.nll)
    error, norm = sparse.shares(a, b) if factor is None else sparse.shares(factor, None)
    exact, report.bound = select(torch.where(sparse.done, 0, error), norm, sparse.full, problem.tolerance)
    todo = int((~sparse.done).sum())
    if len(exact) > todo / 2:
        exact, report.bound = (~sparse.done).nonzero().flatten(), 0.0 * report.bound
    report.exact_tokens = len(exact) + len(sparse.done) - todo

    out = dense
    if len(exact):
        out = _exact(problem, backend, exact, a, b, needs, dense, dense_scale)
        dense_scale = 1.0
    if len(exact) == todo:
        assert out is not None or not todo
        return _finished(problem, out, dense_scale, needs)

    skip = sparse.done.clone()
    skip[exact] = True
    scale = head.logit_scale
    if factor is not None:
        a, b = factor, None
    a, b = (None if w is None else torch.where(skip, 0, w * scale) for w in (a, b))
    values = sparse.values(a, b)
    parts = [w * tail for w, tail in ((a, sparse.tails.nll), (b, sparse.tails.kl)) if w is not None]
    tail = torch.where(skip, 0, sum(parts))
    result = Gradients()
    rows, dim = problem.hidden.to(problem.dtype), head.weight.shape[1]
    if need_hidden:
        factors = [f.to(problem.dtype) for f in (head.weight, head.low_rank) if f is not None]
        means = [backend.weighted_sum(factor, sparse.profile) for factor in factors]
        if sparse.nll_rows is not None:
            result.hidden = sparse.rows(a, b, tail, torch.cat(means)).to(problem.hidden.dtype)
        else:
            products = [
                backend.rows_product(
                    sparse.offsets, sparse.columns, values, factor, tail, mean, problem.hidden.dtype
                )
                for factor, mean in zip(factors, means, strict=True)
            ]  # fmt: skip
            result.hidden = products[0] if len(products) == 1 else torch.cat(products, 1)
        if out is not None and out.hidden is not None:
            at = skip.nonzero().flatten()
            result.hidden.index_copy_(0, at, (out.hidden[at] * dense_scale).to(result.hidden.dtype))

    def columns_product(matrix: Tensor, base: Tensor | None, dtype: torch.dtype) -> Tensor:
        return backend.columns_product(
            sparse.offsets, sparse.columns, values, matrix, sparse.profile, backend.weighted_sum(matrix, tail),
            base, dense_scale, dtype,
        )  # fmt: skip

    if need_weight:
        result.weight = columns_product(rows[:, :dim], None if out is None else out.weight, head.weight.dtype)
    if need_low_rank:
        result.low_rank = columns_product(rows[:, dim:], None if out is None else out.low_rank, head.low_rank.dtype)
    if need_bias:
        bias = sparse.profile * tail.sum()
        starts, _, order = by_column(sparse.offsets, sparse.columns, len(bias))
        bias += torch.segment_reduce(values[order], "sum", offsets=starts, initial=0)
        if out is not None and out.bias is not None:
            bias.add_(out.bias, alpha=dense_scale)
        result.bias = bias.to(head.bias.dtype)
    return result


def _exact(
    problem: Problem, backend: Backend, exact: Tensor, a: Tensor | None, b: Tensor | None,
    needs: tuple[bool, bool, bool, bool], dense: Gradients | None, dense_scale: float,
) -> Gradients:  # fmt: skip
    """The exact gradients of some tokens, their logits computed once more, plus what is there already; hidden at its rows."""
    upstream: Callable = lambda _, at: tuple(None if w is None else w[exact[at]] for w in (a, b))  # noqa: E731
    _, some = backend.gradients(replace(problem.rows(exact), wanted=frozenset()), upstream, *needs)
    out = Gradients(weight=some.weight, bias=some.bias, low_rank=some.low_rank)
    if needs[0]:
        out.hidden = torch.zeros_like(problem.hidden, dtype=some.hidden.dtype)
        if dense is not None and dense.hidden is not None:
            torch.mul(dense.hidden, dense_scale, out=out.hidden)
        out.hidden[exact] = some.hidden
    if dense is not None:
        pairs = (out.weight, dense.weight), (out.bias, dense.bias), (out.low_rank, dense.low_rank)
        for total, before in pairs:
            if total is not None and before is not None:
                total.add_(before, alpha=dense_scale)
    return out


def _finished(
    problem: Problem, total: Gradients | None, scale: float, needs: tuple[bool, bool, bool, bool]
) -> Gradients:
    """New tensors of the inputs' dtypes, so that backward may run again."""
    like = (problem.hidden, problem.head.weight, problem.head.bias, problem.head.low_rank)
    parts = (None,) * 4 if total is None else (total.hidden, total.weight, total.bias, total.low_rank)
    results: list[Tensor | None] = []
    for need, part, tensor in zip(needs, parts, like, strict=True):
        if not need:
            results.append(None)
        elif part is None:
            results.append(torch.zeros_like(tensor))
        else:
            results.append(torch.mul(part, scale, out=torch.empty_like(part, dtype=tensor.dtype)))
    return Gradients(*results)

"""The gradients that follow from a sparse softmax: two sparse products, and exact gradients where the certificate asks
for them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Backend
from ..backends.chunks import by_column
from ..problem import Gradients, Needs, Problem, Segments, Upstream
from .certificate import GradientReport, select
from .weighted import WeightedSparse, sum_of_rows


def gradients(
    problem: Problem, backend: Backend, sparse: WeightedSparse, upstream: Upstream, needs: Needs,
    report: GradientReport, dense: Gradients | None = None, factor: float = 1.0,
) -> Gradients:  # fmt: skip
    """The gradient of hidden, weight, bias and low_rank, in the inputs' dtypes, times `factor`.

    `upstream`: the weights that are in `sparse`. `dense`: the gradient of the tokens that are done.
    """
    exact, todo = choose_exact(problem, sparse, report, factor)
    scale = factor
    if len(exact):
        dense = exact_part(problem, backend, exact, upstream, needs, dense, factor)
        scale = 1.0
    if len(exact) == todo:
        assert dense is not None or not todo
        return _finished(problem, dense, scale, needs)
    skip = sparse.done.clone()
    skip[exact] = True
    return sparse_part(problem, backend, sparse, skip, needs, dense, scale, factor)


def choose_exact(
    problem: Problem, sparse: WeightedSparse, report: GradientReport, factor: float
) -> tuple[Tensor, int]:  # fmt: skip
    """The tokens that must get exact gradients, and how many are left to do; notes both and the bound in the report."""
    error = torch.where(sparse.done, 0, sparse.error * abs(factor))
    exact, report.bound = select(error, sparse.norm * abs(factor), sparse.full, problem.tolerance)
    todo = int((~sparse.done).sum())
    if len(exact) > todo / 2:
        exact, report.bound = (~sparse.done).nonzero().flatten(), 0.0 * report.bound
    report.exact_tokens = len(exact) + len(sparse.done) - todo
    return exact, todo


def exact_part(
    problem: Problem, backend: Backend, exact: Tensor, upstream: Upstream, needs: Needs, dense: Gradients | None,
    factor: float,
) -> Gradients:  # fmt: skip
    """The exact gradients of some tokens, their logits computed once more, plus what is there already; hidden at its
    rows."""
    weights = upstream.rows(exact).each(lambda w: w * factor)
    _, some = backend.gradients(problem.rows(exact).for_gradients(), lambda _, at: weights.at(at), needs)
    out = Gradients(weight=some.weight, bias=some.bias, low_rank=some.low_rank)
    if needs.hidden:
        out.hidden = torch.zeros_like(problem.hidden, dtype=some.hidden.dtype)
        if dense is not None and dense.hidden is not None:
            torch.mul(dense.hidden, factor, out=out.hidden)
        out.hidden[exact] = some.hidden
    if dense is not None:
        pairs = (out.weight, dense.weight), (out.bias, dense.bias), (out.low_rank, dense.low_rank)
        for total, before in pairs:
            if total is not None and before is not None:
                total.add_(before, alpha=factor)
    return out


def sparse_part(
    problem: Problem, backend: Backend, sparse: WeightedSparse, skip: Tensor, needs: Needs, dense: Gradients | None,
    dense_scale: float, factor: float,
) -> Gradients:  # fmt: skip
    """Two sparse products and two rank-one updates; tokens that are skipped are in `dense`, to be scaled."""
    head = problem.head
    weight = torch.where(skip, 0, sparse.left.new_full(skip.shape, factor * head.logit_scale))
    segments, left = sparse.segments(weight), torch.where(skip, 0, sparse.left * weight)
    result = Gradients()
    rows, dim = problem.hidden.to(problem.dtype), head.weight.shape[1]
    if needs.hidden:
        factors = [f.to(problem.dtype) for f in (head.weight, head.low_rank) if f is not None]
        means = [backend.weighted_sum(part, sparse.profile) for part in factors]
        if sparse.rows is not None:
            result.hidden = sum_of_rows([(weight, sparse.rows)], left, torch.cat(means)).to(problem.hidden.dtype)
        else:
            products = [
                backend.rows_product(segments, part, left, mean, problem.hidden.dtype)
                for part, mean in zip(factors, means, strict=True)
            ]
            result.hidden = products[0] if len(products) == 1 else torch.cat(products, 1)
        if dense is not None and dense.hidden is not None:
            at = skip.nonzero().flatten()
            result.hidden.index_copy_(0, at, (dense.hidden[at] * dense_scale).to(result.hidden.dtype))

    def columns_product(matrix: Tensor, base: Tensor | None, dtype: torch.dtype) -> Tensor:
        mean = backend.weighted_sum(matrix, left)
        return backend.columns_product(segments, matrix, sparse.profile, mean, base, dense_scale, dtype)

    if needs.weight:
        result.weight = columns_product(rows[:, :dim], None if dense is None else dense.weight, head.weight.dtype)
    if needs.low_rank:
        result.low_rank = columns_product(rows[:, dim:], None if dense is None else dense.low_rank, head.low_rank.dtype)
    if needs.bias:
        result.bias = _bias(segments, sparse.profile * left.sum(), dense, dense_scale).to(head.bias.dtype)
    return result


def _bias(segments: Segments, rest: Tensor, dense: Gradients | None, dense_scale: float) -> Tensor:
    starts, _, order = by_column(segments.offsets, segments.columns, len(rest))
    rest += torch.segment_reduce(segments.values[order], "sum", offsets=starts, initial=0)
    if dense is not None and dense.bias is not None:
        rest.add_(dense.bias, alpha=dense_scale)
    return rest


def _finished(problem: Problem, total: Gradients | None, scale: float, needs: Needs) -> Gradients:
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

"""The gradients that follow from a sparse softmax: two sparse products, and exact gradients where the certificate asks
for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import shards
from ..backends import Backend
from ..backends.chunks import by_column, scaled
from ..problem import Gradients, Needs, Problem, Segments, Upstream
from ..shards import Shard
from .certificate import L1_SHARE, GradientReport, fewest, relative_bound, select
from .spectrum import SKETCH_FACTORS, norm_bound
from .weighted import WeightedSparse, sum_of_rows

# So often tokens are chosen by the norm of dx as it is then; after that all are exact.
ATTEMPTS = 4
# Rows of the weight's gradient of which its norm is taken: those with the largest entries have nearly all of it.
MOST_ROWS = 4096
AT_A_TIME = 1 << 20  # numbers
USUAL = 1e12  # up to here, and from one over it on, squares of numbers and their sums are within the range of float32


@dataclass
class _Call:
    """What belongs to one backward."""

    problem: Problem
    backend: Backend
    sparse: WeightedSparse
    upstream: Upstream  # the weights that are in `sparse`
    needs: Needs
    factor: float

    @property
    def scale(self) -> float:
        """Of a gradient by the logits before logit_scale."""
        return self.factor * self.problem.head.logit_scale


@dataclass
class _Done:
    """The gradient of the tokens that are exact, to be multiplied by `scale`. `total` None: there are none."""

    total: Gradients | None
    scale: float
    tokens: Tensor  # [N] bool


def gradients(
    problem: Problem, backend: Backend, sparse: WeightedSparse, upstream: Upstream, needs: Needs,
    report: GradientReport, dense: Gradients | None = None, factor: float = 1.0,
) -> Gradients:  # fmt: skip
    """The gradient of hidden, weight, bias and low_rank, in the inputs' dtypes, times `factor`.

    `upstream`: the weights that are in `sparse`. `dense`: the gradient of the tokens that are done.
    """
    call = _Call(problem, backend, sparse, upstream, needs, factor)
    error = torch.where(sparse.done, 0, sparse.error * abs(factor))
    heavy, _ = select(error, sparse.norm * abs(factor), sparse.full, L1_SHARE * problem.tolerance)
    done, hidden = _with_exact(call, _Done(dense, factor, sparse.done), heavy), None
    if needs.hidden and sparse.low is not None and not bool(done.tokens.all()):
        hidden, done, report.hidden_bound = _held_to_hidden_bound(call, done)
    report.exact_tokens = int(done.tokens.sum())
    report.bound = _l1_bound(sparse, done.tokens)
    if not math.isfinite(factor) or not (dense is None or _is_finite(dense, sparse.done)):
        report.bound = math.nan
        report.hidden_bound = None if report.hidden_bound is None else math.nan
    if report.exact_tokens == len(done.tokens):
        report.hidden_bound = report.bound if needs.hidden else None
        report.weight_bound = report.bound if needs.weight else None
        return _finished(problem, done.total, done.scale, needs)
    result = _sparse_part(call, done, hidden)
    if needs.weight and sparse.row_error is not None:
        report.weight_bound = _weight_bound(call, done.tokens, result.weight)
    return result


def _is_finite(total: Gradients, done: Tensor) -> bool:
    """As the gradient of the hidden states says, or one of the others where that is not wanted."""
    parts = (None if total.hidden is None else total.hidden[done], total.weight, total.low_rank, total.bias)
    some = next(part for part in parts if part is not None)
    return not some.numel() or bool(torch.stack(torch.aminmax(some)).isfinite().all())


def _held_to_hidden_bound(call: _Call, done: _Done) -> tuple[Tensor, _Done, float]:
    """dx, exact for the tokens that have to be, and the bound that it then has."""
    sparse, tolerance = call.sparse, call.problem.tolerance
    squares = (sparse.hidden_error * abs(call.scale)).double().square()
    finite = bool((squares.isfinite() & sparse.norm.isfinite()).all())
    hidden = _sparse_hidden(call, done)
    for attempt in range(ATTEMPTS + 1):
        error = torch.where(done.tokens, 0, squares)
        joined = _joined(call.problem, hidden)
        rows = _squares_of_rows(joined).nan_to_num(0, 0, 0)
        total, norm = torch.stack((error.sum(), rows.sum())).tolist()
        if not USUAL**-2 <= norm <= USUAL**2:
            norm = float(_squares_of_rows(joined.double()).nan_to_num(0, 0, 0).sum())
        limit = (tolerance / (1 + tolerance)) ** 2 * norm
        if total <= limit:
            break
        exact, _ = fewest(error, ~error.isfinite(), limit if attempt < ATTEMPTS else -1.0)
        done = _with_exact(call, done, exact)
        hidden[done.tokens] = done.total.hidden[done.tokens].to(hidden.dtype) * done.scale
    bound = relative_bound(math.sqrt(total), math.sqrt(norm)) if finite else math.nan
    return hidden.to(call.problem.hidden.dtype), done, bound


def _joined(problem: Problem, hidden: Tensor) -> Tensor:
    """The gradient of the hidden states, from that of [x, u] with u = x Aᵀ; [x, u] themselves where A is not known."""
    a = problem.low_rank_inputs
    if a is None:
        return hidden
    dim = a.shape[1]
    return torch.addmm(hidden[:, :dim], hidden[:, dim:], a.to(hidden.dtype))


def _squares_of_rows(matrix: Tensor) -> Tensor:
    """[N] float64 ‖row‖²."""
    if _runs_behind(matrix):  # where fp32 sums go by trees, and a matrix of squares would be the largest of all
        return torch.linalg.vector_norm(matrix, dim=1).double().square()
    # A few rows at a time: the memory of more would be new, and its pages would take longer than this.
    parts = matrix.split(max(1, AT_A_TIME // matrix.shape[1]))
    return torch.cat([rows.square().sum(1, dtype=torch.float64) for rows in parts])


def _l1_bound(sparse: WeightedSparse, exact: Tensor) -> float:
    """What the relative error in L1 norm of the gradient of all logits is at most."""
    error, norm = torch.where(exact, 0, sparse.error).double(), sparse.norm.double()
    finite = (sparse.error.isfinite() & norm.isfinite()) | sparse.done
    numbers = (error.sum(), norm.clamp(min=0).sum(), finite.all().double())
    error_sum, total, all_finite = torch.stack(numbers).tolist()
    if not all_finite:
        return math.nan
    return error_sum / total if error_sum and total > 0 else 0.0


def _weight_bound(call: _Call, exact: Tensor, weight: Tensor) -> float | None:
    """From a bound of the error, and the norm of the gradient or of its largest rows. With what its dtype rounds."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    bounds = torch.stack([n.double() for n in (_weight_error(call, exact), _weight_norm(call, weight, wide))])
    error, norm = bounds.tolist()
    if not 1 / USUAL <= norm <= USUAL:
        norm = float(_weight_norm(call, weight, torch.float64))
    shard = call.problem.head.shard
    if shard is not None:
        square = torch.tensor(norm * norm, dtype=torch.float64, device=weight.device)
        norm = math.sqrt(float(shards.total(shard, square)))
    if not math.isfinite(error + norm):
        return math.nan
    bound = relative_bound(error, norm)
    return bound + torch.finfo(weight.dtype).eps / 2 if bound < math.inf else None


def _weight_error(call: _Call, exact: Tensor) -> Tensor:
    """With a sketch `SKETCH_FACTORS` times what that says; what is rounded by row comes on top.

    Else ‖Eᵀx‖ = ‖(R⁻¹E)ᵀ R x‖ ≤ ‖R⁻¹E‖ · the largest singular value of R x, with R² the norms of the rows of E, so that
    tokens with little error do not count.
    """
    sparse = call.sparse
    rows = call.problem.hidden[:, : call.problem.head.weight.shape[1]]
    errors = torch.where(exact, 0, sparse.row_error * abs(call.scale))
    if sparse.sketch is None:
        largest = errors.amax()
        each = torch.where(largest > 0, errors / largest, 0)
        return largest * each.sum(dtype=torch.float64).sqrt() * norm_bound(rows, each.sqrt())
    sketch = torch.where(exact[:, None], 0, sparse.sketch * call.scale)
    # Both with numbers up to 1, so that squares stay within the range.
    longest, largest = (
        t.abs().amax().to(sketch.dtype).clamp(min=torch.finfo(sketch.dtype).tiny) for t in (rows, sketch)
    )
    sketch, product = sketch / largest, sketch.new_zeros(rows.shape[1], sketch.shape[1])
    rounded = product.new_zeros((), dtype=torch.float64)
    few = max(1, AT_A_TIME // rows.shape[1])
    for part, some, error in zip(rows.split(few), sketch.split(few), errors.split(few), strict=True):
        part = part.to(sketch.dtype) / longest
        product.addmm_(part.t(), some)
        rounded += (torch.linalg.vector_norm(part, dim=1) * error).sum(dtype=torch.float64)
    product = shards.total(call.problem.head.shard, product.double() * largest)
    estimate = torch.linalg.vector_norm(product) / math.sqrt(sketch.shape[1])
    return longest.double() * (SKETCH_FACTORS[sketch.shape[1]] * estimate + rounded)


def _weight_norm(call: _Call, weight: Tensor, wide: torch.dtype) -> Tensor:
    """Of the gradient, or of some of its rows, which have nearly all of it; summed in `wide`."""
    if _runs_behind(weight):
        # In place of the largest rows all of them: to read the gradient takes less time than to find those.
        return torch.linalg.vector_norm(weight, dtype=wide)
    sparse, few = call.sparse, max(1, AT_A_TIME // weight.shape[1])
    if len(weight) > MOST_ROWS:
        magnitudes = sparse.segments(torch.ones_like(sparse.left)).values.abs()
        counts = torch.bincount(sparse.columns, weights=magnitudes, minlength=len(weight))
        parts = (weight.index_select(0, ids) for ids in counts.topk(MOST_ROWS).indices.split(few))
    else:
        parts = iter(weight.split(few))
    return torch.stack([torch.linalg.vector_norm(part, dtype=wide) for part in parts]).norm()


def _runs_behind(tensor: Tensor) -> bool:
    """Whether what is asked of its device is done later, so that every number read from it is waited for."""
    return tensor.device.type != "cpu"


def _with_exact(call: _Call, done: _Done, exact: Tensor) -> _Done:
    """Some tokens more with exact gradients, from logits that are computed once more; all that are left, where that is
    most of them."""
    if not len(exact):
        return done
    left = (~done.tokens).nonzero().flatten()
    if len(exact) > len(left) / 2:
        exact = left
    problem, needs = call.problem, call.needs
    weights = call.upstream.rows(exact).each(lambda w: w * call.factor)
    _, some = call.backend.gradients(problem.rows(exact).for_gradients(), lambda _, at: weights.at(at), needs)
    out = Gradients(weight=some.weight, bias=some.bias, low_rank=some.low_rank)
    before = done.total
    if needs.hidden:
        out.hidden = torch.zeros_like(problem.hidden, dtype=some.hidden.dtype)
        if before is not None and before.hidden is not None:
            torch.mul(before.hidden, done.scale, out=out.hidden)
        out.hidden[exact] = some.hidden
    if before is not None:
        pairs = (out.weight, before.weight), (out.bias, before.bias), (out.low_rank, before.low_rank)
        for total, part in pairs:
            if total is not None and part is not None:
                total.add_(part, alpha=done.scale)
    tokens = done.tokens.clone()
    tokens[exact] = True
    return _Done(out, 1.0, tokens)


def _row_weights(call: _Call, done: _Done) -> Tensor:
    """[N] what multiplies the sparse rows: 0 at tokens that are exact."""
    return torch.where(done.tokens, 0, call.sparse.left.new_full(done.tokens.shape, call.scale))


def _sparse_hidden(call: _Call, done: _Done) -> Tensor:
    """dx: a sparse product, a rank-one update, and what the directions add, the last in fp32."""
    problem, backend, sparse = call.problem, call.backend, call.sparse
    head, weight = problem.head, _row_weights(call, done)
    left = torch.where(done.tokens, 0, sparse.left * weight)
    factors = [f.to(problem.dtype) for f in (head.weight, head.low_rank) if f is not None]
    means = [backend.weighted_sum(part, sparse.profile) for part in factors]
    spread = head.shard is not None  # sums over the ranks are rounded afterwards
    dtype = problem.accumulator if spread or sparse.low is not None else problem.hidden.dtype
    if sparse.rows is not None:
        hidden = sum_of_rows([(weight, sparse.rows)], left, torch.cat(means), dtype)
    else:
        segments = sparse.segments(weight)
        products = [
            backend.rows_product(segments, part, left, mean, dtype) for part, mean in zip(factors, means, strict=True)
        ]
        hidden = products[0] if len(products) == 1 else torch.cat(products, 1)
    if sparse.low is not None:
        low = torch.where(done.tokens[:, None], 0, sparse.low * weight[:, None])
        hidden[:, : len(sparse.basis)].addmm_(low, sparse.basis.t())
    if spread:
        _sum_over_ranks(hidden, done.tokens, head.shard)
    if done.total is not None and done.total.hidden is not None:
        at = done.tokens.nonzero().flatten()
        hidden.index_copy_(0, at, (done.total.hidden[at] * done.scale).to(hidden.dtype))
    return hidden


def _sum_over_ranks(hidden: Tensor, done: Tensor, shard: Shard) -> None:
    """Of the tokens that are not done, in place."""
    if not bool(done.any()):
        shards.summed_(shard.group, hidden)
        return
    at = (~done).nonzero().flatten()
    rows = hidden[at]
    shards.summed_(shard.group, rows)
    hidden[at] = rows


def _sparse_part(call: _Call, done: _Done, hidden: Tensor | None) -> Gradients:
    """Two sparse products and two rank-one updates, with the exact tokens added. `hidden`: dx, where it is known."""
    problem, backend, sparse, needs = call.problem, call.backend, call.sparse, call.needs
    head, dense = problem.head, done.total
    result = Gradients()
    if needs.hidden:
        result.hidden = (_sparse_hidden(call, done) if hidden is None else hidden).to(problem.hidden.dtype)
    if not needs.head:
        return result
    weight = _row_weights(call, done)
    segments, left = sparse.segments(weight), torch.where(done.tokens, 0, sparse.left * weight)
    rows, dim = problem.hidden.to(problem.dtype), head.weight.shape[1]

    def columns_product(matrix: Tensor, base: Tensor | None, dtype: torch.dtype) -> Tensor:
        mean = backend.weighted_sum(matrix, left)
        return backend.columns_product(segments, matrix, sparse.profile, mean, base, done.scale, dtype)

    if needs.weight:
        result.weight = columns_product(rows[:, :dim], None if dense is None else dense.weight, head.weight.dtype)
    if needs.low_rank:
        result.low_rank = columns_product(rows[:, dim:], None if dense is None else dense.low_rank, head.low_rank.dtype)
    if needs.bias:
        result.bias = _bias(segments, sparse.profile * left.sum(), dense, done.scale).to(head.bias.dtype)
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
            results.append(scaled(part, scale, tensor.dtype))
    return Gradients(*results)

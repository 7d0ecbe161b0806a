"""A sparse softmax with the upstream weights in it: S' and m', the single logits of lse and `logits_at` among the
entries."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import shards
from ..backends import Backend
from ..kernels import schemas
from ..problem import Entries, Problem, Segments, Upstream
from .certificate import L1_SHARE, select, shares
from .softmax import HALF_SCALE, SparseSoftmax, narrow, sums_of_rows, weighted, widened
from .spectrum import largest_singular_value, limits_of_low_rank, padded

ROWS = 1024  # tokens whose rows are in fp32 at a time, where several are added up

# Ids [N, k] and weights [N, k] of single logits.
Single = tuple[Tensor, Tensor]


@dataclass
class WeightedSparse:
    """The gradient by the logits of N tokens: entries, and the rest as left qᵀ. The order of the fields is data: see
    `tensors`."""

    offsets: Tensor  # [N + 1] int64
    columns: Tensor  # [entries] int32, in each row ascending
    values: Tensor  # [entries], with `scale` float16 of HALF_SCALE times what they are, by the scale of their row
    left: Tensor  # [N] the sum of what the entries leave out
    error: Tensor  # [N] what the error of the row is at most, in L1 norm
    norm: Tensor  # [N] what the row's L1 norm is at least
    profile: Tensor  # [V]
    full: Tensor  # [N] bool: more entries than the capacity, none stored
    done: Tensor  # [N] bool: gradient computed densely in forward
    rows: Tensor | None = None  # [N, D] what dx takes from the entries, where the backend formed it
    # With directions, [N, k] what dx takes in them besides, and U [D, k]; [N] what the L2 norms are at most of what is
    # wrong with a row of the gradient of the logits, and with one of dx. With a sketch, [N, columns] what is wrong with
    # the former, in products with normal numbers; then its norm is that of what comes on top.
    low: Tensor | None = None
    basis: Tensor | None = None
    row_error: Tensor | None = None
    hidden_error: Tensor | None = None
    sketch: Tensor | None = None
    scale: Tensor | None = None  # [N]
    blocks: Tensor | None = None  # of `narrow`

    def narrow(self) -> WeightedSparse:
        """The same with columns of two bytes, to be saved."""
        columns, blocks = narrow(self.columns, self.offsets, len(self.profile))
        return replace(self, columns=columns, blocks=blocks)

    @staticmethod
    def of_tensors(tensors: tuple[Tensor | None, ...]) -> WeightedSparse:
        return widened(WeightedSparse(*tensors))

    def tensors(self) -> tuple[Tensor | None, ...]:
        """For `save_for_backward`; `of_tensors` puts them back, columns as they are without `narrow`."""
        return (
            self.offsets, self.columns, self.values, self.left, self.error, self.norm, self.profile, self.full,
            self.done, self.rows, self.low, self.basis, self.row_error, self.hidden_error,
            self.sketch, self.scale, self.blocks,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors() if t is not None)

    def segments(self, factor: Tensor) -> Segments:
        """The entries times a factor of each token."""
        factor = factor if self.scale is None else factor * self.scale
        return Segments(
            self.offsets, self.columns, weighted(self.offsets.diff(), self.values, None, factor, None)
        )  # fmt: skip


def weigh(
    problem: Problem, backend: Backend, sparse: SparseSoftmax, upstream: Upstream, single: Single | None,
    half: bool = False,
) -> WeightedSparse:  # fmt: skip
    """S' = a ∂nll/∂z + b ∂kl/∂z at the entries, plus single logits: where one is no entry, it becomes one.

    `half`: in float16, to be saved; the certificate counts what that rounds.
    """
    a, b = upstream.softmax, upstream.kl
    offsets, columns = sparse.offsets, sparse.columns
    values = weighted(offsets.diff(), sparse.nll_values, sparse.kl_values, a, b)
    outside = None
    if single is not None:
        offsets, columns, values, outside = _with_single(offsets, columns, values, single, len(sparse.profile))
    rounding, rounding_l2 = _rounding(sparse, a, b)
    stored, scale = values, None
    if half and values.dtype == torch.float32:
        stored, scale, (l1, l2) = _halved(offsets, values)
        rounding, rounding_l2 = rounding + l1, rounding_l2 + l2
    if problem.head.shard is not None:
        rounding, rounding_l2, everywhere = _over_ranks(problem, rounding, rounding_l2, outside)
    else:
        everywhere = outside

    def kept() -> Tensor:
        sums = sums_of_rows(offsets, values.abs())
        return shards.total(problem.head.shard, sums if outside is None else sums - outside)

    error, norm = shares(sparse.tails, a, b, kept, rounding, everywhere)
    if single is not None:  # whose entries are not there to cancel against
        norm = torch.where(sparse.done | sparse.full, 0, norm)
    parts = [w * left for w, left in ((a, sparse.tails.nll_left), (b, sparse.tails.kl_left)) if w is not None]
    left: Tensor = sum(parts) if parts else torch.zeros_like(sparse.tails.nll_left)  # type: ignore[assignment]
    rows = None if sparse.nll_rows is None else _rows(problem, backend, sparse, upstream, single)
    found = WeightedSparse(
        offsets, columns, stored, left, error, norm, sparse.profile, sparse.full, sparse.done, rows, scale=scale
    )
    if sparse.basis is not None:
        found.basis = sparse.basis
        found.low, found.sketch = _low(sparse, left, a, b)
        sketched = found.sketch is not None
        found.row_error, found.hidden_error = _errors(problem, sparse, a, b, (rounding, rounding_l2), sketched)
    return found


def _low(
    sparse: SparseSoftmax, left: Tensor, a: Tensor | None, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """[N, k] the rest in the directions, minus left qᵀ in them; the same in the sketch, if there is one."""
    low = -left[:, None] * sparse.profile_low
    for weight, part in ((a, sparse.tails.nll_low), (b, sparse.tails.kl_low)):
        if weight is not None:
            low.addcmul_(weight[:, None], part)
    count = sparse.basis.shape[1]
    sketch = low[:, padded(count) :]
    return low[:, :count].contiguous(), sketch.contiguous() if sketch.shape[1] else None


def _errors(
    problem: Problem, sparse: SparseSoftmax, a: Tensor | None, b: Tensor | None,
    rounding: tuple[Tensor | float, Tensor | float], sketched: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[N] bounds of ‖E_t‖₂, E what is left out minus left qᵀ, and of ‖E_t W‖₂ without the directions, with a low-rank
    part ‖E_t (W + BA)‖₂, or, where A is not known, ‖E_t [W, B]‖₂. `sketched`: the first is of what is rounded alone.

    For the nll what is left out and q are ≥ 0, so that ‖r − m q‖² ≤ ‖r‖² + m²‖q‖².
    """
    tails, width = sparse.tails, torch.linalg.vector_norm(sparse.profile)
    if problem.head.shard is not None:
        width = shards.total(problem.head.shard, width.square()).sqrt()
    error, left_out = torch.zeros_like(tails.nll_left), torch.zeros_like(tails.nll_left)
    if a is not None:
        error += a.abs() * (tails.nll_square + tails.nll_left.square() * width.square()).sqrt()
        left_out += a.abs() * tails.nll_square.sqrt()
    if b is not None:
        error += b.abs() * (tails.kl_square.sqrt() + tails.kl_left.abs() * width)
        left_out += b.abs() * tails.kl_square.sqrt()
    sigma, longest, in_products = sparse.limits.tolist()
    if problem.head.low_rank is not None:
        part, longest_part = limits_of_low_rank(problem.head.low_rank)
        if problem.low_rank_inputs is None:
            sigma, longest = math.hypot(sigma, part), math.hypot(longest, longest_part)
        else:
            size = largest_singular_value(problem.low_rank_inputs)
            sigma, longest = sigma + size * part, longest + size * longest_part
    l1, l2 = rounding
    return (left_out * in_products if sketched else error) + l2, error * sigma + l1 * longest


def mostly_exact(problem: Problem, entries: Entries, upstream: Upstream, single: Single | None) -> bool:
    """Whether more than half of a chunk's tokens would need exact gradients, taken by itself."""
    if upstream.is_zero:
        return False
    a, b, shard = upstream.softmax, upstream.kl, problem.head.shard
    counts, tails = entries.counts.clamp(min=0), entries.tails
    offsets = counts.new_zeros(len(counts) + 1)
    torch.cumsum(counts, 0, out=offsets[1:])

    def values() -> Tensor:
        return weighted(counts, entries.nll_values, entries.kl_values, a, b)

    if single is None:
        error, norm = shares(tails, a, b, lambda: shards.total(shard, sums_of_rows(offsets, values().abs())))
    else:
        rows = len(problem.head.weight)
        offsets, _, merged, outside = _with_single(offsets, entries.columns, values(), single, rows)
        kept = sums_of_rows(offsets, merged.abs()) - outside
        error, norm = shares(
            tails, a, b, lambda: shards.total(shard, kept), single=shards.total(shard, outside)
        )  # fmt: skip
        norm = torch.where(entries.counts < 0, 0, norm)
    exact, _ = select(error, norm, entries.counts < 0, L1_SHARE * problem.tolerance)
    return len(exact) > len(error) / 2


def mostly_sparse(problem: Problem, entries: Entries) -> bool:
    """Whether `mostly_exact` is false of a chunk for sure, whatever its upstream weights: with that of the nll alone a
    token's share of the error over its share of the norm does not depend on it."""
    if problem.has_reference or problem.ids is not None or problem.head.shard is not None:
        return False
    tails, limit = entries.tails, L1_SHARE * problem.tolerance
    sparse = (2 * tails.nll_left <= limit * tails.nll_l1) & (entries.counts >= 0)
    return 2 * int(sparse.count_nonzero()) >= len(sparse)


def sum_of_rows(
    parts: list[tuple[Tensor | None, Tensor]], left: Tensor | None = None, mean: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Σ weight·rows + left·mean, computed in fp32, in `dtype` or that of the rows."""
    weight, rows = parts[0]
    out = torch.empty_like(rows, dtype=dtype)
    if len(parts) == 1 and weight is not None and (left is None or out.dtype == weight.dtype):
        torch.mul(rows, weight[:, None], out=out)
        return out if left is None else out.addr_(left, mean)
    for at in (slice(i, i + ROWS) for i in range(0, len(out), ROWS)):
        terms = [rows[at].float() if w is None else w[at, None] * rows[at] for w, rows in parts]
        if left is not None:
            terms.append(left[at, None] * mean)
        out[at] = sum(terms)
    return out


def _rows(
    problem: Problem, backend: Backend, sparse: SparseSoftmax, upstream: Upstream, single: Single | None
) -> Tensor:
    """What dx takes from the entries, from the products that the backend has formed."""
    pairs = ((upstream.softmax, sparse.nll_rows), (upstream.kl, sparse.kl_rows))
    parts: list[tuple[Tensor | None, Tensor]] = [(w, rows) for w, rows in pairs if w is not None and rows is not None]
    if single is not None:
        parts.append((None, single_rows(problem, backend, single)))
    if not parts:
        return torch.zeros_like(sparse.nll_rows)
    rows = sum_of_rows(parts)
    return rows.to(sparse.nll_rows.dtype)


def single_rows(problem: Problem, backend: Backend, single: Single) -> Tensor:
    """Σ_j weights[t, j] · [weight, low_rank][ids[t, j]], [N, D + r] in fp32."""
    ids, weights = single
    count, k = ids.shape
    if not len(problem.head.weight):  # a rank without rows
        return weights.new_zeros(count, problem.head.width)
    offsets = torch.arange(count + 1, device=ids.device) * k
    segments = Segments(offsets, ids.reshape(-1).int(), weights.reshape(-1).contiguous())
    none = weights.new_zeros(count)
    products = [
        backend.rows_product(
            segments, factor.to(problem.dtype), none, weights.new_zeros(factor.shape[1]), weights.dtype
        )
        for factor in (problem.head.weight, problem.head.low_rank)
        if factor is not None
    ]
    return products[0] if len(products) == 1 else torch.cat(products, 1)


def _halved(offsets: Tensor, values: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Values as `WeightedSparse.values` has them, [N] scales, and [N] L1 and L2 norm of what that rounds."""
    counts = offsets.diff()
    if schemas.takes_entries(values):
        half = torch.empty_like(values, dtype=torch.float16)
        scale, l1, l2 = (torch.empty(len(counts), dtype=torch.float32) for _ in range(3))
        torch.ops.fused_losses.halve_entries(counts, values, HALF_SCALE, half, scale, l1, l2)
        return half, scale, (l1, l2)
    largest = torch.segment_reduce(values.abs(), "max", lengths=counts, initial=0)
    scale = torch.where(largest.isfinite(), largest, 1).clamp(min=torch.finfo(values.dtype).tiny * HALF_SCALE)
    half = weighted(counts, values, None, HALF_SCALE / scale, None).half()
    error = weighted(counts, half, None, scale, None).sub_(values).abs_()
    return half, scale, (sums_of_rows(offsets, error), sums_of_rows(offsets, error.square()).sqrt_())


def _rounding(sparse: SparseSoftmax, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
    """[N] L1 and L2 norm of what the rounding of the entries adds to a row."""
    if sparse.rounding is None:
        return 0.0, 0.0
    pairs = [
        (w.abs(), norms)
        for w, norms in zip((a, b), sparse.rounding.unflatten(0, (-1, 2)), strict=False)
        if w is not None
    ]
    l1, l2 = (sum(w * norms[i] for w, norms in pairs) for i in range(2))
    return l1, l2


def _over_ranks(
    problem: Problem, l1: Tensor | float, l2: Tensor | float, outside: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """What is rounded, and `outside`, where this rank has its part of the rows."""
    zeros = problem.labels.new_zeros(len(problem.labels), dtype=problem.accumulator)
    lines = [zeros + l1, (zeros + l2).square(), *([] if outside is None else [outside])]
    sums = shards.total(problem.head.shard, torch.stack(lines))
    return sums[0], sums[1].sqrt(), None if outside is None else sums[2]


def _with_single(
    offsets: Tensor, columns: Tensor, values: Tensor, single: Single, vocabulary: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Single logits added to entries, in place where they are among them; new offsets, columns and values, and what is
    in new entries, Σ |·| of each row."""
    ids, weights = single
    # Searches take half the time in numbers of half the size.
    dtype = torch.int32 if len(ids) * vocabulary < 2**31 else torch.int64
    rows = torch.arange(len(ids), device=ids.device, dtype=dtype)[:, None]
    wanted = weights != 0
    keys, weights = (rows * vocabulary + ids.to(dtype))[wanted], weights[wanted]
    keys, order = keys.sort(stable=True)
    keys, inverse = keys.unique_consecutive(return_inverse=True)
    weights = torch.zeros(len(keys), dtype=values.dtype, device=values.device).index_put_(
        (inverse,), weights[order].to(values.dtype), accumulate=True
    )
    counts = offsets.diff()
    entry_keys = torch.repeat_interleave(rows[:, 0] * vocabulary, counts, output_size=len(columns)) + columns
    place = torch.searchsorted(entry_keys, keys)
    known = torch.zeros_like(place, dtype=torch.bool)
    if len(entry_keys):
        known = entry_keys[place.clamp(max=len(entry_keys) - 1)] == keys
    values[place[known]] += weights[known]
    new_keys, new_weights, place = keys[~known], weights[~known], place[~known]
    new_rows = torch.div(new_keys, vocabulary, rounding_mode="floor").long()
    outside = torch.zeros(len(ids), dtype=values.dtype, device=values.device).index_put_(
        (new_rows,), new_weights.abs(), accumulate=True
    )
    if not len(new_keys):
        return offsets, columns, values, outside
    total = len(entry_keys) + len(new_keys)
    at = place + torch.arange(len(place), device=place.device)
    old = torch.ones(total, dtype=torch.bool, device=place.device)
    old[at] = False
    old = old.nonzero().flatten()
    new_columns = (new_keys - new_rows * vocabulary).to(columns.dtype)
    merged_columns, merged_values = (
        before.new_empty(total).index_copy_(0, old, before).index_copy_(0, at, more)
        for before, more in ((columns, new_columns), (values, new_weights))
    )
    added = torch.zeros_like(counts).index_put_((new_rows,), torch.ones_like(new_rows), accumulate=True)
    merged_offsets = offsets.clone()
    merged_offsets[1:] += added.cumsum(0)
    return merged_offsets, merged_columns, merged_values, outside

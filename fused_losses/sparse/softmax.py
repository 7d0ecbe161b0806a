"""The softmax of a batch as a sparse matrix plus one of rank one, P ≈ S + m qᵀ, and the gradients that follow from it.

S keeps the entries with p > θ_t = θ·√(1 − p[label]) (a confident token's gradient is small, so its entries are finer),
m[t] is the exact mass of the rest, and q, Σq = 1, the mean profile of that rest over evenly spaced sampled tokens. With
S' and m' for S and m times the upstream weights, labels subtracted:

    dx = S' W + m' (qᵀW)        dW = S'ᵀ x + q (m'ᵀx)

In a few directions U of the head (`spectrum`) dx takes the rest itself, in the place of m qᵀ. Two sparse products
instead of two GEMMs, and nothing but S and N·k numbers are kept for backward. For the KL the same entries carry
∂kl/∂z = p − p_ref, and the rest is (m − m_ref) qᵀ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .. import shards
from ..backends import Backend
from ..kernels import schemas
from ..problem import Entries, Needs, Problem, Selection, Statistics, Tails
from .certificate import parameters
from .spectrum import directions_of, sketch_columns

# Entries, which are in [−1, 1], are kept as float16 of HALF_SCALE times them: of 4 bytes, 6 with a reference. A θ finer
# than FINEST_HALF asks for better.
HALF_SCALE = 2.0**15
NARROW = 1 << 16
FINEST_HALF = 1e-6
# Tokens of a call from which on it takes directions of a head that is trained: they cost a product of so many columns
# as there are directions, with the whole head.
FEWEST_TOKENS = 128
# With products of 8-bit numbers a profile of more tokens would take as much of the time as dx. It matters to dW alone.
INT8_SAMPLED = 256


@dataclass
class SparseSoftmax:
    """S, m and q of N tokens, before any upstream weight. The order of the fields is data: see `tensors`."""

    offsets: Tensor  # [N + 1] int64
    columns: Tensor  # [entries] int32
    nll_values: Tensor  # [entries] ∂nll/∂z: p, and p − 1 at the label
    kl_values: Tensor | None  # [entries] ∂kl/∂z = p − p_ref
    tails: Tails  # [N] each
    profile: Tensor  # [V]
    full: Tensor  # [N] bool: more entries than the capacity, none stored
    done: Tensor  # [N] bool: gradient computed densely in forward
    # [N, D] what dx takes from the entries (SW), where the backend formed it
    nll_rows: Tensor | None = None
    kl_rows: Tensor | None = None
    # With directions: U [D, k], qᵀ times the rows of `Directions` [K], and [3] float64: sigma, longest and rounding of
    # these.
    basis: Tensor | None = None
    profile_low: Tensor | None = None
    limits: Tensor | None = None
    # [2 or 4, N] what the rounding of the entries adds to a row: L1 and L2 norm of ∂nll/∂z, then of ∂kl/∂z. None: 0.
    rounding: Tensor | None = None
    blocks: Tensor | None = None  # of `narrow`

    def tensors(self) -> tuple[Tensor | None, ...]:
        """For `save_for_backward`; `of_tensors` puts them back, columns as they are without `narrow`."""
        t = self.tails
        return (
            self.offsets, self.columns, self.nll_values, self.kl_values,
            t.nll_left, t.nll_l1, t.kl_left, t.kl_left_l1, t.kl_l1, t.nll_low, t.nll_square, t.kl_low, t.kl_square,
            self.profile, self.full, self.done, self.nll_rows, self.kl_rows, self.basis, self.profile_low, self.limits,
            self.rounding, self.blocks,
        )  # fmt: skip

    @staticmethod
    def of_tensors(tensors: tuple[Tensor | None, ...]) -> SparseSoftmax:
        offsets, columns, nll, kl = tensors[:4]
        count = 4 + len(fields(Tails))
        found = SparseSoftmax(offsets, columns, nll, kl, Tails(*tensors[4:count]), *tensors[count:])
        return widened(found)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors() if t is not None)

    def narrow(self) -> SparseSoftmax:
        """The same with columns of two bytes."""
        columns, blocks = narrow(self.columns, self.offsets, len(self.profile))
        return replace(self, columns=columns, blocks=blocks)

    def halved(self) -> SparseSoftmax:
        """The same in less memory; the certificate counts what that rounds."""
        if self.nll_values.dtype != torch.float32:
            return self
        halves: list[Tensor | None] = []
        rounding = []
        for values in (self.nll_values, self.kl_values):
            half = None if values is None else values.mul(HALF_SCALE).half()
            halves.append(half)
            if half is not None:
                error = _single(half).sub_(values).abs_()
                rounding += [sums_of_rows(self.offsets, error), sums_of_rows(self.offsets, error.square_()).sqrt_()]
        return replace(self, nll_values=halves[0], kl_values=halves[1], rounding=torch.stack(rounding))


def narrow(columns: Tensor, offsets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor | None]:
    """The last 16 bits of columns, which ascend in each row; and [N, V / 65,536] how many of a row have the same other
    bits, None where these are all 0."""
    low = columns.to(torch.int16)  # wraps
    count = -(-vocabulary // NARROW)
    if count <= 1:
        return low, None
    high = columns >> 16
    here = [sums_of_rows(offsets, (high == i).float()).int() for i in range(count)]
    return low, torch.stack(here, 1)


def widened(saved: Any) -> Any:
    """What `narrow` made, of `SparseSoftmax` or `WeightedSparse`, as it was before; others as they are."""
    if saved.columns.dtype != torch.int16:
        return saved
    return replace(saved, columns=wide(saved.columns, saved.blocks), blocks=None)


def wide(columns: Tensor, blocks: Tensor | None) -> Tensor:
    """What `narrow` was given."""
    low = columns.int() & (NARROW - 1)
    if blocks is None:
        return low
    high = torch.arange(blocks.shape[1], device=low.device, dtype=torch.int32).repeat(len(blocks)) << 16
    return low + torch.repeat_interleave(high, blocks.flatten(), output_size=len(low))


def weighted(
    counts: Tensor, nll_values: Tensor, kl_values: Tensor | None, a: Tensor | None, b: Tensor | None
) -> Tensor:  # fmt: skip
    """a·nll_values + b·kl_values, entry by entry, in a new tensor; `counts` per token."""
    parts = [_times_rows(counts, v, weight) for weight, v in ((a, nll_values), (b, kl_values)) if weight is not None]
    if not parts:
        return torch.zeros_like(_single(nll_values))
    return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])


def _times_rows(counts: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    """Each value times the factor of its row."""
    if factor.dtype == torch.float32 and schemas.takes_entries(values):
        out = torch.empty_like(values, dtype=torch.float32)
        scale = 1.0 if values.dtype == torch.float32 else 1 / HALF_SCALE
        torch.ops.fused_losses.scale_entries(counts, values, scale, factor.contiguous(), out)
        return out
    return torch.repeat_interleave(factor, counts, output_size=len(values)).mul_(_single(values))


def _single(values: Tensor) -> Tensor:
    return values.float().div_(HALF_SCALE) if values.dtype == torch.float16 else values


def sums_of_rows(offsets: Tensor, values: Tensor) -> Tensor:
    """[N] Σ over the entries of each row."""
    return torch.segment_reduce(values, "sum", lengths=offsets.diff(), initial=0)


class Builder:
    """Collects the entries of one chunk after the other."""

    def __init__(self, problem: Problem, backend: Backend, needs: Needs) -> None:
        self.problem, self.backend = problem, backend
        n, device = len(problem.labels), problem.hidden.device
        most = min(n, backend.SAMPLED_TOKENS if problem.int8 is None else min(backend.SAMPLED_TOKENS, INT8_SAMPLED))
        sampled = torch.arange(most, device=device) * n // max(1, most)
        profile = torch.zeros(len(problem.head.weight), dtype=problem.accumulator, device=device)
        self.directions = None
        if backend.HAS_DIRECTIONS and (n >= FEWEST_TOKENS or not needs.weight):
            sketch = sketch_columns(problem.has_reference) if needs.weight and backend.HAS_SKETCH else 0
            self.directions = directions_of(problem.head.weight, problem.head.shard, sketch)
        rows, pairs = (None, None) if self.directions is None else (self.directions.rows, self.directions.pairs)
        free = not needs.weight or problem.int8 is not None
        coarser = self.directions is not None and not problem.has_reference and free
        threshold, capacity = parameters(problem.tolerance, problem.head.vocabulary, coarser)
        self.selection = Selection(threshold, capacity, sampled, profile, needs.hidden, rows, pairs)
        self.chunks: list[Entries] = []
        self.done: list[Tensor] = []

    def scan(self, out: Statistics) -> Iterator[tuple[Any, Entries]]:
        """The chunks of the backend's sweep, each to be given to `add`."""
        return self.backend.scan(self.problem, out, self.selection)

    def add(self, entries: Entries, done: bool) -> None:
        """`done`: the chunk's gradient has been computed densely, so its entries are dropped."""
        if done:
            # New tensors: a part of the old ones would keep all of their memory.
            kl = None if entries.kl_values is None else entries.kl_values.new_empty(0)
            entries = replace(
                entries, counts=torch.zeros_like(entries.counts), columns=entries.columns.new_empty(0),
                nll_values=entries.nll_values.new_empty(0), kl_values=kl,
            )  # fmt: skip
        self.chunks.append(entries)
        self.done.append(torch.full_like(entries.counts, done, dtype=torch.bool))

    def finish(self) -> SparseSoftmax:
        """All chunks as one."""
        chunks = self.chunks
        counts = torch.cat([c.counts for c in chunks])
        offsets = counts.new_zeros(len(counts) + 1)
        torch.cumsum(counts.clamp(min=0), 0, out=offsets[1:])
        profile = self.selection.profile

        def join(name: str, parts: Sequence[object] = chunks) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            return tensors[0] if len(tensors) == 1 or tensors[0] is None else torch.cat(tensors)

        tails = [c.tails for c in chunks]
        # The sum is of the same value however many threads take part in it.
        total = shards.total(self.problem.head.shard, profile.sum(dtype=torch.float64)).to(profile.dtype)
        profile = torch.where(total > 0, profile / total, 0)
        found = self.directions
        return SparseSoftmax(
            offsets=offsets,
            columns=join("columns"),
            nll_values=join("nll_values"),
            kl_values=join("kl_values"),
            tails=Tails(*(join(f.name, tails) for f in fields(Tails))),
            profile=profile,
            full=counts < 0,
            done=torch.cat(self.done),
            nll_rows=join("nll_rows"),
            kl_rows=join("kl_rows"),
            basis=None if found is None else found.basis,
            profile_low=None if found is None else self.backend.weighted_sum(found.rows, profile),
            limits=None if found is None else profile.new_tensor(found.limits, dtype=torch.float64),
        )

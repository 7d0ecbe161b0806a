"""What a backend is given and gives back: plain records of tensors, validated before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .shards import Shard

# Statistics of a token. GIVEN are always there (kl and reference_nll with a reference), OPTIONAL where they are wanted,
# logits_at with ids, divergence with beta.
GIVEN = ("nll", "lse", "prediction", "kl", "reference_nll")
OPTIONAL = ("entropy", "reference_entropy", "topk_entropy", "rank", "log_p2")
DIFFERENTIABLE = ("nll", "kl", "lse", "logits_at", "entropy", "divergence")


class Head(NamedTuple):
    """An `LMHead` below the entrance: not checked again."""

    weight: Tensor  # [V, D]; with a shard this rank's rows
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None
    low_rank: Tensor | None = (
        None  # [V, r] B; a row of hidden then is [x, u], D + r numbers, of a reference also x alone
    )
    shard: Shard | None = None  # None: all rows are here

    @property
    def vocabulary(self) -> int:
        """V, over all ranks."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocabulary

    @property
    def most_rows(self) -> int:
        """Rows of the rank that has most: whatever must be equal on all ranks follows from it."""
        return self.weight.shape[0] if self.shard is None else self.shard.largest

    @property
    def width(self) -> int:
        """D + r: of a row of hidden."""
        return self.weight.shape[1] + (0 if self.low_rank is None else self.low_rank.shape[1])


def valid_index(labels: Tensor, ignore_index: int) -> Tensor | None:
    """The positions of the tokens with a label, None where that is all of them."""
    valid = labels != ignore_index
    return None if bool(valid.all()) else valid.nonzero().flatten()


class Needs(NamedTuple):
    """Which tensors of a call need a gradient."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    low_rank: bool = False

    @property
    def head(self) -> bool:
        """Whether anything of the head does."""
        return self.weight or self.bias or self.low_rank


@dataclass
class Int8:
    """That a sweep takes products of 8-bit numbers, and what was measured of them."""

    value_error: float | None = None  # mean |error of the nll| of the tokens that were measured
    note: str | None = None  # why the products are full ones from some token on


TENSORS = 10  # of a `Problem`; their order is data, see `tensors`


@dataclass(frozen=True)
class Problem:
    """N tokens without ignored ones. `reference_head` None and a reference hidden: both models share the head."""

    hidden: Tensor  # [N, D], with a low-rank part [N, D + r]
    labels: Tensor  # [N] int64
    head: Head
    reference_hidden: Tensor | None  # [N, D_ref]
    reference_head: Head | None
    dtype: torch.dtype  # of the GEMM operands
    ids: Tensor | None = None  # [N, k] int64, −1 where there is none: the logits that `logits_at` returns
    wanted: frozenset[str] = frozenset()  # of OPTIONAL
    entropy_gradient: bool = False
    beta: float | None = None  # of the divergence, in (0, 1]; None: none is wanted, or
    divergence_is_kl: bool = False  # β = 0
    top_k: int = 20
    # None: exact gradients. Else sparse ones, with this bound on their relative L1 error.
    tolerance: float | None = None
    int8: Int8 | None = None  # None: full products
    # [r, D] A, where u = x Aᵀ in a row [x, u] of hidden and the gradient of u goes on to x; 0 of what has no gradient.
    # For the certificate; None: not known.
    low_rank_inputs: Tensor | None = None

    @property
    def has_reference(self) -> bool:
        return self.reference_hidden is not None

    @property
    def shared_head(self) -> bool:
        return self.reference_hidden is not None and self.reference_head is None

    @property
    def accumulator(self) -> torch.dtype:
        """Logits, statistics and sums: fp32, float64 for float64."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def has_dense_directions(self) -> bool:
        """Whether gradients are wanted that no sparse softmax holds: of the entropy, or of the divergence."""
        return self.entropy_gradient or self.beta is not None

    @property
    def width(self) -> int:
        """D, with a low-rank part D + r: of a row of hidden."""
        return self.hidden.shape[1]

    def rows(self, index: Tensor) -> Problem:
        """The problem of these tokens alone."""
        return self._of_tokens(lambda tensor: tensor.index_select(0, index))

    def part(self, tokens: slice) -> Problem:
        """The problem of these tokens alone."""
        return self._of_tokens(lambda tensor: tensor[tokens])

    def _of_tokens(self, take: Callable[[Tensor], Tensor]) -> Problem:
        ref, ids = self.reference_hidden, self.ids
        return replace(
            self,
            hidden=take(self.hidden),
            labels=take(self.labels),
            reference_hidden=None if ref is None else take(ref),
            ids=None if ids is None else take(ids),
        )

    def for_gradients(self) -> Problem:
        """Without the statistics that no gradient needs."""
        return replace(self, wanted=frozenset({"entropy"}) if self.entropy_gradient else frozenset())

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All `TENSORS` of them, for `save_for_backward`; `with_tensors` puts them back."""
        head, ref = self.head, self.reference_head or Head(None, None, 1.0, None)
        return (
            self.hidden, self.labels, head.weight, head.bias, head.low_rank, self.reference_hidden,
            ref.weight, ref.bias, ref.low_rank, self.ids,
        )  # fmt: skip

    def with_tensors(self, tensors: tuple[Tensor | None, ...]) -> Problem:
        hidden, labels, weight, bias, low_rank, ref_hidden, ref_weight, ref_bias, ref_low_rank, ids = tensors
        ref = self.reference_head
        return replace(
            self,
            hidden=hidden,
            labels=labels,
            head=self.head._replace(weight=weight, bias=bias, low_rank=low_rank),
            reference_hidden=ref_hidden,
            reference_head=None
            if ref is None
            else ref._replace(weight=ref_weight, bias=ref_bias, low_rank=ref_low_rank),
            ids=ids,
        )

    def without_tensors(self) -> Problem:
        return self.with_tensors((None,) * TENSORS)

    def without_inputs(self) -> Problem:
        """Without the hidden states and the reference, where gradients by the hidden states are kept."""
        ref = self.reference_head
        return replace(
            self, hidden=None, reference_hidden=None,
            reference_head=None if ref is None else ref._replace(weight=None, bias=None, low_rank=None),
        )  # fmt: skip


@dataclass
class Statistics:
    """Per-token vectors, [N]; None where not wanted or without a reference."""

    nll: Tensor
    prediction: Tensor
    kl: Tensor | None = None
    reference_nll: Tensor | None = None
    entropy: Tensor | None = None
    reference_entropy: Tensor | None = None
    topk_entropy: Tensor | None = None
    lse: Tensor | None = None
    logits_at: Tensor | None = None  # [N, k]
    rank: Tensor | None = None  # int64
    log_p2: Tensor | None = None
    divergence: Tensor | None = None
    # Only inside a sweep over one rank's rows of the head (backends/sharded).
    normaliser: Tensor | None = None  # [N, 2] the largest logit, and log Σ exp(z − it)
    reference_normaliser: Tensor | None = None  # [N, 3] the reference's, and lse − its lse
    top_logits: Tensor | None = None  # [N, k]

    def at(self, tokens: slice) -> Statistics:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Statistics(**{name: None if v is None else v[tokens] for name, v in parts.items()})


OUTPUTS = tuple(f.name for f in fields(Statistics))[:12]  # those that leave a backend, in the order of the operator's


@dataclass
class Upstream:
    """Derivatives of a scalar by the statistics of some tokens, [C], `logits_at` [C, k]; None: zeros."""

    nll: Tensor | None = None
    kl: Tensor | None = None
    lse: Tensor | None = None
    logits_at: Tensor | None = None
    entropy: Tensor | None = None
    divergence: Tensor | None = None

    def each(self, function: Callable[[Tensor], Tensor]) -> Upstream:
        parts = {name: getattr(self, name) for name in DIFFERENTIABLE}
        return Upstream(**{name: None if v is None else function(v) for name, v in parts.items()})

    def at(self, tokens: slice) -> Upstream:
        return self.each(lambda values: values[tokens])

    def rows(self, index: Tensor) -> Upstream:
        return self.each(lambda values: values.index_select(0, index))

    def without_common_power(self) -> tuple[Upstream, float]:
        """Relative to the largest power of two among them, so that fp16 neither overflows nor underflows; and that
        power."""
        weights = [getattr(self, name) for name in DIFFERENTIABLE]
        largest = torch.stack([w.abs().amax() for w in weights if w is not None and w.numel()]).amax()
        largest = torch.where(largest.isfinite(), largest, 1)
        exponent = max(-100, min(100, int(torch.frexp(largest).exponent)))
        return self.each(lambda w: w * 2.0**-exponent), 2.0**exponent

    @property
    def softmax(self) -> Tensor | None:
        """The weight of p − onehot(label): that of nll, and that of lse, whose gradient is p."""
        if self.nll is None or self.lse is None:
            return self.lse if self.nll is None else self.nll
        return self.nll + self.lse

    @property
    def is_zero(self) -> bool:
        return all(getattr(self, name) is None for name in DIFFERENTIABLE)


@dataclass
class Gradients:
    """Sums over tokens. `hidden`: a row for each token."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    low_rank: Tensor | None = None


@dataclass
class Rows:
    """∂/∂x of statistics of each token before any upstream weight, [N, D]."""

    nll: Tensor | None = None
    kl: Tensor | None = None
    entropy: Tensor | None = None
    divergence: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.nll, self.kl, self.entropy, self.divergence

    def weighted(self, upstream: Upstream) -> Tensor | None:
        """Their sum with the upstream weights, [N, D]; None where all of these are zeros."""
        weights = (upstream.softmax, upstream.kl, upstream.entropy, upstream.divergence)
        pairs = zip(weights, self.tensors(), strict=True)
        parts = [w[:, None] * rows for w, rows in pairs if w is not None and rows is not None]
        return sum(parts) if parts else None  # type: ignore[return-value]


class Segments(NamedTuple):
    """A sparse matrix by rows: those of row t are entries offsets[t] to offsets[t + 1]."""

    offsets: Tensor  # [rows + 1] int64
    columns: Tensor  # [entries] int32
    values: Tensor  # [entries]


class Directions(NamedTuple):
    """Directions of a head, in which what the entries leave out is taken exactly; sparse/spectrum.py."""

    basis: Tensor  # U [D, k], orthonormal columns
    # G [V, K], nearly (W − 1cᵀ)U, with columns of zeros up to a multiple of 16. In float32, only numbers that
    # `in_half_precision` does not round: tensor cores take them so.
    # With a sketch more columns, of normal numbers; then all in bfloat16.
    rows: Tensor
    sigma: float  # at least the largest singular value of W − 1cᵀ − GUᵀ
    longest: float  # at least the norm of a row of W
    # `rows` as products of bfloat16 numbers need them, which round what they multiply by at most so much of itself.
    pairs: Tensor | None = None
    rounding: float = 0.0

    @property
    def limits(self) -> tuple[float, float, float]:
        return self.sigma, self.longest, self.rounding


def in_half_precision(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 matrix in float16, divided by a power of two so that its largest number is in [2¹⁴, 2¹⁵]; and the
    exponent of that power."""
    exponent = (torch.frexp(matrix.abs().amax()).exponent - 15).clamp(-100, 100)
    return torch.ldexp(matrix, -exponent).half(), exponent


class Selection(NamedTuple):
    """Which entries of a softmax a scan keeps, and what it makes of the rest."""

    threshold: float  # an entry has p or p_ref > threshold · √(1 − p[label]), or is the label's
    capacity: int  # most entries of a token
    sampled: Tensor  # tokens, ascending, whose rest makes the profile
    profile: Tensor  # [V], gains Σ p over what the sampled tokens leave out
    with_rows: bool  # the products of entries and weight are wanted too, where the backend has them at hand
    directions: Tensor | None = None  # [V, K]: what is left out is wanted in these
    pairs: Tensor | None = None  # of `Directions`

    def in_dtype(self, dtype: torch.dtype) -> Selection:
        """With directions in that dtype."""
        return self if self.directions is None else self._replace(directions=self.directions.to(dtype))


@dataclass
class Tails:
    """Per token, [N]: what the entries of a sparse softmax leave out, and the L1 norms of ∂nll/∂z and ∂kl/∂z.

    z are the logits before logit_scale, so a soft-cap's slope is in these.
    """

    nll_left: Tensor  # Σ p over what is left out
    nll_l1: Tensor  # ‖∂nll/∂z‖₁
    kl_left: Tensor | None = None  # Σ (p − p_ref) over what is left out
    kl_left_l1: Tensor | None = None  # Σ |p − p_ref| over what is left out
    kl_l1: Tensor | None = None  # ‖∂kl/∂z‖₁
    # With directions [V, K], of what is left out: its product with them, [N, K]; Σ of its squares.
    nll_low: Tensor | None = None
    nll_square: Tensor | None = None
    kl_low: Tensor | None = None
    kl_square: Tensor | None = None


@dataclass
class Entries:
    """The entries of a chunk's tokens, row by row, with ascending columns; the label's is always among them."""

    counts: Tensor  # [C] int64; −1: more than the capacity, then none are stored
    columns: Tensor  # [entries] int32
    nll_values: Tensor  # [entries] ∂nll/∂z there
    kl_values: Tensor | None  # [entries] ∂kl/∂z there
    tails: Tails
    # [C, D] Σ over the entries of ∂nll/∂z (∂kl/∂z) · weight, where the backend has them at hand
    nll_rows: Tensor | None = None
    kl_rows: Tensor | None = None

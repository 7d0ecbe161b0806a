"""What a backend is given and gives back: plain records of tensors, validated before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .shards import Shard


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


TENSORS = 9  # of a `Problem`


@dataclass(frozen=True)
class Problem:
    """N tokens without ignored ones. `reference_head` None and a reference hidden: both models share the head."""

    hidden: Tensor  # [N, D], with a low-rank part [N, D + r]
    labels: Tensor  # [N] int64
    head: Head
    reference_hidden: Tensor | None  # [N, D_ref]
    reference_head: Head | None
    dtype: torch.dtype  # of the GEMM operands
    wanted: frozenset[str] = frozenset()  # of entropy, reference_entropy, topk_entropy: those that cost a pass
    top_k: int = 20
    tolerance: float | None = (
        None  # None: exact gradients. Else sparse ones, with this bound on their relative L1 error
    )

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

    def rows(self, index: Tensor) -> Problem:
        """The problem of these tokens alone."""
        ref = self.reference_hidden
        return replace(
            self,
            hidden=self.hidden.index_select(0, index),
            labels=self.labels.index_select(0, index),
            reference_hidden=None if ref is None else ref.index_select(0, index),
        )

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All `TENSORS` of them, for `save_for_backward`; `with_tensors` puts them back."""
        head, ref = self.head, self.reference_head or Head(None, None, 1.0, None)
        return (
            self.hidden, self.labels, head.weight, head.bias, head.low_rank, self.reference_hidden,
            ref.weight, ref.bias, ref.low_rank,
        )  # fmt: skip

    def with_tensors(self, tensors: tuple[Tensor | None, ...]) -> Problem:
        hidden, labels, weight, bias, low_rank, ref_hidden, ref_weight, ref_bias, ref_low_rank = tensors
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
        )

    def without_tensors(self) -> Problem:
        return self.with_tensors((None,) * TENSORS)


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
    # Only inside a sweep over one rank's rows of the head (backends/sharded.py).
    normaliser: Tensor | None = None  # [N, 2] the largest logit, and log Σ exp(z − it)
    reference_normaliser: Tensor | None = None
    top_logits: Tensor | None = None  # [N, k]

    def at(self, tokens: slice) -> Statistics:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Statistics(**{name: None if v is None else v[tokens] for name, v in parts.items()})


@dataclass
class Gradients:
    """Sums over tokens (hidden, weight, bias, low_rank), or the rows ∂nll/∂x and ∂kl/∂x before any upstream weight."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    low_rank: Tensor | None = None
    nll: Tensor | None = None
    kl: Tensor | None = None


@dataclass
class Tails:
    """Per token, [N]: what the entries of a sparse softmax leave out, and the L1 norms of both directions.

    Directions are those of the logits before logit_scale, so with a soft-cap's slope in them.
    """

    nll: Tensor  # Σ p over what is left out
    nll_l1: Tensor  # ‖∂nll/∂z‖₁
    kl: Tensor | None = None  # Σ (p − p_ref) over what is left out
    kl_left: Tensor | None = None  # Σ |p − p_ref| over what is left out
    kl_l1: Tensor | None = None  # ‖∂kl/∂z‖₁
    error: Tensor | None = None  # with upstream weights in `nll` already: the bound of the row's error

    def each(self, function: Callable[[Tensor], Tensor]) -> Tails:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Tails(**{name: None if v is None else function(v) for name, v in parts.items()})


@dataclass
class Entries:
    """The entries of a chunk's tokens, row by row, with ascending columns; the label's is always among them."""

    counts: Tensor  # [C] int64; −1: more than the capacity, then none are stored
    columns: Tensor  # [entries] int32
    nll: Tensor  # [entries] ∂nll/∂z there
    kl: Tensor | None  # [entries] ∂kl/∂z there
    tails: Tails
    # [C, D] Σ over the entries of ∂nll/∂z (∂kl/∂z) · weight, where the backend has them at hand
    nll_rows: Tensor | None = None
    kl_rows: Tensor | None = None

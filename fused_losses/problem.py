"""What a backend is given and gives back: plain records of tensors, validated before."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """An `LMHead` below the entrance: not checked again."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True)
class Problem:
    """N tokens without ignored ones. `reference_head` None and a reference hidden: both models share the head."""

    hidden: Tensor  # [N, D]
    labels: Tensor  # [N] int64
    head: Head
    reference_hidden: Tensor | None  # [N, D_ref]
    reference_head: Head | None
    dtype: torch.dtype  # of the GEMM operands
    wanted: frozenset[str] = frozenset()  # of entropy, reference_entropy, topk_entropy: those that cost a pass
    top_k: int = 20

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

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors, for `save_for_backward`; `with_tensors` puts them back."""
        ref = self.reference_head
        return (
            self.hidden, self.labels, self.head.weight, self.head.bias, self.reference_hidden,
            None if ref is None else ref.weight, None if ref is None else ref.bias,
        )  # fmt: skip

    def with_tensors(self, tensors: tuple[Tensor | None, ...]) -> Problem:
        hidden, labels, weight, bias, ref_hidden, ref_weight, ref_bias = tensors
        ref = self.reference_head
        return replace(
            self,
            hidden=hidden,
            labels=labels,
            head=self.head._replace(weight=weight, bias=bias),
            reference_hidden=ref_hidden,
            reference_head=None if ref is None else ref._replace(weight=ref_weight, bias=ref_bias),
        )


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

    def at(self, tokens: slice) -> Statistics:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Statistics(**{name: None if v is None else v[tokens] for name, v in parts.items()})


@dataclass
class Gradients:
    """Sums over tokens (hidden, weight, bias), or the rows ∂nll/∂x and ∂kl/∂x before any upstream weight."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    nll: Tensor | None = None
    kl: Tensor | None = None

"""EKSFT: the most uncertain tokens, and those farthest from the original, are not imitated but kept open and held."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..compiled import capturable
from ..devices import has_float64
from ..head import Reference
from ..problem import Statistics
from ..tokens import Tokens, loss_of_chunk
from .arguments import item_count
from .base import HeadLike, Objective

SELECTIONS = ("union", "intersection")
REDUCTIONS = ("group_mean", "token_mean")


class EKSFTLoss(Objective):
    """Entropy-KL selective fine-tuning: nll where neither H nor KL is among the largest, else −λ_h·H/ln V and +λ_k·KL.

    Of the N tokens of a call E are the ⌊fraction·N⌋ of largest entropy H(p), K as many of largest KL(p ‖ p_ref); of
    equals the first. M is their union, or their intersection.

        group_mean: mean of nll off M − entropy_weight · mean of H / ln V over E + kl_weight · mean of KL over K
        token_mean: (Σ nll off M − entropy_weight · Σ H / ln V over E + kl_weight · Σ KL over K) / n

    Take it to prepare a model for reinforcement learning with little data: it learns what fits it, and keeps its
    doubts. Not to teach facts: the tokens that carry them are the ones left out.

    Args:
        fraction: in (0, 1], of the tokens of a call, so of a batch, whose rows are mixed.
        entropy_weight: λ_h ≥ 0, of a reward for entropy.
        kl_weight: λ_k ≥ 0.
        selection: M, "union" or "intersection".
        reduction: "group_mean" as the authors' code has it; an empty group adds 0, and `num_items` is an error.
            "token_mean": n is the number of tokens with a label, or `num_items`; λ_h and λ_k then weigh 1 / fraction
            less.

    Args of the call: hidden [..., D], head, labels int64 [...], `reference`, `num_items`. Under gradient accumulation
    each batch selects its own.

    Gradients are exact, as those of the entropy and of KL(p ‖ p_ref) have no sparse form. GEMMs: 6; with a frozen head
    6, and 4 rows [N, D] kept for backward. Source: arXiv 2605.29303 and MINE-USTC/EKSFT: fraction, weights and union as
    in its readme. Not as there: selections and losses are of aligned labels, the KL is one of log-probabilities, and λ
    is not multiplied by 1.05 or 0.95 in each step.
    """

    needs_reference = True
    wanted = frozenset({"entropy"})
    entropy_gradient = True
    beta = 1.0  # KL(p ‖ p_ref)
    bounds: ClassVar = {
        "fraction": dict(above=0, most=1), "entropy_weight": dict(least=0), "kl_weight": dict(least=0)
    }  # fmt: skip

    def __init__(
        self,
        fraction: float = 0.2,
        entropy_weight: float = 0.05,
        kl_weight: float = 0.05,
        selection: str = "union",
        reduction: str = "group_mean",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.fraction, self.entropy_weight, self.kl_weight = fraction, entropy_weight, kl_weight
        self.selection, self.reduction = selection, reduction

    def __setattr__(self, name: str, value: Any) -> None:
        for option, known in (("selection", SELECTIONS), ("reduction", REDUCTIONS)):
            if name == option and value not in known:
                raise ValueError(f"{name}: expected {' or '.join(known)}, got {value!r}")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        weights = f"entropy_weight={self.entropy_weight}, kl_weight={self.kl_weight}"
        return f"fraction={self.fraction}, {weights}, selection={self.selection!r}, reduction={self.reduction!r}"

    @property
    def divides_by_items(self) -> bool:
        """A mean of each group cannot be divided by the tokens of several batches."""
        return self.reduction != "group_mean"

    def token_loss(self, out: Statistics, weight: Tensor, entropy_weight: Tensor, kl_weight: Tensor) -> Tensor:
        return weight * out.nll - entropy_weight * out.entropy + kl_weight * out.divergence

    @capturable
    def forward(
        self,
        hidden: Tensor,
        head: HeadLike,
        labels: Tensor,
        *,
        reference: Reference | None = None,
        num_items: Any = None,
    ) -> Tensor:
        self.check_call(reference, {})
        if num_items is not None and self.reduction == "group_mean":
            raise ValueError(
                f"num_items: reduction='group_mean' takes means within the call, got {num_items!r}; leave it out, or "
                "take reduction='token_mean'"
            )
        tokens = self.prepare(hidden, head, labels, reference)
        n = item_count(num_items, tokens.count)
        wanted, k = self._statistics()
        out = tokens.losses(wanted, k)
        weights, divisor = self._weights(tokens, out, n)
        loss = tokens.total(loss_of_chunk(self.token_loss, weights, wanted, tokens)(out, slice(None)))
        if tokens.observer is not None:
            tokens.observer.were_divided(divisor)
        return loss

    def _weights(self, tokens: Tokens, out: Statistics, n: Any) -> tuple[dict[str, Tensor], Any]:
        """Of the terms of each token, divided; and what divided the nll."""
        uncertain = largest(tokens, out.entropy.detach(), self.fraction)
        far = largest(tokens, out.divergence.detach(), self.fraction)
        left_out = uncertain | far if self.selection == "union" else uncertain & far
        of_entropy = self.entropy_weight / math.log(max(2, tokens.problem.head.vocabulary))
        pairs = {
            "weight": (~left_out, 1.0),
            "entropy_weight": (uncertain, of_entropy),
            "kl_weight": (far, self.kl_weight),
        }
        divisors = {name: n for name in pairs}
        if self.reduction == "group_mean":
            divisors = {name: tokens.total(group).clamp(min=1) for name, (group, _) in pairs.items()}
        weights = {name: group.to(out.nll.dtype) * factor / divisors[name] for name, (group, factor) in pairs.items()}
        return weights, divisors["weight"]


def largest(tokens: Tokens, values: Tensor, fraction: float) -> Tensor:
    """[N] bool: the ⌊fraction·count⌋ largest of the valid tokens; of equals the first."""
    count = tokens.count
    if isinstance(count, Tensor):  # of a graph, where ignored tokens are among them
        values = values.masked_fill(~tokens.valid, -torch.inf)  # type: ignore[attr-defined]
        exact = torch.float64 if has_float64(count.device.type) else torch.float32
        most: Any = (count.to(exact) * fraction).floor()
    else:
        most = math.floor(count * fraction)
    order = values.argsort(descending=True, stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return place < most

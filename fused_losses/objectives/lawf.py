"""LAwF: cross-entropy on anchors, KL to the frozen original elsewhere."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..compiled import capturable
from ..head import Reference
from ..problem import Statistics
from .arguments import Field, item_count
from .base import HeadLike, Objective


class LAwFLoss(Objective):
    """Cross-entropy on anchors, KL to the frozen reference elsewhere: KL(q ‖ p), q = c·onehot(label) + (1 − c)·p_ref.

    Take it to correct single tokens of the model's own answers, and to train until it is right, as little else moves. Not
    for answers that others wrote: there every token is a correction, which is `SFTKLLoss`.


    c, the confidence, is 0 off the anchors (pure KL to the reference), 1 for an anchor that is certain (pure
    cross-entropy), between for a softer one. The value is the true KL(q ‖ p), its gradient that of c·nll + (1 − c)·kl.

        token_mean: (anchor_weight · Σ_{c>0} + retain_weight · Σ_{c=0}) / n
        group_mean: anchor_weight · mean over c > 0 + retain_weight · mean over c = 0    (an empty group adds 0)

    Args:
        anchor_weight, retain_weight: α and β, ≥ 0.
        reduction: "token_mean" or "group_mean".

    Args of the call: hidden [..., D], head, labels int64 [...] (also off the anchors every token that shall be retained
    needs a label, any valid id: only ignored tokens are left out), `confidence` [...] in [0, 1], and not above 0 where
    the label is ignored, `reference`, `num_items`: n; for group_mean a pair (anchors, others).

    GEMMs: 4, 3 with a frozen head. Source: longern/LAwF.
    """

    needs_reference = True
    fields: ClassVar = {
        "confidence": Field(
            "1 at anchors, 0 at tokens to retain, of the labels' shape",
            "fractions",
            labelled=True,
            in_a_batch="fused_losses.huggingface.AnchorCollator makes it of a column anchors or confidence, which SFTTrainer "
            "drops unless remove_unused_columns=False",
        )
    }
    bounds: ClassVar = {"anchor_weight": dict(least=0), "retain_weight": dict(least=0)}

    def __init__(
        self, anchor_weight: float = 1.0, retain_weight: float = 1.0, reduction: str = "token_mean", **options: Any
    ) -> None:
        super().__init__(**options)
        self.anchor_weight, self.retain_weight, self.reduction = anchor_weight, retain_weight, reduction

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "reduction" and value not in ("token_mean", "group_mean"):
            raise ValueError(f"reduction: expected token_mean or group_mean, got {value!r}")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"anchor_weight={self.anchor_weight}, retain_weight={self.retain_weight}, reduction={self.reduction!r}"

    def token_loss(self, out: Statistics, confidence: Tensor, weight: Tensor) -> Tensor:
        c, r = confidence, (-out.reference_nll).exp()
        q_label = c + (1 - c) * r
        # −H(q) + (1 − c)·H(p_ref): what lies between c·nll + (1 − c)·kl and KL(q ‖ p). The entropy itself cancels.
        constant = (
            torch.xlogy(q_label, q_label)
            + torch.xlogy((1 - c) * (1 - r), 1 - c)
            + (1 - c) * torch.where(r > 0, r * out.reference_nll, 0)
        )
        return weight * (c * out.nll + (1 - c) * out.kl + constant)

    @capturable
    def forward(
        self,
        hidden: Tensor,
        head: HeadLike,
        labels: Tensor,
        *,
        confidence: Tensor | None = None,
        reference: Reference | None = None,
        num_items: Any = None,
    ) -> Tensor:
        self.check_call(reference, {"confidence": confidence})
        tokens = self.prepare(hidden, head, labels, reference)
        c = self.fields["confidence"].read(tokens, confidence, "confidence")
        anchor = c > 0
        # Products, as a graph is specialised on numbers that become tensors otherwise.
        anchor_weight, retain_weight = c.new_ones(()) * self.anchor_weight, c.new_ones(()) * self.retain_weight
        if self.reduction == "group_mean":
            # `reduce` divides by n again.
            anchors, others = self._group_counts(num_items, anchor, tokens.count)
            anchor_weight, retain_weight = anchor_weight * tokens.count / anchors, retain_weight * tokens.count / others
            num_items = None
        weight = torch.where(anchor, anchor_weight, retain_weight)
        return self.reduce(tokens, num_items, confidence=c, weight=weight)

    @property
    def divides_by_items(self) -> bool:
        """A mean of each group cannot be divided by the tokens of several batches."""
        return self.reduction != "group_mean"

    @staticmethod
    def _group_counts(num_items: Any, anchor: Tensor, count: int | Tensor) -> tuple[Tensor | float, Tensor | float]:
        if num_items is None:
            anchors = anchor.sum()
            return anchors.clamp(min=1), (count - anchors).clamp(min=1)
        if not isinstance(num_items, (tuple, list)) or len(num_items) != 2:
            raise ValueError(
                f"num_items: for reduction='group_mean' expected a pair (anchors, other tokens), got {num_items!r}"
            )
        if any(x is None for x in num_items):
            raise ValueError(f"num_items: expected a pair of numbers (anchors, other tokens), got {num_items!r}")
        return tuple(item_count(x, 0) for x in num_items)  # type: ignore[return-value]

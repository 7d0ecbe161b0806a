"""LAwF: cross-entropy on anchors, KL to the frozen original elsewhere."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..compiled import capturable
from ..head import Reference
from ..problem import Statistics
from ..tokens import Tokens, loss_of_chunk
from .arguments import Field, item_count
from .base import HeadLike, Objective


class LAwFLoss(Objective):
    """Cross-entropy on anchors, KL to the frozen reference elsewhere: KL(q ‖ p), q = c·onehot(label) + (1 − c)·p_ref.

    Take it to correct single tokens of the model's own answers, and to train until it is right, as little else moves.
    With every token an anchor of confidence 1, as in answers that others wrote, LAwF is cross-entropy: there take
    `SFTKLLoss`, or a `target_probability`, with which the rest of each token stays as the original spreads it.

    c, the confidence, is 0 off the anchors (pure KL to the reference), 1 for an anchor that is certain (pure
    cross-entropy), between for a softer one. The value is the true KL(q ‖ p), its gradient that of c·nll + (1 − c)·kl.

        token_mean: (anchor_weight · Σ_{c>0} + retain_weight · Σ_{c=0}) / n
        group_mean: anchor_weight · mean over c > 0 + retain_weight · mean over c = 0    (an empty group adds 0)

    With a **target probability** p* an anchor asks for an absolute probability of the label in place of a step from the
    reference's r: c = (p* − r) / (1 − r), which makes q[label] = p* and leaves the others in proportion to p_ref. Where
    r ≥ p* the reference says the label already, and the token is retained. `confidence` > 0 then only marks anchors.

    Args:
        anchor_weight, retain_weight: α and β, ≥ 0.
        reduction: "token_mean" or "group_mean".
        target_probability: p* in (0, 1) of all anchors, or None.

    Args of the call: hidden [..., D], head, labels int64 [...] (also off the anchors every token that shall be retained
    needs a label, any valid id: only ignored tokens are left out), `confidence` [...] in [0, 1], and not above 0 where
    the label is ignored, `target_probability` [...]: p* of each anchor in (0, 1), anything elsewhere, in the place of
    the option; `reference`, `num_items`: n; for group_mean a pair (anchors, others), where anchors are those with c >
    0.

    GEMMs: 4, 3 with a frozen head; 6 (4) for group_mean with a target probability without num_items, as which tokens
    are anchors must be known first. Source: longern/LAwF.
    """

    needs_reference = True
    fields: ClassVar = {
        "confidence": Field(
            "1 at anchors, 0 at tokens to retain, of the labels' shape",
            "fractions",
            labelled=True,
            in_a_batch="fused_losses.huggingface.AnchorCollator makes it of a column anchors or confidence, which "
            "SFTTrainer drops unless remove_unused_columns=False",
        ),
        "target_probability": Field("what the label of each anchor shall get, in (0, 1)", "fractions", optional=True),
    }
    bounds: ClassVar = {
        "anchor_weight": dict(least=0), "retain_weight": dict(least=0),
        "target_probability": dict(above=0, below=1, optional=True),
    }  # fmt: skip

    def __init__(
        self,
        anchor_weight: float = 1.0,
        retain_weight: float = 1.0,
        reduction: str = "token_mean",
        target_probability: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.anchor_weight, self.retain_weight, self.reduction = anchor_weight, retain_weight, reduction
        self.target_probability = target_probability

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "reduction" and value not in ("token_mean", "group_mean"):
            raise ValueError(f"reduction: expected token_mean or group_mean, got {value!r}")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        target = "" if self.target_probability is None else f", target_probability={self.target_probability}"
        weights = f"anchor_weight={self.anchor_weight}, retain_weight={self.retain_weight}"
        return f"{weights}, reduction={self.reduction!r}{target}"

    def token_loss(
        self, out: Statistics, confidence: Tensor, weight: Tensor, anchor_weight: Tensor | None = None
    ) -> Tensor:
        """With `anchor_weight` the confidence is p*, 0 off the anchors, and `weight` that of tokens to retain."""
        c, r = confidence, (-out.reference_nll).exp()
        if anchor_weight is not None:
            c = confidence_for(confidence, out.reference_nll)
            weight = torch.where(c > 0, anchor_weight, weight)
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
        target_probability: Tensor | None = None,
        reference: Reference | None = None,
        num_items: Any = None,
    ) -> Tensor:
        self.check_call(reference, {"confidence": confidence})
        tokens = self.prepare(hidden, head, labels, reference)
        c = self.fields["confidence"].read(tokens, confidence, "confidence")
        # Products, as a graph is specialised on numbers that become tensors otherwise.
        anchor_weight, retain_weight = c.new_ones(()) * self.anchor_weight, c.new_ones(()) * self.retain_weight
        targets = self._targets(tokens, c > 0, target_probability)
        grouped = self.reduction == "group_mean"
        if grouped and num_items is None and targets is not None:
            return self._group_means_of_targets(tokens, targets, anchor_weight, retain_weight)
        anchor = c > 0
        if grouped:
            # `reduce` divides by n again.
            anchors, others = self._group_counts(num_items, anchor, tokens.count)
            anchor_weight, retain_weight = anchor_weight * tokens.count / anchors, retain_weight * tokens.count / others
            num_items = None
        if targets is None:
            weight = torch.where(anchor, anchor_weight, retain_weight)
            return self.reduce(tokens, num_items, confidence=c, weight=weight)
        weights = {"weight": retain_weight.expand_as(c), "anchor_weight": anchor_weight.expand_as(c)}
        return self.reduce(tokens, num_items, confidence=targets, **weights)

    def _targets(self, tokens: Tokens, marked: Tensor, values: Tensor | None) -> Tensor | None:
        """p* of each token, 0 where none is marked; None: the confidence is the objective's own."""
        if values is None:
            target = self.target_probability
            return None if target is None else marked.to(tokens.problem.accumulator) * target
        found = tokens.select(values, "target_probability").detach().to(tokens.problem.accumulator)
        inside = torch.where(marked, found, 0.5)
        return torch.where(marked, tokens.check(inside, "target_probability", "open_fractions"), 0)

    def _group_means_of_targets(
        self, tokens: Tokens, targets: Tensor, anchor_weight: Tensor, retain_weight: Tensor
    ) -> Tensor:
        """Which tokens are anchors follows from the reference, so its statistics come first."""
        wanted, k = self._statistics()
        out = tokens.losses(wanted, k)
        anchor = confidence_for(targets, out.reference_nll) > 0
        anchors, others = self._group_counts(None, tokens.total(anchor), tokens.count)
        per_token = {"confidence": targets, "weight": (retain_weight / others).expand_as(targets),
                     "anchor_weight": (anchor_weight / anchors).expand_as(targets)}  # fmt: skip
        loss = loss_of_chunk(self.token_loss, per_token, wanted, tokens)
        return tokens.total(loss(out, slice(None)))

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


def confidence_for(target: Tensor, reference_nll: Tensor) -> Tensor:
    """(p* − r) / (1 − r), which makes the target of the label p*; 0 where r ≥ p*, and where p* is 0."""
    rest, rest_ref = 1 - target, -torch.expm1(-reference_nll)
    return 1 - rest / torch.maximum(rest, rest_ref)

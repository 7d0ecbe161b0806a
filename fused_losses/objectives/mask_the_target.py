"""Mask the Target: cross-entropy, and a KL to the frozen original over all of the vocabulary but the label."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..problem import Statistics
from .base import Objective

# The model's 1 − p, below which its logarithm is cut off: that of a float32 that is nearly 0.
LEAST_REST = 1e-30
# The reference's 1 − r, below which the term fades. Logits near 30 are rounded by 2e-6 in float32.
LEAST_REFERENCE_REST = 1e-6


class MaskTheTargetLoss(Objective):
    """Mask the Target: Σ (nll + kl_weight·KL(p_ref' ‖ p')) / n; p', p_ref': without the label, renormalised.

    The label's own probability is free to rise, what the model would say in its place is held to the original. Take it
    in place of SFT + KL where the KL holds back what is to be learned. Not with a reference that is nearly certain of
    most labels: what is left of its distribution, magnified to 1, is then mostly noise.

    With r and p the label's probabilities, KL(p_ref' ‖ p') is
    [KL(p_ref ‖ p) − r·(nll − nll_ref) − (1 − r)·(ln(1 − r) − ln(1 − p))] / (1 − r). That magnifies rounding by
    1 / (1 − r). So where the reference is all but certain, 1 − r < 1e-6, the division is by 1e-6 instead: the term
    fades to 0 with 1 − r, and so does its gradient. Where 1 − p < 1e-30 its logarithm is that of 1e-30 and has no
    gradient. Neither value nor gradient is ever NaN, and infinite only where a bias of −inf rules out what the
    reference has.

    Args:
        kl_weight: λ ≥ 0.

    Args of the call: hidden [..., D], head, labels int64 [...], `reference`, `num_items`.

    GEMMs: 4; 3 with a frozen head. Sparse gradients: tokens of which either model is nearly certain have a gradient
    made of small probabilities, so many of them are exact, as the report says. Source: arXiv 2605.29498.
    """

    needs_reference = True
    bounds: ClassVar = {"kl_weight": dict(least=0)}

    def __init__(self, kl_weight: float, **options: Any) -> None:
        super().__init__(**options)
        self.kl_weight = kl_weight

    def extra_repr(self) -> str:
        return f"kl_weight={self.kl_weight}"

    def token_loss(self, out: Statistics) -> Tensor:
        rest = -torch.expm1(-out.nll)  # 1 − p, accurate also where p is nearly 1
        rest_ref = -torch.expm1(-out.reference_nll)
        log_ratio = rest_ref.clamp(min=LEAST_REST).log() - rest.clamp(min=LEAST_REST).log()
        kl = out.kl - (1 - rest_ref) * (out.nll - out.reference_nll) - rest_ref * log_ratio
        return out.nll + self.kl_weight * kl / rest_ref.clamp(min=LEAST_REFERENCE_REST)

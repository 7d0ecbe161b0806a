"""SFT with a KL to the frozen original."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..problem import Statistics
from .base import Objective


class SFTKLLoss(Objective):
    """SFT + KL: Σ (nll + kl_weight·KL(p_ref ‖ p)) / n.

    The baseline of all that hold a model to its original: every token is learned and held at once, so kl_weight is the
    price between the two. Take it first; LAwF holds where it does not learn, ASFT learns little of what is hard,
    MaskTheTarget does not hold the label itself back.

    Args:
        kl_weight: ≥ 0; what helps lies between 0.1 and 1.

    Args of the call: hidden [..., D], head, labels int64 [...], `reference`, `num_items`. GEMMs: 4; 3 with a frozen
    head.
    """

    needs_reference = True
    bounds: ClassVar = {"kl_weight": dict(least=0)}

    def __init__(self, kl_weight: float, **options: Any) -> None:
        super().__init__(**options)
        self.kl_weight = kl_weight

    def extra_repr(self) -> str:
        return f"kl_weight={self.kl_weight}"

    def token_loss(self, out: Statistics) -> Tensor:
        return out.nll + self.kl_weight * out.kl

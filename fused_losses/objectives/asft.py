"""ASFT: DFT with a KL to the frozen original."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..problem import Statistics
from .base import Objective


class ASFTLoss(Objective):
    """Anchored SFT: Σ (p[label]·nll + kl_weight·KL(p_ref ‖ p)) / n, the probability without a gradient.

    Take it where DFT drifts from the original: the KL holds what the weights do not. Not for facts, as DFT.

    Needs `reference`. 4 GEMMs; 3 with a frozen head. Source: arXiv 2509.23753.
    """

    needs_reference = True
    bounds: ClassVar = {"kl_weight": dict(least=0)}

    def __init__(self, kl_weight: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        self.kl_weight = kl_weight

    def extra_repr(self) -> str:
        return f"kl_weight={self.kl_weight}"

    def token_loss(self, out: Statistics) -> Tensor:
        return (-out.nll.detach()).exp() * out.nll + self.kl_weight * out.kl

"""DFT: the loss times the probability of the label."""

from __future__ import annotations

from torch import Tensor

from ..problem import Statistics
from .base import Objective


class DFTLoss(Objective):
    """Dynamic fine-tuning: Σ p[label]·nll / n, the probability without a gradient.

    3 GEMMs; 2 with a frozen head. Source: arXiv 2508.05629.
    """

    def token_loss(self, out: Statistics) -> Tensor:
        return (-out.nll.detach()).exp() * out.nll

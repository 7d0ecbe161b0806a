"""DFT: the loss times the probability of the label."""

from __future__ import annotations

from torch import Tensor

from ..problem import Statistics
from .base import Objective


class DFTLoss(Objective):
    """Dynamic fine-tuning: Σ p[label]·nll / n, the probability without a gradient.

    Take it where answers are given in the model's own manner, as in mathematics and code: what it holds for unlikely
    hardly pulls. Not to teach facts, nor from random initialisation: where p is near 0, so is the gradient.

    3 GEMMs; 2 with a frozen head. Source: arXiv 2508.05629.
    """

    def token_loss(self, out: Statistics) -> Tensor:
        return (-out.nll.detach()).exp() * out.nll

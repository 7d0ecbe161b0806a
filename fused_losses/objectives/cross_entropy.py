"""Cross-entropy."""

from __future__ import annotations

from torch import Tensor

from ..problem import Statistics
from .base import Objective


class CrossEntropyLoss(Objective):
    """Σ nll / n.

    Args of the call: hidden [..., D], head, labels [...] int64, `num_items` (a number or a tensor of one; default: the
    tokens with a label). Returns a scalar, float32 (float64 for float64). 3 GEMMs; 2 with a frozen head.
    """

    def token_loss(self, out: Statistics) -> Tensor:
        return out.nll

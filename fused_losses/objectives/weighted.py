"""Cross-entropy with a weight of one's own for each token."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..problem import Statistics
from .arguments import Field
from .base import Objective


class WeightedLoss(Objective):
    """Weighted cross-entropy: Σ w·nll / n, with a weight w of each token from the batch.

    Take it where weights are known before training: by message or role, by the quality of a sample, rewards or
    advantages, 0 for tokens that are to be read only. A negative weight makes a token less likely, without bound: keep
    such weights small and few. Weights that follow from the model's own probabilities are other objectives (TALR, DFT,
    EAFT, InfoSFT).

    Args of the call: hidden [..., D], head, labels int64 [...]; `weights` [...]: finite numbers of either sign,
    anything where the label is ignored; `num_items`. n is the number of tokens with a label, whatever their weights:
    for a weighted mean give `num_items`, the sum of the weights of the whole accumulated batch.

    GEMMs: 3; 2 with a frozen head.
    """

    fields: ClassVar = {"weights": Field("a weight of each token, of the labels' shape")}

    def token_loss(self, out: Statistics, weights: Tensor) -> Tensor:
        return weights * out.nll

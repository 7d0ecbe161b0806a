"""EAFT: tokens that the model is sure of count less."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from ..compiled import capturable
from ..problem import Statistics
from ..tokens import check_wanted
from .base import HeadLike, Objective


class EAFTLoss(Objective):
    """Entropy-adaptive fine-tuning: Σ w·nll / n, w = (H_k / ln k)^alpha.

    Take it where labels contradict what the model is sure of: those tokens pull least, while tokens it does not know,
    with much entropy, pull as they do in cross-entropy. Not to correct the model where it is confidently wrong.


    H_k is the entropy of the k largest probabilities, renormalised; k = min(top_k, V). A confident token that is wrong
    gets little weight.

    Args:
        alpha: ≥ 0.
        top_k: k ≥ 2.
        normaliser: in the place of ln k, > 0; None: ln k, as in the paper. The authors' code, and LLaMA-Factory, have
            3.0 for ln 20 = 2.9957.

    3 GEMMs; 2 with a frozen head. Source: arXiv 2601.02151.
    """

    wanted = frozenset({"topk_entropy"})

    bounds: ClassVar = {"alpha": dict(least=0), "normaliser": dict(above=0, optional=True)}

    def __init__(self, alpha: float = 1.0, top_k: int = 20, normaliser: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.alpha, self.normaliser = alpha, normaliser
        _, self.top_k = check_wanted(self.wanted, top_k)

    def extra_repr(self) -> str:
        own = "" if self.normaliser is None else f", normaliser={self.normaliser}"
        return f"alpha={self.alpha}, top_k={self.top_k}{own}"

    def token_loss(self, out: Statistics, log_k: Tensor) -> Tensor:
        return (out.topk_entropy / log_k) ** self.alpha * out.nll

    @capturable
    def forward(self, hidden: Tensor, head: HeadLike, labels: Tensor, *, num_items: Any = None) -> Tensor:
        tokens = self.prepare(hidden, head, labels)
        k = max(2, min(self.top_k, tokens.problem.head.vocabulary))
        most = math.log(k) if self.normaliser is None else self.normaliser
        log_k = hidden.new_full(tokens.problem.labels.shape, most, dtype=tokens.problem.accumulator)
        return self.reduce(tokens, num_items, log_k=log_k)

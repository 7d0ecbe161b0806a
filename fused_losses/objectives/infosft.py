"""InfoSFT: tokens of medium confidence count most."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..problem import Statistics
from .base import Objective


class InfoSFTLoss(Objective):
    """Information-aware SFT: Σ p·max(1 − logit(p)/logit(P), 0)·nll / n, p the label's probability, without a gradient.

    logit(p) = ln p − ln(1 − p), P = `max_probability`. The weight is largest at a medium p, falls to 0 for impossible
    tokens as p·|ln p|, and is 0 from p = P on: what the model knows already is left alone. Take it in the place of DFT
    where the model shall go on to learn new behaviour without being torn apart by single tokens; like DFT it learns
    little of what the model finds impossible.

    Args:
        max_probability: P in (0.5, 1), from which on tokens count nothing.

    Args of the call: hidden [..., D], head, labels int64 [...], `num_items`. GEMMs: 3; 2 with a frozen head. Source:
    arXiv 2605.14967; P = 0.93 and the division by the number of tokens as in Helloworld10011/InfoSFT.
    """

    bounds: ClassVar = {"max_probability": dict(above=0.5, below=1)}

    def __init__(self, max_probability: float = 0.93, **options: Any) -> None:
        super().__init__(**options)
        self.max_probability = max_probability

    def extra_repr(self) -> str:
        return f"max_probability={self.max_probability}"

    def token_loss(self, out: Statistics) -> Tensor:
        nll = out.nll.detach()
        logit = -nll - torch.log(-torch.expm1(-nll))  # where p is 1: infinite, and its weight 0
        weight = (-nll).exp() * (1 - logit / math.log(self.max_probability / (1 - self.max_probability))).clamp(min=0)
        return weight * out.nll

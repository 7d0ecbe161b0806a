"""PSFT: no step beyond a ratio of the old policy, as PPO clips."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..problem import Statistics
from .arguments import Field
from .base import Objective


class PSFTLoss(Objective):
    """Proximal SFT: Σ −min(r, clip(r, 1 − ε, 1 + ε)) / n, r = p[label] / p_old[label].

    Take it where several epochs or large steps on few samples would overfit, and before reinforcement learning: entropy
    stays. Not for a single pass with small steps, where r is 1 throughout.

    No gradient where r is above 1 + ε already. Args of the call: `old_nll` [...]: nll of the same tokens under the
    policy at the start of the step (`token_losses(...).nll` without a gradient), and `num_items`.

    3 GEMMs; 2 with a frozen head. Source: zwhong714/PSFT (arXiv 2508.17784).
    """

    fields: ClassVar = {
        "old_nll": Field("token_losses(...).nll of the same tokens before this step, without gradient", "losses")
    }
    bounds: ClassVar = {"epsilon": dict(above=0, most=1)}

    def __init__(self, epsilon: float = 0.2, **options: Any) -> None:
        super().__init__(**options)
        self.epsilon = epsilon

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}"

    def token_loss(self, out: Statistics, old_nll: Tensor) -> Tensor:
        ratio = (old_nll - out.nll).clamp(max=20).exp()  # clipped anyway; exp must not overflow
        return -torch.minimum(ratio, ratio.clamp(1 - self.epsilon, 1 + self.epsilon))

"""PSFT: no step beyond a ratio of the old policy, as PPO clips."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..problem import Statistics
from .arguments import Field
from .base import Objective


class PSFTLoss(Objective):
    """Proximal SFT: Σ −min(r, clip(r, 1 − ε, 1 + ε')) / n, r = p[label] / p_old[label].

    Take it where several epochs or large steps on few samples would overfit, and before reinforcement learning: entropy
    stays. Not for a single pass with small steps, where r is 1 throughout.

    No gradient where r is above 1 + ε' already.

    Args:
        epsilon: ε in (0, 1]. Nothing depends on the lower clip but what is written here: the minimum is r below it.
        epsilon_high: ε' > 0; None: ε, as in the paper. The authors' script has 0.28.

    Args of the call: `old_nll` [...]: nll of the same tokens under the policy at the start of the step
    (`token_losses(...).nll` without a gradient), and `num_items`.

    3 GEMMs; 2 with a frozen head. Source: zwhong714/PSFT (arXiv 2508.17784).
    """

    fields: ClassVar = {
        "old_nll": Field("token_losses(...).nll of the same tokens before this step, without gradient", "losses")
    }
    bounds: ClassVar = {"epsilon": dict(above=0, most=1), "epsilon_high": dict(above=0, optional=True)}

    def __init__(self, epsilon: float = 0.2, epsilon_high: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.epsilon, self.epsilon_high = epsilon, epsilon_high

    def extra_repr(self) -> str:
        high = "" if self.epsilon_high is None else f", epsilon_high={self.epsilon_high}"
        return f"epsilon={self.epsilon}{high}"

    def token_loss(self, out: Statistics, old_nll: Tensor) -> Tensor:
        ratio = (old_nll - out.nll).clamp(max=20).exp()  # clipped anyway; exp must not overflow
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return -torch.minimum(ratio, ratio.clamp(1 - self.epsilon, 1 + high))

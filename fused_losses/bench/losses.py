"""The losses that are measured: their names, and what contestants and the truth must agree on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CROSS_ENTROPY, TALR, LAWF_FROZEN, LAWF_TRAINED, JSD = "cross-entropy", "TALR", "LAwF frozen", "LAwF trained", "JSD"
LOSSES = (CROSS_ENTROPY, TALR, LAWF_FROZEN, LAWF_TRAINED, JSD)
FROZEN_HEAD = (LAWF_FROZEN,)  # of all others the head is trained
SEQUENCES = 8  # of TALR, N / 8 tokens each
ANCHORS = 20  # of LAwF, every so many tokens
BETA = 0.5  # of JSD

Loss = Callable[[Tensor, Tensor], Tensor]  # of hidden [N, D] and weight [V, D]


def talr_weights(nll: Tensor) -> Tensor:
    """[N]; the temperature is the median over the sequences of their mean nll."""
    tau = nll.view(SEQUENCES, -1).mean(1).quantile(0.5).clamp(min=1e-6)
    return (-nll / tau).exp().clamp(min=0.01)


def anchors(count: int, device: torch.device) -> Tensor:
    """[N] bool: which tokens are LAwF's anchors, of confidence 1."""
    return torch.arange(count, device=device) % ANCHORS == 0

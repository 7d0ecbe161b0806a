"""This package as a contestant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import objectives
from ..head import Reference
from ..op import token_losses
from .inputs import Inputs
from .losses import BETA, CROSS_ENTROPY, JSD, LAWF_FROZEN, LAWF_TRAINED, SEQUENCES, TALR, Loss, anchors

OURS = "fused_losses, "
NOT_SPARSE = f'see "{OURS}exact": a divergence with β > 0 has exact gradients, and with them full products'


def our_losses(gradient: str, backend: str = "auto", scan: str = "full") -> dict[str, Callable[[Inputs], Loss] | str]:
    """Of every loss what makes loss(hidden, weight) of the inputs; its attribute `each` gives the tokens' values."""
    options: dict[str, Any] = {"gradient": gradient, "backend": backend, "scan": scan}

    def nll(given: Inputs) -> Loss:
        return lambda x, w: token_losses(x, w, given.labels, **options).nll

    def cross_entropy(given: Inputs) -> Loss:
        module = objectives.CrossEntropyLoss(**options)
        return _giving(lambda x, w: module(x, w, given.labels), nll(given))

    def talr(given: Inputs) -> Loss:
        module, rows = objectives.TALRLoss(**options), given.labels.view(SEQUENCES, -1)
        return _giving(lambda x, w: module(x.view(SEQUENCES, -1, x.shape[1]), w, rows), nll(given))

    def lawf(trained: bool) -> Callable[[Inputs], Loss]:
        def build(given: Inputs) -> Loss:
            module, c = objectives.LAwFLoss(**options), anchors(len(given.labels), given.labels.device).float()
            reference = Reference(given.reference_hidden, given.weight if trained else None)

            def each(x: Tensor, w: Tensor) -> Tensor:
                out = token_losses(x, w, given.labels, reference=reference, **options)
                return torch.where(c > 0, out.nll, out.kl)

            return _giving(lambda x, w: module(x, w, given.labels, confidence=c, reference=reference), each)

        return build

    def jsd(given: Inputs) -> Loss:
        module, reference = objectives.JSDLoss(BETA, **options), Reference(given.reference_hidden)

        def each(x: Tensor, w: Tensor) -> Tensor:
            return token_losses(x, w, given.labels, reference=reference, beta=BETA, **options).divergence

        return _giving(lambda x, w: module(x, w, given.labels, reference=reference), each)

    return {
        CROSS_ENTROPY: cross_entropy, TALR: talr, LAWF_FROZEN: lawf(False), LAWF_TRAINED: lawf(True),
        JSD: jsd if gradient == "exact" else NOT_SPARSE,
    }  # fmt: skip


def _giving(loss: Loss, each: Loss) -> Loss:
    loss.each = each  # type: ignore[attr-defined]
    return loss

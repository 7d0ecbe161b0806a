"""The methods of the study, as data: a loss of this package, and what it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fused_losses as fl
from fused_losses.objectives import Objective

L2, SFT_KL, LAWF_TARGET, REPLAY = 3e-3, 0.3, 0.9, 0.25
WISE = (0.3, 0.6)  # parts of the way from the start to the tuned weights
# TALR, DFT and their like have small gradients; AdamW takes steps of the same size whatever these are.
SMALL, MIDDLE, LARGE = 2e-5, 1e-4, 4e-4
LORA_FACTOR = 10  # its rates are so many times those of all weights


@dataclass(frozen=True)
class Method:
    """`make`: the objective, from the median nll of the training rows before training, which only FLOW uses.

    initial: "sequence" or "token" where it weighs by the losses before training; l2: λ of ‖θ − θ₀‖²; replay: part of
    the rows that are the start model's own answers; anchors: it gets a confidence of 1 on every label; finch: the rate
    follows the batch's loss.
    """

    title: str
    make: Callable[[float], Objective]
    initial: str | None = None
    l2: float = 0.0
    replay: float = 0.0
    lora: bool = False
    anchors: bool = False
    finch: bool = False


def _exact(loss: type[Objective], **options: Any) -> Callable[[float], Objective]:
    return lambda median: loss(gradient="exact", **options)


def _sft() -> Callable[[float], Objective]:
    return _exact(fl.CrossEntropyLoss)


METHODS = {
    "sft": Method("SFT", _sft()),
    "talr": Method("TALR", _exact(fl.TALRLoss)),
    "lawf": Method("LAwF", _exact(fl.LAwFLoss, target_probability=LAWF_TARGET), anchors=True),
    "sft+kl": Method("SFT + KL", _exact(fl.SFTKLLoss, kl_weight=SFT_KL)),
    "replay": Method("SFT + own answers", _sft(), replay=REPLAY),
    "lora": Method("LoRA", _sft(), lora=True),
    "l2": Method("L2-Reg", _sft(), l2=L2),
    "flow": Method("FLOW", lambda median: fl.FLOWLoss(max(median, 1e-6), gradient="exact"), initial="sequence"),
    "dft": Method("DFT", _exact(fl.DFTLoss)),
    "asft": Method("ASFT", _exact(fl.ASFTLoss)),
    "eaft": Method("EAFT", _exact(fl.EAFTLoss)),
    "stm": Method("STM", _exact(fl.STMLoss), initial="token"),
    "infosft": Method("InfoSFT", _exact(fl.InfoSFTLoss)),
    "finch": Method("FINCH", _sft(), finch=True),
}
WISE_TITLE = "Wise-FT"  # of SFT's weights, without a run of its own


def finch_factor(average: float) -> float:
    """η_i / η of fused_losses.huggingface.FinchCallback, which is one of a Trainer, with its defaults."""
    return min((average + 1e-8) ** -0.5, 2.5)

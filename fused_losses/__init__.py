"""Token-level losses for fine-tuning language models without forgetting, fused with the LM head.

`token_losses` is the op; the objectives are modules on top of it; `reference` holds the same in plain PyTorch.
"""

from . import importing  # noqa: F401  # first: it imports torch

# isort: split
from . import anchors  # noqa: F401
from .head import LMHead, LowRank, Reference
from .huggingface import initial_losses, patch, patched, unpatch
from .objectives import (
    ASFTLoss,
    CrossEntropyLoss,
    DFTLoss,
    EAFTLoss,
    EKSFTLoss,
    FLOWLoss,
    InfoSFTLoss,
    JSDLoss,
    LAwFLoss,
    MaskTheTargetLoss,
    Objective,
    PSFTLoss,
    ReverseKLLoss,
    SFTKLLoss,
    STMLoss,
    TALRLoss,
    TopKDistillationLoss,
    WeightedLoss,
)
from .op import TokenLosses, token_losses
from .parameters import l2_to_initial, wise_ft
from .preference import sequence_logps
from .sparse.certificate import GradientReport

__version__ = "0.1.0"

__all__ = [
    "ASFTLoss",
    "CrossEntropyLoss",
    "DFTLoss",
    "EAFTLoss",
    "EKSFTLoss",
    "FLOWLoss",
    "GradientReport",
    "InfoSFTLoss",
    "JSDLoss",
    "LAwFLoss",
    "LMHead",
    "LowRank",
    "MaskTheTargetLoss",
    "Objective",
    "PSFTLoss",
    "Reference",
    "ReverseKLLoss",
    "SFTKLLoss",
    "STMLoss",
    "TALRLoss",
    "TokenLosses",
    "TopKDistillationLoss",
    "WeightedLoss",
    "initial_losses",
    "l2_to_initial",
    "patch",
    "patched",
    "sequence_logps",
    "token_losses",
    "unpatch",
    "wise_ft",
]

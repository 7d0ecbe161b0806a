"""Training objectives as modules without parameters, each a few lines over the per-token losses; one file a method."""

from .arguments import item_count
from .asft import ASFTLoss
from .base import Objective
from .cross_entropy import CrossEntropyLoss
from .dft import DFTLoss
from .eaft import EAFTLoss
from .eksft import EKSFTLoss
from .flow import FLOWLoss
from .jsd import JSDLoss, ReverseKLLoss
from .infosft import InfoSFTLoss
from .lawf import LAwFLoss
from .mask_the_target import MaskTheTargetLoss
from .psft import PSFTLoss
from .sft_kl import SFTKLLoss
from .stm import STMLoss
from .talr import TALRLoss
from .topk_distillation import TopKDistillationLoss
from .weighted import WeightedLoss

__all__ = [
    "ASFTLoss",
    "CrossEntropyLoss",
    "DFTLoss",
    "EAFTLoss",
    "EKSFTLoss",
    "FLOWLoss",
    "JSDLoss",
    "InfoSFTLoss",
    "LAwFLoss",
    "MaskTheTargetLoss",
    "Objective",
    "PSFTLoss",
    "ReverseKLLoss",
    "SFTKLLoss",
    "STMLoss",
    "TALRLoss",
    "TopKDistillationLoss",
    "WeightedLoss",
    "item_count",
]

"""Training objectives as modules without parameters, each a few lines over the per-token losses; one file a method."""

from .arguments import item_count
from .asft import ASFTLoss
from .base import Objective
from .cross_entropy import CrossEntropyLoss
from .dft import DFTLoss
from .eaft import EAFTLoss
from .flow import FLOWLoss
from .jsd import JSDLoss, ReverseKLLoss
from .lawf import LAwFLoss
from .psft import PSFTLoss
from .talr import TALRLoss
from .topk_distillation import TopKDistillationLoss
from .weighted import WeightedLoss

__all__ = [
    "ASFTLoss",
    "CrossEntropyLoss",
    "DFTLoss",
    "EAFTLoss",
    "FLOWLoss",
    "JSDLoss",
    "LAwFLoss",
    "Objective",
    "PSFTLoss",
    "ReverseKLLoss",
    "TALRLoss",
    "TopKDistillationLoss",
    "WeightedLoss",
    "item_count",
]

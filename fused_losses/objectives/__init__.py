"""Training objectives as modules without parameters, each a few lines over the per-token losses; one file a method.

    CrossEntropyLoss      cross-entropy; label smoothing, z-loss, class weights
    WeightedLoss          cross-entropy with a weight of each token from the batch
    TALRLoss              tokens with a large loss count less
    LAwFLoss              cross-entropy on anchors, KL to the original elsewhere
    FLOWLoss              sequences that the initial model finds easy count most
    DFTLoss               the loss times the probability of the label
    ASFTLoss              DFT with a KL to the original
    EAFTLoss              confident tokens count less
    PSFTLoss              no step beyond a ratio of the old policy
    STMLoss               tokens that the start model finds perplexing are left out
    InfoSFTLoss           most weight on labels of middling probability
    MaskTheTargetLoss     cross-entropy, and a KL to the original that leaves the label out
    EKSFTLoss             uncertain and distant tokens are kept open and held instead of imitated
    SFTKLLoss             cross-entropy plus a KL to the original
    JSDLoss               a divergence from a teacher in memory, forward to reverse KL
    ReverseKLLoss         KL of the model to a teacher in memory
    TopKDistillationLoss  a teacher of whom k log-probabilities a token are known

`Objective` is the base for one's own; docs/objectives.md says which when.
"""

from .arguments import item_count
from .asft import ASFTLoss
from .base import Objective
from .cross_entropy import CrossEntropyLoss
from .dft import DFTLoss
from .eaft import EAFTLoss
from .eksft import EKSFTLoss
from .flow import FLOWLoss
from .infosft import InfoSFTLoss
from .jsd import JSDLoss, ReverseKLLoss
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
    "InfoSFTLoss",
    "JSDLoss",
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

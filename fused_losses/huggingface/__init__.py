"""Fused losses inside Hugging Face models: `patch` a causal language model and keep your Trainer, TRL or PEFT script.

Importing this needs torch only; transformers, peft, trl and safetensors are imported where they are used.
"""

from .cache import ReferenceCache
from .collator import AnchorCollator
from .logits import LogitsNotKept
from .patching import patch, patched, unpatch

__all__ = ["AnchorCollator", "LogitsNotKept", "ReferenceCache", "patch", "patched", "unpatch"]

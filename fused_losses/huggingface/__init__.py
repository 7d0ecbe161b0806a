"""Fused losses inside Hugging Face models: `patch` a causal language model and keep your Trainer, TRL or PEFT script.

Importing this needs torch only; transformers, peft, trl and safetensors are imported where they are used.
"""

from .logits import LogitsNotKept
from .patch import patch, patched, unpatch

__all__ = ["LogitsNotKept", "patch", "patched", "unpatch"]

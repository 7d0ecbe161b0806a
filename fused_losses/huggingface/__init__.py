"""Fused losses inside Hugging Face models: `patch` a causal language model and keep your Trainer, TRL or PEFT script.

`patch`, `patched`, `unpatch`: a model's loss. `AnchorCollator`: batches with anchors or other fields. `initial_losses`,
`ReferenceCache`: what is computed once, before training. `Callback` (what the loss sees of its tokens, in the logs) and
`FinchCallback` (a learning rate that falls where the loss is high), `PatchCallback` (patches the model of a Trainer
that makes it itself): callbacks of a Trainer.

Importing this needs torch only; transformers, peft, trl and safetensors are imported where they are used.
"""

from typing import Any

from .cache import ReferenceCache
from .collator import AnchorCollator
from .initial import initial_losses
from .logits import LogitsNotKept
from .patching import patch, patched, unpatch

__all__ = [
    "AnchorCollator",
    "Callback",
    "FinchCallback",
    "LogitsNotKept",
    "PatchCallback",
    "ReferenceCache",
    "initial_losses",
    "patch",
    "patched",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """What is a subclass of a class of transformers."""
    if name == "FinchCallback":
        from .callbacks import FinchCallback

        return FinchCallback
    if name == "Callback":
        from .metrics import Callback

        return Callback
    if name == "PatchCallback":
        from .patch_callback import PatchCallback

        return PatchCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

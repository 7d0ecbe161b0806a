"""Which implementations there are, which can run here, and which one "auto" takes."""

from __future__ import annotations

import importlib
from types import ModuleType

# torch is not imported here: the name is that of a submodule.

NAMES = ("torch", "reference")

PURPOSE = {
    "torch": "exact, chunked, any device",
    "reference": "full logits in plain PyTorch, the specification; for checks on small inputs",
}


def unavailable(name: str) -> str | None:
    """Why the backend cannot run here; None where it can. Both are plain PyTorch."""
    return None


def choose(name: str, device_type: str) -> str:
    """The backend for a call; "auto" is the chunked one, on every device."""
    return "torch" if name == "auto" else name


def load(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")

"""Which implementations there are, which can run here, and which one "auto" takes."""

from __future__ import annotations

import importlib
from types import ModuleType

# torch is not imported here: the name is that of a submodule.

NAMES = ("cpu", "torch", "reference")

PURPOSE = {
    "cpu": "compiled kernels for the row passes and sparse products on a CPU",
    "torch": "chunked, in plain PyTorch operations, any device",
    "reference": "full logits in plain PyTorch, the specification; for checks on small inputs",
}


def unavailable(name: str) -> str | None:
    """Why the backend cannot run here; None where it can."""
    if name == "cpu":
        from .. import kernels

        return kernels.load()
    return None


def choose(name: str, device_type: str) -> str:
    """The backend for a call. "auto" is cpu on a CPU where it was built, else torch."""
    if name == "auto":
        return "cpu" if device_type == "cpu" and unavailable("cpu") is None else "torch"
    if name == "cpu" and device_type != "cpu":
        raise ValueError(f"backend='cpu' with tensors on {device_type}; give backend='auto', or move them to the CPU")
    reason = unavailable(name)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot run here: {reason}; give backend='auto'")
    return name


def load(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")

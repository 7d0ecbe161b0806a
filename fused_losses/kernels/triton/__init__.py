"""The Triton kernels: `scan` (the product that writes no logits), `quantized` (what a scan of 8-bit operands needs
besides), `rows` (over a chunk's logits), `left_out` (what the entries leave out of these), `entries` (over kept
ones)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def launcher(function: F) -> F:
    """A function that launches a kernel on the device of its first argument."""

    @functools.wraps(function)
    def call(tensor, *args, **kwargs):
        with on_device_of(tensor):
            return function(tensor, *args, **kwargs)

    return call  # type: ignore[return-value]

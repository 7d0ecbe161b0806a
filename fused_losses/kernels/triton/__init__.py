"""The Triton kernels: `scan` (the product that writes no logits), `quantized` (what a scan of 8-bit operands needs
besides), `rows` (over a chunk's logits), `left_out` (what the entries leave out of these), `entries` (over kept
ones)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from ... import devices

F = TypeVar("F", bound=Callable)


def launcher(function: F) -> F:
    """A function that launches a kernel on the device of its first argument."""

    @functools.wraps(function)
    def call(tensor, *args, **kwargs):
        with devices.current(tensor):
            return function(tensor, *args, **kwargs)

    return call  # type: ignore[return-value]

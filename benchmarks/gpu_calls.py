"""The calls of kernels inside the GPU backend, noted or timed where they are made.

A kernel is measured with the arguments that a real call of the loss gives it, and a call of the loss is split into its
parts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fused_losses.backends import chunks, gpu, gpu_int8, gpu_products, gpu_scan, gpu_tails

Wrap = Callable[[str, Callable], Callable]
KERNELS = ("row_statistics", "count_bits", "columns_of_bits", "entry_logits", "attention", "segment_product")


def _scan_name(operands: Any, tokens: slice, known: Tensor, bits: Tensor | None, vocabulary: int) -> str:
    kind = "with a reference" if operands.problem.has_reference else "alone"
    eight = "" if operands.eight is None else ", 8 bits"
    if bits is not None:
        return f"scan {kind}{'' if operands.directions is None else ', directions'}{eight}"
    probe = vocabulary < operands.problem.head.vocabulary
    return f"probe {kind}{eight}" if probe else f"scan without bits {kind}{eight}"


@contextlib.contextmanager
def wrapped(backend: gpu.Gpu, wrap: Wrap) -> Iterator[None]:
    kernels = SimpleNamespace(**{name: wrap(name, getattr(backend.kernels, name)) for name in KERNELS})
    places = [
        (gpu.row_kernels, "logit_bits", "logit_bits"), (gpu.direction_kernels, "directions", "directions"),
        (gpu.row_kernels, "tail_profile", "tail_profile"), (gpu, "weighted_sum_kernel", "weighted_sum"),
        (gpu_tails, "add_profile", "tail profile"), (gpu_products, "_times", "product dz W"),
        (chunks, "add_product", "product dzᵀ x"), (gpu_scan, "bounds", "probe"), (gpu_scan, "join", "join"),
        (chunks, "project", "logits"), (chunks, "by_column", "by column"),
        (gpu_tails.kernels, "left_out", "left_out"), (gpu_int8.kernels, "quantize_rows", "quantize_rows"),
        (gpu_int8.kernels, "kept_sums", "kept_sums"), (gpu_int8, "channel_of", "channels"),
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(backend, "kernels", kernels))
        for owner, attribute, name in places:
            stack.enter_context(mock.patch.object(owner, attribute, wrap(name, getattr(owner, attribute))))
        scan = gpu_scan.Operands.run

        def run(self: Any, *args: Any) -> Tensor:
            return wrap(_scan_name(self, *args), scan)(self, *args)

        stack.enter_context(mock.patch.object(gpu_scan.Operands, "run", run))
        yield


def first_calls(backend: gpu.Gpu, function: Callable[[], object]) -> dict[str, tuple[Callable, tuple]]:
    """{name: (kernel, the arguments of its first call)} of one call of `function`."""
    found: dict[str, tuple[Callable, tuple]] = {}

    def wrap(name: str, kernel: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            found.setdefault(name, (kernel, args))
            return kernel(*args, **options)

        return call

    with wrapped(backend, wrap):
        function()
    return found


def split(backend: gpu.Gpu, function: Callable[[], object], cuda: bool) -> dict[str, float]:
    """Milliseconds of each part of one call of `function`, on the device; a part inside another belongs to that one."""
    spans: list[tuple[str, Any, Any]] = []
    depth = 0

    def now() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wrap(name: str, kernel: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal depth
            depth += 1
            begin = now()
            try:
                return kernel(*args, **options)
            finally:
                depth -= 1
                if depth == 0:
                    spans.append((name, begin, now()))

        return call

    begin = now()
    with wrapped(backend, wrap):
        function()
    end = now()
    if cuda:
        torch.cuda.synchronize()

    def taken(one: Any, other: Any) -> float:
        return one.elapsed_time(other) if cuda else 1e3 * (other - one)

    parts: dict[str, float] = {}
    for name, one, other in spans:
        parts[name] = parts.get(name, 0.0) + taken(one, other)
    parts["everything else"] = taken(begin, end) - sum(parts.values())
    parts["all"] = taken(begin, end)
    return parts


def work(name: str, args: tuple) -> dict[str, float]:
    """The least that a call must do: "flop" of products, "flop8" of those of 8 bits, "bytes" of memory, "cached" bytes
    that L2 may give."""
    if name.startswith(("scan", "probe ")):
        operands, tokens, _, bits, vocabulary = args
        reference = operands.problem.has_reference
        logits = 2.0 * (tokens.stop - tokens.start) * vocabulary
        of_directions = 0
        if bits is not None and operands.directions is not None:
            of_directions = (1 + reference) * operands.directions.shape[1]
        if operands.eight is not None:
            return {"flop8": logits * operands.weight.shape[1], "flop": logits * of_directions}
        widths = operands.weight.shape[1] + (operands.reference_weight.shape[1] if reference else 0)
        return {"flop": logits * (widths + of_directions)}
    if name in ("row_statistics", "logit_bits", "directions"):
        z, r = args[:2]
        passes = {"row_statistics": 4, "logit_bits": 1, "directions": 1}[name] if r is not None else 1
        read = 4.0 * z.numel() * passes * (1 if r is None or name == "row_statistics" else 2)
        written = {"directions": lambda: z.numel() * args[12].element_size(), "logit_bits": lambda: args[-1].nbytes}
        return {"bytes": read + written.get(name, lambda: 0)()}
    if name == "left_out":
        z, r, bits = args[0], args[1], args[8]
        return {"bytes": 4.0 * z.numel() * (1 if r is None else 2) + bits.nbytes}
    if name == "quantize_rows":
        return {"bytes": float(args[0].nbytes + args[2].nbytes)}
    if name == "kept_sums":
        return {"bytes": float(args[0].nbytes + args[3].nbytes + 24 * len(args[1]))}
    if name == "tail_profile":
        return {"bytes": 4.0 * args[0].numel()}
    if name == "count_bits":
        return {"bytes": float(args[0].nbytes)}
    if name == "columns_of_bits":
        return {"bytes": float(args[0].nbytes + args[3].nbytes)}
    if name == "entry_logits":
        hidden, weight, _, _, columns, _ = args
        return {"bytes": float(hidden.nbytes + len(columns) * weight.shape[1] * weight.element_size())}
    if name == "attention":
        weight, columns = args[3], args[7]
        rows = sum(t.nbytes for t in args[-2:] if t is not None)
        gathered = float(len(columns) * weight.shape[1] * weight.element_size())
        return {"cached": gathered, "bytes": float(args[0].nbytes + rows)}
    if name == "segment_product":
        columns, matrix, base, out = args[1], args[3], args[6], args[-1]
        gathered = float(len(columns) * matrix.shape[1] * matrix.element_size())
        return {"cached": gathered, "bytes": float(out.nbytes + (0 if base is None else base.nbytes))}
    if name == "weighted_sum":
        return {"bytes": float(args[0].nbytes)}
    return {}

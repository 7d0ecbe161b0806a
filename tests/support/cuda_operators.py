"""The operators of csrc/cuda, run on a CPU by cuda_shim, under conditions that find mistakes.

Every operator runs twice, the second time with blocks, warps and lanes in reverse order: results must have equal bits.
Outputs start as NaN and lie between margins that must stay as they are; floating-point inputs lie between NaN.
"""

from __future__ import annotations

import math
import shutil
import sys

import pytest
import torch
from torch import Tensor

ops = torch.ops.fused_losses
MARGIN = 64
INF = float("inf")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="no g++ to compile the kernels for a CPU with"
)


class Outputs:
    """Tensors poisoned with NaN (integers: −77), in one buffer each with margins; `offset` breaks their alignment."""

    def __init__(self, offset: int = 0) -> None:
        self.buffers: list[tuple[Tensor, int]] = []
        self.offset = offset

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = math.prod(shape)
        buffer = torch.full((size + 2 * MARGIN + self.offset,), poison(dtype), dtype=dtype)
        self.buffers.append((buffer, size))
        start = MARGIN + self.offset
        return buffer[start : start + size].view(shape)

    def check_margins(self) -> None:
        for buffer, size in self.buffers:
            start = MARGIN + self.offset
            for margin in (buffer[:start], buffer[start + size :]):
                expected = torch.full_like(margin, poison(buffer.dtype))
                assert torch.equal(margin.view(torch.uint8), expected.view(torch.uint8)), "written beyond the end"


def poison(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else -77


def guarded(x: Tensor, offset: int = 0) -> Tensor:
    """The same between NaN."""
    buffer = torch.full((x.numel() + 2 * MARGIN + offset,), float("nan"), dtype=x.dtype)
    view = buffer[MARGIN + offset : MARGIN + offset + x.numel()].view(x.shape)
    return view.copy_(x)


def twice(shim, call, offset: int = 0, **setting):
    """`call(outputs)` returns tensors; once forwards, once backwards."""
    results = []
    for backwards in (False, True):
        outputs = Outputs(offset)
        with shim.setting(backwards=backwards, **setting):
            results.append(call(outputs))
        outputs.check_margins()
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
    return results[0]


def normal(*shape: int, spread: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * spread


def check(results: dict[str, Tensor], truth: dict[str, Tensor], tolerances: dict[str, float]) -> None:
    assert results.keys() >= truth.keys()
    for name, expected in truth.items():
        if expected.dtype == torch.int64:
            assert torch.equal(results[name], expected), name
            continue
        # Sums in which terms cancel are measured against the sum of absolute values, differences against operands.
        size = truth[SIZE_OF.get(name, name)].norm().clamp(min=1e-30)
        if name in ("SHIFT", "MISSED"):
            size = torch.hypot(truth["TOP"], truth["LOG_SUM"]).norm()
        error = ((results[name].double() - expected).norm() / size).item()
        assert math.isfinite(error), f"{name} is not finite"
        assert error <= tolerances[name], f"{name}: relative error {error:.2g}"


SIZE_OF = {"GAP": "GAP_L1", "KEPT_GAP": "KEPT_GAP_L1"}


def entries_of(n: int, v: int, counts: list[int], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets and ascending columns, the label's among them; a count of 0 leaves the token without."""
    rows = []
    for t in range(n):
        count = min(counts[t % len(counts)], v)
        columns = torch.randperm(v)[:count]
        if count and labels[t] not in columns:
            columns[0] = labels[t]
        rows.append(columns.sort().values)
    lengths = torch.tensor([0, *map(len, rows)])
    return lengths.cumsum(0), torch.cat(rows).to(torch.int32)

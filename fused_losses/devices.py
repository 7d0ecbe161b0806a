"""What a device can do that others cannot, found out once: by asking torch, or by trying on a few numbers."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor


def is_rocm() -> bool:
    """Whether torch's "cuda" devices are AMD's."""
    return torch.version.hip is not None


def architecture(device: torch.device) -> str | None:
    """Of an AMD GPU, such as gfx942; None of others."""
    if device.type != "cuda" or not is_rocm():
        return None
    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]


def has_float64(device_type: str) -> bool:
    """Sparse gradients sum and bound in it: not on Apple's GPUs, and not on Intel's without the aspect fp64."""
    if device_type == "xpu" and torch.xpu.is_available():
        return bool(torch.xpu.get_device_properties().has_fp64)
    return device_type != "mps"


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether PyTorch's products of bfloat16 matrices are worth taking on this CPU: where oneDNN has none (x86 without
    AVX-512, ARM without BF16) they take ten times as long as those in float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiplies_wide(tensor: Tensor) -> bool:
    """Whether `torch.mm` there sums products of half-precision matrices in float32 and returns these sums, so that no
    operand is converted. CUDA does; ROCm and XPU since some release of torch; a CPU does not."""
    kind = tensor.device.type
    return kind != "cpu" and ((kind == "cuda" and not is_rocm()) or _tried_wide(kind))


@functools.cache
def _tried_wide(device_type: str) -> bool:
    try:
        half = torch.full((16, 16), 1.0, dtype=torch.bfloat16, device=device_type)
        total = torch.mm(half, half, out_dtype=torch.float32)
        torch.addmm(total, half, half, out_dtype=torch.float32, out=total)
        return total.dtype == torch.float32 and bool((total == 32).all())
    except (RuntimeError, TypeError, NotImplementedError, AssertionError):  # as the build of torch refuses it
        return False


def processors(device: torch.device) -> int:
    """Streaming multiprocessors, compute units or Xe cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return 4


def current(tensor: Tensor) -> contextlib.AbstractContextManager:
    """The tensor's device as the current one, which kernels are launched on."""
    module = getattr(torch, tensor.device.type, None) if tensor.device.type in ("cuda", "xpu") else None
    return contextlib.nullcontext() if module is None else module.device(tensor.device)

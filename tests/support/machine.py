"""Where the checks run: on the GPU, or dry on the CPU; which dtypes and backends there are."""

import os

import pytest
import torch

from fused_losses import backends

DRY = os.environ.get("FUSED_LOSSES_GPU_DRY") == "1"
SKIP = "" if DRY or torch.cuda.is_available() else "no GPU visible; FUSED_LOSSES_GPU_DRY=1 runs it dry on the CPU"
DEVICE = "cpu" if DRY else "cuda"
# Triton's interpreter computes bf16 wrongly.
HALVES = (torch.float16,) if DRY else (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
# The largest relative error of a result that is rounded to the dtype once.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}


def _needs(backend: str):
    reason = SKIP or backends.unavailable(backend)
    return pytest.param(backend, marks=pytest.mark.skipif(reason is not None and reason != "", reason=str(reason)))


# A dry run of a few cases of each test must not spend them on what cannot run.
BACKENDS = [_needs("triton"), *([] if DRY else [_needs("cuda")])]


def pick(dry, real):
    """Of two sizes."""
    return dry if DRY else real


def repeats_that_differ(result) -> int:
    """Of so many calls of `result`, which gives tensors, how many are not what the first gave, to the bit."""
    first = result()
    return sum(
        not all(torch.equal(one, other) for one, other in zip(first, result(), strict=True)) for _ in range(pick(1, 19))
    )

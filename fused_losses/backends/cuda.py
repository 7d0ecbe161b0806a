"""The losses with the CUDA kernels of csrc/cuda for the entries and the row statistics; the scan is Triton's."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from .gpu import Gpu

_NAMES = ("row_statistics", "count_bits", "columns_of_bits", "entry_logits", "attention", "segment_product")
# The overloads themselves: resolving a name costs more than such a call.
backend = Gpu(SimpleNamespace(**{name: getattr(torch.ops.fused_losses, name).default for name in _NAMES}))

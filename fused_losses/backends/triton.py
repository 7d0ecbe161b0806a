"""The losses with Triton's kernels alone: wherever Triton runs, and on the CPU under its interpreter
(TRITON_INTERPRET=1)."""

from __future__ import annotations

from types import SimpleNamespace

from ..kernels.triton import entries, rows
from .gpu import Gpu

backend = Gpu(
    SimpleNamespace(
        row_statistics=rows.row_statistics, count_bits=entries.count_bits, columns_of_bits=entries.columns_of_bits,
        entry_logits=entries.entry_logits, attention=entries.attention, segment_product=entries.segment_product,
    )
)  # fmt: skip

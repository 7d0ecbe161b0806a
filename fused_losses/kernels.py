"""The operators of csrc/: schemas and fakes here, implementations in the compiled library `_kernels.so`, where built.

All write into tensors that the caller made, so fakes have nothing to return. Everything is contiguous; logits, values
and statistics are float32. Sources: csrc/README.md.
"""

from __future__ import annotations

import enum
import functools
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_kernels.so")
# The rows of the tensor `rows` [8, N] of `compact`: what is known of a token besides its statistics.
BOUND, REFERENCE_BOUND, LOG_SUM, TAIL, NLL_L1, KL_TAIL, KL_TAIL_L1, KL_L1 = range(8)


class Row(enum.IntEnum):
    """The rows of the tensor `rows` [9, N] of the GPU's kernels: what is known of a token besides its statistics.

    p[v] = exp((z[v] − TOP) − LOG_SUM), p_ref likewise. Slope: 1 − (z/softcap)², 1 without soft-cap.
    """

    TOP = 0
    LOG_SUM = 1
    REF_TOP = 2
    REF_LOG_SUM = 3
    SHIFT = 4  # lse − lse of the reference
    REST = 5  # Σ p·slope over all but the label
    GAP = 6  # Σ (p − p_ref)·slope
    GAP_L1 = 7  # Σ |p − p_ref|·slope, with TOTALS_SHIFT in place of SHIFT
    TOTALS_SHIFT = 8


# A segment of more entries than this is summed in slots (`segment_product`); csrc/cuda/common.cuh has it too.
SPLIT = 512

SCHEMAS = (
    # out[t, v] = hidden[t] · weight[v] + bias[v], float32 from float32 or bfloat16 operands; false: not possible here
    "logits(Tensor hidden, Tensor weight, Tensor? bias, Tensor(a!) out) -> bool",
    # Statistics and entries of a chunk's logits z, or of r + z with `difference`; counts −1: more than the capacity
    "compact(Tensor z, Tensor? r, bool difference, Tensor labels, float softcap, float threshold, Tensor(a!) nll, "
    "Tensor(b!) prediction, Tensor(c!)? kl, Tensor(d!)? entropy, Tensor(e!)? reference_nll, "
    "Tensor(f!)? reference_entropy, Tensor(g!) rows, Tensor(h!) counts, Tensor(i!) columns, Tensor(j!) nll_values, "
    "Tensor(k!)? kl_values) -> ()",
    # The counted entries of [N, capacity] (32-bit) one after the other
    "pack(Tensor counts, Tensor source, Tensor(a!) out) -> ()",
    # profile += Σ over the tokens `which` of what is not an entry
    "tail_profile(Tensor z, Tensor? r, bool difference, Tensor labels, float softcap, Tensor rows, Tensor which, "
    "Tensor(a!) profile) -> ()",
    # out[t] = Σ_j values[j] · matrix[columns[j]] + scale[t] · vector, j over row t
    "rows_product(Tensor offsets, Tensor columns, Tensor values, Tensor matrix, Tensor scale, Tensor vector, "
    "Tensor(a!) out) -> ()",
    # out[v] = base_scale · base[v] + Σ_j values[j] · matrix[row of j] + scale[v] · vector, j over column v
    "columns_product(Tensor offsets, Tensor columns, Tensor values, Tensor matrix, Tensor scale, Tensor vector, "
    "Tensor? base, float base_scale, Tensor(a!) out) -> ()",
    # out = Σ_v scale[v] · matrix[v]
    "weighted_sum(Tensor matrix, Tensor scale, Tensor(a!) out) -> ()",
    "simd() -> str",
    "interface() -> int",
)
# Raised with every change of a schema or of what its arguments mean, here and in csrc/cpu/ops.cpp.
INTERFACE = 1

for _schema in SCHEMAS:
    _name = _schema.partition("(")[0]
    torch.library.define(f"fused_losses::{_name}", _schema.removeprefix(_name))
    if _name == "logits":
        torch.library.register_fake("fused_losses::logits", lambda hidden, weight, bias, out: True)
    elif _name not in ("simd", "interface"):
        torch.library.register_fake(f"fused_losses::{_name}", lambda *args: None)


@functools.cache
def load() -> str | None:
    """Load the compiled library; why it cannot be used, or None."""
    if not LIBRARY.is_file():
        return "not built: at installation there was no C++ compiler, or torch was not there yet; see csrc/README.md"
    remedy = "install the package again to rebuild it"
    try:
        torch.ops.load_library(str(LIBRARY))
        found = torch.ops.fused_losses.interface()
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY.name} does not load ({str(error).splitlines()[0]}); {remedy}"
    return None if found == INTERFACE else f"{LIBRARY.name} was built from other sources (interface {found}); {remedy}"


@functools.cache
def load_cuda() -> str | None:
    """Load the CUDA kernels; why they cannot be used, or None."""
    return "not built"


@functools.cache
def has_logits(dtype: torch.dtype) -> bool:
    """Whether `logits` works here, tried on a small product."""
    if load() is not None or dtype not in (torch.float32, torch.bfloat16):
        return False
    hidden, weight = torch.arange(12.0).view(3, 4).to(dtype), torch.arange(20.0).view(5, 4).to(dtype)
    out = torch.empty(3, 5)
    try:
        return bool(torch.ops.fused_losses.logits(hidden, weight, None, out)) and torch.equal(
            out, hidden.float() @ weight.float().T
        )
    except RuntimeError:
        return False


def describe() -> str:
    """Which instruction set the loaded kernels use, and where the logits come from."""
    products = [str(dtype).removeprefix("torch.") for dtype in (torch.float32, torch.bfloat16) if has_logits(dtype)]
    logits = f"logits of {' and '.join(products)} by oneDNN micro-kernels" if products else "logits by torch.mm"
    return f"{torch.ops.fused_losses.simd()}; {logits}"

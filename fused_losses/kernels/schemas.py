"""The operators of csrc/: schemas and fakes here, implementations in the compiled libraries, where built: `_kernels.so`
for CPUs (SCHEMAS), `_cuda.so` for CUDA devices (GPU_SCHEMAS).

All write into tensors that the caller made, so fakes have nothing to return. Everything is contiguous; logits, values
and statistics are float32. Sources: csrc/README.md, in the installed package fused_losses/csrc/README.md.
"""

from __future__ import annotations

import enum
import functools
from pathlib import Path

import torch

from . import build

LIBRARY = Path(__file__).parents[1] / "_kernels.so"
CUDA_LIBRARY = LIBRARY.with_name("_cuda.so")
NOT_BUILT = "not built"
# The rows of the tensor `rows` [8, N] of `compact`: what is known of a token besides its statistics.
BOUND, REFERENCE_BOUND, LOG_SUM, TAIL, NLL_L1, KL_TAIL, KL_TAIL_L1, KL_L1 = range(8)


class ExactRow(enum.IntEnum):
    """The rows of the tensor `rows` [8, N] of `exact_statistics`: what `exact_directions` needs besides the nll. Here
    and in csrc/cpu/exact.inc. What needs a reference, the entropy or the divergence is not written without it.

    log p[v] = (z[v] − TOP) − LOG_SUM, log p_ref likewise.
    """

    TOP = 0
    LOG_SUM = 1
    REF_TOP = 2
    REF_LOG_SUM = 3
    SHIFT = 4  # log p − log p_ref: z − SHIFT − MISSED with `difference`, else (z − TOP) − (r − REF_TOP) − the same
    ENTROPY = 5
    MIXTURE_KL = 6  # KL(p‖m), m = beta · p_ref + (1 − beta) · p
    MISSED = 7  # the error of SHIFT, too small to be added to it


class Row(enum.IntEnum):
    """The rows of the tensor `rows` [9, N] of the GPU's kernels: what is known of a token besides its statistics. Here
    and in csrc/cuda/kernels.h.

    p[v] = exp((z[v] − TOP) − LOG_SUM), p_ref likewise. Slope: 1 − (z/softcap)², 1 without soft-cap.
    """

    TOP = 0
    LOG_SUM = 1
    REF_TOP = 2
    REF_LOG_SUM = 3
    SHIFT = 4  # about lse − lse of the reference, which is SHIFT + MISSED
    REST = 5  # Σ p·slope over all but the label
    GAP = 6  # Σ (p − p_ref)·slope
    GAP_L1 = 7  # Σ |p − p_ref|·slope, as if MISSED were 0
    MISSED = 8  # often too small to be added to SHIFT, and larger than the gap of an id with nearly all of p


# A label that is none of the columns, to kernels that come after `row_statistics`: above every bit of a row of them.
ABSENT = 1 << 30

# Segments of `segment_product` with more entries than this are listed in `hot`. Here and in csrc/cuda/kernels.h.
SPLIT = 512

SCHEMAS = (
    # out[t, v] = hidden[t] · weight[v] + bias[v], float32 from float32 or bfloat16 operands; false: not possible here
    "logits(Tensor hidden, Tensor weight, Tensor? bias, Tensor(a!) out) -> bool",
    # large_from [N]: a 32nd of the largest |direction[t]|, ∞ where more than 64 are larger than that; in the two below
    # larger ones are not rounded. False, here and there: not possible here
    "large_numbers(Tensor direction, Tensor(a!) large_from) -> bool",
    # total[v] += Σ_t direction[t, v] · hidden[t] in float32; direction float32, rounded to bfloat16, as hidden is
    "add_outer(Tensor direction, Tensor large_from, Tensor hidden, Tensor(a!) total) -> bool",
    # out[t] = Σ_v direction[t, v] · weight[v] likewise; lost [N] = Σ_v of what rounding took from the direction;
    # narrow: room for at least so many bfloat16 numbers as direction has
    "times_weight(Tensor direction, Tensor large_from, Tensor weight, Tensor(a!) narrow, Tensor(b!) out, "
    "Tensor(c!) lost) -> bool",
    # blocks uint8 [B, D' / 4, 128, 4], D' a multiple of 4: the first 128 B rows of weight · channel in 8 bits, row v of
    # a block as blocks[b, :, v]; scales [128 B]; sums [128 B] int32 of a row's numbers. With `hidden` [n, D], float32,
    # of a few tokens also out [n, V] = hidden · weight + bias, and all_scales [V] those of all rows
    "int8_head(Tensor weight, Tensor? channel, Tensor(a!) blocks, Tensor(b!) scales, Tensor(c!) sums, "
    "Tensor? hidden, Tensor? bias, Tensor(d!)? out, Tensor(e!)? all_scales) -> ()",
    # As logits, from products of 8-bit numbers of hidden · inverse and of weight · channel, of `blocks` and made on the
    # way where these end; `mean` [D], nearly the mean row of weight · channel: what rounding a token loses of it is
    # given back
    "int8_logits(Tensor hidden, Tensor? inverse, Tensor weight, Tensor? channel, Tensor? mean, Tensor blocks, "
    "Tensor scales, Tensor sums, Tensor? bias, Tensor(a!) out) -> ()",
    # out[t] = scale · (hidden[t] · weight[labels[t]] + bias[labels[t]]), hidden float32
    "label_logits(Tensor hidden, Tensor weight, Tensor? bias, float scale, Tensor labels, Tensor(a!) out) -> ()",
    # As int8_logits, times `scale`, less label_logits (0 in place of those that are not within 10,000), in float16:
    # out [N, 128 B], B = ⌈V / 128⌉, −∞ beyond V; largest [N, 8 B'], B' = B or, if that is odd, B + 1: of a block of 128
    # the largest of those with the same id modulo 8
    "half_logits(Tensor hidden, Tensor? inverse, Tensor weight, Tensor? channel, Tensor? mean, Tensor blocks, "
    "Tensor scales, Tensor sums, Tensor? bias, float scale, Tensor label_logits, Tensor(a!) out, "
    "Tensor(b!) largest) -> ()",
    # As compact, of what half_logits made, without a reference and without a soft-cap; the entries leave z, as −∞
    "compact_half(Tensor(a!) z, Tensor(b!) largest, Tensor label_logits, Tensor labels, float threshold, "
    "Tensor(c!) nll, Tensor(d!) prediction, Tensor(e!) lse, Tensor(f!)? entropy, Tensor(g!) tail, Tensor(h!) nll_l1, "
    "Tensor(i!) counts, Tensor(j!) columns, Tensor(k!) nll_values, Tensor? directions, Tensor? pairs, "
    "Tensor(l!)? nll_low, Tensor(m!)? square, Tensor hidden, Tensor weight, Tensor? bias, float scale) -> ()",
    # As tail_profile, of what compact_half has left; `which` are shifted by `first`, and those without an lse or with
    # too many entries left out
    "half_tail_profile(Tensor z, Tensor label_logits, Tensor lse, Tensor counts, Tensor which, int first, "
    "Tensor(a!) profile) -> ()",
    # Statistics and entries of a chunk's logits z, or of r + z with `difference`; counts −1: more than the capacity.
    # With directions [V, K], K a multiple of 16: nll_low [N, K] = Σ_v of what is left out of ∂nll/∂z · directions[v],
    # kl_low likewise, squares [2, N] Σ of its squares. Directions are float32 or bfloat16; `pairs`, where `has_pairs`,
    # are rows v and v + 16 of each 32 of them beside each other, [⌈V / 32⌉ · 16, K, 2] bfloat16; what is left out is
    # rounded to that for the product. With `hidden` [N, D], of z, and `reference`, of r, both float32, logits are taken
    # for those of 8-bit products and computed again from these operands where p or p_ref is above threshold ·
    # √(1 − p[label]); low_hidden and low_reference [N, R] are float32 too
    "compact(Tensor(o!) z, Tensor(p!)? r, bool difference, Tensor labels, float softcap, float threshold, "
    "Tensor(a!) nll, Tensor(b!) prediction, Tensor(c!)? kl, Tensor(d!)? entropy, Tensor(e!)? reference_nll, "
    "Tensor(f!)? reference_entropy, Tensor(g!) rows, Tensor(h!) counts, Tensor(i!) columns, Tensor(j!) nll_values, "
    "Tensor(k!)? kl_values, Tensor? directions, Tensor? pairs, Tensor(l!)? nll_low, Tensor(m!)? kl_low, "
    "Tensor(n!)? squares, Tensor? hidden, Tensor? reference, Tensor? weight, Tensor? low_rank, Tensor? low_hidden, "
    "Tensor? low_reference, Tensor? bias, float scale) -> ()",
    # out = values · scale · factor of their row; values float32 or float16, `counts` of each row
    "scale_entries(Tensor counts, Tensor values, float scale, Tensor factor, Tensor(a!) out) -> ()",
    # out = half_scale · values / scales in float16, scales = max |values| of a row; what that rounds, in L1 and L2 norm
    "halve_entries(Tensor counts, Tensor values, float half_scale, Tensor(a!) out, Tensor(b!) scales, Tensor(c!) l1, "
    "Tensor(d!) l2) -> ()",
    # The counted entries of [N, capacity] (32-bit) one after the other
    "pack(Tensor counts, Tensor source, Tensor(a!) out) -> ()",
    # profile += Σ over the tokens `which` of what is not an entry
    "tail_profile(Tensor z, Tensor? r, bool difference, Tensor labels, float softcap, Tensor rows, Tensor which, "
    "Tensor(a!) profile) -> ()",
    # Statistics of the exact mode; z, r and `difference` as above. What is None is not wanted. beta, of the divergence:
    # m = beta · p_ref + (1 − beta) · p, in (0, 1]. lse = log Σ exp z, log_p2 = log Σ p², rank: logits above the label's
    "exact_statistics(Tensor z, Tensor? r, bool difference, Tensor labels, float beta, Tensor(a!) nll, "
    "Tensor(b!) prediction, Tensor(c!) lse, Tensor(d!)? kl, Tensor(e!)? entropy, Tensor(f!)? reference_nll, "
    "Tensor(g!)? reference_entropy, Tensor(h!)? log_p2, Tensor(i!)? rank, Tensor(j!)? divergence, "
    "Tensor(k!) rows) -> ()",
    # out[t, v] = Σ of weight[t] · ∂/∂z[t, v] of nll, kl, entropy and divergence; label_weight is of z[label]. None: 0.
    # out may be z or r. `rows` are of exact_statistics with the same beta
    "exact_directions(Tensor z, Tensor? r, bool difference, Tensor labels, float softcap, float beta, Tensor nll, "
    "Tensor rows, Tensor? nll_weight, Tensor? kl_weight, Tensor? entropy_weight, Tensor? divergence_weight, "
    "Tensor? label_weight, Tensor(a!) out) -> ()",
    # out[t] = Σ_j values[j] · matrix[columns[j]] + scale[t] · vector, j over row t
    "rows_product(Tensor offsets, Tensor columns, Tensor values, Tensor matrix, Tensor scale, Tensor vector, "
    "Tensor(a!) out) -> ()",
    # out[v] = base_scale · base[v] + Σ_j values[j] · matrix[row of j] + scale[v] · vector, j over column v
    "columns_product(Tensor offsets, Tensor columns, Tensor values, Tensor matrix, Tensor scale, Tensor vector, "
    "Tensor? base, float base_scale, Tensor(a!) out) -> ()",
    # out = Σ_v scale[v] · matrix[v]
    "weighted_sum(Tensor matrix, Tensor scale, Tensor(a!) out) -> ()",
    "simd() -> str",
    "int8_is_fast() -> bool",
    "has_half_logits() -> bool",
    "has_pairs() -> bool",
    "interface() -> int",
)
# Raised with every change of a schema or of what its arguments mean, here and in csrc/cpu/ops.cpp.
INTERFACE = 8

# The rows of `kept` [4, N] of `attention`: Σ p·slope over entries but the label's; over all entries Σ gap·slope,
# Σ |gap·slope|, and the last as if MISSED were 0. gap = p − p_ref.
KEPT, KEPT_GAP, KEPT_GAP_L1, KEPT_GAP_L1_OF_TOTALS = range(4)

GPU_SCHEMAS = (
    # All that is known of tokens from their rows of products x·W + b; r: the reference's. With `difference` z is
    # (x − x_ref)·W
    "row_statistics(Tensor z, Tensor? r, bool difference, Tensor labels, float scale, float softcap, "
    "float reference_scale, float reference_softcap, Tensor(a!) nll, Tensor(b!) prediction, Tensor(c!)? kl, "
    "Tensor(d!)? entropy, Tensor(e!)? reference_nll, Tensor(f!)? reference_entropy, Tensor(g!) rows) -> ()",
    # counts[t]: set bits of row t, the label's among them; −1: more than the capacity. Bits of columns ≥ V must be 0
    "count_bits(Tensor bits, Tensor labels, int capacity, Tensor(a!) counts) -> ()",
    # Their columns, ascending, from offsets[t] on; rows without room are skipped
    "columns_of_bits(Tensor bits, Tensor labels, Tensor offsets, Tensor(a!) columns) -> ()",
    # out[j] = hidden[t] · weight[columns[j]] + bias[columns[j]], j over row t
    "entry_logits(Tensor hidden, Tensor weight, Tensor? bias, Tensor offsets, Tensor columns, Tensor(a!) out) -> ()",
    # ∂nll/∂z and ∂kl/∂z at the entries and their products with the weight, without the factor scale
    "attention(Tensor hidden, Tensor? difference, Tensor? entry_reference, Tensor weight, Tensor? bias, Tensor labels, "
    "Tensor offsets, Tensor columns, Tensor rows, Tensor nll, float scale, float softcap, Tensor(a!) nll_values, "
    "Tensor(b!)? kl_values, Tensor(c!) kept, Tensor(d!)? nll_rows, Tensor(e!)? kl_rows) -> ()",
    # out[i] = base_scale · base[i] + Σ_j values[j] · matrix[columns[j]] + scale[i] · vector, j over segment i
    "segment_product(Tensor offsets, Tensor columns, Tensor values, Tensor matrix, Tensor scale, Tensor vector, "
    "Tensor? base, float base_scale, Tensor hot, Tensor hot_first, Tensor(a!) partial, Tensor(b!) out) -> ()",
    "cuda_interface() -> int",
)
# As INTERFACE, for GPU_SCHEMAS and csrc/cuda/ops.cpp.
CUDA_INTERFACE = 2

for _schema in SCHEMAS + GPU_SCHEMAS:
    _name = _schema.partition("(")[0]
    torch.library.define(f"fused_losses::{_name}", _schema.removeprefix(_name))
    if _name in ("logits", "large_numbers", "add_outer", "times_weight"):
        torch.library.register_fake(f"fused_losses::{_name}", lambda *args: True)
    elif _name not in ("simd", "int8_is_fast", "has_half_logits", "has_pairs", "interface", "cuda_interface"):
        torch.library.register_fake(f"fused_losses::{_name}", lambda *args: None)


@functools.cache
def load() -> str | None:
    """Load the compiled library for CPUs, the installed one or the cached one; why it cannot be used, or None."""
    try:
        library = LIBRARY if LIBRARY.is_file() else build.cached_cpu()
    except (OSError, RuntimeError) as error:
        return f"{NOT_BUILT}, and the cache cannot be looked at ({_first_line(error)})"
    if library is not None:
        return _load(library, "interface", INTERFACE)
    if LIBRARY.parent.with_name("pyproject.toml").is_file():
        return (
            f"{NOT_BUILT}: {LIBRARY.parent} is a source checkout; with a C++ compiler and torch at hand, "
            "pip install -e . there, or run from another folder"
        )
    return (
        f"{NOT_BUILT}: at installation there was no C++ compiler, or torch was not there yet; where there is one, "
        f"python -m fused_losses.build cpu builds it ({_guide()})"
    )


@functools.cache
def load_cuda() -> str | None:
    """Load the compiled library for CUDA devices, the installed one or what `build.build_cuda` made; why it cannot be
    used, or None. CUDA itself is left alone where torch is a CPU build.
    """
    if torch.version.hip is not None:
        return "torch is a build for AMD GPUs, whose kernels are Triton's"
    if torch.version.cuda is None:
        built = "are built" if CUDA_LIBRARY.is_file() else "are not built"
        return f"torch is a build without CUDA (the CUDA kernels {built}); install a torch with it"
    try:
        library = CUDA_LIBRARY if CUDA_LIBRARY.is_file() else build.cached_cuda()
    except (OSError, RuntimeError) as error:
        return f"{NOT_BUILT}, and the cache cannot be looked at ({_first_line(error)})"
    if library is None:
        return (
            f"{NOT_BUILT}: at installation there was no nvcc of CUDA 12.8 or later, or torch was not there yet or a "
            "build without CUDA; where there is an nvcc, backend='cuda' builds it when first used, and so does "
            f"python -m fused_losses.build ({_guide()})"
        )
    return _load(library, "cuda_interface", CUDA_INTERFACE)


def build_and_load_cuda() -> str | None:
    """`load_cuda`, but where only the library is missing it is built now, once, into a cache. Why it cannot be used, or
    None."""
    reason = load_cuda()
    if reason is not None and reason.startswith(NOT_BUILT):
        try:
            build.build_cuda()
        except (RuntimeError, OSError) as error:
            return f"{reason}; building it now failed: {error}"
        load_cuda.cache_clear()
        reason = load_cuda()
    return reason


def _load(library: Path, interface: str, expected: int) -> str | None:
    remedy = "install the package again to rebuild it"
    try:
        torch.ops.load_library(str(library))
        found = getattr(torch.ops.fused_losses, interface)()
    except (OSError, RuntimeError) as error:
        reason = _first_line(error.__cause__ or error)  # torch's own says the path only, its cause what is missing
        return f"{library.name} does not load ({reason}); {remedy}"
    return None if found == expected else f"{library.name} was built from other sources (interface {found}); {remedy}"


def _guide() -> str:
    """Where to read more, as a path that is there."""
    return f"see {build.csrc() / 'README.md'}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def takes_entries(values: torch.Tensor) -> bool:
    """Whether `scale_entries` and `halve_entries` are there for them."""
    here = values.device.type == "cpu" and values.dtype in (torch.float32, torch.float16)
    return here and load() is None and torch.ops.fused_losses.has_half_logits()


@functools.cache
def has_pairs() -> bool:
    """Whether `compact` and `compact_half` take pairs."""
    return load() is None and torch.ops.fused_losses.has_pairs()


@functools.cache
def has_logits(dtype: torch.dtype) -> bool:
    """Whether `logits` works here, tried on a small product."""
    if load() is not None or dtype not in (torch.float32, torch.bfloat16):
        return False
    hidden = torch.arange(80, dtype=dtype).view(20, 4)  # few tokens would not try the micro-kernels
    weight, out = torch.arange(20, dtype=dtype).view(5, 4), torch.empty(20, 5, dtype=torch.float32)
    try:
        return bool(torch.ops.fused_losses.logits(hidden, weight, None, out)) and torch.equal(
            out, hidden.float() @ weight.float().T
        )
    except RuntimeError:
        return False


@functools.cache
def has_narrow_products() -> bool:
    """Whether `large_numbers`, `add_outer` and `times_weight` work here, tried on small products."""
    if load() is not None:
        return False
    direction, matrix = torch.arange(15, dtype=torch.float32).view(3, 5), torch.arange(10, dtype=torch.bfloat16)
    hidden, weight, total, out = matrix[:6].view(3, 2), matrix.view(5, 2), torch.zeros(5, 2), torch.zeros(3, 2)
    narrow, large_from, lost, ops = weight.new_empty(15), torch.empty(3), torch.empty(3), torch.ops.fused_losses
    try:
        done = ops.large_numbers(direction, large_from) and ops.add_outer(direction, large_from, hidden, total)
        done = done and ops.times_weight(direction, large_from, weight, narrow, out, lost)
    except RuntimeError:
        return False
    return bool(
        done and torch.equal(total, direction.T @ hidden.float()) and torch.equal(out, direction @ weight.float())
    )


def describe() -> str:
    """Which instruction set the loaded kernels use, and where the logits come from."""
    products = [str(dtype).removeprefix("torch.") for dtype in (torch.float32, torch.bfloat16) if has_logits(dtype)]
    logits = f"logits of {' and '.join(products)} by oneDNN micro-kernels" if products else "logits by torch.mm"
    return f"{torch.ops.fused_losses.simd()}; {logits}"

"""Ahead-of-time compilation of the kernels, no GPU needed: what each takes of registers and shared memory, and whether
it spills.

`specimens()` lists every kernel with every row of the table of tiles; `compile_for` compiles one for an architecture.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import directions, entries, left_out, quantized, rows, scan, tiles

ARCHITECTURES = (80, 90, 100, 120)
AMD = ("gfx942", "gfx950")  # MI300 and MI350; they take the table's rows for 80
# Dynamic shared memory that a block may have, by architecture (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Local data share of a workgroup (AMD CDNA3 and CDNA4 instruction set references).
SHARED_LIMIT_AMD = {"gfx942": 64 << 10, "gfx950": 160 << 10}
HIDDEN = (576, 2048, 4096, 8192, 16384)

# The names of the kernels' arguments are data: the types follow from them. A name that is not here is an error.
OF_OPERANDS = frozenset(
    {"hidden_ptr", "difference_ptr", "weight_ptr", "matrix_ptr", "nll_rows_ptr", "kl_rows_ptr", "out_ptr", "kl_out_ptr"}
)
ARGUMENTS = {
    "labels_ptr": "*i64", "bits_ptr": "*i32", "columns_ptr": "*i32", "offsets_ptr": "*i64", "counts_ptr": "*i64",
    "prediction_ptr": "*i64", "hot_ptr": "*i64", "hot_first_ptr": "*i64", "rank_ptr": "*i64",
    **dict.fromkeys(
        (
            "a_ptr", "b_ptr", "base_ptr", "bias_ptr", "bounds_ptr", "divergence_ptr", "divergence_weight_ptr",
            "directions_ptr", "entropy_ptr", "entropy_weight_ptr", "entry_reference_ptr", "extended_ptr", "factor_ptr",
            "kept_ptr", "kl_ptr", "kl_values_ptr", "known_ptr", "left_ptr", "log_p2_ptr", "low_ptr", "lse_ptr",
            "nll_ptr", "nll_values_ptr", "partial_ptr", "profile_ptr", "r_ptr", "reference_bias_ptr",
            "reference_entropy_ptr", "reference_nll_ptr", "rows_ptr", "scale_ptr", "values_ptr", "vector_ptr",
            "w_scale_ptr", "x_scale_ptr", "z_ptr",
        ),
        "*fp32",
    ),
    **dict.fromkeys(("scale", "softcap", "reference_scale", "reference_softcap", "base_scale", "beta"), "fp32"),
    **dict.fromkeys(
        (
            "C", "D", "D_REF", "N", "V", "capacity", "count", "first", "hot", "rows_per_part", "segments",
            "blocks_per_part", "rows", "tiles_per_part", "width", "words",
        ),
        "i32",
    ),
}  # fmt: skip


def type_of(name: str, operand: str) -> str:
    """Of a kernel's argument, as Triton writes it."""
    if name in OF_OPERANDS:
        return f"*{operand}"
    if name.startswith("stride"):
        return "i64"
    if name not in ARGUMENTS:
        raise KeyError(f"{name}: no type is known for an argument of that name; add it to ARGUMENTS in {__name__}")
    return ARGUMENTS[name]


@dataclass(frozen=True)
class Specimen:
    """A kernel with the constants and options of one use."""

    name: str
    kernel: Any
    architectures: tuple[int, ...]
    constants: dict[str, Any]
    options: dict[str, int]
    absent: tuple[str, ...] = ()  # pointers that are None
    types: dict[str, str] = field(default_factory=dict)
    operand: str = "bf16"
    expected: dict[int, tuple[str, ...]] = field(default_factory=dict)  # what the PTX must have, by architecture


@dataclass(frozen=True)
class Resources:
    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack
    shared: int  # bytes of a block
    code: str = field(repr=False)  # PTX, or AMD's assembly


def compile_for(specimen: Specimen, architecture: int | str) -> Resources:
    if isinstance(architecture, str):
        return _compile_for_amd(specimen, architecture)
    compiled = _compiled(specimen, GPUTarget("cuda", architecture, 32))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([_tool(), "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage: expected a line REG:… STACK:…, got {usage!r}")
    registers, stack, shared, local = map(int, found.groups())
    return Resources(registers, stack + local, max(shared, compiled.metadata.shared), compiled.asm["ptx"])


def _compile_for_amd(specimen: Specimen, architecture: str) -> Resources:
    """Vector registers; scalar ones that do not fit go to lanes of these, not to memory, and are not counted."""
    compiled = _compiled(specimen, GPUTarget("hip", architecture, 64))
    code = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        if found is None:
            raise RuntimeError(f"{specimen.name} for {architecture}: its metadata lacks .{name}")
        return int(found[1])

    spilled = 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
    return Resources(number("vgpr_count"), spilled, compiled.metadata.shared, code)


def _compiled(specimen: Specimen, target: GPUTarget) -> Any:
    kernel, signature, constants, attributes = specimen.kernel, {}, dict(specimen.constants), {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants or name in specimen.absent:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
            continue
        signature[name] = specimen.types.get(name) or type_of(name, specimen.operand)
        if signature[name][0] == "*" or name in ("V", "D", "D_REF") or name.startswith("stride"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    if "PRECISION" in constants:
        constants["PRECISION"] = left_out.precision(target.backend == "hip")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=specimen.options)


def specimens() -> Iterator[Specimen]:
    for row in (*tiles.SCANS, *tiles.EIGHT_BIT_SCANS):
        yield scan_specimen(row)
    flags = dict(DIFFERENCE=False, REFERENCE=False, SOFTCAP=False, REFERENCE_SOFTCAP=False, BLOCK=rows.BLOCK)
    both = flags | dict(REFERENCE=True, DIFFERENCE=True)
    capped = flags | dict(REFERENCE=True, SOFTCAP=True, REFERENCE_SOFTCAP=True)
    warps = rows.OPTIONS
    of_reference: tuple[str, ...] = ("r_ptr", "kl_ptr", "reference_nll_ptr", "reference_entropy_ptr")
    of_entropy = ("entropy_weight_ptr", "entropy_ptr")
    of_divergence = ("divergence_weight_ptr", "extended_ptr", "beta")
    for name, some, absent in (("", flags, of_reference), (", shared", both, ()), (", own, soft-cap", capped, ())):
        entropy = dict(ENTROPY=True, REFERENCE_ENTROPY=some["REFERENCE"])
        yield Specimen(
            "row_statistics" + name, rows.row_statistics_kernel, ARCHITECTURES, some | entropy, warps, absent
        )
        no_r = () if some["REFERENCE"] else ("r_ptr",)
        blocks = left_out.BLOCKS | dict(K=16, PRECISION=None)  # the last by architecture
        blocks |= {flag: on for flag, on in some.items() if flag != "BLOCK"}
        yield Specimen("left_out" + name, left_out.left_out_kernel, ARCHITECTURES, blocks, left_out.OPTIONS, no_r)
        yield Specimen("logit_bits" + name, rows.logit_bits_kernel, ARCHITECTURES, some, warps, no_r)
        if some["REFERENCE"]:
            yield Specimen("gap_totals" + name, rows.gap_totals_kernel, ARCHITECTURES, some, warps)
        weights = dict(HAS_A=True, HAS_B=some["REFERENCE"], SEPARATE=False, HAS_ENTROPY=False, HAS_DIVERGENCE=False)
        none = ("kl_out_ptr", *no_r, *(() if some["REFERENCE"] else ("b_ptr",)))
        yield Specimen(
            "directions" + name, directions.directions_kernel, ARCHITECTURES, some | weights, warps,
            (*none, *of_entropy, *of_divergence),
        )  # fmt: skip
        block = dict(BLOCK=directions.DIVERGENCE_BLOCK if some["REFERENCE"] else rows.BLOCK)
        more = weights | block | dict(HAS_ENTROPY=True, HAS_DIVERGENCE=some["REFERENCE"])
        none = none if some["REFERENCE"] else (*none, *of_divergence)
        yield Specimen(
            f"directions{name}, extended", directions.directions_kernel, ARCHITECTURES, some | more, warps, none
        )  # fmt: skip
        asked = block | dict(LOG_P2=True, RANK=True, DIVERGENCE=some["REFERENCE"])
        none = () if some["REFERENCE"] else ("r_ptr", "divergence_ptr", "extended_ptr", "beta")
        yield Specimen(
            "extended_statistics" + name,
            directions.extended_statistics_kernel,
            ARCHITECTURES,
            some | asked,
            warps,
            none,
        )
    separate = both | dict(HAS_A=True, HAS_B=False, SEPARATE=True, HAS_ENTROPY=False, HAS_DIVERGENCE=False)
    none = ("b_ptr", *of_entropy, *of_divergence)
    yield Specimen("directions, separate", directions.directions_kernel, ARCHITECTURES, separate, warps, none)
    profile = dict(SOFTCAP=True, **rows.PROFILE)
    yield Specimen("tail_profile", rows.tail_profile_kernel, ARCHITECTURES, profile, dict(num_warps=4, **tiles.FUSED))

    small = dict(num_warps=4, **tiles.FUSED)
    yield Specimen("count_bits", entries.count_bits_kernel, ARCHITECTURES, dict(BLOCK=1024), small)
    yield Specimen("columns_of_bits", entries.columns_of_bits_kernel, ARCHITECTURES, dict(WORDS=entries.WORDS),
                   dict(num_warps=entries.WORDS_WARPS, **tiles.FUSED))  # fmt: skip
    for dim in (16, 256):
        yield Specimen(f"weighted_sum, D {dim}", entries.weighted_sum_kernel, ARCHITECTURES, entries.sum_tile(dim),
                       dict(num_warps=entries.SUMMED_WARPS, **tiles.FUSED))  # fmt: skip
    for kind in ("i8", "fp8e4nv"):
        of = tuple(a for a in ARCHITECTURES if (a in tiles.FLOAT8) != (kind == "i8"))
        constants = dict(HAS_FACTOR=True, INT8=kind == "i8", **quantized.BLOCKS)
        out = dict(out_ptr=f"*{kind}")
        yield Specimen(f"quantize_rows, {kind}", quantized.quantize_rows_kernel, of, constants, small, (), out)
    capped_sums = dict(SOFTCAP=True, BLOCK=quantized.KEPT_BLOCK)
    yield Specimen("kept_sums", quantized.kept_sums_kernel, ARCHITECTURES, capped_sums, small)
    for dim in HIDDEN:
        with_rows = dim <= tiles.ROWS_UP_TO
        plain = dict(
            HAS_BIAS=False, DIFFERENCE=False, ENTRY_REFERENCE=False, SOFTCAP=False, NLL_ROWS=with_rows, KL_ROWS=False
        )  # fmt: skip
        rest = () if with_rows else ("nll_rows_ptr", "kl_rows_ptr")
        absent = ("difference_ptr", "entry_reference_ptr", "bias_ptr", "kl_values_ptr", "kl_rows_ptr", *rest)
        yield _gather(f"attention, D {dim}", entries.attention_kernel, plain, dim, 1 + with_rows, absent)
        shared = plain | dict(DIFFERENCE=True, KL_ROWS=with_rows)
        yield _gather(f"attention, shared, D {dim}", entries.attention_kernel, shared, dim, 2 + 2 * with_rows,
                      (*absent[1:3], *rest))  # fmt: skip
        own = plain | dict(ENTRY_REFERENCE=True, KL_ROWS=with_rows, HAS_BIAS=True, SOFTCAP=True)
        yield _gather(
            f"attention, own, D {dim}", entries.attention_kernel, own, dim, 1 + 2 * with_rows, (absent[0], *rest)
        )
        biased, based = dict(HAS_BIAS=True), dict(HAS_BASE=True)
        yield _gather(f"entry_logits, D {dim}", entries.entry_logits_kernel, biased, dim, 1, (), out_ptr="*fp32")
        yield _gather(f"segment_product, D {dim}", entries.segment_product_kernel, based, dim, 1, ())
        tile = tiles.gather_tile(dim, 1)
        yield Specimen(f"join_slots, D {dim}", entries.join_slots_kernel, ARCHITECTURES,
                       based | dict(BLOCK_D=tile["BLOCK_D"]),
                        dict(num_warps=tile["num_warps"], **tiles.FUSED))  # fmt: skip


def scan_specimen(row: tiles.Scan, operand: str = "bf16") -> Specimen:
    """A scan with everything on that the row may have to do: bits, entropies, and for its kind bias, scale and
    soft-cap."""
    with_directions = row.kind.removesuffix(tiles.EIGHT_BIT)
    kind = with_directions.removesuffix(tiles.DIRECTED)
    capped, reference, directed = kind == "capped", kind in ("shared", "own"), kind != with_directions
    eight = with_directions != row.kind
    if eight:
        operand = "fp8e4nv" if row.architecture in tiles.FLOAT8 else "i8"
    constants: dict[str, Any] = dict(
        **row.constants, DESCRIPTORS=row.descriptors, HAS_BIAS=capped or kind == "own",
        SCALED=capped, ENTROPY=True, BITS=True, K=16 if directed else 0,
    )  # fmt: skip
    absent = [] if constants["HAS_BIAS"] else ["bias_ptr"]
    absent += [] if directed else ["directions", "left_ptr", "low_ptr"]
    if reference:
        own = kind == "own"
        constants |= dict(SHARED=not own, HAS_REFERENCE_BIAS=own, REFERENCE_ENTROPY=True)
        absent += [] if own else ["reference_bias_ptr"]
    else:
        constants |= dict(SOFTCAP=capped, SCALES=eight, INT8=operand == "i8")
        absent += [] if eight else ["x_scale_ptr", "w_scale_ptr"]

    def operand_type(of: str, *block: int) -> str:
        return f"tensordesc<{of}{list(block)}>" if row.descriptors else f"*{of}"

    left, right = (operand_type(operand, block, row.block_d) for block in (row.block_n, row.block_v))
    rows_of = operand_type("fp32" if operand == "fp32" else "fp16", row.block_v // row.slices, 16)
    types = dict(x=left, w=right, reference_x=left, reference_w=right, directions=rows_of, words="i32")
    expected: dict[int, tuple[str, ...]] = {
        80: ("mma.sync",),
        90: ("wgmma", "cp.async.bulk.tensor") if row.descriptors else ("wgmma",),
        100: ("tcgen05", "cp.async.bulk.tensor") if row.descriptors else ("tcgen05",),
        120: ("mma.sync",),
    }
    if eight:
        integers = ".s32.s8.s8.s32"
        expected = {
            80: ("mma.sync", integers), 90: ("wgmma", ".s32.s8.s8", "cp.async.bulk.tensor"),
            100: ("tcgen05.mma.cta_group::1.kind::f8f6f4", "cp.async.bulk.tensor"), 120: ("mma.sync", integers),
        }  # fmt: skip
    return Specimen(
        f"scan, {row.kind}, {row.block_n}×{row.block_v}×{row.block_d}",
        scan.scan_with_reference if reference else scan.scan,
        (row.architecture,), constants, row.options, tuple(absent), types, operand, expected,
    )  # fmt: skip


def _gather(
    name: str, kernel: Any, constants: dict[str, Any], dim: int, vectors: int, absent: tuple[str, ...], **types: str
) -> Specimen:
    tile = tiles.gather_tile(dim, vectors)
    warps = {name: tile.pop(name) for name in ("num_warps", *tiles.FUSED)}
    return Specimen(name, kernel, ARCHITECTURES, constants | tile, warps, absent, types)


def _tool() -> str:
    folder = Path(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    return str(folder / "cuobjdump")

"""nvcc and g++ on the real sources of csrc/cuda, where there are both: warnings, registers, registered operators."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import grids
import pytest
from compilers import NVCC, needs_compiler, needs_nvcc
from processes import ROOT

from fused_losses.kernels import build


@pytest.fixture(scope="module")
def of_nvcc(tmp_path_factory, from_benchmarks):
    """What nvcc says of each kernel, warnings being errors, and the library: for every architecture with --exhaustive,
    else the one before clusters, which rows.cu uses, and the first with them."""
    folder = tmp_path_factory.mktemp("cuda")
    with pytest.MonkeyPatch.context() as patch:
        if not grids.EXHAUSTIVE:
            patch.setenv("FUSED_LOSSES_CUDA_ARCHS", "80,90a")
        yield from_benchmarks("cuda_resources").resources(folder), folder / "_cuda.so"


def documented():
    """The rows of the table in docs/kernels.md by their cells' names."""
    table = (ROOT / "docs" / "kernels.md").read_text().partition("| kernel | source |")
    names, _, *rows = (table[1] + table[2]).partition("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (names, *rows) if line.startswith("|")]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]


@needs_nvcc
@needs_compiler
def test_no_warnings_no_spilled_registers_and_documented_figures(of_nvcc, from_benchmarks, show_table):
    found, _ = of_nvcc
    table = from_benchmarks("compiled").cuda_table(found)
    show_table("Registers / bytes of static shared memory of the CUDA kernels\n" + table)
    if from_benchmarks("cuda_resources").version() == "13.0":
        names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        known = [[row[name] for name in names] for row in documented()]
        assert rows == known, "run benchmarks/compiled.py"
    assert {x["architecture"] for x in found} == {f"sm_{a}" for a in build.architectures(NVCC)}
    names = {x["kernel"].partition("<")[0] for x in found}
    for source in build.KERNELS:
        text = (build.sources() / f"{source}.cu").read_text()
        defined = {line.partition("void ")[2].partition("(")[0] for line in text.splitlines() if "__global__" in line}
        assert defined and defined <= names
        assert defined == {x["kernel"].partition("<")[0] for x in found if x["source"] == f"{source}.cu"}
    spilled = [x for x in found if x["spill_stores"] or x["spill_loads"] or x["stack"]]
    assert not spilled, json.dumps(spilled, indent=1)
    # As many blocks as the launches count on must fit 65,536 registers.
    for x in found:
        assert x["registers"] <= 128 and x["shared"] <= 48 << 10, x


@needs_nvcc
@needs_compiler
def test_cuda_library_loads_and_registers(of_nvcc):
    """Built against whatever torch there is; torch being a CPU build, load_cuda says so."""
    code = f"""
import torch
from fused_losses.kernels import schemas
torch.ops.load_library({str(of_nvcc[1])!r})
assert torch.ops.fused_losses.cuda_interface() == schemas.CUDA_INTERFACE
for schema in schemas.GPU_SCHEMAS[:-1]:
    name = "fused_losses::" + schema.partition("(")[0]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
if torch.version.cuda is None:
    assert "without CUDA" in schemas.load_cuda(), schemas.load_cuda()
    assert not torch.cuda.is_initialized()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr


@needs_nvcc
def test_dependencies_that_nvcc_writes_name_the_headers(tmp_path):
    """Those of the kernels' own folder and of CUDA: a change of either compiles anew."""
    library = build.cuda_library(tmp_path, NVCC, ["90"])
    command = [*library.compilers[build.sources() / "bits.cu"], "-MD", "-MF", "deps", "-c", "-o", "bits.o"]
    subprocess.run([*command, str(build.sources() / "bits.cu")], cwd=tmp_path, check=True, timeout=600)
    found = {Path(word).name for word in shlex.split((tmp_path / "deps").read_text())}
    assert {"bits.cu", "common.cuh", "kernels.h", "cuda_runtime.h"} <= found


@needs_nvcc
def test_unknown_architecture_is_named(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_CUDA_ARCHS", "90a,13")
    with pytest.raises(RuntimeError, match=r"FUSED_LOSSES_CUDA_ARCHS: expected .*, got 13"):
        build.architectures(NVCC)

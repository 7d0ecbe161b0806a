"""Every Triton kernel, with every row of the table of tiles, compiled ahead of time for GPUs that need not be here.

By default each for one architecture, in turn, and each kind of scan with one row.
"""

import re
from pathlib import Path

import pytest
import triton

from fused_losses.kernels.triton import ahead, tiles

ROOT = Path(__file__).parents[2]
SPECIMENS = list(ahead.specimens())
USES = [(s, architecture) for s in SPECIMENS for architecture in s.architectures]
OF_AMD = [s for s in SPECIMENS if 80 in s.architectures]
ALL_SCANS, ALL_KINDS = (*tiles.SCANS, *tiles.EIGHT_BIT_SCANS), (*tiles.KINDS, *tiles.EIGHT_BIT_KINDS)
SCANS = {ahead.scan_specimen(row).name: ALL_KINDS.index(row.kind) for row in ALL_SCANS}
TURN = {s.name: ahead.ARCHITECTURES[SCANS.get(s.name, number) % 4] for number, s in enumerate(SPECIMENS)}
FOUND: dict[tuple[str, int], ahead.Resources] = {}
PINNED = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)[1]


@pytest.mark.parametrize(
    "specimen, architecture",
    [
        pytest.param(s, a, id=f"{s.name}-sm_{a}", marks=() if a == TURN[s.name] else pytest.mark.exhaustive)
        for s, a in USES
    ],
)
def test_compiles_without_spills_and_with_the_instructions_meant(specimen, architecture):
    found = FOUND[specimen.name, architecture] = ahead.compile_for(specimen, architecture)
    # Other releases put registers elsewhere; a few bytes more or less there are no reason for another tile.
    assert found.spilled <= (0 if triton.__version__ == PINNED else 32)
    assert found.shared <= ahead.SHARED_LIMIT[architecture]
    for instruction in specimen.expected.get(architecture, ()):
        assert instruction in found.code


# By default a scan for each, and a kernel of each kind.
SHOWN_OF_AMD = {
    "gfx942": ("scan, own-directions, 64×64×32", "row_statistics", "left_out, shared", "quantize_rows, i8"),
    "gfx950": ("scan, own, 64×64×32", "logit_bits", "count_bits", "attention, D 576"),
}


@pytest.mark.parametrize(
    "specimen, architecture",
    [
        pytest.param(s, a, id=f"{s.name}-{a}", marks=() if s.name in SHOWN_OF_AMD[a] else pytest.mark.exhaustive)
        for s in OF_AMD for a in ahead.AMD
    ],
)  # fmt: skip
def test_compiles_for_amd(specimen, architecture):
    found = FOUND[specimen.name, architecture] = ahead.compile_for(specimen, architecture)
    assert found.spilled == 0
    assert found.shared <= ahead.SHARED_LIMIT_AMD[architecture]
    if specimen.name.startswith("scan"):
        assert "v_mfma" in found.code


def test_specimens_that_are_compiled_for_amd_by_default_exist():
    assert {name for names in SHOWN_OF_AMD.values() for name in names} <= {s.name for s in SPECIMENS}


@pytest.mark.parametrize("operand", ["fp16", "fp32"])
def test_scan_compiles_for_other_operands(operand):
    row = tiles.scan_tile(80, "plain")
    assert ahead.compile_for(ahead.scan_specimen(row, operand), 80).shared <= ahead.SHARED_LIMIT[80]


def test_there_is_a_row_for_every_kind_and_architecture():
    assert {(row.architecture, row.kind) for row in ALL_SCANS} == {
        (a, k) for a in ahead.ARCHITECTURES for k in ALL_KINDS
    }
    capabilities = {(7, 5): 80, (8, 0): 80, (8, 9): 80, (9, 0): 90, (10, 0): 100, (10, 3): 100, (12, 0): 120}
    assert {c: tiles.architecture(c) for c in capabilities} == capabilities


@pytest.mark.exhaustive
@pytest.mark.skipif(triton.__version__ != PINNED, reason=f"the documented figures are those of Triton {PINNED}")
def test_documented_figures_are_those_found(from_benchmarks, show_table):
    if len(FOUND) < len(USES) + len(ahead.AMD) * len(OF_AMD):
        pytest.skip("needs the whole file")
    table = from_benchmarks("compiled").triton_table(FOUND)
    show_table("Registers / shared memory in KiB of the Triton kernels\n" + table)
    assert table in (ROOT / "docs" / "kernels.md").read_text(), "run benchmarks/compiled.py"

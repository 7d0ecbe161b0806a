"""Which tile each kernel takes, by architecture and shape: a committed table, so that the first call is as fast as the
last.

`fused-losses tune` measures on a GPU and prints rows for SCANS. Every row is compiled ahead of time in the tests, for
the architectures that it may run on, and must not spill (docs/kernels.md has registers and shared memory of each).
"""

from __future__ import annotations

from typing import NamedTuple


class Scan(NamedTuple):
    """A row of the table: what it is for, then the tile."""

    architecture: int  # compute capability × 10, of the smallest that takes it
    kind: (
        str  # plain; capped: with soft-cap or bias; shared, own: with a reference, by whose head; or DIRECTED of these
    )
    block_n: int
    block_v: int
    block_d: int
    slices: int
    warps: int
    stages: int
    descriptors: bool  # tensor memory accelerator; else plain pointers
    source: str  # how it was chosen

    @property
    def constants(self) -> dict[str, int]:
        return dict(BLOCK_N=self.block_n, BLOCK_V=self.block_v, BLOCK_D=self.block_d, SLICES=self.slices)

    @property
    def options(self) -> dict[str, int]:
        return dict(num_warps=self.warps, num_stages=self.stages, **FUSED)


# Multiply and add in one instruction; Triton 3.10 no longer does so by itself.
FUSED = dict(enable_fp_fusion=True)
COMPILED = "largest that compiles without spills; not timed"
# What a kind's name ends with where the head's directions are given: sums and products more, so tiles are smaller.
DIRECTED = "-directions"
SCANS = (
    Scan(80, "plain", 128, 128, 32, 2, 8, 4, False, COMPILED),
    Scan(80, "capped", 128, 128, 32, 2, 8, 3, False, COMPILED),
    Scan(80, "shared", 64, 128, 64, 2, 8, 2, False, COMPILED),
    Scan(80, "own", 64, 64, 32, 2, 8, 3, False, COMPILED),
    Scan(80, "plain-directions", 128, 128, 32, 2, 8, 4, False, COMPILED),
    Scan(80, "capped-directions", 128, 64, 32, 2, 8, 4, False, COMPILED),
    Scan(80, "shared-directions", 64, 64, 32, 2, 8, 3, False, COMPILED),
    Scan(80, "own-directions", 64, 64, 32, 2, 8, 3, False, COMPILED),
    Scan(90, "plain", 128, 256, 64, 2, 8, 3, True, COMPILED),
    Scan(90, "capped", 128, 128, 64, 2, 8, 4, True, COMPILED),
    Scan(90, "shared", 128, 128, 64, 4, 8, 4, True, COMPILED),
    Scan(90, "own", 128, 64, 64, 2, 8, 4, True, COMPILED),
    Scan(90, "plain-directions", 128, 256, 64, 4, 8, 3, True, COMPILED),
    Scan(90, "capped-directions", 128, 128, 64, 2, 8, 4, True, COMPILED),
    Scan(90, "shared-directions", 64, 128, 64, 4, 8, 4, True, COMPILED),
    Scan(90, "own-directions", 64, 128, 64, 4, 8, 4, True, COMPILED),
    Scan(100, "plain", 128, 256, 64, 4, 8, 3, True, COMPILED),
    Scan(100, "capped", 128, 256, 64, 4, 8, 3, True, COMPILED),
    Scan(100, "shared", 128, 128, 64, 4, 8, 4, True, COMPILED),
    Scan(100, "own", 128, 128, 64, 4, 8, 4, True, COMPILED),
    Scan(100, "plain-directions", 128, 256, 64, 4, 8, 3, True, COMPILED),
    Scan(100, "capped-directions", 128, 256, 64, 4, 8, 3, True, COMPILED),
    Scan(100, "shared-directions", 128, 64, 64, 2, 8, 4, True, COMPILED),
    Scan(100, "own-directions", 128, 64, 64, 2, 8, 4, True, COMPILED),
    Scan(120, "plain", 128, 128, 32, 2, 8, 4, False, COMPILED),
    Scan(120, "capped", 128, 128, 32, 2, 8, 3, False, COMPILED),
    Scan(120, "shared", 64, 128, 64, 2, 8, 2, False, COMPILED),
    Scan(120, "own", 64, 64, 32, 2, 8, 3, False, COMPILED),
    Scan(120, "plain-directions", 128, 64, 32, 2, 8, 4, False, COMPILED),
    Scan(120, "capped-directions", 128, 64, 32, 2, 8, 4, False, COMPILED),
    Scan(120, "shared-directions", 64, 32, 32, 1, 8, 3, False, COMPILED),
    Scan(120, "own-directions", 64, 32, 32, 1, 8, 3, False, COMPILED),
)
# What a kind's name ends with where the operands are of 8 bits, and where these are floats (e4m3) and no integers: on
# sm_100 integers would go through the old mma.sync.
EIGHT_BIT = "-8bit"
FLOAT8 = (100,)
EIGHT_BIT_SCANS = (
    Scan(80, "plain-8bit", 128, 128, 64, 2, 8, 4, False, COMPILED),
    Scan(80, "capped-8bit", 128, 128, 64, 2, 8, 3, False, COMPILED),
    Scan(80, "plain-directions-8bit", 128, 128, 64, 2, 8, 4, False, COMPILED),
    Scan(80, "capped-directions-8bit", 128, 64, 64, 2, 8, 4, False, COMPILED),
    Scan(90, "plain-8bit", 128, 256, 128, 2, 8, 3, True, COMPILED),
    Scan(90, "capped-8bit", 128, 128, 128, 2, 8, 4, True, COMPILED),
    Scan(90, "plain-directions-8bit", 128, 256, 128, 4, 8, 3, True, COMPILED),
    Scan(90, "capped-directions-8bit", 128, 128, 128, 2, 8, 4, True, COMPILED),
    Scan(100, "plain-8bit", 128, 256, 128, 4, 8, 3, True, COMPILED),
    Scan(100, "capped-8bit", 128, 256, 128, 4, 8, 3, True, COMPILED),
    Scan(100, "plain-directions-8bit", 128, 256, 128, 4, 8, 3, True, COMPILED),
    Scan(100, "capped-directions-8bit", 128, 256, 128, 4, 8, 3, True, COMPILED),
    Scan(120, "plain-8bit", 128, 128, 64, 2, 8, 4, False, COMPILED),
    Scan(120, "capped-8bit", 128, 128, 64, 2, 8, 3, False, COMPILED),
    Scan(120, "plain-directions-8bit", 128, 64, 64, 2, 8, 4, False, COMPILED),
    Scan(120, "capped-directions-8bit", 128, 64, 64, 2, 8, 4, False, COMPILED),
)
KINDS = tuple(kind + end for end in ("", DIRECTED) for kind in ("plain", "capped", "shared", "own"))
EIGHT_BIT_KINDS = tuple(kind + end + EIGHT_BIT for end in ("", DIRECTED) for kind in ("plain", "capped"))


PLAIN = 80  # the architecture whose rows need neither Hopper's instructions nor Blackwell's


def architecture(capability: tuple[int, int]) -> int:
    """Of the table: 80 for everything that has neither Hopper's wgmma nor Blackwell's tcgen05; consumer Blackwell has
    rows of its own, with the same instructions as 80."""
    major = capability[0]
    return {9: 90, 10: 100, 12: 120}.get(major, 80)


def scan_tile(arch: int, kind: str) -> Scan:
    """The row for a call."""
    return next(row for row in (*SCANS, *EIGHT_BIT_SCANS) if (row.architecture, row.kind) == (arch, kind))


# Of a token's hidden size: up to here the attention holds what it accumulates in registers.
ROWS_UP_TO = 8192


def gather_tile(dim: int, vectors: int) -> dict[str, int]:
    """For rows of `dim` numbers gathered whole, GROUP at a time, beside so many vectors of that length in registers."""
    block = 16
    while block < dim:
        block *= 2
    warps = min(8 if block <= 4096 else 16, max(1, block // 256))
    each = block // (32 * warps) or 1  # numbers of a row in one thread
    # 80 in registers leave room for two programs on a multiprocessor at D = 4096; with many vectors that is too little.
    room = (144 if vectors > 2 and warps <= 8 else 80) // each - vectors
    group = next(g for g in (8, 4, 2, 1) if g <= max(1, room))
    return dict(GROUP=group, BLOCK_D=block, num_warps=warps, **FUSED)

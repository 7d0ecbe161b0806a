"""scan="int8" on backend "cpu": what is kept from chunk to chunk, and what is found out once for all of them."""

from unittest import mock

import pytest
import torch
from cases import coarse, make, run_with_report
from sparse_checks import needs_kernels

from fused_losses.backends import chunks, int8

pytestmark = needs_kernels
SHAPE = 130, 64, 1500


@pytest.mark.parametrize("halves", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "rows, width, whole",
    [(64, 32, True), (49_152, 576, True), (49_152, 2048, True), (151_936, 896, True), (128_256, 2048, False)],
)
def test_memory_of_the_head_and_of_a_chunk(rows, width, whole, dtype, halves):
    """Together no more than a usual chunk and KEPT_BYTES; all of the head where that leaves enough for chunks."""
    kept, chunk = int8._memory(torch.empty(rows, width, dtype=dtype, device="meta"), halves)
    assert kept + chunk <= chunks.CHUNK_BYTES + int8.KEPT_BYTES
    assert (kept >= rows * width) == whole
    assert int8.CHUNKS[0] <= chunk <= chunks.CHUNK_BYTES


@pytest.mark.parametrize("reference, kept", [(None, 0), ("shared", 1 << 14)])
def test_one_chunk_keeps_no_more_than_before(reference, kept):
    """Smaller chunks would leave nothing for the head where there is one alone."""
    case = make(*SHAPE, spread=4.0, reference=reference)
    seen = []

    def head(self, *arguments, of=int8.Int8Product._head):
        seen.append(self.kept_bytes)
        return of(self, *arguments)

    with (
        coarse(1e-3), mock.patch.object(int8, "KEPT_BYTES", 1 << 14),
        mock.patch.object(int8.Int8Product, "_head", head),
    ):  # fmt: skip
        run_with_report(case, torch.float32, "cpu", "sparse", scan="int8")
    assert seen and set(seen) == {kept}


@pytest.mark.parametrize("wide", [False, True], ids=["none", "one-token"])
@pytest.mark.parametrize("reference", [None, "shared"])
def test_hidden_states_that_8_bits_are_too_few_for(wide, reference):
    """Where there are none in any token nothing is looked at twice; where there is one, its products are full."""
    case = make(*SHAPE, spread=4.0, reference=reference)
    if wide:
        case.hidden[7, 3] = 2000.0
    with coarse(1e-3, chunk_bytes=1), mock.patch.object(int8, "too_wide", wraps=int8.too_wide) as looked:
        _, report = run_with_report(case, torch.float32, "cpu", "sparse", scan="int8")
    count = looked.call_count
    assert count == 1 if not wide and reference is None else count > 1
    assert ("8 bits are too few for" in (report.scan_note or "")) == wide

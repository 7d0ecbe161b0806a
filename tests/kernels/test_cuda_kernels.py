"""The CUDA kernels, run on a CPU by tests/support/cuda_shim, against float64: bits, products of segments, and what the
host code refuses.

Their build by nvcc is tested in test_nvcc.py.
"""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import relative
from cuda_operators import DTYPES, INF, guarded, needs_compiler, normal, ops, twice
from torch import Tensor

from fused_losses.kernels import build, schemas

# ---- The shim itself


@needs_compiler
def test_shim_finds_mistakes(shim):
    message, out = shim.mistake(0)
    assert message == "" and out == [sum(range(64)) + 1] * 64
    for number, word in ((1, "__syncthreads"), (2, "__shfl_xor_sync"), (3, "__syncwarp"), (4, "aligned")):
        assert word in shim.mistake(number)[0]


# ---- count_bits and columns_of_bits


@needs_compiler
@pytest.mark.parametrize("v", [2, 33, 123, 507, 4097, 70_001])
@pytest.mark.parametrize("extra", [0, 1, 3])
def test_bits(shim, v, extra):
    n = 6
    kept = torch.rand(n, v) < torch.tensor([0.0, 0.01, 0.2, 0.2, 0.9, 0.1])[:, None]
    labels = torch.randint(v, (n,))
    labels[0], labels[1], labels[2] = v - 1, 0, min(v, 32) - 1  # the first and the last bit of a word
    kept[0], kept[2, labels[2]] = False, False
    words = -(-v // 32) + extra
    bits = oracles.packed(kept, words)
    kept[torch.arange(n - 1), labels[:-1]] = True
    labels[-1] = schemas.ABSENT
    expected = kept.sum(1)
    capacity = int(expected[3])  # a row of just as many, and one of more
    expected[expected > capacity] = -1

    def count(new):
        counts = new(n, dtype=torch.int64)
        ops.count_bits(bits, labels, capacity, counts)
        return (counts,)

    (counts,) = twice(shim, count)
    assert torch.equal(counts, expected)
    offsets = oracles.offsets_of(counts.clamp(min=0))

    def fill(new):
        columns = new(int(offsets[-1]), dtype=torch.int32)
        ops.columns_of_bits(bits, labels, offsets, columns)
        return (columns,)

    (columns,) = twice(shim, fill)
    expected_columns = [kept[t].nonzero().flatten() for t in range(n) if counts[t] >= 0]
    assert torch.equal(columns.long(), torch.cat(expected_columns or [torch.empty(0, dtype=torch.int64)]))


# ---- segment_product


def segment_case(matrix_dtype, i, d, m, lengths, base):
    counts = torch.tensor([lengths[k % len(lengths)] for k in range(i)])
    offsets = oracles.offsets_of(counts)
    total = int(offsets[-1])
    columns = torch.randint(m, (total,), dtype=torch.int32)
    values, matrix = normal(total).float(), normal(m, d).to(matrix_dtype)
    scale, vector = normal(i).float(), normal(d).float()
    b = normal(i, d).float() if base else None
    hot = (counts > schemas.SPLIT).nonzero().flatten()
    hot_first = oracles.offsets_of(-(-counts[hot] // schemas.SPLIT))
    truth = oracles.segment_product(offsets, columns, values, matrix, scale, vector, b, 0.3)
    return (offsets, columns, values, matrix, scale, vector, b, 0.3, hot, hot_first), truth


# Measured: 8.2e-7, 1.9e-3, 2.6e-4; the last two are the rounding of the result.
SEGMENT_TOLERANCES = {torch.float32: 2.4e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}


def segment_product(shim, arguments, out_dtype, offset=0, spare=0):
    i, d = len(arguments[0]) - 1, arguments[3].shape[1]
    placed = [guarded(x, offset) if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]

    def call(new):
        partial, out = new(int(arguments[-1][-1]) + spare, d), new(i, d, dtype=out_dtype)
        ops.segment_product(*placed, partial, out)
        return (out,)

    return twice(shim, call, offset)[0]


@needs_compiler
@pytest.mark.pairwise
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("matrix", DTYPES)
@pytest.mark.parametrize("d", [1, 17, 64, 576, 2056])
def test_segment_product(shim, matrix, out, d):
    """Segments without entries, around the group of loads, and hot ones of one more than a slot and of several."""
    lengths = [0, 3, 0, 8, 513, 0, 17, 1, 512, 1100, 0]
    arguments, truth = segment_case(DTYPES[matrix], 19, d, 29, lengths, base=d != 64)
    result = segment_product(shim, arguments, DTYPES[out], offset=0, spare=d % 2)
    assert relative(result, truth) < SEGMENT_TOLERANCES[DTYPES[out]]


@needs_compiler
@pytest.mark.parametrize("matrix", DTYPES)
def test_segment_product_in_parts_of_d(shim, matrix):
    arguments, truth = segment_case(DTYPES[matrix], 3, 5000, 5, [9, 0, 600], base=True)
    for offset in (0, 1):
        result = segment_product(shim, arguments, torch.float32, offset)
        assert relative(result, truth) < SEGMENT_TOLERANCES[torch.float32]


@needs_compiler
@pytest.mark.parametrize("i", [1, 9])
def test_segment_product_without_entries(shim, i):
    arguments, truth = segment_case(torch.bfloat16, i, 64, 5, [0], base=False)
    assert relative(segment_product(shim, arguments, torch.float32), truth) < 1e-7
    infinite = list(arguments)
    infinite[3] = torch.full_like(arguments[3], INF)  # rows that no entry names must not be multiplied by 0
    assert segment_product(shim, infinite, torch.float32).isfinite().all()


# ---- What the host code refuses


@needs_compiler
def test_errors_say_name_expected_and_got(shim):
    z, labels, rows = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), torch.zeros(9, 2)
    nll, prediction = torch.zeros(2), torch.zeros(2, dtype=torch.int64)

    def call(z=z, labels=labels, rows=rows, nll=nll, kl=None):
        ops.row_statistics(z, None, False, labels, 1.0, 0.0, 1.0, 0.0, nll, prediction, kl, None, None, None, rows)

    call()
    for arguments, words in (
        ({"labels": labels.int()}, ("row_statistics", "labels", "Long", "Int")),
        ({"rows": torch.zeros(8, 2)}, ("rows", "[9, 2]", "[8, 2]")),
        ({"z": torch.zeros(8, 2).T}, ("z", "contiguous", "[1, 2]")),
        ({"z": z.double()}, ("z", "Float", "Double")),
        ({"nll": torch.zeros(3)}, ("nll", "[2]", "[3]")),
        ({"kl": torch.zeros(2)}, ("r:", "None")),
    ):
        with pytest.raises(RuntimeError) as error:
            call(**arguments)
        assert all(word in str(error.value) for word in words), str(error.value)
    with pytest.raises(RuntimeError, match="hidden: expected dtype Float, BFloat16 or Half, got Double"):
        ops.entry_logits(z.double(), z.double(), None, torch.zeros(3, dtype=torch.int64), prediction[:0].int(), nll[:0])


@needs_compiler
def test_no_tokens(shim):
    empty, ids = torch.empty(0, 8), torch.empty(0, dtype=torch.int64)
    nll, rows = empty[:, 0], torch.empty(9, 0)
    ops.row_statistics(empty, None, False, ids, 1.0, 0.0, 1.0, 0.0, nll, ids, None, None, None, None, rows)
    ops.count_bits(torch.empty(0, 1, dtype=torch.int32), ids, 5, ids)
    ops.columns_of_bits(torch.empty(0, 1, dtype=torch.int32), ids, torch.zeros(1, dtype=torch.int64), ids.int())
    ops.entry_logits(empty, empty, None, torch.zeros(1, dtype=torch.int64), ids.int(), empty[:, 0])


def _enumerators(header: str, enum: str) -> list[str]:
    """All but the last, which is their number."""
    return header.partition(f"enum {enum} {{")[2].partition("}")[0].strip().split(", ")[:-1]


def test_numbers_that_stand_twice():
    """SPLIT, the names of the rows of `rows` and `kept`, and the interface, in schemas.py and in csrc/cuda."""
    header, registration = ((build.sources() / name).read_text() for name in ("kernels.h", "ops.cpp"))
    assert f"SPLIT = {schemas.SPLIT};" in header
    assert _enumerators(header, "Row") == [row.name for row in schemas.Row]
    kept = {name: row for name, row in vars(schemas).items() if name.startswith("KEPT")}
    assert _enumerators(header, "KeptRow") == sorted(kept, key=kept.get)
    assert f"interface_op() {{ return {schemas.CUDA_INTERFACE}; }}" in registration

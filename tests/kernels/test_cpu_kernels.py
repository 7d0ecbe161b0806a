"""The sparse mode's compiled kernels for CPUs, for every instruction set, and the library that holds them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import relative
from cpu_products import check_large_columns, check_products, check_rounding_of_bf16, check_slices
from processes import pythonpath
from sparse_checks import needs_kernels

import fused_losses as fl
from fused_losses.backends import chunks
from fused_losses.kernels import schemas


@needs_kernels
@pytest.mark.parametrize("matrix_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("d", [1, 17, 64, 131, 513])
@pytest.mark.parametrize("base", [False, True], ids=["alone", "onto-base"])
def test_products(matrix_dtype, out_dtype, d, base):
    check_products(matrix_dtype, out_dtype, d, base)


@needs_kernels
@pytest.mark.parametrize("matrix_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_columns_in_slices(matrix_dtype, out_dtype):
    check_slices(matrix_dtype, out_dtype)


@needs_kernels
def test_large_sums_of_columns():
    check_large_columns()


@needs_kernels
def test_bf16_output_is_rounded_to_nearest_even_and_keeps_nan():
    check_rounding_of_bf16()


# The least; one token more than a block of 64; D a little more than several blocks of 64 or 128, or odd, so that the
# last has no pair; V between blocks.
LOGIT_SHAPES = [
    (1, 2, 1), (65, 64, 64), (70, 1030, 130), (3, 514, 1000), (8, 70, 2), (9, 1030, 131), (16, 34, 64), (40, 1, 70),
    (33, 3, 130), (70, 577, 65),
]  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LOGIT_SHAPES, ids=str)
def test_logits(dtype, shape):
    if not schemas.has_logits(dtype):
        pytest.skip("this PyTorch exports no micro-kernels for it")
    n, d, v = shape
    hidden, weight, bias = torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype), torch.randn(v)
    out = torch.full((n, v), torch.nan)
    for b in (None, bias):
        assert torch.ops.fused_losses.logits(hidden, weight, b, out)
        truth = hidden.double() @ weight.double().T + (0 if b is None else b)
        assert relative(out, truth) < 1e-6


@needs_kernels
@pytest.mark.parametrize("dtype, most", [(torch.float32, 2.4e-7), (torch.bfloat16, 1.3e-7)], ids=str)
def test_logits_are_sums_of_short_sums(dtype, most):
    """Measured 1.6e-7 and 0.9e-7; sums of 512 terms in a row have 4.1e-7 and 1.6e-7."""
    if not schemas.has_logits(dtype):
        pytest.skip("this PyTorch exports no micro-kernels for it")
    hidden, weight = torch.randn(64, 1024).to(dtype), torch.randn(512, 1024).to(dtype)
    out = torch.empty(64, 512)
    assert torch.ops.fused_losses.logits(hidden, weight, None, out)
    assert relative(out, hidden.double() @ weight.double().T) < most


needs_narrow_products = pytest.mark.skipif(
    not schemas.has_narrow_products(), reason="no AVX512_BF16 here, or this PyTorch exports no micro-kernels for it"
)
# No id, as a rank of a spread head may have; the least; tokens between vectors and odd, so that the last has no pair;
# ids between blocks of 128, steps of 512, and odd; D between panels.
NARROW_SHAPES = [
    (3, 0, 8), (1, 1, 1), (2, 3, 2), (15, 16, 64), (16, 17, 65), (17, 130, 63), (341, 300, 200), (64, 1024, 128),
    (33, 1537, 97), (5, 513, 600),
]  # fmt: skip


def directions(n, v, large):
    """A few numbers of each row much larger than the others, or all of about the same size; and where they are."""
    direction = torch.randn(n, v)
    if large and v > 100:
        direction *= 1e-2
        direction.scatter_(1, torch.randint(v, (n, 5)), torch.randn(n, 5) + 2)
    found = torch.full((n,), torch.nan)
    assert torch.ops.fused_losses.large_numbers(direction, found)
    largest = direction.abs().amax(1, keepdim=True) / 32 if v else torch.zeros(n, 1)
    where = direction.abs() > largest
    few = where.sum(1) <= 64
    assert torch.equal(found, torch.where(few, largest[:, 0], torch.inf))
    return direction, found, torch.where(where & few[:, None], direction, direction.bfloat16().float())


@needs_narrow_products
@pytest.mark.parametrize("large", [False, True], ids=["flat", "peaked"])
@pytest.mark.parametrize("shape", NARROW_SHAPES, ids=str)
def test_add_outer(shape, large):
    n, v, d = shape
    direction, large_from, rounded = directions(n, v, large)
    hidden, before = torch.randn(n, d).bfloat16(), torch.randn(v, d)
    total = before.clone()
    assert torch.ops.fused_losses.add_outer(direction, large_from, hidden, total)
    change = rounded.double().T @ hidden.double()
    assert relative(total.double(), before.double() + change) < 1e-6
    assert not (large and v > 100) or relative(change, direction.double().T @ hidden.double()) < 3e-4  # measured 9e-5


@needs_narrow_products
@pytest.mark.parametrize("large", [False, True], ids=["flat", "peaked"])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", NARROW_SHAPES, ids=str)
def test_times_weight(shape, threads, large):
    """An id without a pair, the last of an odd number, is not rounded."""
    n, v, d = shape
    direction, large_from, rounded = directions(n, v, large)
    weight = torch.randn(v, d).bfloat16()
    if v % 2:
        rounded[:, -1] = direction[:, -1]
    out, lost = torch.full((n, d), torch.nan), torch.full((n,), torch.nan)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        narrow = torch.empty_like(direction).bfloat16()
        assert torch.ops.fused_losses.times_weight(direction, large_from, weight, narrow, out, lost)
    finally:
        torch.set_num_threads(before)
    assert relative(out, rounded.double() @ weight.double()) < 1e-6
    assert (lost - (direction.double() - rounded).sum(1)).abs().max() < 1e-6


@needs_narrow_products
def test_narrow_products_keep_what_is_not_finite_to_its_row():
    direction, total, out, lost = torch.randn(5, 40), torch.zeros(40, 3), torch.empty(5, 3), torch.empty(5)
    direction[3, 7], direction[1, 30] = torch.nan, torch.inf
    matrix, large_from = torch.randn(40, 3).bfloat16(), torch.empty(5)
    assert torch.ops.fused_losses.large_numbers(direction, large_from)
    assert torch.ops.fused_losses.add_outer(direction, large_from, matrix[:5], total)
    assert torch.ops.fused_losses.times_weight(direction, large_from, matrix, torch.empty(200).bfloat16(), out, lost)
    assert (~total.isfinite()).all(1).nonzero().flatten().tolist() == [7, 30] and total[7].isnan().all()
    assert (~out.isfinite()).all(1).nonzero().flatten().tolist() == [1, 3] and out[3].isnan().all()
    assert total.isfinite().sum() == 38 * 3 and out.isfinite().sum() == 3 * 3


@needs_kernels
@pytest.mark.parametrize("name, value", [("FUSED_LOSSES_SIMD", "avx2"), ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")])
def test_without_narrow_products(name, value):
    """The library was told to leave AVX-512 alone, or oneDNN: its micro-kernel then throws. Gradients are there."""
    code = (
        "import torch, fused_losses as fl; from fused_losses.kernels import schemas; "
        "assert schemas.load() is None and not schemas.has_narrow_products(); torch.manual_seed(0); "
        "x, w, y = torch.randn(40, 16).bfloat16(), torch.randn(300, 16).bfloat16(), torch.randint(300, (40,)); "
        "w.requires_grad_(); fl.CrossEntropyLoss(gradient='exact')(x, w, y).backward(); z = w.detach().double(); "
        "p = ((x.double() @ z.T).softmax(1) - torch.nn.functional.one_hot(y, 300)) / 40; "
        "assert (w.grad.double() - p.T @ x.double()).norm() < 3e-2 * w.grad.double().norm(), w.grad"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": pythonpath(), name: value, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


@needs_kernels
@pytest.mark.parametrize("d", [1, 31, 64, 577])
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_values_in_bfloat16_are_of_float32_logits(d, gradient):
    """Whether D is even or odd. Measured 5e-7; 1e-3 of logits that are rounded."""
    if not schemas.has_logits(torch.bfloat16):
        pytest.skip("this PyTorch exports no micro-kernels for it")
    hidden, weight, labels = torch.randn(40, d).bfloat16(), torch.randn(2000, d).bfloat16(), torch.randint(2000, (40,))
    nll = fl.token_losses(hidden.requires_grad_(), weight, labels, gradient=gradient).nll
    truth = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="none")
    assert relative(nll, truth) < 1.5e-6


SIMD = """
import itertools, sys, torch
from cases import HEADS, REFERENCES, coarse, errors, make, relative, run
from cpu_products import check_products, check_rounding_of_bf16, check_slices
from fused_losses.kernels import schemas

FLOATS = torch.float32, torch.bfloat16
assert schemas.load() is None and torch.ops.fused_losses.simd() == sys.argv[1]
for reference, head in itertools.product(REFERENCES, HEADS):
    case = make(33, 18, 123, **head, reference=reference)
    with coarse(1e-30, capacity=507, chunk_bytes=1):
        assert max(errors(case, torch.float32, "cpu", gradient="sparse").values()) < 1e-5
    with coarse(5e-3):
        ours, plain = (run(case, torch.float32, b, gradient="sparse", tolerance=0.9) for b in ("cpu", "torch"))
        assert max(relative(ours[k], plain[k]) for k in ours) < 1e-5
for matrix_dtype, out_dtype, d in itertools.product(FLOATS, FLOATS, (1, 17, 64)):
    check_products(matrix_dtype, out_dtype, d, True)
for matrix_dtype, out_dtype in itertools.product(FLOATS, FLOATS):
    check_slices(matrix_dtype, out_dtype)
check_rounding_of_bf16()
"""


@needs_kernels
@pytest.mark.parametrize("wanted, found", [("avx2", "AVX2"), ("baseline", "128-bit SIMD")])
def test_other_instruction_sets(wanted, found):
    """The kernels are compiled once per instruction set; this machine's best runs in all other tests."""
    if wanted == "avx2" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("no AVX2 here")
    result = subprocess.run(
        [sys.executable, "-c", SIMD, found], capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": pythonpath(), "FUSED_LOSSES_SIMD": wanted, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


LIBRARY = """
import sys, fused_losses.kernels.schemas as schemas
from pathlib import Path
import torch, fused_losses as fl
for path in sys.argv[1:]:
    schemas.LIBRARY = Path(path)
    schemas.load.cache_clear()
    hidden = torch.randn(3, 4, requires_grad=True)
    fl.CrossEntropyLoss(gradient="sparse")(hidden, torch.randn(9, 4), torch.arange(3)).backward()
    try:
        fl.token_losses(hidden, torch.randn(9, 4), torch.arange(3), backend="cpu")
    except RuntimeError as error:
        print(error)
"""


def test_a_library_that_cannot_be_used_is_passed_over_with_the_reason(tmp_path):
    """It is missing; it is no library; it is one without the kernels, here that of C's mathematics."""
    import ctypes.util

    name = ctypes.util.find_library("m")
    found = [p for p in Path("/").glob(f"usr/lib/*/{name}")] + [p for p in Path("/").glob(f"lib*/*/{name}")]
    paths = [tmp_path / name for name in ("missing.so", "corrupt.so", "other.so")]
    paths[1].write_bytes(b"not a library")
    if found:
        paths[2].write_bytes(found[0].read_bytes())
    else:
        paths.pop()
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}  # not what this machine has built before
    command = [sys.executable, "-c", LIBRARY, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    assert len(said) == len(paths)
    for line, reason in zip(said, ("not built", "does not load", "rebuild"), strict=False):
        assert "backend='cpu' cannot run here" in line and reason in line and "auto" in line


@needs_kernels
@pytest.mark.parametrize("objective", [True, False], ids=["objective", "token_losses"])
@pytest.mark.parametrize(
    "dtype, frozen, size",
    [(torch.bfloat16, False, 32), (torch.float16, False, 32), (torch.float32, False, 16), (torch.bfloat16, True, 16)],
    ids=str,
)
def test_chunks_beside_sums_have_the_memory_of_rounding_these(dtype, frozen, size, objective, monkeypatch):
    """V·D numbers of 2 bytes, where a token's logits take V of 6; 16 tokens at least."""
    sizes, logit_chunks = [], chunks.logit_chunks

    def seen(*args, **options):
        for chunk in logit_chunks(*args, **options):
            sizes.append(len(chunk.z))
            yield chunk

    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    monkeypatch.setattr(chunks, "logit_chunks", seen)
    hidden, weight = (torch.randn(n, 96).to(dtype).requires_grad_() for n in (64, 130))
    weight.requires_grad_(not frozen)
    labels = torch.randint(130, (64,))
    if objective:
        fl.CrossEntropyLoss(gradient="exact", backend="cpu")(hidden, weight, labels).backward()
        assert sizes == [size] * (64 // size)
    else:
        fl.token_losses(hidden, weight, labels, gradient="exact", backend="cpu").nll.sum().backward()
        assert sizes == [16] * 4 + [size] * (64 // size) * (not frozen)  # values first, then gradients

"""The kernels of scan="int8": products of 8-bit numbers, and logits computed again beside the compaction."""

import os
import subprocess
import sys

import int8_products
import pytest
import torch
from cases import name
from processes import pythonpath
from sparse_checks import needs_kernels

from fused_losses.backends import int8

pytestmark = needs_kernels
FLOATS = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("shared", [False, True], ids=["own-scales", "shared-channels"])
@pytest.mark.parametrize("d, v", [(1, 1), (19, 200), (64, 128), (1027, 129)], ids=str)
def test_head(dtype, shared, d, v):
    """The numbers, the scales and the sums, to the bit; zeros where rows or columns are missing."""
    int8_products.check_head(dtype, d, v, shared)


# The least; D no multiple of 4, of 4 but not 16, of several slices; V about a block; N about a block of 64 and 128.
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 20, 127), (64, 64, 128), (65, 19, 129), (127, 1030, 300), (130, 1600, 257)], ids=name
)
def test_logits(dtype, shape):
    int8_products.check_logits(dtype, *shape)


def test_logits_of_wide_differences():
    """float32 hidden states, bfloat16 weight: what x − x_ref is."""
    int8_products.check_logits(torch.bfloat16, 70, 131, 200, hidden_dtype=torch.float32)


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_not_finite(dtype):
    int8_products.check_not_finite(dtype)


@pytest.mark.parametrize("size", [1e-41, 1e-30, 1e8, 1e30])
def test_sizes(size):
    """Scales are of a row: its logits are as right as others, or 0 where float32 has no such numbers."""
    hidden, weight, _, _ = int8_products.operands(5, 64, 130, torch.float32)
    usual = int8_products.product(hidden, weight, None, None, 0)
    hidden[2] *= size
    found = int8_products.product(hidden, weight, None, None, 0)
    torch.testing.assert_close(found[2].double(), usual[2].double() * size, rtol=1e-6, atol=size * 1e-5 + 1e-38)
    keep = [0, 1, 3, 4]
    assert torch.equal(found[keep], usual[keep])


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("reference", [False, True], ids=["alone", "reference"])
@pytest.mark.parametrize("head", int8_products.HEADS, ids=name)
def test_kept_logits_are_exact(dtype, reference, head):
    """Soft-cap, scale, a bias with −∞, low rank; with a reference and no soft-cap z is a difference."""
    int8_products.check_exact_logits(dtype=dtype, reference=reference, **head)


@pytest.mark.parametrize("d, v", [(1, 20), (16, 33), (32, 64), (130, 1000)], ids=str)
def test_kept_logits_at_borders(d, v):
    int8_products.check_exact_logits(d=d, v=v, spread=3.0, threshold=6e-2)


@pytest.mark.parametrize("reference", [False, True], ids=["alone", "reference"])
def test_kept_logits_of_long_rows(reference):
    """Which they are is told by a lower bound of the lse."""
    options = dict(n=5, v=20_001, threshold=1e-3, reference=reference)
    int8_products.check_exact_logits(**options)
    z = int8_products.Rough(**options | {"reference": False}).exact()[0]
    lower = int8_products.lse_of(z, lambda lse: torch.full_like(lse, int8.REFINED * 1e-3).log())
    assert (lower < z.logsumexp(1) - 1e-3).all() and (lower > z.logsumexp(1) - 1).all()


@pytest.mark.parametrize("reference", [False, True], ids=["alone", "reference"])
def test_flat_rows_have_no_exact_logits_but_the_labels(reference):
    """By that bound nearly all of them would be."""
    int8_products.check_exact_logits(n=5, v=4000, spread=0.1, threshold=1e-3, reference=reference, flat=True)


@pytest.mark.parametrize("wanted, found", [("avx2", "AVX2"), ("baseline", "128-bit SIMD")])
def test_other_instruction_sets(wanted, found):
    if wanted == "avx2" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("no AVX2 here")
    code = (
        "import int8_products, torch; int8_products.check_all(); "
        f"assert torch.ops.fused_losses.simd() == {found!r} and not torch.ops.fused_losses.int8_is_fast()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": pythonpath(), "FUSED_LOSSES_SIMD": wanted, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_without_the_micro_kernel():
    """oneDNN may be told to leave VNNI alone; its micro-kernel then throws."""
    code = (
        "import int8_products, torch; from fused_losses.kernels import schemas; assert schemas.load() is None; "
        "assert not torch.ops.fused_losses.int8_is_fast(); int8_products.check_logits(torch.float32, 65, 20, 130)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": pythonpath(), "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr

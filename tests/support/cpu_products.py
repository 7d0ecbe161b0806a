"""Products of sparse entries by the compiled kernels for CPUs, against float64.

A process that takes other instruction sets imports them too.
"""

import torch
from cases import relative

from fused_losses import backends
from fused_losses.problem import Segments


def check_products(matrix_dtype, out_dtype, d, base):
    n, v = 37, 53
    g = torch.Generator().manual_seed(0)
    dense = torch.where(torch.rand(n, v, generator=g) < 0.3, torch.randn(n, v, generator=g), 0)
    dense[3] = 0
    dense[:, 7] = 0
    at = dense.nonzero()
    offsets = torch.zeros(n + 1, dtype=torch.int64)
    offsets[1:] = (dense != 0).sum(1).cumsum(0)
    entries = Segments(offsets, at[:, 1].int(), dense[dense != 0])
    x, w = torch.randn(n, d, generator=g).to(matrix_dtype), torch.randn(v, d, generator=g).to(matrix_dtype)
    scale, vector, q = torch.randn(n, generator=g), torch.randn(d, generator=g), torch.randn(v, generator=g)
    onto = torch.randn(v, d, generator=g) if base else None
    rows = dense.double() @ w.double() + scale.double()[:, None] * vector
    columns = dense.double().T @ x.double() + q.double()[:, None] * vector
    if base:
        columns += 0.5 * onto
    rounding = 2.5e-3 if out_dtype == torch.bfloat16 else 1e-6
    for module in (backends.load("cpu"), backends.load("torch")):
        got = module.rows_product(entries, w, scale, vector, out_dtype)
        assert got.dtype == out_dtype and relative(got, rows) < rounding
        got = module.columns_product(entries, x, q, vector, onto, 0.5, out_dtype)
        assert got.dtype == out_dtype and relative(got, columns) < rounding
        assert relative(module.weighted_sum(w, q), q.double() @ w.double()) < 1e-6


def check_slices(matrix_dtype, out_dtype):
    """Sums of columns in slices of D, vectors and single numbers, whatever the output's address; with a base or not."""
    n, v, d = 21, 40, 300
    g = torch.Generator().manual_seed(0)
    dense = torch.where(torch.rand(n, v, generator=g) < 0.3, torch.randn(n, v, generator=g), 0)
    dense[:, 7] = 0
    at = dense.nonzero()
    offsets = torch.zeros(n + 1, dtype=torch.int64)
    offsets[1:] = (dense != 0).sum(1).cumsum(0)
    x, scale, vector = torch.randn(n, d, generator=g).to(matrix_dtype), torch.randn(v), torch.randn(d)
    base = torch.randn(v, d, generator=g)
    truth = dense.double().T @ x.double() + scale.double()[:, None] * vector
    for shift, onto in ((0, None), (0, base), (1, None), (3, base)):
        buffer = torch.full((v * d + 8,), torch.nan, dtype=out_dtype)
        out = buffer[shift : shift + v * d].view(v, d)
        torch.ops.fused_losses.columns_product(
            offsets, at[:, 1].int(), dense[dense != 0], x, scale, vector, onto, -0.5, out
        )  # fmt: skip
        expected = truth if onto is None else truth - 0.5 * onto
        assert relative(out, expected) < (2.5e-3 if out_dtype == torch.bfloat16 else 1e-6)
        assert buffer[:shift].isnan().all() and buffer[shift + v * d :].isnan().all()


def check_large_columns():
    """A result whose pages the system is asked for before it is written, wherever it begins."""
    n, v, d = 5, 33_000, 260
    g = torch.Generator().manual_seed(0)
    columns = torch.randint(v, (n, 40), generator=g).sort(1).values
    offsets = torch.arange(n + 1) * 40
    values, x = torch.randn(n * 40, generator=g), torch.randn(n, d, generator=g)
    scale, vector = torch.randn(v, generator=g), torch.randn(d, generator=g)
    truth = scale.double()[:, None] * vector
    truth.index_put_(
        (columns.flatten(),), values.double()[:, None] * x.double().repeat_interleave(40, 0), accumulate=True
    )
    assert 4 * v * d > 32 << 20  # FRESH_BYTES of csrc/cpu/kernels.h
    for shift in (0, 3):
        buffer = torch.full((v * d + 8,), torch.nan)
        out = buffer[shift : shift + v * d].view(v, d)
        torch.ops.fused_losses.columns_product(
            offsets, columns.flatten().int(), values, x, scale, vector, None, 0.0, out
        )  # fmt: skip
        assert relative(out, truth) < 1e-6
        assert buffer[:shift].isnan().all() and buffer[shift + v * d :].isnan().all()


def check_rounding_of_bf16():
    """To nearest, ties to even; NaN stays NaN."""
    x = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.0e38, torch.nan, torch.inf] * 4])
    offsets = torch.tensor([0, 1])
    one = Segments(offsets, torch.tensor([0], dtype=torch.int32), torch.ones(1))
    got = backends.load("cpu").rows_product(one, x, torch.zeros(1), torch.zeros(24), torch.bfloat16)
    torch.testing.assert_close(got, x.bfloat16(), rtol=0, atol=0, equal_nan=True)

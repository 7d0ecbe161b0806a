"""The CUDA kernels, run on a CPU by tests/support/cuda_shim, against float64: `entry_logits` and `attention`.

Their build by nvcc is tested in test_nvcc.py.
"""

from __future__ import annotations

import pytest
import torch
from cuda_operators import DTYPES, INF, check, entries_of, guarded, needs_compiler, normal, ops, twice
from oracles import Rows, segments_of
from torch import Tensor

from fused_losses.kernels.schemas import Row


@needs_compiler
@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 17, 64, 576, 2056])
@pytest.mark.parametrize("bias", [False, True])
def test_entry_logits(shim, dtype, d, bias):
    n, v = 3, 123
    hidden, weight = (x.to(DTYPES[dtype]) for x in (normal(n, d), normal(v, d) / d**0.5))
    b = normal(v).float() if bias else None
    labels = torch.tensor([0, v - 1, 7])
    offsets, columns = entries_of(n, v, [40, 0, 9], labels)
    if bias:
        b[columns[3]] = -INF
    t, at = segments_of(offsets), columns.long()
    truth = (hidden[t].double() * weight[at].double()).sum(1)
    if bias:
        truth = (truth + b[at]).clamp(min=-1e30)
    size = truth[truth > -1e29].norm()
    for offset in (0, 1):

        def call(new, offset=offset):
            out = new(len(columns))
            ops.entry_logits(guarded(hidden, offset), guarded(weight, offset), b, offsets, columns, out)
            return (out,)

        (out,) = twice(shim, call, offset)
        assert torch.equal(out == -1e30, truth == -1e30)
        error = (out.double() - truth)[truth > -1e29].norm() / size
        assert error < ENTRY_TOLERANCE, f"relative error {error:.2g}"


ENTRY_TOLERANCE = 4.5e-7  # 1.6e-7

ATTENTION_MODES = {
    "alone": (None, 1.0, 0.0, False),
    "alone-scaled-capped-bias": (None, 0.7, 4.0, True),
    "own-bias": ("own", 1.0, 0.0, True),
    "own-capped": ("own", -0.8, 5.0, False),
    "shared-bias": ("shared", 1.0, 0.0, True),
    "shared-negative": ("shared", -0.6, 0.0, False),
    "shared-capped-bias": ("shared", 1.2, 5.0, True),
}
ATTENTION_TOLERANCES = {
    "nll_values": 8e-7,  # 2.9e-7
    "KEPT": 2.3e-6,  # 7.8e-7
    "nll_rows": 3e-6,  # 1.1e-6
    "kl_values": 6.5e-5,  # 2.3e-5, here and below of differences of about 0.05
    "KEPT_GAP": 2.9e-5,  # 9.8e-6
    "KEPT_GAP_L1": 4.5e-5,  # 1.6e-5
    "KEPT_OF_TOTALS": 4e-5,  # 1.4e-5
    "kl_rows": 6.5e-5,  # 2.3e-5
}
TOTALS_OFFSET = 0.03


def attention_truth(rows: Rows, known: Tensor, weight: Tensor, t: Tensor, at: Tensor) -> dict[str, Tensor]:
    """What `attention` writes where entry i is token t[i]'s at column at[i]."""
    n, v = rows.z.shape

    def summed(values: Tensor) -> Tensor:
        return values.new_zeros(n).index_add(0, t, values)

    def product(values: Tensor) -> Tensor:
        return values.new_zeros(n, v).index_put((t, at), values) @ weight

    values = rows.d_nll[t, at]
    sloped = (rows.p * rows.slope * (1 - rows.one_hot))[t, at]
    truth = {"nll_values": values, "KEPT": summed(sloped), "nll_rows": product(values)}
    if rows.r_raw is None:
        return truth

    def gap(*shifts: Row) -> Tensor:
        # A shift is a number given, so the truth takes it as it was rounded.
        x = rows.z - rows.r - sum(known[shift].double()[:, None] for shift in shifts)
        return torch.where(rows.p_ref > 0, rows.p_ref * torch.expm1(x) * rows.slope, 0)[t, at]

    kl, of_totals = gap(Row.SHIFT, Row.MISSED), gap(Row.SHIFT)
    return truth | {
        "kl_values": kl, "KEPT_GAP": summed(kl), "KEPT_GAP_L1": summed(kl.abs()),
        "KEPT_OF_TOTALS": summed(of_totals.abs()), "kl_rows": product(kl),
    }  # fmt: skip


def attention_case(mode: str, dtype: torch.dtype, n: int, d: int, v: int, counts: list[int]):
    """Arguments of `attention` and the truth from the same rounded numbers."""
    kind, scale, softcap, with_bias = ATTENTION_MODES[mode]
    hidden, weight = (x.to(dtype) for x in (normal(n, d), normal(v, d) * 2 / d**0.5))
    bias = normal(v).float() if with_bias else None
    difference = (normal(n, d) * 0.05).to(dtype) if kind == "shared" else None
    labels = torch.randint(v, (n,))
    labels[0], labels[-1] = 0, v - 1
    offsets, columns = entries_of(n, v, counts, labels)
    t, at = segments_of(offsets), columns.long()
    if with_bias and len(at) > 2:
        banned = at[(at != labels[t])][:1]
        banned = banned[~torch.isin(banned, labels)]
        bias[banned] = -INF
    product = hidden.double() @ weight.double().T
    if bias is not None:
        product = product + bias.double()
    if kind == "shared":
        rows = Rows(difference.double() @ weight.double().T, product, True, labels, scale, softcap)
    else:
        r = None
        if kind == "own":
            r = (Rows(product, None, False, labels, scale, softcap).z + normal(n, v) * 0.05).float()
        rows = Rows(product, r, False, labels, scale, softcap)
    known = torch.full_like(rows.known, float("nan"))  # what a kernel must not read
    given = [Row.TOP, Row.LOG_SUM]
    if kind is not None:
        given += [Row.REF_TOP, Row.REF_LOG_SUM, Row.SHIFT, Row.MISSED]
    known[given] = rows.known[given]
    known[Row.SHIFT] += TOTALS_OFFSET
    known[Row.MISSED] -= TOTALS_OFFSET
    known = known.float()
    truth = attention_truth(rows, known, weight.double(), t, at)
    arguments = {
        "hidden": hidden, "difference": difference, "entry_reference": r[t, at] if kind == "own" else None,
        "weight": weight, "bias": bias, "labels": labels, "offsets": offsets, "columns": columns, "rows": known,
        "nll": rows.nll.float(), "scale": scale, "softcap": softcap,
    }  # fmt: skip
    return arguments, truth


def attention(shim, arguments, offset=0, rows_dtype=torch.float32, want=(True, True), **setting):
    hidden, columns = arguments["hidden"], arguments["columns"]
    n, d = hidden.shape
    reference = arguments["difference"] is not None or arguments["entry_reference"] is not None
    placed = {
        k: guarded(x, offset) if isinstance(x, Tensor) and x.is_floating_point() and k != "rows" else x
        for k, x in arguments.items()
    }
    keys: list[str] = []

    def call(new):
        out = {"nll_values": new(len(columns)), "kept": new(4, n)}
        if want[0]:
            out["nll_rows"] = new(n, d, dtype=rows_dtype)
        if reference:
            out["kl_values"] = new(len(columns))
            if want[1]:
                out["kl_rows"] = new(n, d, dtype=rows_dtype)
        rows = out.get("nll_rows"), out.get("kl_rows")
        ops.attention(*placed.values(), out["nll_values"], out.get("kl_values"), out["kept"], *rows)
        keys.extend(out)
        return list(out.values())

    values = twice(shim, call, offset, **setting)
    results = dict(zip(keys, values, strict=False))
    kept = results.pop("kept")
    assert reference or (kept[1:] == 0).all()
    return results | dict(zip(("KEPT", "KEPT_GAP", "KEPT_GAP_L1", "KEPT_OF_TOTALS"), kept, strict=True))


# Rows of no whole word of 16 bytes, of some words of a warp, and of more than 1,024 elements, where blocks are larger.
@needs_compiler
@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 17, 64, 576, 1032, 2048])
@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_attention(shim, mode, d, dtype):
    arguments, truth = attention_case(mode, DTYPES[dtype], 4, d, 123, [30, 1, 0, 17])
    check(attention(shim, arguments), truth, ATTENTION_TOLERANCES)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["alone", "own-capped", "shared-bias"])
def test_attention_unaligned(shim, mode, dtype):
    arguments, truth = attention_case(mode, DTYPES[dtype], 3, 64, 33, [20, 5])
    check(attention(shim, arguments, offset=1), truth, ATTENTION_TOLERANCES)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8192, 8200])
def test_attention_at_the_largest_sizes(shim, d, dtype):
    arguments, truth = attention_case("shared-bias", DTYPES[dtype], 1, d, 33, [7])
    check(attention(shim, arguments), truth, ATTENTION_TOLERANCES)


@needs_compiler
@pytest.mark.parametrize("v", [2, 33, 507, 4097])
@pytest.mark.parametrize("mode", ["alone", "own-bias", "shared-capped-bias"])
def test_attention_of_many_entries(shim, mode, v):
    arguments, truth = attention_case(mode, torch.bfloat16, 2, 64, v, [v, 3])
    check(attention(shim, arguments), truth, ATTENTION_TOLERANCES)


@needs_compiler
@pytest.mark.parametrize("mode", ["alone", "shared-bias"])
@pytest.mark.parametrize("d", [17, 64])
def test_attention_of_a_row_that_no_entry_names(shim, mode, d):
    """0 times what is infinite is no 0; lanes beyond the last entry have column 0."""
    arguments, truth = attention_case(mode, torch.float32, 3, d, 33, [5, 3])
    weight, bias = arguments["weight"], arguments["bias"]
    arguments["weight"] = torch.cat([torch.full_like(weight[:1], INF), weight])
    arguments["bias"] = None if bias is None else torch.cat([bias[:1], bias])
    arguments["labels"], arguments["columns"] = arguments["labels"] + 1, arguments["columns"] + 1
    check(attention(shim, arguments), truth, ATTENTION_TOLERANCES)


@needs_compiler
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("d", [17, 64])
def test_attention_rows_are_rounded_once(shim, dtype, d):
    arguments, _ = attention_case("own-bias", DTYPES[dtype], 3, d, 33, [20, 5])
    whole = attention(shim, arguments)
    rounded = attention(shim, arguments, rows_dtype=DTYPES[dtype])
    for name in ("nll_rows", "kl_rows"):
        assert torch.equal(rounded[name], whole[name].to(DTYPES[dtype]))


@needs_compiler
@pytest.mark.parametrize("d", [17, 64])
def test_attention_without_rows(shim, d):
    arguments, _ = attention_case("shared-bias", torch.bfloat16, 3, d, 33, [20, 5])
    whole = attention(shim, arguments)
    for want in ((False, False), (True, False), (False, True)):
        some = attention(shim, arguments, want=want)
        assert all(torch.equal(x, whole[name]) for name, x in some.items())

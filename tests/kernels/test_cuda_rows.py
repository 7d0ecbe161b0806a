"""The CUDA kernels, run on a CPU by tests/support/cuda_shim, against float64: `row_statistics`.

Their build by nvcc is tested in test_nvcc.py.
"""

from __future__ import annotations

import pytest
import torch
from cases import relative
from cuda_operators import INF, check, guarded, needs_compiler, normal, ops, twice
from oracles import Rows
from torch import Tensor

from fused_losses.kernels.schemas import Row


def row_statistics(shim, z, r, labels, difference=False, options=(1.0, 0.0, 1.0, 0.0), offset=0, **setting):
    n = len(labels)
    z, r = guarded(z, offset), None if r is None else guarded(r, offset)

    def call(new):
        names = ["nll", "entropy", *(["kl", "reference_nll", "reference_entropy"] if r is not None else [])]
        out = {name: new(n) for name in names} | {"prediction": new(n, dtype=torch.int64)}
        rows = new(9, n)
        scale, softcap, reference_scale, reference_softcap = options
        ops.row_statistics(
            z, r, difference, labels, scale, softcap, reference_scale, reference_softcap, out["nll"], out["prediction"],
            out.get("kl"), out["entropy"], out.get("reference_nll"), out.get("reference_entropy"), rows,
        )  # fmt: skip
        keys.extend(out)
        return [*out.values(), rows]

    keys: list[str] = []
    *values, rows = twice(shim, call, **setting)
    return dict(zip(keys, values, strict=False)) | {row.name: rows[row] for row in Row}


def truth_of(rows: Rows) -> dict[str, Tensor]:
    """What `row_statistics` writes of them."""
    names = ["nll", "entropy", "prediction"]
    known = [Row.TOP, Row.LOG_SUM, Row.REST]
    if rows.r_raw is not None:
        names += ["kl", "reference_nll", "reference_entropy"]
        known = list(Row)
    return {name: getattr(rows, name) for name in names} | {row.name: rows.known[row] for row in known}


ROW_MODES = {
    "alone": (None, (1.0, 0.0, 1.0, 0.0)),
    "alone-scaled-capped": (None, (-0.7, 5.0, 1.0, 0.0)),
    "own": ("own", (1.0, 0.0, 0.9, 0.0)),
    "own-capped": ("own", (0.8, 6.0, -1.0, 4.0)),
    "shared": ("shared", (-0.5, 0.0, 1.0, 0.0)),
    "shared-capped": ("shared", (0.5, 5.0, 1.0, 0.0)),
}
# Relative L2 errors; behind each what was measured, the largest over all cases below.
ROW_TOLERANCES = {
    "nll": 3e-7,  # 1.0e-7
    "entropy": 1e-6,  # 3.8e-7
    "TOP": 5e-7,  # 1.9e-7
    "LOG_SUM": 7e-7,  # 2.6e-7
    "REST": 9e-7,  # 3.1e-7
    "reference_nll": 5e-7,  # 1.7e-7
    "reference_entropy": 1e-6,  # 4.1e-7
    "kl": 2.4e-4,  # 8.2e-5, of one token and 2 ids; 3.3e-6 else
    "REF_TOP": 2e-7,  # 6.8e-8
    "REF_LOG_SUM": 1.5e-6,  # 5.1e-7
    "SHIFT": 3.7e-7,  # 1.3e-7
    "MISSED": 3.7e-7,
    "GAP": 2.2e-4,  # 7.5e-5; a shift of 10⁻³ is a difference of numbers near 8
    "GAP_L1": 2.2e-4,  # 7.5e-5
}


def row_case(mode: str, n: int, v: int):
    kind, options = ROW_MODES[mode]
    z = normal(n, v, spread=2.0)
    labels = torch.randint(v, (n,))
    labels[0], labels[-1] = 0, v - 1
    if n > 2:
        z[1, labels[1]] += 30 * (1 if options[0] > 0 else -1)  # an almost certain label
        z[2, (labels[2] + 1) % v] += 30 * (1 if options[0] > 0 else -1)  # and an almost certain other id
    r = None
    if kind == "shared":
        r, z = z, normal(n, v, spread=0.05)
    elif kind == "own":
        r = z + normal(n, v, spread=0.05)
        r[-1] = normal(v, spread=2.0)  # far from the reference
    if options[0] > 0 and options[2] > 0 and v > 2:
        (z if r is None or kind == "own" else r)[:, 1] = -INF
        if r is not None:
            r[:, 1] = -INF
        labels[labels == 1] = 0
    return z.float(), None if r is None else r.float(), labels, kind == "shared", options


# Fewer ids than a block's 512 threads, as many, and several rounds of them; a multiple of a load's 4 ids and not.
@needs_compiler
@pytest.mark.pairwise
@pytest.mark.parametrize("v", [2, 33, 123, 507, 512, 4097, 4100])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("mode", ROW_MODES)
def test_row_statistics(shim, mode, n, v):
    z, r, labels, difference, options = row_case(mode, n, v)
    truth = truth_of(Rows(z, r, difference, labels, *options))
    for offset in (0, 1):
        check(row_statistics(shim, z, r, labels, difference, options, offset), truth, ROW_TOLERANCES)


@needs_compiler
@pytest.mark.parametrize("blocks, limit", [(1, 40_000), (2, 20_000), (4, 10_000), (8, 6_000)])
@pytest.mark.parametrize("mode", ["own", "own-capped", "shared", "shared-capped"])
@pytest.mark.parametrize("v", [4096, 4097])
def test_row_statistics_in_clusters(shim, mode, v, blocks, limit):
    """A row held in the shared memory of 1 to 8 blocks, also where the last ones have less of it."""
    z, r, labels, difference, options = row_case(mode, 3, v)
    truth = truth_of(Rows(z, r, difference, labels, *options))
    check(row_statistics(shim, z, r, labels, difference, options, cluster_limit=limit), truth, ROW_TOLERANCES)


@needs_compiler
@pytest.mark.parametrize("v", [2, 3, 5, 17])
def test_row_statistics_in_clusters_with_idle_blocks(shim, v):
    z, r, labels, difference, options = row_case("own", 3, v)
    truth = truth_of(Rows(z, r, difference, labels, *options))
    check(row_statistics(shim, z, r, labels, difference, options, cluster_limit=970), truth, ROW_TOLERANCES)


@needs_compiler
@pytest.mark.parametrize("n, clusters", [(2, True), (3, False)])
def test_long_rows_take_clusters_only_where_there_are_few(shim, n, clusters):
    """More than two blocks a multiprocessor can hold, and more or less than one row for two of the shim's 4."""
    z, r, labels, difference, options = row_case("own", n, 102_500)
    truth = truth_of(Rows(z, r, difference, labels, *options))
    check(row_statistics(shim, z, r, labels, difference, options, cluster_limit=227 << 10), truth, ROW_TOLERANCES)
    assert shim.launched() == ("row_cluster_kernel" if clusters else "row_kernel")


@needs_compiler
def test_row_statistics_of_one_id(shim):
    z = torch.tensor([[3.0], [-2.0]])
    out = row_statistics(shim, z, z + 1, torch.zeros(2, dtype=torch.int64))
    for name in ("nll", "entropy", "kl", "reference_nll", "LOG_SUM", "REST", "GAP_L1"):
        assert (out[name] == 0).all(), name
    assert (out["SHIFT"] == -1).all()


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("where", ["label", "other", "everywhere"])
@pytest.mark.parametrize("v", [5, 600])
@pytest.mark.parametrize("reference", [False, True])
def test_row_statistics_of_what_is_not_finite(shim, bad, where, v, reference):
    z = normal(3, v).float()
    r = z.clone() if reference else None
    labels = torch.tensor([0, v - 1, 2])
    if where == "label":
        z[1, v - 1] = bad
    elif where == "other":
        z[1, 1] = bad
    else:
        z[1] = bad
    for limit in (0, 40_000):
        out = row_statistics(shim, z, r, labels, cluster_limit=limit)
        assert out["nll"][1].isnan() and out["entropy"][1].isnan() and 0 <= out["prediction"][1] < v
        assert out["nll"][[0, 2]].isfinite().all()
        if reference:
            assert out["kl"][1].isnan() and out["reference_nll"].isfinite().all()


@needs_compiler
def test_row_statistics_keep_tiny_and_offset_numbers(shim):
    """nll of an almost certain label, a KL of 10⁻⁸, and an offset common to all logits."""
    r = torch.zeros(2, 512)
    r[0, 3] = 60.0
    r[1] = torch.arange(512) % 7 * 0.25 + 2.0**8
    labels = torch.tensor([3, 5])
    difference = normal(2, 512, spread=1e-4).float()
    out = row_statistics(shim, difference, r, labels, True)
    truth = truth_of(Rows(difference, r, True, labels))
    assert relative(out["reference_nll"][:1], truth["reference_nll"][:1]) < 5e-7
    assert relative(out["reference_nll"][1:], truth["reference_nll"][1:]) < 5e-7
    for name in ("kl", "GAP_L1"):
        assert relative(out[name][1:], truth[name][1:]) < 1e-3, name


@needs_compiler
def test_row_statistics_ties_take_the_lowest_id(shim):
    z = torch.zeros(3, 2050)
    z[1, [700, 1300, 2049]] = 1.0
    z[2, [5, 6]] = 1.0
    labels = torch.tensor([9, 1300, 6])
    for limit in (0, 40_000, 10_000):
        assert row_statistics(shim, z, z, labels, cluster_limit=limit)["prediction"].tolist() == [0, 700, 5]

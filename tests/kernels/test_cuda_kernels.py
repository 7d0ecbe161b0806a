"""The CUDA kernels, run on a CPU by tests/support/cuda_shim, against float64; their build by nvcc is tested in test_build.py.

Every operator runs twice, the second time with blocks, warps and lanes in reverse order: results must have equal bits. Outputs start as
NaN and lie between margins that must stay as they are; floating-point inputs lie between NaN.
"""

from __future__ import annotations

import math
import shutil
import sys

import pytest
import torch
from torch import Tensor

from fused_losses.kernels import build, schemas

ops = torch.ops.fused_losses
MARGIN = 64
INF = float("inf")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="no g++ to compile the kernels for a CPU with"
)


class Outputs:
    """Tensors poisoned with NaN (integers: −77), in one buffer each with margins; `offset` breaks their alignment."""

    def __init__(self, offset: int = 0) -> None:
        self.buffers: list[tuple[Tensor, int]] = []
        self.offset = offset

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = math.prod(shape)
        buffer = torch.full((size + 2 * MARGIN + self.offset,), poison(dtype), dtype=dtype)
        self.buffers.append((buffer, size))
        start = MARGIN + self.offset
        return buffer[start : start + size].view(shape)

    def check_margins(self) -> None:
        for buffer, size in self.buffers:
            start = MARGIN + self.offset
            for margin in (buffer[:start], buffer[start + size :]):
                expected = torch.full_like(margin, poison(buffer.dtype))
                assert torch.equal(margin.view(torch.uint8), expected.view(torch.uint8)), "written beyond the end"


def poison(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else -77


def guarded(x: Tensor, offset: int = 0) -> Tensor:
    """The same between NaN."""
    buffer = torch.full((x.numel() + 2 * MARGIN + offset,), float("nan"), dtype=x.dtype)
    view = buffer[MARGIN + offset : MARGIN + offset + x.numel()].view(x.shape)
    return view.copy_(x)


def twice(shim, call, offset: int = 0, **setting):
    """`call(outputs)` returns tensors; once forwards, once backwards."""
    results = []
    for backwards in (False, True):
        outputs = Outputs(offset)
        with shim.setting(backwards=backwards, **setting):
            results.append(call(outputs))
        outputs.check_margins()
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
    return results[0]


def relative(value: Tensor, truth: Tensor) -> float:
    value, truth = value.double(), truth.double()
    assert value.isfinite().all(), "not finite"
    return ((value - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def normal(*shape: int, spread: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * spread


def cap_of(x: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(x / softcap) if softcap else x


def slope_of(z: Tensor, softcap: float) -> Tensor:
    return 1 - (z / softcap) ** 2 if softcap else torch.ones_like(z)


# ---- The shim itself


@needs_compiler
def test_shim_finds_mistakes(shim):
    message, out = shim.mistake(0)
    assert message == "" and out == [sum(range(64)) + 1] * 64
    for number, word in ((1, "__syncthreads"), (2, "__shfl_xor_sync"), (3, "__syncwarp"), (4, "aligned")):
        assert word in shim.mistake(number)[0]


# ---- row_statistics


def finished(z, r, difference, scale, softcap, reference_scale, reference_softcap):
    """Logits of both and their difference, float64."""
    z = z.double()
    if r is None:
        return cap_of(scale * z.clamp(min=-1e30), softcap), None, None
    r = r.double().clamp(min=-1e30)
    if difference:
        reference = cap_of(scale * r, softcap)
        if not softcap:
            return reference + scale * z, reference, scale * z
        logits = cap_of(scale * (z + r), softcap)
    else:
        reference = cap_of(reference_scale * r, reference_softcap)
        logits = cap_of(scale * z.clamp(min=-1e30), softcap)
    return logits, reference, logits - reference


def distribution(z: Tensor, labels: Tensor):
    """nll, prediction, entropy, top, log_sum, p of logits, float64."""
    rows = torch.arange(len(z))
    others = z.clone()
    others[rows, labels] = -INF
    delta = others.logsumexp(1) - z[rows, labels] if z.shape[1] > 1 else torch.full((len(z),), -INF, dtype=z.dtype)
    nll = torch.nn.functional.softplus(delta, threshold=50)
    top, prediction = z.max(1)
    log_sum = z.logsumexp(1) - top
    log_p = z - top[:, None] - log_sum[:, None]
    p = log_p.exp()
    return nll, prediction, -(p * log_p).sum(1), top, log_sum, p


def row_truth(z, r, labels, difference, scale, softcap, reference_scale, reference_softcap):
    logits, reference, d = finished(z, r, difference, scale, softcap, reference_scale, reference_softcap)
    rows = torch.arange(len(z))
    nll, prediction, entropy, top, log_sum, p = distribution(logits, labels)
    slope = slope_of(logits, softcap)
    others = (p * slope).clone()
    others[rows, labels] = 0
    truth = {"nll": nll, "prediction": prediction, "entropy": entropy}
    truth |= {"TOP": top, "LOG_SUM": log_sum, "REST": others.sum(1)}
    if r is not None:
        ref_nll, _, ref_entropy, ref_top, ref_log_sum, p_ref = distribution(reference, labels)
        shift = (top - ref_top) + (log_sum - ref_log_sum)
        x = d - shift[:, None]
        gap = torch.where(x.abs() < 1, p_ref * torch.expm1(x), p - p_ref)
        excess = torch.where(x.abs() < 1, p_ref * (torch.expm1(x) - x), gap - torch.where(p_ref > 0, p_ref * x, 0))
        truth |= {
            "reference_nll": ref_nll, "reference_entropy": ref_entropy, "kl": excess.sum(1),
            "REF_TOP": ref_top, "REF_LOG_SUM": ref_log_sum, "SHIFT": shift, "GAP": (gap * slope).sum(1),
            "GAP_L1": (gap * slope).abs().sum(1), "TOTALS_SHIFT": shift,
        }  # fmt: skip
    return truth


ROW_NAMES = ("TOP", "LOG_SUM", "REF_TOP", "REF_LOG_SUM", "SHIFT", "REST", "GAP", "GAP_L1", "TOTALS_SHIFT")


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
    return dict(zip(keys, values, strict=False)) | dict(zip(ROW_NAMES, rows, strict=True))


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
    "TOTALS_SHIFT": 3.7e-7,
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


def check(results: dict[str, Tensor], truth: dict[str, Tensor], tolerances: dict[str, float]) -> None:
    assert results.keys() >= truth.keys()
    for name, expected in truth.items():
        if expected.dtype == torch.int64:
            assert torch.equal(results[name], expected), name
            continue
        # Sums in which terms cancel are measured against the sum of absolute values, differences against what they are of.
        size = truth[SIZE_OF.get(name, name)].norm().clamp(min=1e-30)
        if "SHIFT" in name:
            size = torch.hypot(truth["TOP"], truth["LOG_SUM"]).norm()
        error = ((results[name].double() - expected).norm() / size).item()
        assert math.isfinite(error), f"{name} is not finite"
        assert error <= tolerances[name], f"{name}: relative error {error:.2g}"


SIZE_OF = {"GAP": "GAP_L1", "KEPT_GAP": "KEPT_GAP_L1"}


@needs_compiler
@pytest.mark.pairwise
@pytest.mark.parametrize("v", [2, 33, 123, 507, 512, 4097, 4100])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("mode", ROW_MODES)
def test_row_statistics(shim, mode, n, v):
    z, r, labels, difference, options = row_case(mode, n, v)
    truth = row_truth(z, r, labels, difference, *options)
    for offset in (0, 1):
        check(row_statistics(shim, z, r, labels, difference, options, offset), truth, ROW_TOLERANCES)


@needs_compiler
@pytest.mark.parametrize("blocks, limit", [(1, 40_000), (2, 20_000), (4, 10_000), (8, 6_000)])
@pytest.mark.parametrize("mode", ["own", "own-capped", "shared", "shared-capped"])
@pytest.mark.parametrize("v", [4096, 4097])
def test_row_statistics_in_clusters(shim, mode, v, blocks, limit):
    """A row held in the shared memory of 1 to 8 blocks, also where the last ones have less of it."""
    z, r, labels, difference, options = row_case(mode, 3, v)
    truth = row_truth(z, r, labels, difference, *options)
    check(row_statistics(shim, z, r, labels, difference, options, cluster_limit=limit), truth, ROW_TOLERANCES)


@needs_compiler
@pytest.mark.parametrize("v", [2, 3, 5, 17])
def test_row_statistics_in_clusters_with_idle_blocks(shim, v):
    z, r, labels, difference, options = row_case("own", 3, v)
    truth = row_truth(z, r, labels, difference, *options)
    check(row_statistics(shim, z, r, labels, difference, options, cluster_limit=970), truth, ROW_TOLERANCES)


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
    truth = row_truth(difference, r, labels, True, 1.0, 0.0, 1.0, 0.0)
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


# ---- count_bits and columns_of_bits


def packed_bits(kept: Tensor, words: int) -> Tensor:
    n, v = kept.shape
    padded = torch.zeros(n, 32 * words, dtype=torch.int64)
    padded[:, :v] = kept
    numbers = (padded.view(n, words, 32) << torch.arange(32)).sum(2)
    return torch.where(numbers >= 2**31, numbers - 2**32, numbers).to(torch.int32)


@needs_compiler
@pytest.mark.parametrize("v", [2, 33, 123, 507, 4097, 70_001])
@pytest.mark.parametrize("extra", [0, 1, 3])
def test_bits(shim, v, extra):
    n = 5
    kept = torch.rand(n, v) < torch.tensor([0.0, 0.01, 0.2, 0.2, 0.9])[:, None]
    labels = torch.randint(v, (n,))
    labels[0], labels[1], labels[2] = v - 1, 0, min(v, 32) - 1  # the first and the last bit of a word
    kept[0], kept[2, labels[2]] = False, False
    words = -(-v // 32) + extra
    bits = packed_bits(kept, words)
    kept[torch.arange(n), labels] = True
    expected = kept.sum(1)
    capacity = int(expected[3])  # a row of just as many, and one of more
    expected[expected > capacity] = -1

    def count(new):
        counts = new(n, dtype=torch.int64)
        ops.count_bits(bits, labels, capacity, counts)
        return (counts,)

    (counts,) = twice(shim, count)
    assert torch.equal(counts, expected)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.clamp(min=0).cumsum(0)])

    def fill(new):
        columns = new(int(offsets[-1]), dtype=torch.int32)
        ops.columns_of_bits(bits, labels, offsets, columns)
        return (columns,)

    (columns,) = twice(shim, fill)
    expected_columns = [kept[t].nonzero().flatten() for t in range(n) if counts[t] >= 0]
    assert torch.equal(columns.long(), torch.cat(expected_columns or [torch.empty(0, dtype=torch.int64)]))


# ---- entry_logits and attention


def entries_of(n: int, v: int, counts: list[int], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets and ascending columns, the label's among them; a count of 0 leaves the token without."""
    rows = []
    for t in range(n):
        count = min(counts[t % len(counts)], v)
        columns = torch.randperm(v)[:count]
        if count and labels[t] not in columns:
            columns[0] = labels[t]
        rows.append(columns.sort().values)
    lengths = torch.tensor([0, *map(len, rows)])
    return lengths.cumsum(0), torch.cat(rows).to(torch.int32)


def segments_of(offsets: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())


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
        product = (product + bias.double()).clamp(min=-1e30)
    d_logits = reference = None
    logits = cap_of(scale * product, softcap)
    if kind == "shared":
        d_logits = scale * (difference.double() @ weight.double().T)
        reference, logits = logits, cap_of(scale * product + d_logits, softcap)
        if softcap:
            d_logits = logits - reference
    elif kind == "own":
        reference = (logits + normal(n, v) * 0.05).float().double()
        d_logits = logits - reference
    tokens = torch.arange(n)
    nll, _, _, top, log_sum, p = distribution(logits, labels)
    slope = slope_of(logits, softcap)
    rows = torch.full((9, n), float("nan"), dtype=torch.float64)
    rows[0], rows[1] = top, log_sum
    direction = p.clone()
    direction[tokens, labels] = torch.expm1(-nll)
    sloped = (p * slope)[t, at]
    truth = {"nll_values": (direction * slope)[t, at]}
    zero = torch.zeros(n, dtype=torch.float64)
    truth["KEPT"] = zero.index_add(0, t, torch.where(at == labels[t], 0, sloped))
    dense = torch.zeros(n, v, dtype=torch.float64)
    dense[t, at] = truth["nll_values"]
    truth["nll_rows"] = dense @ weight.double()
    if kind is not None:
        _, _, _, ref_top, ref_log_sum, p_ref = distribution(reference, labels)
        shift = (top - ref_top) + (log_sum - ref_log_sum)
        rows[2], rows[3], rows[4], rows[8] = ref_top, ref_log_sum, shift, shift + TOTALS_OFFSET
        rows = rows.float()
        # The shift is a number given, so the truth takes it as it was rounded; so do the totals.
        gap, other = (
            torch.where(p_ref > 0, p_ref * torch.expm1(d_logits - rows[row].double()[:, None]) * slope, 0)[t, at]
            for row in (4, 8)
        )
        truth["kl_values"] = gap
        truth["KEPT_GAP"] = zero.index_add(0, t, gap)
        truth["KEPT_GAP_L1"] = zero.index_add(0, t, gap.abs())
        truth["KEPT_OF_TOTALS"] = zero.index_add(0, t, other.abs())
        dense = torch.zeros(n, v, dtype=torch.float64)
        dense[t, at] = gap
        truth["kl_rows"] = dense @ weight.double()
    arguments = {
        "hidden": hidden, "difference": difference, "entry_reference": reference[t, at].float() if kind == "own" else None,
        "weight": weight, "bias": bias, "labels": labels, "offsets": offsets, "columns": columns, "rows": rows.float(),
        "nll": nll.float(), "scale": scale, "softcap": softcap,
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


# ---- segment_product


def segment_case(matrix_dtype, i, d, m, lengths, base):
    counts = torch.tensor([lengths[k % len(lengths)] for k in range(i)])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    total = int(offsets[-1])
    columns = torch.randint(m, (total,), dtype=torch.int32)
    values, matrix = normal(total).float(), normal(m, d).to(matrix_dtype)
    scale, vector = normal(i).float(), normal(d).float()
    b = normal(i, d).float() if base else None
    hot = (counts > schemas.SPLIT).nonzero().flatten()
    slots = -(-counts[hot] // schemas.SPLIT)
    hot_first = torch.cat([torch.zeros(1, dtype=torch.int64), slots.cumsum(0)])
    truth = scale.double()[:, None] * vector.double()
    truth.index_add_(0, segments_of(offsets), values.double()[:, None] * matrix[columns.long()].double())
    if base:
        truth += 0.3 * b.double()
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


def test_numbers_that_stand_twice():
    """SPLIT, the rows' names and the interface, in schemas.py and in csrc/cuda."""
    header, registration = ((build.sources() / name).read_text() for name in ("kernels.h", "ops.cpp"))
    assert f"SPLIT = {schemas.SPLIT};" in header
    names = header.partition("enum Row {")[2].partition("}")[0].split(", ")
    assert [name.strip() for name in names[:-1]] == [row.name for row in schemas.Row]
    assert f"interface_op() {{ return {schemas.CUDA_INTERFACE}; }}" in registration

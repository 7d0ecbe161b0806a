"""Logits in float16 beside scan="int8", and the other kernels that came with them."""

import math
import os
import subprocess
import sys

import half_logits
import int8_products
import pytest
import torch
from cases import coarse, make, name, relative, run_with_report
from half_logits import KINDS, OPS
from processes import pythonpath
from sparse_checks import needs_kernels

import fused_losses as fl
from fused_losses.backends import half
from fused_losses.kernels import schemas
from fused_losses.sparse import softmax, weighted

pytestmark = [needs_kernels]
FLOATS = [torch.float32, torch.bfloat16]
if schemas.load() is None and not OPS.has_half_logits():
    pytestmark.append(pytest.mark.skip(reason="neither AVX2 nor AVX-512"))


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("shape", half_logits.SHAPES, ids=name)
def test_logits(dtype, shape):
    half_logits.check_logits(dtype, *shape)


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("head", [dict(), dict(bias=True), dict(scale=0.3), dict(bias=True, scale=1.7)], ids=name)
@pytest.mark.parametrize("v", [203, 128, 1, 3000], ids=str)
def test_statistics_and_entries(dtype, head, v):
    half_logits.check_compacted(dtype=dtype, v=v, **head)


@pytest.mark.parametrize("n", [1, 2, 3, 5], ids=str)
def test_rows_that_go_together(n):
    half_logits.check_compacted(n=n, v=700, width=32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, width, v", [(1, 16, 700), (11, 32, 433), (8, 48, 128), (5, 64, 17)], ids=str)
def test_directions(kind, n, width, v):
    half_logits.check_compacted(n=n, v=v, width=width, kind=kind)


@pytest.mark.parametrize("off", [0.0, 0.2], ids=str)
def test_logits_that_are_off(off):
    half_logits.check_compacted(n=30, v=2000, off=off, spread=6.0)


def test_without_directions_and_entropy():
    whole, less = half_logits.compacted(v=900), half_logits.compacted(v=900, width=0, entropy=False)
    for part in ("nll", "prediction", "lse", "tail", "nll_l1", "counts", "z"):
        assert torch.equal(getattr(whole, part), getattr(less, part)), part
    assert less.entropy.isnan().all() and less.square.isnan().all()


def test_more_entries_than_the_capacity():
    whole = half_logits.compacted(n=40, v=900, spread=2.0)
    few = half_logits.compacted(n=40, v=900, spread=2.0, capacity=int(whole.counts.median()))
    over = whole.counts > whole.counts.median()
    assert over.any() and not over.all()
    assert torch.equal(few.counts == -1, over) and torch.equal(few.counts[~over], whole.counts[~over])
    assert torch.equal(few.nll, whole.nll)
    profile = torch.zeros(900)
    OPS.half_tail_profile(few.z, few.label_logits, few.lse, few.counts, over.nonzero().flatten(), 0, profile)
    assert not profile.any()


def test_flat_rows():
    """Nothing stands out: the label alone is exact, and the largest logit, as it is, the prediction."""
    found = half_logits.compacted(n=20, v=5000, spread=0.01, threshold=1e-2, off=0.01)
    label = torch.nn.functional.one_hot(found.case.labels, 5000).bool()
    rough = torch.where(label, found.case.exact()[0], found.before)
    torch.testing.assert_close(found.nll.double(), rough.logsumexp(1) - rough[label], rtol=0, atol=1.3e-6)
    assert torch.equal(found.counts, torch.ones_like(found.counts))
    assert torch.equal(rough[torch.arange(20), found.prediction], rough.amax(1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_not_finite(value):
    """A hidden state that is none has no statistics, and others have theirs."""
    case = int8_products.Rough(n=6, v=300)
    hidden = case.hidden.clone()
    hidden[2, 3] = value
    expected = fl.token_losses(case.hidden, case.weight, case.labels, backend="cpu", scan="int8").nll
    found = fl.token_losses(hidden, case.weight, case.labels, backend="cpu", scan="int8")
    rest = torch.arange(6) != 2
    assert found.nll[2].isnan() and torch.allclose(found.nll[rest], expected[rest], rtol=0, atol=3.7e-5)


def test_a_label_that_is_ruled_out():
    """By a bias of −∞: its logit is −1e30, and the others keep their accuracy."""
    case = int8_products.Rough(n=8, v=400)
    bias = torch.zeros(400)
    bias[case.labels[3]] = -torch.inf
    others = (case.labels != case.labels[3]).nonzero().flatten()
    got = fl.token_losses(case.hidden, fl.LMHead(case.weight, bias=bias), case.labels, backend="cpu", scan="int8")
    truth = fl.token_losses(
        case.hidden.double(), fl.LMHead(case.weight.double(), bias=bias.double()), case.labels, backend="reference"
    )
    assert got.nll[3] == torch.inf and torch.allclose(got.nll[others].double(), truth.nll[others], rtol=0, atol=1e-4)
    assert torch.equal(got.prediction, truth.prediction)


@pytest.mark.parametrize(
    "options, there",
    [
        (dict(), True), (dict(bias=True, scale=0.3), True), (dict(softcap=7.0), False), (dict(scale=-0.3), False),
        (dict(rank=3), False), (dict(reference="shared"), False), (dict(wide=True), False), (dict(topk=True), False),
    ],
    ids=str,
)  # fmt: skip
def test_where_logits_are_halves(options, there, monkeypatch):
    case = make(
        130, 64, 1500, spread=4.0, bias=options.get("bias", False), scale=options.get("scale", 1.0),
        softcap=options.get("softcap"), reference=options.get("reference"),
    )  # fmt: skip
    if options.get("wide"):
        case.hidden[7, 3] = 2000.0
    hidden, head, reference = case.inputs(torch.float32)
    if options.get("rank"):
        head = fl.LMHead(head.weight, low_rank=fl.LowRank(torch.randn(1500, 3), torch.randn(3, 64)))
    seen, plain = [], half.scan
    monkeypatch.setattr(half, "scan", lambda *given: seen.append(1) or plain(*given))
    if options.get("topk"):
        fl.EAFTLoss(gradient="sparse", backend="cpu", scan="int8")(hidden, head, case.labels)
    else:
        with torch.no_grad():
            fl.token_losses(hidden, head, case.labels, reference=reference, backend="cpu", scan="int8")
    assert bool(seen) == there


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_as_logits_in_float32(dtype, monkeypatch):
    """The same values and gradients to what rounding to float16 changes."""
    case = make(300, 64, 3000, spread=4.0, ignored=7).rounded(dtype)
    results = []
    for there in (True, False):
        monkeypatch.setattr(half, "is_possible", lambda problem, none_wide, there=there: there)
        with coarse(1e-3, chunk_bytes=1):
            results.append(run_with_report(case, dtype, "cpu", "sparse", scan="int8"))
    (halves, report), (singles, other) = results
    assert report.scan == other.scan == "int8" and report.exact_tokens == other.exact_tokens
    limits = dict(nll=2e-5, lse=2e-5, d_hidden=3e-3, d_weight=3e-3)
    for what, limit in limits.items():
        assert relative(halves[what], singles[what]) < limit, what


@pytest.mark.parametrize("simd", ["avx2"])
def test_other_instruction_sets(simd):
    code = "import half_logits; half_logits.check_all()"
    environment = {**os.environ, "FUSED_LOSSES_SIMD": simd, "PYTHONPATH": pythonpath()}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("shared", [False, True], ids=["own-scales", "shared-channels"])
def test_what_rounding_loses_of_the_mean_is_given_back(dtype, shared):
    """A row that all of the head has in common makes no error that all logits of a token have in common."""
    hidden, weight, _, channel = int8_products.operands(9, 70, 300, dtype)
    common = 40 * torch.randn(70, generator=torch.Generator().manual_seed(1))
    weight = (weight + common).to(dtype)
    channel = channel if shared else None
    mean = weight.float().mean(0) * (1 if channel is None else channel)
    truth = hidden.double() @ weight.double().t()
    plain, mended = (int8_products.product(hidden, weight, None, channel, 0, m).double() for m in (None, mean))
    inverse = None if channel is None else channel.reciprocal()
    q, scale = int8_products.quantised(hidden, inverse)
    scaled = hidden.double() if inverse is None else hidden.double() * inverse.double()
    lost = (scaled - q * scale[:, None]) @ mean.double()
    torch.testing.assert_close(mended, plain + lost[:, None], rtol=0, atol=1.3e-4)
    before, after = ((found - truth).mean(1).abs().mean() for found in (plain, mended))
    assert after < before / 5  # measured 9 to 17


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize("n", [1, 8, 13])
def test_few_products_beside_the_head(dtype, kept, n):
    hidden, weight, bias, _ = int8_products.operands(n, 70, 300, dtype)
    out = torch.full((n, 300), torch.nan)
    alone = int8_products.head_of(weight, None, kept)
    found = [torch.empty_like(part) for part in alone]
    scales = torch.full((300,), torch.nan)
    OPS.int8_head(weight, None, *found, hidden.float(), bias, out, scales)
    assert torch.equal(scales, int8_products.head_of(weight, None, 3)[1][:300])
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
    torch.testing.assert_close(out.double(), hidden.double() @ weight.double().t() + bias, rtol=0, atol=1.7e-5)


@pytest.mark.parametrize("kind", ["usual", "nothing", "not finite", "tiny"])
def test_entries_times_their_rows(kind, monkeypatch):
    """What PyTorch's own operations give, the stored numbers to the bit."""
    g = torch.Generator().manual_seed(2)
    counts = torch.tensor([0, 1, 17, 33, 0, 128, 5])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    values = torch.randn(int(counts.sum()), generator=g) * {"tiny": 1e-37, "nothing": 0.0}.get(kind, 1.0)
    if kind == "not finite":
        values[3], values[30], values[60] = torch.nan, torch.inf, -torch.inf
    factor = torch.randn(len(counts), generator=g)
    results = []
    for there in (True, False):
        if not there:
            monkeypatch.setattr(schemas, "takes_entries", lambda values: False)
        stored, scale, (l1, l2) = weighted._halved(offsets, values)
        back = softmax.weighted(counts, stored, None, scale, None)
        results.append((stored, scale, l1, l2, back, softmax.weighted(counts, values, None, factor, None)))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1.2e-4, atol=0, equal_nan=True)  # norms of what is rounded: 4e-5
    assert torch.equal(results[0][0].nan_to_num(0), results[1][0].nan_to_num(0))

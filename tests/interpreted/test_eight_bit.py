"""The scan with operands of 8 bits in Triton's interpreter: beside the same quantised numbers in float64, with exact
logits where a bit is set."""

from __future__ import annotations

import math

import pytest
import scan_truth
import torch
from cases import HEADS, make, name, relative
from scan_truth import logits, logits_of_8_bits

import fused_losses as fl
from fused_losses import backends
from fused_losses.backends import gpu_int8, gpu_scan, int8
from fused_losses.kernels.triton.scan import UNIT, Known, Left, Sum
from fused_losses.problem import Int8, Problem
from fused_losses.sparse import softmax
from fused_losses.sparse.spectrum import directions_of

pytestmark = pytest.mark.usefixtures("small_chunks")
INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def no_channels(monkeypatch):
    """What is compared is made without factors of channels."""
    monkeypatch.setattr(gpu_int8, "channel_of", lambda problem: None)


def problem_of(shape=(9, 17, 130), dtype=torch.float32, **options) -> Problem:
    case = make(*shape, ignored=0, **options).rounded(dtype)
    return scan_truth.problem_of(case, dtype, int8=Int8())


def in_8_bits(problem: Problem, dtype: torch.dtype) -> gpu_int8.Eight:
    x, w = (gpu_int8.rows_of(m, None, dtype) for m in (problem.hidden, problem.head.weight))
    return gpu_int8.Eight(gpu_scan.INTERPRETED_TILE, *x, *w)


def scan(problem: Problem, threshold: float = 5e-3, capacity: int = 1 << 20, directed: bool = True):
    return scan_truth.swept(problem, "triton", threshold, capacity, directed)


@pytest.mark.parametrize("with_factor", [False, True])
@pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=name)
def test_rows_in_8_bits(dtype, with_factor):
    matrix = torch.randn(9, 37) * torch.logspace(-6, 6, 9)[:, None]
    matrix[3] = 0
    factor = torch.rand(37) + 0.5 if with_factor else None
    out, scale = gpu_int8.rows_of(matrix, factor, dtype)
    scaled = matrix if factor is None else matrix * factor
    expected = (scaled.abs().amax(1) / (127 if dtype == INT8 else 448)).clamp(min=1e-37)
    torch.testing.assert_close(scale, expected, rtol=2e-7, atol=0)
    numbers = scaled / scale[:, None]
    if dtype == INT8:
        assert torch.equal(out[:, :37].float(), numbers.round())
    else:
        numbers = numbers.to(dtype).float()
        carried = numbers.abs().log2() % 1 == 0  # Triton's interpreter halves what it rounds up to a power of two
        assert torch.equal(out[:, :37].float()[~carried], numbers[~carried])
    assert out.shape == (9, 48) and not out[:, 37:].float().any()


def test_a_row_that_is_not_finite_has_the_scale_nan():
    matrix = torch.ones(3, 5)
    matrix[1, 2], matrix[2, 4] = float("nan"), float("-inf")
    assert gpu_int8.rows_of(matrix, None, INT8)[1].isfinite().tolist() == [True, False, False]


# Limits here are three times what was measured.
@pytest.mark.pairwise
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=name)
def test_sums_are_those_of_the_quantised_numbers_without_a_bit(head, directed, dtype):
    problem = problem_of(**head)
    n, v = 9, 130
    eight = in_8_bits(problem, dtype)
    z = logits_of_8_bits(problem, eight)
    known = torch.zeros(3, n)
    known[Known.BOUND] = z.quantile(0.9, dim=1)
    rows = directions_of(problem.head.weight).rows if directed else None
    bits = torch.zeros(16, 192 // 32, dtype=torch.int32)
    found = gpu_scan.Operands(problem, eight.tile, rows, eight).run(slice(0, n), known, bits, v)
    kept = ((bits[:n, :, None] >> torch.arange(32)) & 1).reshape(n, -1)[:, :v] != 0
    assert torch.equal(kept, z > known[Known.BOUND].double()[:, None])

    z = z.masked_fill(kept, -torch.inf).scatter(1, problem.labels[:, None], -torch.inf)
    top, moved = gpu_scan._moved(found.partial[:, Sum.TOP])
    assert relative(top, z.amax(1)) <= 3.3e-7
    total = (found.partial[:, Sum.SUM] * moved).sum(0)
    assert relative(total, (z - z.amax(1, keepdim=True)).exp().sum(1)) <= 8.4e-7
    if directed:
        slope = 1.0 if problem.head.softcap is None else 1 - (z.clamp(min=-100) / problem.head.softcap) ** 2
        left = (z - known[Known.BOUND].double()[:, None]).exp() * slope
        assert relative(found.left.sum(0)[Left.SUM], left.sum(1)) <= 2e-7
        assert relative(found.left.sum(0)[Left.SQUARE], left.square().sum(1)) <= 4.8e-7
        assert relative(found.low.sum(0)[0] / UNIT.value, left @ rows.double()) <= 6.3e-7


@pytest.mark.each_value
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("directed", [False, True])
def test_what_is_kept_counts_with_its_exact_logits(head, directed):
    problem = problem_of(**head)
    out, found, kept = scan(problem, directed=directed)
    assert problem.int8.value_error is not None and problem.int8.note is None
    z = logits(problem)
    z = torch.where(kept, z, logits_of_8_bits(problem, in_8_bits(problem, INT8)))
    lse, at = z.logsumexp(1), torch.arange(9)
    p = (z - lse[:, None]).exp()
    assert (out.nll - (lse - z[at, problem.labels])).abs().max() <= 1.9e-6
    assert (out.lse - lse).abs().max() <= 1.3e-6
    assert relative(out.entropy, (p * (lse[:, None] - z)).sum(1)) <= 3.3e-7
    assert torch.equal(out.prediction, z.argmax(1))
    slope = torch.ones_like(z) if problem.head.softcap is None else 1 - (z / problem.head.softcap) ** 2
    values = p * slope
    values[at, problem.labels] -= slope[at, problem.labels]
    assert relative(torch.cat([c.nll_values for c in found]), values[kept]) <= 5e-7
    left = torch.cat([c.tails.nll_left for c in found])
    assert relative(left, (p * slope).masked_fill(kept, 0).sum(1)) <= 3e-6


def test_values_without_gradients(monkeypatch):
    monkeypatch.setattr(int8, "THRESHOLD", 0.05)
    problem = problem_of((10, 16, 130))
    out = backends.load("triton").statistics(problem)[0]
    exact = logits(problem)
    truth = exact.logsumexp(1) - exact.gather(1, problem.labels[:, None])[:, 0]
    assert 1e-5 <= (out.nll - truth).abs().mean() <= 2 * problem.int8.value_error <= 2.4e-3  # 0.0006, 0.0008


def test_tokens_with_too_many_entries_have_values_of_full_products():
    problem = problem_of()
    problem.hidden[:4] *= 0.01  # flat
    out, found, _ = scan(problem, threshold=5e-3, capacity=40)
    full = torch.cat([c.counts for c in found]) < 0
    assert full[:4].all() and not full.all()
    z = logits(problem)
    truth = z.logsumexp(1) - z.gather(1, problem.labels[:, None])[:, 0]
    assert (out.nll - truth)[full].abs().max() <= 1.3e-6


def test_channels_share_what_one_of_them_has_too_much_of(monkeypatch):
    monkeypatch.setattr(gpu_int8, "channel_of", int8.channel_of)
    problem = problem_of()
    problem.hidden[:, 3] *= 1e4
    problem.head.weight[:, 3] *= 1e-4
    scan(problem, threshold=0.05)
    assert problem.int8.value_error < gpu_int8.MOST_ERROR and problem.int8.note is None


@pytest.mark.parametrize("reference", [False, True])
def test_the_option_reaches_it(reference):
    problem = problem_of((9, 16, 130) if reference else (24, 16, 300), torch.float16)
    x, w = problem.hidden.clone().requires_grad_(), problem.head.weight
    given = fl.Reference(problem.hidden) if reference else None
    out = fl.token_losses(x, w, problem.labels, reference=given, gradient="sparse", scan="int8", backend="triton")
    out.nll.sum().backward()
    report = out.gradient_report
    assert (report.scan, report.value_error is None) == (("full", True) if reference else ("int8", False))
    assert ("without a reference" in (report.scan_note or "")) == reference
    assert x.grad.isfinite().all()


def test_a_call_that_has_no_scan_is_as_with_full_products(monkeypatch):
    """Also in how fine its entries are, and in the tokens of its profile."""
    monkeypatch.setattr(softmax, "FEWEST_TOKENS", 1)
    problem, found = problem_of((16, 16, 150), torch.float16), {}
    for scan in ("int8", "full"):
        x, w = problem.hidden.clone().requires_grad_(), problem.head.weight.clone().requires_grad_()
        loss = fl.EAFTLoss(gradient="sparse", tolerance=0.9, scan=scan, backend="triton")
        loss(x, w, problem.labels).backward()
        found[scan] = x.grad, w.grad, loss.gradient_report
    (*got, report), (*expected, full) = found["int8"], found["full"]
    assert report.scan == "full" and "has no scan" in report.scan_note and full.scan_note is None
    assert report.entries == full.entries and all(map(torch.equal, got, expected))


@pytest.mark.parametrize("seen", ["in the numbers", "where measured"])
def test_an_error_that_is_too_large_turns_to_full_products(seen, monkeypatch):
    problem = problem_of()
    problem.hidden[:, 3] *= 1e4
    problem.head.weight[:, 3] *= 1e-4
    if seen == "where measured":
        monkeypatch.setattr(int8, "MOST_SPREAD", math.inf)
    out, *_ = scan(problem, threshold=0.05)
    z = logits(problem)
    if seen == "where measured":
        assert problem.int8.value_error > gpu_int8.MOST_ERROR and "nats on average" in problem.int8.note
    else:
        assert problem.int8.value_error is None
        assert problem.int8.note == "8 bits are too few for 9 of 9 hidden states"
    assert (out.nll - (z.logsumexp(1) - z.gather(1, problem.labels[:, None])[:, 0])).abs().max() <= 1.6e-6


@pytest.mark.parametrize("count", [1, 5])
def test_rows_of_the_head_that_8_bits_are_too_few_for(count, monkeypatch):
    """A number much larger than their others; tokens are not what is told by here. The call takes full products."""
    problem = problem_of()
    problem.head.weight[7 : 7 + count, 2] = 1e3
    monkeypatch.setattr(gpu_int8, "too_wide", lambda *_: torch.empty(0, dtype=torch.int64))
    out, *_ = scan(problem, threshold=0.05)
    z = logits(problem)
    assert problem.int8.value_error is None
    assert problem.int8.note == f"8 bits are too few for {count} of {z.shape[1]} rows of the head"
    truth = z.logsumexp(1) - z.gather(1, problem.labels[:, None])[:, 0]
    assert (out.nll - truth).abs().max() <= 2e-6 * truth.abs().max()


def test_a_token_of_nan_stays_the_only_one():
    problem = problem_of()
    problem.hidden[5] = float("nan")
    out, *_ = scan(problem)
    assert out.nll.isfinite().tolist() == [token != 5 for token in range(9)]


def test_half_precision():
    problem = problem_of((9, 16, 130), torch.float16)
    out, _, kept = scan(problem)
    z = torch.where(kept, logits(problem), logits_of_8_bits(problem, in_8_bits(problem, INT8)))
    assert (out.lse - z.logsumexp(1)).abs().max() <= 2e-6

"""The error of sparse gradients is never above its certificate, and that never above the tolerance."""

import math
from dataclasses import replace
from unittest import mock

import grids
import pytest
import torch
from cases import coarse, make, relative, run, run_with_report
from hypothesis import given, settings
from sparse_checks import BACKENDS, CERTIFICATE, V, check_certificate, logits_of

import fused_losses as fl
from fused_losses import reference as oracle
from fused_losses.sparse import certificate, gradients, softmax


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=grids.examples(60, 150), deadline=None, derandomize=True)
@given(**CERTIFICATE)
def test_true_error_is_within_the_certificate_and_that_within_the_tolerance(backend, **options):
    check_certificate(backend, **options)


def test_certificate_is_not_idle():
    """On adversarial tails the error reaches a good part of the certificate."""
    x = logits_of("adversarial", 24, torch.Generator())
    hidden = x.clone().requires_grad_()
    labels = torch.full((24,), 5)
    with coarse(2e-3), mock.patch.object(softmax, "directions_of", lambda *_: None):
        out = fl.token_losses(hidden, torch.eye(V, dtype=torch.float64), labels, gradient="sparse", tolerance=0.5)
        out.nll.sum().backward()
    exact = x.softmax(1) - torch.nn.functional.one_hot(labels, V)
    error = ((hidden.grad - exact).abs().sum() / exact.abs().sum()).item()
    assert out.gradient_report.exact_tokens == 0
    assert 0.7 * out.gradient_report.bound < error <= out.gradient_report.bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_heavy_tokens_are_exact(backend):
    g = torch.Generator().manual_seed(0)
    x = torch.cat([logits_of("one-hot", 60, g), logits_of("flat", 4, g)])
    hidden = x.float().requires_grad_()
    weight = torch.eye(V, requires_grad=True)
    labels = torch.randint(V, (64,), generator=g)
    with coarse(1e-2, tolerance=0.01):
        out = fl.token_losses(hidden, weight, labels, gradient="sparse", tolerance=0.01, backend=backend)
    assert out.gradient_report.bound is None and "after backward" in str(out.gradient_report)
    out.nll.sum().backward()
    report = out.gradient_report
    assert report.exact_tokens == 4 and report.bound <= 0.01 and report.tokens == 64
    exact = x.softmax(1) - torch.nn.functional.one_hot(labels, V)
    assert relative(hidden.grad[60:], exact[60:]) < 1e-6
    assert relative(weight.grad, exact.T @ x) < 6.5e-8  # measured 2.2e-8


def test_rank_one_tail_is_worth_having():
    """Tails that resemble each other, as word frequencies make them: dropping them costs several times the error."""
    case = make(200, 32, 3000, spread=2.0, ignored=0)
    case = replace(
        case, bias=-1.2 * torch.arange(1, 3001).double().log(), weight=case.weight + 0.5, hidden=case.hidden + 0.5
    )
    case = replace(case, nll_upstream=torch.ones(200, dtype=torch.float64))
    truth = run(case, torch.float64, "reference")

    def without_profile(self, finish=softmax.Builder.finish):
        sparse = finish(self)
        sparse.profile.zero_()
        return sparse

    with coarse(5e-4):
        ours = run(case, torch.float64, gradient="sparse", tolerance=0.9)
        with mock.patch.object(softmax.Builder, "finish", without_profile):
            dropped = run(case, torch.float64, gradient="sparse", tolerance=0.9)
    figures = {
        k: (relative(ours[k], truth[k]), relative(dropped[k], truth[k])) for k in ("d_hidden", "d_weight", "d_bias")
    }
    print("with the rank-one tail, and without:", figures)
    assert all(with_tail < without / 2 for with_tail, without in figures.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", ["nll", "kl", "both", "opposite"])
def test_rounding_of_kept_entries_is_in_the_certificate(backend, weights):
    """With a KL and upstream weights that come late an entry is two float16 numbers.

    Here nothing is left out but their rounding.
    """
    g = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(30, V, generator=g)
    ref = x + 0.01 * torch.randn(30, V, generator=g)
    labels = x.argmax(1)
    a, b = {"nll": (1, 0), "kl": (0, 1), "both": (0.3, 1), "opposite": (1, -1)}[weights]
    found = {}
    for finest in (softmax.FINEST_HALF, 1.0):
        hidden = x.clone().requires_grad_()
        with coarse(1e-6), mock.patch.object(softmax, "FINEST_HALF", finest):
            out = fl.token_losses(
                hidden, torch.eye(V), labels, reference=fl.Reference(ref), gradient="sparse", backend=backend
            )
        (a * out.nll + b * out.kl).sum().backward()
        found[finest] = hidden.grad, out.gradient_report
    (halved, report), (single, report_single) = found.values()
    error = ((halved - single).abs().sum() / single.abs().sum()).item()
    assert report.exact_tokens == report_single.exact_tokens == 0 and report.entries > 29 * V
    assert report.saved_bytes < report_single.saved_bytes - 3.9 * report.entries
    assert report_single.bound < 1e-6 and 5e-5 < error < report.bound < 6e-4  # measured 1.8e-4 and 5e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("summed", [False, True], ids=["per-token", "summed"])
def test_entries_are_float16(backend, summed):
    """4 bytes each, with the column; what that rounds is in all three bounds. Weights of very different size have a
    scale of their own."""
    case = make(300, 32, 3000, ignored=0, spread=4.0)
    case = replace(case, nll_upstream=10.0 ** torch.linspace(-12, 3, 300, dtype=torch.float64))
    truth = run(case, torch.float64, "reference")
    found = {}
    for finest in (softmax.FINEST_HALF, 1.0):
        with coarse(1e-6), mock.patch.multiple(softmax, FINEST_HALF=finest, FEWEST_TOKENS=1):
            hidden, head, _ = case.inputs(torch.float32)
            if summed:
                loss = fl.WeightedLoss(gradient="sparse", backend=backend)
                loss(hidden, head, case.labels, weights=case.nll_upstream.float(), num_items=1).backward()
                report = loss.gradient_report
            else:
                out = fl.token_losses(hidden, head, case.labels, gradient="sparse", backend=backend)
                (out.nll * case.nll_upstream).sum().backward()
                report = out.gradient_report
        found[finest] = hidden.grad, head.weight.grad, report
    (dx, dw, report), (_, _, single) = found.values()
    assert report.saved_bytes < single.saved_bytes - 1.9 * report.entries
    rows = (dx - truth["d_hidden"]).norm(dim=1) / truth["d_hidden"].norm(dim=1)
    assert rows.max() < 6e-4  # measured 4e-4; float16 rounds by 2.4e-4 at most
    assert relative(dx, truth["d_hidden"]) < report.hidden_bound < 6e-4  # measured 9e-5 and 3e-4
    assert relative(dw, truth["d_weight"]) < report.weight_bound < 9e-4  # measured 1e-4 and 4e-4
    assert single.bound < report.bound and single.hidden_bound < report.hidden_bound
    assert single.weight_bound < report.weight_bound


@pytest.mark.parametrize("halves", [1, 2])
def test_what_sparse_gradients_get_wrong_without_directions(halves):
    """Two halves of the vocabulary that no token mixes and one direction of the head tells apart.

    One profile serves neither, and dx is off by more than the bound, which is one of the logits' gradient.
    """
    n, d, v = 64, 12, 4000
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(v, d, generator=g) / d**0.5
    weight[:, 0] = -(1.0 + torch.arange(v) % (v // 2)).log()
    weight[:, 1] = torch.where(torch.arange(v) < v // 2, 20.0, -20.0)
    hidden = 2.5 * torch.randn(n, d, generator=g)
    hidden[:, 0], hidden[:, 1] = 1.2, 0.5
    if halves == 2:
        hidden[n // 2 :, 1] *= -1
    weight.requires_grad_()
    low_rank = fl.LowRank(torch.zeros(v, 2, requires_grad=True), torch.randn(2, d, generator=g))
    labels = torch.multinomial((hidden @ weight.detach().T).softmax(1), 1, generator=g)[:, 0]
    tolerance = 0.1 / certificate.L1_SHARE
    loss = fl.TALRLoss(temperature=2.0, tolerance=tolerance)
    with coarse(5e-4, tolerance=tolerance), mock.patch.object(softmax, "directions_of", lambda *_: None):
        found = loss.sparse_errors(hidden, fl.LMHead(weight, low_rank=low_rank), labels, num_items=7)
        sparse = fl.TALRLoss(temperature=2.0, gradient="sparse", tolerance=tolerance)
        x = hidden.clone().requires_grad_()
        sparse(x, fl.LMHead(weight, low_rank=low_rank), labels).backward()
    y = hidden.clone().requires_grad_()
    fl.TALRLoss(temperature=2.0, gradient="exact")(y, fl.LMHead(weight, low_rank=low_rank), labels).backward()
    assert set(found) == {"hidden", "weight", "low_rank.b"}
    assert found["hidden"] == pytest.approx(relative(x.grad, y.grad), rel=6e-6)  # AVX2: 2.2e-6
    assert sparse.gradient_report.bound < 0.1
    assert found["hidden"] > 0.3 if halves == 2 else 0 < found["hidden"] < 0.03  # measured 0.75 and 0.0105
    assert 0 < found["weight"] < 0.017 and loss.gradient_report is None and loss.gradient == "auto"


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_certified_where_something_is_not_finite(backend):
    case = make(20, 6, 300, ignored=0)
    hidden, head, _ = case.inputs(torch.float32)
    with torch.no_grad():
        hidden[7] = torch.nan
    out = fl.token_losses(hidden, head, case.labels, gradient="sparse", backend=backend)
    out.nll.sum().backward()
    assert math.isnan(out.gradient_report.bound)


def test_finer_tolerance_gets_finer_entries():
    loose, fine = (certificate.parameters(t, 128256) for t in (0.15, 0.03))
    assert fine[0] < loose[0] and fine[1] > loose[1]
    assert certificate.parameters(0.9, 128256) == loose
    assert certificate.parameters(0.15, 100)[1] == 100
    assert certificate.parameters(1e-300, 128256)[1] == 128256 // 8


def test_oracle_of_the_certificate_tests_is_what_it_says():
    """With the identity as head, dx is p − onehot."""
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    oracle.nll(x @ torch.eye(7, dtype=torch.float64), torch.tensor([1, 2, 3])).sum().backward()
    torch.testing.assert_close(x.grad, x.detach().softmax(1) - torch.nn.functional.one_hot(torch.tensor([1, 2, 3]), 7))


@pytest.mark.parametrize("vocabulary", [100, 2**30], ids=["int32", "int64"])
def test_single_logits_are_merged_with_keys_of_either_size(vocabulary):
    """Rows and ids together make numbers of 32 bits, or where they do not fit of 64."""
    from fused_losses.sparse.weighted import _with_single

    offsets, columns = torch.tensor([0, 2, 2, 5]), torch.tensor([3, 7, 0, 7, 99], dtype=torch.int32)
    single = torch.tensor([[7, 5], [4, 4], [99, -1]]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]])
    starts, at, values, outside = _with_single(offsets, columns, torch.ones(5), single, vocabulary)
    assert starts.tolist() == [0, 3, 4, 7] and at.tolist() == [3, 5, 7, 4, 0, 7, 99]
    assert values.tolist() == [1, 2, 2, 7, 1, 1, 6] and outside.tolist() == [2, 7, 0]


def test_all_tokens_are_exact_after_the_last_attempt():
    """Where every attempt fails to keep the bound of dx: here there is but the last one."""
    case = make(64, 64, 900, ignored=0, spread=3.0, frozen=True)
    with coarse(2e-2, tolerance=0.1), mock.patch.multiple(gradients, ATTEMPTS=0, L1_SHARE=1e9):
        got, report = run_with_report(case, torch.float32, "auto", "sparse", tolerance=0.1)
    assert report.exact_tokens == 64 and report.hidden_bound == 0
    assert relative(got["d_hidden"], run(case, torch.float64, "reference")["d_hidden"]) < 1e-6


def test_the_threshold_falls_with_large_vocabularies_alone():
    """√V from the vocabulary on that it was chosen for; the tolerance and directions act beside that."""
    threshold = {v: certificate.parameters(0.1, v)[0] for v in (300, 49152, 4 * 49152, 262144)}
    assert threshold[300] == threshold[49152] == certificate.THRESHOLD
    assert threshold[4 * 49152] == certificate.THRESHOLD / 2 and threshold[262144] == pytest.approx(
        4.54663337e-5, rel=1e-8
    )
    finer, coarser = certificate.parameters(0.05, 4 * 49152)[0], certificate.parameters(0.1, 4 * 49152, True)[0]
    assert (finer, coarser) == (certificate.THRESHOLD / 8, certificate.THRESHOLD / 2 * certificate.COARSER)


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e2, 1e4], ids=str)
@pytest.mark.parametrize("reference", [None, "base", "other adapter", "none to train"])
@pytest.mark.parametrize("kind", ["random", "what tells tails apart"])
def test_of_an_adapter_on_the_head_the_gradient_that_goes_through_it_is_counted(backend, size, reference, kind):
    """However B A is divided between B and A."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    n, d, v, r = 200, 16, 3000, 2
    weight, b, a, hidden = 0.6 * normal(v, d), normal(v, r) / size, normal(r, d) * size / d**0.5, normal(n, d)
    if kind != "random":
        half = torch.arange(v).double() % 2 * 2 - 1
        weight[:, 0], b, a = half, torch.stack([30 * half, 0 * half], 1) / size, torch.zeros(r, d, dtype=torch.float64)
        a[0, 0], hidden[:, 0] = size, 0.2 * (torch.arange(n) % 2 * 2.0 - 1)
    low_rank, given, truth = fl.LowRank(b, a), None, hidden.clone().requires_grad_()
    if reference == "none to train":
        low_rank = None
    z = truth @ (weight + (0 if low_rank is None else b @ a)).t()
    labels = z.detach().softmax(1).multinomial(1, generator=g)[:, 0]
    loss = torch.nn.functional.cross_entropy(z, labels)
    if reference:
        other = None if reference == "base" else fl.LowRank(b + 0.1 * normal(v, r) / size, a)
        given = fl.Reference(hidden + 0.1 * normal(n, d), fl.LMHead(weight, low_rank=other))
        product = 0 if other is None else other.b @ a
        log_r = (given.hidden @ (weight + product).t()).log_softmax(1)
        loss = (log_r.exp() * (log_r - z.log_softmax(1))).sum(1).mean()
    loss.backward()
    hidden.requires_grad_()
    with coarse(1e-3, tolerance=0.9):
        head = fl.LMHead(weight, low_rank=low_rank)
        out = fl.token_losses(
            hidden, head, labels, reference=given, gradient="sparse", tolerance=0.9, backend=backend
        )  # fmt: skip
        (out.kl if reference else out.nll).mean().backward()
    error = relative(hidden.grad, truth.grad)
    assert error <= out.gradient_report.hidden_bound + 1e-12 and out.gradient_report.hidden_bound <= 0.9
    assert out.gradient_report.exact_tokens < n or kind != "random"

"""Sparse-plus-rank-one gradients: exact where nothing is left out, and never further off than certified."""

import copy
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import grids
import pytest
import torch
from cases import HEADS, REFERENCES, coarse, errors, make, name, relative, run, run_with_report
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import fused_losses as fl
from fused_losses import backends
from fused_losses import reference as oracle
from fused_losses.kernels import schemas
from fused_losses.problem import Segments
from fused_losses.sparse import certificate, softmax

needs_kernels = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=str(backends.unavailable("cpu")))
BACKENDS = ["torch", pytest.param("cpu", marks=needs_kernels)]


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1, 2), (33, 18, 123), (130, 66, 507)], ids=lambda s: "N{}-D{}-V{}".format(*s))
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
def test_with_nothing_left_out_it_is_exact(backend, shape, head, reference, frozen):
    """A threshold of nearly 0: values, and gradients through the sparse products, equal the oracle."""
    case = make(*shape, **head, reference=reference, frozen=frozen)
    with coarse(1e-30, capacity=507, chunk_bytes=1):
        for output, error in errors(case, torch.float32, backend, gradient="sparse").items():
            assert error <= 1e-5, output


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
def test_with_no_room_for_error_every_token_is_exact(backend, head, reference, frozen):
    case = make(40, 18, 300, **head, reference=reference, frozen=frozen, ignored=0)
    with coarse(0.5, chunk_bytes=1):
        results = errors(case, torch.float32, backend, gradient="sparse", tolerance=1e-9)
        for output, error in results.items():
            assert error <= 1e-5, output


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
def test_a_token_of_as_many_entries_as_there_is_room_for_is_sparse(backend, reference):
    check_room(backend, reference)


def check_room(backend, reference):
    case = make(5, 8, 67, reference=reference, ignored=0)
    for capacity, exact in ((67, 0), (66, 5)):
        with coarse(1e-30, capacity=capacity), mock.patch("fused_losses.backends.gpu.CANDIDATES", 1):
            _, report = run_with_report(case, torch.float32, backend, "sparse")
        assert report.exact_tokens == exact and report.entries == (0 if exact else 5 * 67)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unlikely_labels_at_the_borders_of_words(backend):
    check_label_borders(backend)


def check_label_borders(backend):
    """The label is an entry however small its probability is, also as the first or last of 32 ids, 16 or 8."""
    case = make(12, 16, 100, ignored=0, spread=3.0)
    case.labels[:] = torch.tensor([0, 7, 8, 15, 16, 30, 31, 32, 63, 64, 95, 99])
    toward = case.weight[case.labels]
    case.hidden[:] -= toward * ((case.hidden * toward).sum(1, keepdim=True) + 9) / toward.square().sum(1, keepdim=True)
    with coarse(3e-2, tolerance=0.9):
        found, report = run_with_report(case, torch.float32, backend, "sparse", tolerance=0.9)
    assert report.exact_tokens == 0 and report.entries < 12 * 60
    assert relative(found["d_hidden"], run(case, torch.float64, "reference")["d_hidden"]) < 0.1


def test_float64_has_sparse_gradients_too():
    case = make(40, 18, 300, reference="own", bias=True)
    with coarse(1e-30):
        assert (
            max(errors(case, torch.float64, "cpu" if schemas.load() is None else "torch", gradient="sparse").values())
            < 1e-10
        )


# --- the certificate ---------------------------------------------------------------------------------------------------

V = 257
KINDS = ("flat", "one-hot", "two-point", "heavy-tailed", "random initialisation", "adversarial", "mixed")


def logits_of(kind: str, n: int, g: torch.Generator) -> torch.Tensor:
    """[n, V] float64."""
    if kind == "flat":
        return torch.zeros(n, V, dtype=torch.float64)
    noise = torch.randn(n, V, generator=g, dtype=torch.float64)
    if kind == "random initialisation":
        return 0.3 * noise
    if kind == "heavy-tailed":
        return (noise / torch.randn(n, V, generator=g, dtype=torch.float64).abs().clamp(min=0.05)).clamp(-30, 30)
    if kind == "one-hot":
        return noise.scatter(1, torch.randint(V, (n, 1), generator=g), 40.0)
    if kind == "two-point":
        return (
            noise
            - 30
            + 30 * torch.zeros(n, V, dtype=torch.float64).scatter(1, torch.randint(V, (n, 2), generator=g), 1)
        )
    if kind == "adversarial":
        # Each token's tail lies just below the threshold, on columns that no other token's tail touches.
        z = torch.full((n, V), -50.0, dtype=torch.float64)
        z[:, 0] = 0
        for t in range(n):
            z[t, 1 + torch.arange(t, V - 1, max(n, 2))] = -7.0
        return z
    rows = torch.arange(n) % (len(KINDS) - 1)
    return torch.stack([logits_of(KINDS[int(k)], 1, g)[0] for k in rows])


CERTIFICATE = dict(
    kind=st.sampled_from(KINDS), reference=st.sampled_from([None, "same kind", "near"]), frozen=st.booleans(),
    softcap=st.sampled_from([None, None, 6.0]), scale=st.sampled_from([1.0, 1.0, -0.5, 2.0]), n=st.integers(1, 40),
    tolerance=st.sampled_from([0.02, 0.15, 0.6]), threshold=st.sampled_from([1e-3, 4e-3, 2e-2]),
    capacity=st.sampled_from([8, 64, V]), decades=st.sampled_from([0, 3, 8]), seed=st.integers(0, 10**6),
    small_chunks=st.booleans(), summed=st.booleans(),
)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=grids.examples(60, 150), deadline=None, derandomize=True)
@given(**CERTIFICATE)
def test_true_error_is_within_the_certificate_and_that_within_the_tolerance(backend, **options):
    check_certificate(backend, **options)


def check_certificate(
    backend, kind, reference, frozen, softcap, scale, n, tolerance, threshold, capacity, decades, seed, small_chunks,
    summed,
):  # fmt: skip
    """The head is the identity, so dx is the gradient of the logits itself and its L1 error is what is certified."""
    g = torch.Generator().manual_seed(seed)
    x = logits_of(kind, n, g)
    ref = None
    if reference == "near":
        ref = x + 0.05 * torch.randn(n, V, generator=g, dtype=torch.float64)
    elif reference is not None:
        ref = logits_of(kind, n, g)
    labels = torch.where(torch.rand(n, generator=g) < 0.5, x.argmax(1), torch.randint(V, (n,), generator=g))
    upstream = [
        torch.randn(n, generator=g, dtype=torch.float64)
        * 10 ** (decades * (torch.rand(n, generator=g, dtype=torch.float64) - 0.5))
        * (torch.rand(n, generator=g) < 0.8)
        for _ in range(2)
    ]
    dtype = torch.float64 if backend == "torch" else torch.float32
    rounding = 1e-10 if backend == "torch" else 2e-5

    def gradient(dtype, **options):
        hidden = x.to(dtype, copy=True).requires_grad_()
        head = fl.LMHead(torch.eye(V, dtype=dtype, requires_grad=not frozen), None, scale, softcap)
        given = None if ref is None else fl.Reference(ref.to(dtype))
        a, b = (u.to(dtype) for u in upstream)
        if summed:

            class Weighted(fl.Objective):
                def token_loss(self, out, a, b):
                    return a * out.nll if out.kl is None else a * out.nll + b * out.kl

            objective = Weighted(**options)
            loss = objective(hidden, head, labels, reference=given, a=a, b=b)
            loss.backward()
            return hidden.grad.double() * n, head.weight.grad, objective.gradient_report
        out = fl.token_losses(hidden, head, labels, reference=given, **options)
        loss = (out.nll * a).sum() if ref is None else (out.nll * a + out.kl * b).sum()
        loss.backward()
        return hidden.grad.double(), head.weight.grad, out.gradient_report

    truth, truth_weight, _ = gradient(torch.float64, backend="reference")
    with coarse(threshold, capacity, 1 if small_chunks else None, tolerance):
        got, got_weight, report = gradient(dtype, backend=backend, gradient="sparse", tolerance=tolerance)
    assert report.mode == "sparse" and 0 <= report.bound <= tolerance
    error, norm = (got - truth).abs().sum(), truth.abs().sum()
    # Rounding, of which p − onehot and p − p_ref of nearly nothing are all made, in exact mode too.
    allowed = (report.bound + rounding) * norm + (1e-14 if dtype == torch.float64 else 1e-6) * sum(
        u.abs().sum() for u in upstream
    )
    assert error <= allowed
    if not frozen:
        # dW = dzᵀ x, so its largest error is at most that of dz times the largest x.
        worst = (got_weight.double() - truth_weight).abs().max() * (n if summed else 1)
        assert worst <= allowed * x.abs().max()


def test_certificate_is_not_idle():
    """On adversarial tails the error reaches a good part of the certificate."""
    x = logits_of("adversarial", 24, torch.Generator())
    hidden = x.clone().requires_grad_()
    labels = torch.full((24,), 5)
    with coarse(2e-3):
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
    """With a KL and upstream weights that come late an entry is two float16 numbers. Here nothing is left out but their rounding."""
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


# --- chunks computed densely in forward, and what else may happen ------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("summed", [False, True], ids=["per-token", "summed"])
def test_flat_chunks_between_peaked_ones(backend, reference, frozen, summed):
    check_flat_chunks(backend, (64, 40, 600), 64, reference, frozen, summed)


def check_flat_chunks(backend, shape, capacity, reference, frozen, summed):
    """16 tokens a chunk; the second is flat and one token of the third: all three ways in one call."""
    case = make(*shape, reference=reference, frozen=frozen, ignored=0, bias=True, spread=6.0)
    case.hidden[16:32] *= 0.01
    case.hidden[40] *= 0.01
    if reference == "shared":
        case.reference_hidden[:] = case.hidden + 0.1 * torch.randn_like(case.hidden)

    class Weighted(fl.Objective):
        def token_loss(self, out, **weights):
            return sum(w * v for w, v in zip(weights.values(), (out.nll, out.kl), strict=False))

    def gradients(dtype, **options):
        hidden, head, ref = case.inputs(dtype)
        weights = {"a": case.nll_upstream.to(dtype)}
        if reference is not None:
            weights["b"] = case.kl_upstream.to(dtype)
        if summed:
            objective = Weighted(**options)
            loss = objective(hidden, head, case.labels, reference=ref, **weights)
            loss.backward(torch.tensor(float(len(case.labels)), dtype=dtype))
            report = objective.gradient_report
        else:
            out = fl.token_losses(hidden, head, case.labels, reference=ref, **options)
            sum((w * v).sum() for w, v in zip(weights.values(), (out.nll, out.kl), strict=False)).backward()
            report = out.gradient_report
        return (hidden.grad, head.weight.grad, head.bias.grad), report

    truth, _ = gradients(torch.float64, backend="reference")
    with coarse(5e-3, capacity=capacity, chunk_bytes=1):
        got, report = gradients(torch.float32, backend=backend, gradient="sparse", tolerance=0.1)
    assert 17 <= report.exact_tokens < 40 and report.bound <= 0.1
    for value, expected in zip(got, truth, strict=True):
        if expected is not None:
            assert relative(value, expected) < 0.012  # measured 0.0042
    assert relative(got[0][16:32], truth[0][16:32]) < 1e-5 and relative(got[0][40], truth[0][40]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_logit_reaches_the_gradient_of_its_token_only(backend):
    case = make(20, 6, 300, ignored=0)
    hidden, head, _ = case.inputs(torch.float32)
    with torch.no_grad():
        hidden[7] = torch.inf
    out = fl.token_losses(hidden, head, case.labels, gradient="sparse", backend=backend)
    out.nll.sum().backward()
    bad = ~out.nll.isfinite()
    assert bad.nonzero().flatten().tolist() == [7]
    assert not hidden.grad[7].isfinite().all() and hidden.grad[~bad].isfinite().all()
    assert not head.weight.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_with_strides(backend):
    case = make(60, 12, 300, reference="own", ignored=0)
    truth = run(case, torch.float64, "reference")
    every_second = torch.stack([case.labels, torch.zeros_like(case.labels)], 1).flatten()[::2]
    hidden, head, ref = case.inputs(torch.float32)
    hidden = hidden.detach().T.contiguous().T.requires_grad_()
    weight = head.weight.detach().T.contiguous().T.requires_grad_()
    reference = fl.Reference(ref.hidden.T.contiguous().T, ref.head.weight.T.contiguous().T)
    with coarse(1e-30):
        out = fl.token_losses(hidden, weight, every_second, reference=reference, gradient="sparse", backend=backend)
    ((out.nll * case.nll_upstream.float()) + out.kl * case.kl_upstream.float()).sum().backward()
    assert not every_second.is_contiguous()
    assert relative(hidden.grad, truth["d_hidden"]) < 1e-5 and relative(weight.grad, truth["d_weight"]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ignored(backend):
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = fl.CrossEntropyLoss(gradient="sparse", backend=backend)(hidden, weight, torch.full((3,), -100))
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_of_zero(backend):
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    out = fl.token_losses(hidden, weight, torch.arange(3), gradient="sparse", backend=backend)
    (0 * out.nll).sum().backward()
    assert (hidden.grad == 0).all() and (weight.grad == 0).all() and out.gradient_report.bound == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_are_the_same_from_run_to_run_and_for_any_number_of_threads(backend, dtype):
    case = make(130, 66, 507, reference="own", bias=True, spread=6.0).rounded(dtype)
    results = []
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            with coarse(1e-3):
                results.append(run(case, dtype, backend, gradient="sparse", tolerance=0.5))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    if backend == "cpu" and dtype != torch.float16:  # torch's own products differ with the number of threads
        assert all(torch.equal(results[0][k], results[2][k]) for k in ("nll", "kl", "d_hidden", "d_weight"))


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_nearer_the_truth_than_plain_pytorch(backend, reference, frozen, dtype):
    """With entries as fine as the default's on a real vocabulary. ε as for exact mode."""
    case = make(64, 96, 1000, reference=reference, frozen=frozen, spread=4.0)
    with coarse(1e-6):
        ours, plain = errors(case, dtype, backend, gradient="sparse"), errors(case, dtype, "reference")
    for output in ours:
        assert ours[output] <= plain[output] * 1.02, (output, ours[output], plain[output])


@needs_kernels
def test_compiled_bf16_logits_are_not_rounded():
    """PyTorch's bf16 product on a CPU rounds them, which is most of the error of plain bf16."""
    case = make(64, 96, 1000, spread=4.0)
    for gradient in ("exact", "sparse"):
        with coarse(1e-6):
            ours, plain = (
                errors(case, torch.bfloat16, b, **o) for b, o in (("cpu", {"gradient": gradient}), ("reference", {}))
            )
        assert ours["nll"] < plain["nll"] / 1000  # measured: 1e-7 and 1e-3
        assert ours["d_hidden"] < plain["d_hidden"]


def test_backward_twice_and_after_the_graph_was_kept():
    for loss in (fl.CrossEntropyLoss(gradient="sparse"), fl.TALRLoss(gradient="sparse")):
        case = make(48, 8, 300)
        hidden, head, _ = case.inputs(torch.float32)
        value = loss(hidden[None], head, case.labels[None])
        first = torch.autograd.grad(value, (hidden, head.weight), retain_graph=True)
        kept = [g.clone() for g in first]
        for g in first:
            g.zero_()
        assert all(
            torch.equal(a, b) for a, b in zip(torch.autograd.grad(value, (hidden, head.weight)), kept, strict=True)
        )


def test_changing_the_weight_between_forward_and_backward_is_noticed():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = fl.CrossEntropyLoss(gradient="sparse")(hidden, weight, torch.arange(3))
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- which mode, and the report ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, vocabulary, mode",
    [(torch.float32, 9000, "exact"), (torch.bfloat16, 9000, "sparse"), (torch.float16, 9000, "sparse"),
     (torch.bfloat16, 8191, "exact"), (torch.float64, 9000, "exact")],
)  # fmt: skip
def test_auto(dtype, vocabulary, mode):
    hidden, weight = torch.randn(4, 8).to(dtype).requires_grad_(), torch.randn(vocabulary, 8).to(dtype)
    loss = fl.CrossEntropyLoss()
    loss(hidden, weight, torch.arange(4)).backward()
    assert loss.gradient_report.mode == mode
    assert loss.gradient_report.tolerance == (certificate.TOLERANCE if mode == "sparse" else None)
    with torch.no_grad():
        loss(hidden, weight, torch.arange(4))
    assert loss.gradient_report.mode == "none" and loss.gradient_report.bound is None


def test_report_in_words():
    case = make(100, 16, 4000, spread=6.0, ignored=0)

    def report(hidden, upstream=1.0, **options):
        loss = fl.CrossEntropyLoss(gradient="sparse", **options)
        hidden = hidden.float().requires_grad_()
        (upstream * loss(hidden, case.weight.float(), case.labels)).backward()
        return str(loss.gradient_report)

    assert "of them exact, L1 error of the logits' gradient ≤ " in report(case.hidden)
    assert "all 100 tokens exact, as too few of their entries stand out (tolerance 0.01 %)" in report(
        case.hidden * 0.001, tolerance=1e-4
    )
    assert "no bound, as a loss or an upstream gradient is not finite" in report(case.hidden, torch.nan)
    assert repr(fl.TALRLoss(gradient="sparse", tolerance=0.05)) == (
        "TALRLoss(temperature='median', floor=0.01, gradient='sparse', tolerance=0.05)"
    )
    assert repr(fl.CrossEntropyLoss()) == "CrossEntropyLoss()"


@pytest.mark.parametrize("halves", [1, 2])
def test_what_sparse_gradients_get_wrong_here(halves):
    """Two halves of the vocabulary that no token mixes and one direction of the head tells apart: one profile serves neither, and
    dx is off by more than the bound, which is one of the logits' gradient."""
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
    loss = fl.TALRLoss(temperature=2.0, tolerance=0.1)
    with coarse(5e-4, tolerance=0.1):
        found = loss.sparse_errors(hidden, fl.LMHead(weight, low_rank=low_rank), labels, num_items=7)
        sparse = fl.TALRLoss(temperature=2.0, gradient="sparse", tolerance=0.1)
        x = hidden.clone().requires_grad_()
        sparse(x, fl.LMHead(weight, low_rank=low_rank), labels).backward()
    y = hidden.clone().requires_grad_()
    fl.TALRLoss(temperature=2.0, gradient="exact")(y, fl.LMHead(weight, low_rank=low_rank), labels).backward()
    assert set(found) == {"hidden", "weight", "low_rank.b"}
    assert found["hidden"] == pytest.approx(relative(x.grad, y.grad), rel=4e-7)
    assert sparse.gradient_report.bound < 0.1
    assert found["hidden"] > 0.3 if halves == 2 else 0 < found["hidden"] < 0.03  # measured 0.75 and 0.0105
    assert 0 < found["weight"] < 0.017 and loss.gradient_report is None and loss.gradient == "auto"


def test_report():
    case = make(100, 16, 4000, spread=6.0, ignored=0.2)
    hidden, head, _ = case.inputs(torch.float32)
    out = fl.token_losses(hidden, head, case.labels, gradient="sparse")
    out.nll.sum().backward()
    report = out.gradient_report
    n = int((case.labels != -100).sum())
    assert report.tokens == n and n <= report.entries < n * 2048 and report.exact_tokens < n
    assert 8 * report.entries <= report.saved_bytes <= 8 * report.entries + 64 * n + 8 * 4000
    assert 0 < report.bound <= 0.15 and f"{100 * report.bound:.3g} %" in str(report)
    out = fl.token_losses(hidden, head, case.labels, gradient="exact")
    assert (out.gradient_report.mode, out.gradient_report.bound, out.gradient_report.exact_tokens) == ("exact", 0, n)
    assert str(out.gradient_report) == f"exact gradients for {n} tokens"


@pytest.mark.parametrize("reentrant", [False, True])
def test_report_of_a_checkpointed_loss(reentrant):
    loss = fl.TALRLoss(gradient="sparse")
    hidden, weight = torch.randn(1, 8, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    labels = torch.arange(8)[None]
    checkpoint(lambda x: loss(x, weight, labels), hidden, use_reentrant=reentrant).backward()
    assert loss.gradient_report.bound is not None


def test_report_after_a_backward_is_of_its_call():
    loss = fl.CrossEntropyLoss(gradient="sparse")
    hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    value = loss(hidden, weight, torch.arange(8))
    with torch.no_grad():
        loss(hidden[:3], weight, torch.arange(3))
    assert (loss.gradient_report.tokens, loss.gradient_report.mode) == (3, "none")
    value.backward()
    assert (loss.gradient_report.tokens, loss.gradient_report.mode) == (8, "sparse")
    copied = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
    assert copied.gradient_report == loss.gradient_report


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


@pytest.mark.parametrize("tolerance", [0, 1, -0.1, float("nan"), "0.1", None, True])
def test_bad_tolerance(tolerance):
    with pytest.raises(ValueError, match="tolerance: expected a number above 0 and below 1"):
        fl.CrossEntropyLoss(tolerance=tolerance)
    with pytest.raises(ValueError, match="gradient='exact'"):
        fl.token_losses(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]), tolerance=tolerance)


def test_sparse_gradients_of_the_reference_backend_are_refused():
    with pytest.raises(ValueError, match="backend='reference'"):
        fl.CrossEntropyLoss(gradient="sparse", backend="reference")


# --- the operators -----------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("matrix_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("d", [1, 17, 64, 131])
@pytest.mark.parametrize("base", [False, True], ids=["alone", "onto-base"])
def test_products(matrix_dtype, out_dtype, d, base):
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


@needs_kernels
def test_bf16_output_is_rounded_to_nearest_even_and_keeps_nan():
    x = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.0e38, torch.nan, torch.inf] * 4])
    offsets = torch.tensor([0, 1])
    one = Segments(offsets, torch.tensor([0], dtype=torch.int32), torch.ones(1))
    got = backends.load("cpu").rows_product(one, x, torch.zeros(1), torch.zeros(24), torch.bfloat16)
    torch.testing.assert_close(got, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 1), (65, 64, 64), (70, 1030, 130), (3, 514, 1000)], ids=str)
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


SIMD = """
import itertools, sys, torch
sys.path.insert(0, "tests")
from test_sparse_softmax import *
assert torch.ops.fused_losses.simd() == sys.argv[1]
for reference, head in itertools.product(REFERENCES, HEADS):
    case = make(33, 18, 123, **head, reference=reference)
    with coarse(1e-30, capacity=507, chunk_bytes=1):
        assert max(errors(case, torch.float32, "cpu", gradient="sparse").values()) < 1e-5
    with coarse(5e-3):
        ours, plain = (run(case, torch.float32, b, gradient="sparse", tolerance=0.9) for b in ("cpu", "torch"))
        assert max(relative(ours[k], plain[k]) for k in ours) < 1e-5
for matrix_dtype, out_dtype, d in itertools.product((torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16), (1, 17, 64)):
    test_products(matrix_dtype, out_dtype, d, True)
test_bf16_output_is_rounded_to_nearest_even_and_keeps_nan()
"""


@needs_kernels
@pytest.mark.parametrize("wanted, found", [("avx2", "AVX2"), ("baseline", "128-bit SIMD")])
def test_other_instruction_sets(wanted, found):
    """The kernels are compiled once per instruction set; this machine's best runs in all other tests."""
    if wanted == "avx2" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("no AVX2 here")
    result = subprocess.run(
        [sys.executable, "-c", SIMD, found], capture_output=True, text=True, timeout=900,
        env={**os.environ, "FUSED_LOSSES_SIMD": wanted, "OMP_NUM_THREADS": "1"},
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


def test_oracle_of_the_certificate_tests_is_what_it_says():
    """With the identity as head, dx is p − onehot."""
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    oracle.nll(x @ torch.eye(7, dtype=torch.float64), torch.tensor([1, 2, 3])).sum().backward()
    torch.testing.assert_close(x.grad, x.detach().softmax(1) - torch.nn.functional.one_hot(torch.tensor([1, 2, 3]), 7))


# --- what a review found ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=name)
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_default_dtype_is_of_no_consequence(backend, gradient, default):
    """Kernels write float32 whatever torch.set_default_dtype says."""
    case = make(40, 18, 300, reference="shared", ignored=0, bias=True)
    plain = run(case, torch.float32, backend, gradient=gradient)
    torch.set_default_dtype(default)
    schemas.has_logits.cache_clear()
    try:
        assert schemas.has_logits(torch.float32) == (schemas.load() is None)
        other = run(case, torch.float32, backend, gradient=gradient)
    finally:
        torch.set_default_dtype(torch.float32)
        schemas.has_logits.cache_clear()
    assert all(torch.equal(plain[k], other[k]) for k in plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cap", [5.0, 30.0])
def test_saturated_soft_cap(backend, cap):
    """1 − (z/softcap)² rounds to less than 0 there; as nothing moves such logits, the gradient is 0."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 16, generator=g)
    for scale in (1e2, 1e4, 1e8):
        hidden = (scale * torch.randn(4, 16, generator=g)).requires_grad_()
        loss = fl.CrossEntropyLoss(gradient="sparse", backend=backend)
        loss(hidden, fl.LMHead(weight, softcap=cap), torch.arange(4)).backward()
        assert hidden.grad.isfinite().all() and loss.gradient_report.bound <= 0.15
        assert scale < 1e8 or not hidden.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_weights_of_a_loss_with_heavy_tokens(backend):
    case = make(64, 16, 600, ignored=0, spread=6.0)
    case.hidden[:8] *= 0.001

    class Weighted(fl.Objective):
        def token_loss(self, out, w):
            return w * out.nll

    grads = []
    for dtype in (torch.float32, torch.float64):
        hidden, head, _ = case.inputs(torch.float32)
        loss = Weighted(gradient="sparse", tolerance=0.02, backend=backend)
        with coarse(2e-3, capacity=300, tolerance=0.02):
            loss(hidden, head, case.labels, w=torch.linspace(0, 1, 64).to(dtype)).backward()
        assert 0 < loss.gradient_report.exact_tokens < 32
        grads.append((hidden.grad, head.weight.grad))
    for single, double in zip(*grads, strict=True):
        assert torch.equal(double, single)


@needs_kernels
@pytest.mark.parametrize("distance", [0.003, 0.1, 1.5])
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_values_in_bf16_near_and_far_from_the_reference(gradient, distance):
    """x − x_ref has digits that bf16 has not; the logits must not lose them."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 64, generator=g).bfloat16()
    ref = (x.float() + distance * torch.randn(60, 64, generator=g)).bfloat16()
    weight = (0.6 * torch.randn(900, 64, generator=g)).bfloat16()
    labels = (x.float() @ weight.float().T).argmax(1)
    hidden = x.clone().requires_grad_()
    out = fl.token_losses(hidden, weight, labels, reference=fl.Reference(ref), gradient=gradient, backend="cpu")
    z, z_ref = x.double() @ weight.double().T, ref.double() @ weight.double().T
    assert (out.nll - oracle.nll(z, labels)).abs().max() < 4.5e-6  # measured 1.5e-6
    assert relative(out.kl, oracle.kl(z_ref, z)) < (
        1.5e-4 if distance < 0.1 else 5e-6
    )  # measured 5e-5 at a KL of 1e-4, 1.7e-6


def test_threads_do_not_change_results():
    """Also of more than 32,768 ids, where PyTorch adds in parallel."""
    case = make(20, 8, 40_000, spread=5.0, ignored=0)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(case, torch.float32, gradient="sparse"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in results), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [16, 17, 300])
def test_tokens_that_are_certain(backend, vocabulary):
    """p[label] is 1 in float32: nothing but the label is kept, and nothing needs exact gradients. Logits below −1e30 too."""
    weight = torch.zeros(vocabulary, 2)
    weight[:, 0], weight[5, 0] = -torch.arange(vocabulary), 200.0
    hidden = torch.ones(6, 2).requires_grad_()
    labels = torch.full((6,), 5)
    out = fl.token_losses(hidden, weight, labels, gradient="sparse", backend=backend)
    out.nll.sum().backward()
    assert (out.nll == 0).all() and (hidden.grad == 0).all()
    assert out.gradient_report.entries == 6 and out.gradient_report.exact_tokens <= 1
    far = torch.full((vocabulary, 1), -3.0).scatter_(0, torch.tensor([[7]]), -2.0)
    out = fl.token_losses(torch.full((1, 1), 1e30), far, torch.tensor([7]), backend=backend)
    assert out.nll == 0 and out.prediction == 7


@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("summed", [False, True], ids=["per-token", "summed"])
def test_saved_bytes_have_everything(frozen, summed):
    """Also what flat chunks keep; against what autograd is given, inputs aside."""
    case = make(64, 16, 900, ignored=0, frozen=frozen, spread=0.1)
    hidden, head, _ = case.inputs(torch.float32)
    saved = []
    inputs = {t.data_ptr() for t in (hidden, head.weight, case.labels)}

    def pack(t):
        saved.append(t.nbytes if t.data_ptr() not in inputs else 0)
        return t

    loss = fl.CrossEntropyLoss(gradient="sparse")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if summed:
            loss(hidden, head, case.labels)
            report = loss.gradient_report
        else:
            report = fl.token_losses(hidden, head, case.labels, gradient="sparse").gradient_report
    assert (
        0 <= sum(saved) - report.saved_bytes < 600
    )  # the weights 1/n of the sum's own node, labels without ignored ones

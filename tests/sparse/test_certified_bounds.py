"""What is certified of dx, dW and the logits' gradient is above the truth, for heads, distributions and weights of each
kind; 3,000 calls with `--exhaustive`."""

import math
from unittest import mock

import grids
import torch
from cases import relative
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_losses as fl
from fused_losses.sparse import certificate
from fused_losses.sparse import gradients as sparse_gradients

N, D, V = 136, 24, 700
HEADS = ("random", "heavy-tailed", "groups", "spectral", "offset")
LOGITS = ("flat", "one-hot", "ordinary", "mixed")
WEIGHTS = ("ones", "signs", "scales")


def head_of(kind: str, g: torch.Generator) -> torch.Tensor:
    weight = torch.randn(V, D, generator=g, dtype=torch.float64) / math.sqrt(D)
    if kind == "heavy-tailed":
        weight *= torch.randn(V, 1, generator=g).double().exp() ** 2
    elif kind == "groups":  # along more directions than are taken out
        signs = torch.randn(V, 20, generator=g).double().sign()
        weight = 0.1 * weight + signs @ torch.linalg.qr(torch.randn(D, 20, generator=g).double()).Q.t()
    elif kind == "spectral":
        weight *= 0.7 ** torch.arange(D)
    elif kind == "offset":
        weight += 5 * torch.randn(1, D, generator=g).double()
    return weight


def hidden_of(kind: str, weight: torch.Tensor, labels: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    x = torch.randn(N, D, generator=g, dtype=torch.float64)
    x *= {"flat": 0.03, "one-hot": 2.0, "ordinary": 4.0, "mixed": 4.0}[kind] / (x @ weight.t()).std()
    if kind in ("one-hot", "mixed"):
        rows = weight[labels]
        sure = torch.rand(N, 1, generator=g) < (1.0 if kind == "one-hot" else 0.5)
        x = x + sure * 12 * rows / rows.square().sum(1, keepdim=True)
    return x


def weights_of(kind: str, g: torch.Generator) -> torch.Tensor:
    a = torch.ones(N, dtype=torch.float64)
    if kind != "ones":
        a *= torch.randn(N, generator=g).sign()
    return a * torch.randn(N, generator=g).double().mul(3).exp() if kind == "scales" else a


@settings(max_examples=grids.examples(80, 3000), deadline=None, derandomize=True)
@given(
    st.sampled_from(HEADS), st.sampled_from(LOGITS), st.sampled_from(WEIGHTS), st.sampled_from(["nll", "kl", "both"]),
    st.booleans(), st.sampled_from([0.0, 1e-4, 3e-3]), st.sampled_from([0.1, 0.5, 0.9]), st.integers(0, 10**6),
    st.booleans(),
)  # fmt: skip
def test_no_error_is_above_its_bound(head, logits, weights, losses, frozen, moved, tolerance, seed, behind):
    """`behind`: with the bound of dW as a GPU takes it."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (N,), generator=g)
    weight = head_of(head, g)
    hidden = hidden_of(logits, weight, labels, g)
    reference = hidden * (1 + 0.05 * torch.randn(N, D, generator=g).double()) if losses != "nll" else None
    a, b = weights_of(weights, g), weights_of(weights, g)

    def gradients(kind: str, w: torch.Tensor):
        x, w = hidden.clone().requires_grad_(), w.clone().requires_grad_(not frozen)
        given = None if reference is None else fl.Reference(reference)
        out = fl.token_losses(x, w, labels, reference=given, gradient=kind, tolerance=tolerance)
        total = (out.nll * a).sum() if losses != "kl" else 0.0
        with mock.patch.object(sparse_gradients, "_runs_behind", lambda tensor: behind):
            (total + (out.kl * b).sum() if losses != "nll" else total).backward()
        return x.grad, w.grad, out.gradient_report

    if moved:  # the spectrum is of what the head was before
        gradients("sparse", weight)
        weight = weight + moved * torch.randn(V, D, generator=g).double() * weight.norm() / math.sqrt(V * D)
    dx, dw, report = gradients("sparse", weight)
    exact_dx, exact_dw, _ = gradients("exact", weight)
    # Rounding comes on top; these are float64.
    assert relative(dx, exact_dx) <= report.hidden_bound * (1 + 1e-6) + 1e-9
    assert report.hidden_bound <= tolerance and report.bound <= certificate.L1_SHARE * tolerance
    if not frozen and report.weight_bound is not None:  # None: it may be all of dW
        assert relative(dw, exact_dw) <= report.weight_bound * (1 + 1e-6) + 1e-9


def test_such_calls_are_approximated():
    """The bounds above are not those of calls whose tokens are all exact, nor far from the errors."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (N,), generator=g)
    weight = head_of("groups", g)
    hidden = hidden_of("ordinary", weight, labels, g)
    found = []
    for kind in ("sparse", "exact"):
        x = hidden.clone().requires_grad_()
        out = fl.token_losses(x, weight, labels, gradient=kind, tolerance=0.9)
        out.nll.sum().backward()
        found.append((x.grad, out.gradient_report))
    (dx, report), (exact, _) = found
    assert report.exact_tokens < N / 2
    assert report.hidden_bound / 30 < relative(dx, exact) < report.hidden_bound

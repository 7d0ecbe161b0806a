"""What sparse gradients promise, checked for a backend by its name; and logits that are hard for them."""

from unittest import mock

import pytest
import torch
from cases import coarse, make, relative, run, run_with_report
from hypothesis import strategies as st

import fused_losses as fl
from fused_losses import backends
from fused_losses.sparse import certificate, softmax

needs_kernels = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=str(backends.unavailable("cpu")))
BACKENDS = ["torch", pytest.param("cpu", marks=needs_kernels)]


def check_room(backend, reference):
    case = make(5, 8, 67, reference=reference, ignored=0)
    for capacity, exact in ((67, 0), (66, 5)):
        with coarse(1e-30, capacity=capacity), mock.patch("fused_losses.backends.gpu.CANDIDATES", 1):
            _, report = run_with_report(case, torch.float32, backend, "sparse")
        assert report.exact_tokens == exact and report.entries == (0 if exact else 5 * 67)


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
    small_chunks=st.booleans(), summed=st.booleans(), directions=st.booleans(),
)  # fmt: skip


def check_certificate(
    backend, kind, reference, frozen, softcap, scale, n, tolerance, threshold, capacity, decades, seed, small_chunks,
    summed, directions,
):  # fmt: skip
    """The head is the identity. So without directions dx is the gradient of the logits itself, whose L1 error is
    certified; with them the L2 errors of dx and dW are, also of a trained head in a call of a few tokens."""
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
    with (
        coarse(threshold, capacity, 1 if small_chunks else None, tolerance),
        mock.patch.object(softmax, "FEWEST_TOKENS", 1),
        mock.patch.object(softmax, "directions_of", softmax.directions_of if directions else lambda *_: None),
    ):
        got, got_weight, report = gradient(dtype, backend=backend, gradient="sparse", tolerance=tolerance)
    assert report.mode == "sparse" and 0 <= report.bound <= certificate.L1_SHARE * tolerance
    # Rounding, of which p − onehot and p − p_ref of nearly nothing are all made, in exact mode too.
    least = 1e-14 if dtype == torch.float64 else 1e-6
    if not directions:
        allowed = (report.bound + rounding) * truth.abs().sum() + least * sum(u.abs().sum() for u in upstream)
        assert (got - truth).abs().sum() <= allowed
        if not frozen:
            # dW = dzᵀ x, so its largest error is at most that of dz times the largest x.
            worst = (got_weight.double() - truth_weight).abs().max() * (n if summed else 1)
            assert worst <= allowed * x.abs().max()
        return
    assert report.hidden_bound <= tolerance
    slack = 2 * least * sum(u.norm() for u in upstream)
    assert (got - truth).norm() <= (report.hidden_bound + rounding) * truth.norm() + slack
    if not frozen and report.weight_bound is not None:
        error = (got_weight.double() - truth_weight).norm() * (n if summed else 1)
        norm = truth_weight.norm() * (n if summed else 1)
        assert error <= (report.weight_bound + rounding) * norm + slack * x.norm()


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
        got, report = gradients(torch.float32, backend=backend, gradient="sparse", tolerance=0.1 / certificate.L1_SHARE)
    assert 17 <= report.exact_tokens < 40 and report.bound <= 0.1
    for value, expected in zip(got, truth, strict=True):
        if expected is not None:
            assert relative(value, expected) < 0.012  # measured 0.0042
    assert relative(got[0][16:32], truth[0][16:32]) < 1e-5 and relative(got[0][40], truth[0][40]) < 1e-5

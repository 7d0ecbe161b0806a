"""bfloat16 where all rows of the head have a large part in common: of a direction, which sums to 0, nothing of it is
left, and of a rounded direction something is."""

import pytest
import torch
from cases import relative

import fused_losses as fl
from fused_losses.kernels import schemas

V, D, N = 4000, 64, 64


def gradients(hidden, weight, labels, dtype, **options):
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
    fl.CrossEntropyLoss(**options)(*leaves, labels).backward()
    return [x.grad for x in leaves]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("times", [0, 10, 1000])
def test_gradients(times, backend):
    common = torch.randn(D)
    weight = ((torch.randn(V, D) + times * common) / D**0.5).bfloat16()
    hidden = torch.randn(N, D)
    hidden = (
        hidden - (hidden @ common)[:, None] * common / (common @ common)
    ).bfloat16()  # so that logits are not huge
    labels = torch.randint(V, (N,))
    truth = gradients(hidden, weight, labels, torch.float64, backend="reference")
    ours = gradients(hidden, weight, labels, torch.bfloat16, backend=backend, gradient="exact")
    d_hidden, d_weight = (relative(a, b) for a, b in zip(ours, truth, strict=True))
    assert d_hidden < 3.5e-3  # measured 1.7e-3 to 2.4e-3; without the correction 4.5e-3 and 0.26
    assert d_weight < 3e-3


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("times", [0, 3, 10, 1000])
@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_gradients_of_a_divergence(times, head, backend):
    """Near the reference; below 4 times what rows have besides, where PyTorch's products do not look at it, too."""
    common = torch.randn(D)
    weight = ((torch.randn(V, D) + times * common) / D**0.5).bfloat16()
    hidden = torch.randn(N, D)
    hidden = (hidden - (hidden @ common)[:, None] * common / (common @ common)).bfloat16()
    reference = fl.Reference((hidden.float() + 0.05 * torch.randn(N, D)).bfloat16())
    labels, upstream = torch.randint(V, (N,)), torch.rand(N)

    def gradients(dtype, **options):
        x, w = hidden.to(dtype, copy=True).requires_grad_(), weight.to(dtype, copy=True)
        w.requires_grad_(head == "trained")
        other = fl.Reference(reference.hidden.to(dtype))
        out = fl.token_losses(x, w, labels, reference=other, gradient="exact", **options)
        (out.kl * upstream.to(out.kl.dtype)).sum().backward()
        return [g for g in (x.grad, w.grad) if g is not None]

    truth = gradients(torch.float64, backend="reference")
    errors = [relative(a, b) for a, b in zip(gradients(torch.bfloat16, backend=backend), truth, strict=True)]
    assert max(errors) < 3.5e-3, errors
    if backend == "cpu" and schemas.has_narrow_products():
        assert max(errors) < 2.5e-3  # measured 1.8e-3, of which 1.7e-3 are of rounding the gradients themselves

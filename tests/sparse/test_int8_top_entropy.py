"""`topk_entropy` beside products of 8-bit numbers: of exact logits, though one p be nearly 1 and it lie in others."""

import pytest
import torch
from cases import relative
from sparse_checks import needs_kernels

import fused_losses as fl

pytestmark = needs_kernels
N, V, D = 260, 3001, 32


def inputs(dtype):
    """Hidden states with much in common, of which 8 bits are coarse; tokens from nearly certain to uncertain."""
    hidden = (torch.randn(N, D) + 4 * torch.randn(D)) * torch.linspace(0.2, 1, N)[:, None]
    hidden, weight = hidden.to(dtype), torch.randn(V, D).to(dtype)
    return hidden, weight, (hidden.float() @ weight.float().T).argmax(1)


def heads(weight, to):
    torch.manual_seed(2)
    a, b, bias = torch.randn(2, D), torch.randn(V, 2), torch.randn(V)
    return {
        "plain": fl.LMHead(weight),
        "capped": fl.LMHead(weight, softcap=30.0),
        "scaled, bias": fl.LMHead(weight, logit_scale=0.7, bias=to(bias)),
        "low rank": fl.LMHead(weight, low_rank=fl.LowRank(to(b), to(a))),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reference", [False, True], ids=["alone", "reference"])
@pytest.mark.parametrize("head", ["plain", "capped", "scaled, bias", "low rank"])
def test_of_every_head(head, reference, dtype):
    """Measured 1.2e-6, and 3e-4 of a single one; 2e-4 and 2e-2 of the logits that 8 bits leave."""
    hidden, weight, labels = inputs(dtype)
    other = (hidden.float() + 0.05 * torch.randn(N, D)).to(dtype)

    def entropies(dtype, **options):
        x = hidden.to(dtype, copy=True).requires_grad_()
        of = {"reference": fl.Reference(other.to(dtype))} if reference else {}
        model = heads(weight.to(dtype), lambda t: t.to(weight.dtype).to(dtype))[head]
        return fl.token_losses(x, model, labels, wanted=("topk_entropy",), **of, **options)

    ours = entropies(dtype, scan="int8", gradient="sparse", tolerance=0.9, backend="cpu")
    assert ours.gradient_report.scan == "int8"
    # The rows of a low-rank part are rounded to the dtype of hidden.
    truth = entropies(dtype, gradient="sparse") if head == "low rank" else entropies(torch.float64, backend="reference")
    assert relative(ours.topk_entropy, truth.topk_entropy) < 3.7e-6
    large = truth.topk_entropy > 1e-4
    assert ((ours.topk_entropy - truth.topk_entropy).abs() / truth.topk_entropy)[large].max() < 9e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [2, 20, 4000])
def test_the_weights_of_eaft(k, dtype):
    hidden, weight, labels = inputs(dtype)
    loss = fl.EAFTLoss(top_k=k, scan="int8", gradient="sparse", tolerance=0.9, backend="cpu")
    ours = loss(hidden.clone().requires_grad_(), weight, labels).detach()
    truth = fl.EAFTLoss(top_k=k, backend="reference")(hidden.double(), weight.double(), labels)
    assert ours == pytest.approx(float(truth), rel=5e-5)  # measured 1.6e-5

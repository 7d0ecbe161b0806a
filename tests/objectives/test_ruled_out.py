"""Losses of what a bias of −inf rules out: infinite, as plain PyTorch's, so that whoever looks for that finds it."""

import pytest
import torch
from cases import relative

import fused_losses as fl

V, OUT = 9, 4
SEEDED = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT = torch.randn(3, 5, generator=SEEDED), torch.randn(V, 5, generator=SEEDED)
BIAS = torch.zeros(V).index_fill_(0, torch.tensor([OUT]), -torch.inf)
OF_LABEL = {
    "cross-entropy": fl.CrossEntropyLoss, "z-loss": lambda **o: fl.CrossEntropyLoss(z_loss=1e-3, **o),
    "TALR": lambda **o: fl.TALRLoss(2.0, **o), "weighted": fl.WeightedLoss, "EAFT": fl.EAFTLoss,
}  # fmt: skip
backends = pytest.mark.parametrize("backend", ["cpu", "torch"])


@backends
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("loss", OF_LABEL)
def test_a_label(loss, backend, gradient):
    labels, found = torch.tensor([0, OUT, 2]), []
    for options in (dict(backend=backend, gradient=gradient), dict(backend="reference", gradient="exact")):
        hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
        fields = {"weights": torch.ones(3)} if loss == "weighted" else {}
        value = OF_LABEL[loss](**options)(hidden, fl.LMHead(weight, BIAS), labels, **fields)
        value.backward()
        assert value == torch.inf
        found.append((hidden.grad, weight.grad))
    for ours, truth in zip(*found, strict=True):
        assert ours.isfinite().all()
        if truth.isfinite().all():
            assert relative(ours, truth) < (6.3e-4 if gradient == "sparse" else 5.4e-7)  # measured 2.1e-4, 1.8e-7


@backends
def test_other_ids(backend):
    """With label smoothing the others have to be likely too; to a KL those that the reference has."""
    labels, options = torch.tensor([0, 1, 2]), dict(backend=backend)
    whole, without = fl.LMHead(WEIGHT.clone().requires_grad_()), fl.LMHead(WEIGHT.clone().requires_grad_(), BIAS)
    for loss, head, reference in (
        (fl.CrossEntropyLoss(0.1, **options), without, None), (fl.SFTKLLoss(0.5, **options), without, whole),
        (fl.MaskTheTargetLoss(0.5, **options), without, whole), (fl.ReverseKLLoss(**options), whole, without),
    ):  # fmt: skip
        given = {} if reference is None else {"reference": fl.Reference(HIDDEN, reference)}
        assert loss(HIDDEN, head, labels, **given) == torch.inf, loss
    both = {"reference": fl.Reference(HIDDEN, without)}
    for loss in (fl.CrossEntropyLoss(**options), fl.SFTKLLoss(0.5, **options), fl.JSDLoss(0.5, **options)):
        assert loss(HIDDEN, without, labels, **({} if type(loss) is fl.CrossEntropyLoss else both)).isfinite(), loss


@backends
def test_token_losses(backend):
    labels = torch.tensor([0, OUT, 2])
    out = fl.token_losses(
        HIDDEN, fl.LMHead(WEIGHT, BIAS), labels, reference=fl.Reference(HIDDEN, fl.LMHead(WEIGHT)), beta=1.0,
        backend=backend,
    )  # fmt: skip
    assert out.nll.isinf().tolist() == [False, True, False]
    assert out.kl.isinf().all() and out.divergence.isfinite().all() and out.reference_nll.isfinite().all()
    out = fl.token_losses(
        HIDDEN, fl.LMHead(WEIGHT), labels, reference=fl.Reference(HIDDEN, fl.LMHead(WEIGHT, BIAS)), beta=1.0,
        backend=backend,
    )  # fmt: skip
    assert out.reference_nll.isinf().tolist() == [False, True, False]
    assert out.divergence.isinf().all() and out.kl.isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", ["reference", "model", "both", "each its own"])
@pytest.mark.parametrize("value", [-torch.inf, -1e5])
def test_a_divergence_of_models_that_rule_out_other_ids(backend, dtype, masked, value):
    """A teacher with the smaller vocabulary, for example: m is half of the other's p there."""
    ids = {"reference": ([], [6, 7, 8]), "model": ([1, 8], []), "both": ([7], [7]), "each its own": ([3, 8], [8, 5])}
    bias, bias_ref = (torch.zeros(V, dtype=dtype).index_fill(0, torch.tensor(i, dtype=torch.int64), value)
                      for i in ids[masked])  # fmt: skip
    weight, weight_ref = WEIGHT.to(dtype).requires_grad_(), WEIGHT.to(dtype).flip(0)
    hidden, labels = HIDDEN.to(dtype).requires_grad_(), torch.tensor([0, 2, 4])
    reference = fl.Reference(HIDDEN.to(dtype).flip(0), fl.LMHead(weight_ref, bias_ref))
    value = fl.JSDLoss(0.3, backend=backend)(hidden, fl.LMHead(weight, bias), labels, reference=reference)
    found = value.detach(), *torch.autograd.grad(value, (hidden, weight))
    x, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    p, r = ((x @ w.T + bias).softmax(1), (reference.hidden.double() @ weight_ref.double().T + bias_ref).softmax(1))
    p, r = p.clamp(min=1e-300), r.clamp(min=1e-300)
    m = 0.3 * r + 0.7 * p
    truth = (0.3 * r * (r / m).log() + 0.7 * p * (p / m).log()).sum(1).mean()
    for ours, expected in zip(found, (truth.detach(), *torch.autograd.grad(truth, (x, w))), strict=True):
        assert relative(ours, expected) < (7.2e-7 if dtype == torch.float32 else 2.4e-15)  # measured 2.4e-7, 7.9e-16


def test_in_a_compiled_graph():
    loss = fl.CrossEntropyLoss()
    call = torch.compile(lambda hidden, labels: loss(hidden, fl.LMHead(WEIGHT, BIAS), labels), backend="eager")
    assert call(HIDDEN, torch.tensor([0, OUT, 2])) == torch.inf and call(HIDDEN, torch.tensor([0, 1, 2])).isfinite()


def test_of_what_is_reported_beside_the_loss():
    observer, loss = fl.tokens.Observer(), fl.CrossEntropyLoss()
    with loss.observed(observer):
        loss(HIDDEN, fl.LMHead(WEIGHT, BIAS), torch.tensor([0, OUT, 2]))
    assert observer.nll.isinf().tolist() == [False, True, False]

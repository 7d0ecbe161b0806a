"""The surroundings a training loop puts the losses in: autocast, no_grad, checkpointing, compile, ranks."""

import subprocess
import sys

import pytest
import torch
from cases import make, relative
from torch.utils.checkpoint import checkpoint

import fused_losses as fl
from fused_losses import reference as oracle

LOSSES = [loss(gradient=g) for g in ("exact", "sparse") for loss in (fl.CrossEntropyLoss, fl.TALRLoss, fl.LAwFLoss)]


def call(loss, hidden, head, labels, ref):
    hidden, labels = hidden[None], labels[None]
    if isinstance(loss, fl.LAwFLoss):
        ref = fl.Reference(ref.hidden[None], ref.head)
        return loss(hidden, head, labels, confidence=(labels % 3 == 0).float(), reference=ref)
    return loss(hidden, head, labels)


@pytest.fixture(params=LOSSES, ids=lambda loss: f"{type(loss).__name__}-{loss.gradient}")
def loss(request):
    return request.param


def gradients(loss, case, dtype=torch.float32):
    hidden, head, ref = case.inputs(dtype)
    value = call(loss, hidden, head, case.labels, ref)
    value.backward()
    return value.detach(), hidden.grad, head.weight.grad


@pytest.mark.parametrize("reference", ["shared", "own"])
def test_autocast_computes_in_its_dtype_and_keeps_float32_gradients(loss, reference):
    case = make(48, 32, 300, bias=True, reference=reference)
    hidden, head, ref = case.inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = call(loss, hidden, head, case.labels, ref)
    value.backward()
    assert value.dtype == hidden.grad.dtype == head.weight.grad.dtype == torch.float32
    truth = gradients(loss, case, torch.float64)
    for got, expected in zip((value.detach(), hidden.grad, head.weight.grad), truth, strict=True):
        assert 1e-6 < relative(got, expected) < 0.011  # bf16 operands: neither exact nor far off
    rounded = gradients(loss, case.rounded(torch.bfloat16), torch.float64)
    assert relative(value.detach(), rounded[0]) < 6e-4


def test_autocast_takes_hidden_and_weight_of_two_dtypes(loss):
    case = make(48, 32, 300, reference="shared")
    hidden, head, ref = case.inputs(torch.float32)
    half = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = call(loss, half, head, case.labels, ref)
    value.backward()
    assert half.grad.dtype == torch.bfloat16 and head.weight.grad.dtype == torch.float32


def test_float64_is_left_alone_by_autocast():
    case = make(20, 8, 30)
    hidden, head, _ = case.inputs(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = fl.token_losses(hidden, head, case.labels)
    assert out.nll.dtype == torch.float64


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_modes(loss, mode):
    case = make(48, 8, 30, reference="shared")
    hidden, head, ref = case.inputs(torch.float32)
    with mode():
        value = call(loss, hidden, head, case.labels, ref)
        out = fl.token_losses(hidden, head, case.labels, reference=ref)
    assert not value.requires_grad and not out.nll.requires_grad
    assert value.item() == pytest.approx(gradients(loss, case)[0].item(), rel=1e-6)


def test_tensors_made_in_inference_mode_can_be_evaluated(loss):
    case = make(48, 8, 30, reference="shared")
    with torch.inference_mode():
        hidden, head, ref = case.inputs(torch.float32)
        assert call(loss, hidden.clone(), head, case.labels.clone(), ref).isfinite()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(loss, reentrant):
    case = make(48, 8, 30, reference="shared")
    _, d_hidden, d_weight = gradients(loss, case)
    hidden, head, ref = case.inputs(torch.float32)
    value = checkpoint(lambda x: call(loss, x, head, case.labels, ref), hidden, use_reentrant=reentrant)
    value.backward()
    assert torch.equal(hidden.grad, d_hidden) and torch.equal(head.weight.grad, d_weight)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_retain_graph(loss, frozen):
    case = make(48, 8, 30, reference="shared", frozen=frozen)
    hidden, head, ref = case.inputs(torch.float32)
    value = call(loss, hidden, head, case.labels, ref)
    first = torch.autograd.grad(value, hidden, retain_graph=True)[0]
    kept = first.clone()
    first.zero_()  # a caller may do as he likes with a gradient
    assert torch.equal(torch.autograd.grad(value, hidden)[0], kept)


def test_second_derivatives_are_refused_not_wrong():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    nll = fl.token_losses(hidden, weight, torch.arange(3)).nll.sum()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(nll, hidden, create_graph=True)
    nll = fl.token_losses(hidden, weight, torch.arange(3), backend="reference").nll.sum()
    torch.autograd.grad(nll, hidden, create_graph=True)[0].sum().backward()


def test_changing_the_weight_between_forward_and_backward_is_noticed():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    nll = fl.token_losses(hidden, weight, torch.arange(3)).nll.sum()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nll.backward()


def test_one_output_backward_without_the_other():
    case = make(20, 8, 30, reference="own")
    for frozen in (False, True):
        for name in ("nll", "kl"):
            from dataclasses import replace

            hidden, head, ref = replace(case, frozen=frozen).inputs(torch.float64)
            out = fl.token_losses(hidden, head, case.labels, reference=ref)
            getattr(out, name).sum().backward()
            keep = case.labels != -100
            x = case.hidden.clone().requires_grad_()
            z = oracle.logits(x[keep], fl.LMHead(case.weight))
            z_ref = ref.hidden.detach()[keep] @ ref.head.weight.T
            truth = oracle.nll(z, case.labels[keep]) if name == "nll" else oracle.kl(z_ref, z)
            truth.sum().backward()
            assert relative(hidden.grad, x.grad) < 1e-12


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.each_value
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_caller(loss, dynamic):
    """A graph break, and the same numbers, for changing numbers of tokens and of ignored tokens."""

    def step(x, head_weight, labels, ref_hidden):
        hidden = torch.tanh(x) * 2
        ref = fl.Reference(ref_hidden)
        return 3 * call(loss, hidden, head_weight, labels, ref) + 1

    compiled = torch.compile(step, backend="aot_eager", dynamic=dynamic)
    for n, ignored in ((20, 0.0), (31, 0.5), (20, 0.3)):
        case = make(n, 8, 30, ignored=ignored, reference="shared")
        results = []
        for function in (step, compiled):
            x, w = case.hidden.float().requires_grad_(), case.weight.float().requires_grad_()
            value = function(x, w, case.labels, case.reference_hidden.float())
            value.backward()
            results.append((value.detach(), x.grad, w.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


RANK = """
import sys, torch, torch.distributed as dist, fused_losses as fl
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
torch.manual_seed(0)
hidden, weight = torch.randn(5, 4, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
labels = torch.randint(11, (5, 4))
labels[1] = -100
mine = slice(0, 4) if rank == 0 else slice(4, 5)
n = (labels != -100).sum()
loss = fl.TALRLoss(process_group=dist.group.WORLD)(hidden[mine], weight, labels[mine], num_items=n)
dist.all_reduce(loss)
whole = fl.TALRLoss()(hidden, weight, labels)
alone = fl.TALRLoss()(hidden[mine], weight, labels[mine], num_items=n)
dist.all_reduce(alone)
assert abs(loss - whole) < 1e-12 * whole, (loss, whole)
assert abs(alone - whole) > 1e-4 * whole
dist.destroy_process_group()
"""


def test_talr_median_over_two_ranks(tmp_path):
    """3 sequences with labels on one rank, 1 on the other: the median of 4."""
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path / "rendezvous")], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for rank in ranks:
        _, error = rank.communicate(timeout=600)
        assert rank.returncode == 0, error.decode()

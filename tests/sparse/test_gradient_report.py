"""Which mode "auto" takes, and what the report of a call says of it."""

import copy
import pickle

import pytest
import torch
from cases import make, name
from torch.utils.checkpoint import checkpoint

import fused_losses as fl
from fused_losses.sparse import certificate


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


def test_report():
    case = make(100, 16, 4000, spread=6.0, ignored=0.2)
    hidden, head, _ = case.inputs(torch.float32)
    out = fl.token_losses(hidden, head, case.labels, gradient="sparse")
    out.nll.sum().backward()
    report = out.gradient_report
    n = int((case.labels != -100).sum())
    assert report.tokens == n and n <= report.entries < n * 2048 and report.exact_tokens < n
    assert 4 * report.entries <= report.saved_bytes <= 4 * report.entries + 64 * n + 8 * 4000
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

"""NeMo Automodel's loss_fn: against full logits, over its own base class or, where it is not installed, a stand-in."""

import importlib
import importlib.util
import inspect
import sys
import types

import pytest
import torch
from torch import nn

import fused_losses as fl

MODULE = "nemo_automodel.components.loss.linear_ce"


class StandIn(nn.Module):
    """What is used of FusedLinearCrossEntropy, as read in nemo-automodel 0.7.0."""

    def __init__(self, ignore_index=-100, logit_softcapping=0, reduction="sum"):
        super().__init__()
        self.ignore_index, self.logit_softcapping, self.reduction = ignore_index, logit_softcapping, reduction

    @staticmethod
    def materialize_lm_weight(lm_weight, *, grad_reduce_group=None):
        return lm_weight.full_tensor() if hasattr(lm_weight, "full_tensor") else lm_weight


@pytest.fixture
def FusedLoss(monkeypatch):
    if importlib.util.find_spec("nemo_automodel") is None:
        parts = MODULE.split(".")
        for i in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        sys.modules[MODULE].FusedLinearCrossEntropy = StandIn
    monkeypatch.delitem(sys.modules, "fused_losses.integrations.automodel", raising=False)
    yield importlib.import_module("fused_losses.integrations.automodel").FusedLoss
    sys.modules.pop("fused_losses.integrations.automodel", None)


def tensors():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 16, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 16, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(31, (2, 7), generator=g)
    labels[0, :3] = -100
    return hidden, weight, labels


def nlls(hidden, weight, labels, cap):
    logits = hidden @ weight.T
    logits = cap * torch.tanh(logits / cap) if cap else logits
    return nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


@pytest.mark.parametrize("cap", [0, 5.0])
@pytest.mark.parametrize("name, options, weigh", [
    ("sft", None, lambda nll: 1.0), ("dft", {}, lambda nll: (-nll).exp()),
    ("talr", {"temperature": 2.0}, lambda nll: (-nll / 2).exp().clamp(min=0.01)),
], ids=["sft", "dft", "talr"])  # fmt: skip
@pytest.mark.parametrize("items", [None, 40, 0])
def test_loss_and_gradients(FusedLoss, name, options, weigh, cap, items):
    hidden, weight, labels = tensors()
    found = FusedLoss(name, options, logit_softcapping=cap)(hidden, labels, weight, items)
    nll = nlls(hidden, weight, labels, cap)
    truth = torch.where(labels >= 0, nll * weigh(nll.detach()), 0).sum() / (items or 1)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)
    for got, expected in zip(
        torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(truth, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_weights_of_tokens(FusedLoss):
    hidden, weight, labels = tensors()
    weights = torch.rand(2, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = FusedLoss("weighted")(hidden_states=hidden, labels=labels, lm_weight=weight, loss_weights=weights)
    truth = torch.where(labels >= 0, nlls(hidden, weight, labels, 0) * weights, 0).sum()
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)
    with pytest.raises(TypeError, match="weights: DFTLoss has no such field"):
        FusedLoss("dft")(hidden, labels, weight, loss_weights=weights)


def test_what_automodel_hands_over_is_taken(FusedLoss):
    base = FusedLoss.__mro__[1]
    assert base.__name__ == "FusedLinearCrossEntropy" or base is StandIn
    if base is not StandIn:
        assert list(inspect.signature(FusedLoss.forward).parameters) == list(inspect.signature(base.forward).parameters)


@pytest.mark.parametrize("name, options, message", [
    ("lawf", {}, "loss: LAwFLoss needs a frozen original, which Automodel does not hand"),
    ("psft", {}, "loss: PSFTLoss needs old_nll, which Automodel does not hand"),
    ("tlar", {}, "did you mean talr"),
    ("talr", {"tau": 2}, "did you mean temperature"),
], ids=["lawf", "psft", "name", "option"])  # fmt: skip
def test_what_it_cannot_do_is_said(FusedLoss, name, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        FusedLoss(name, options)


def test_a_configuration_node_is_read(FusedLoss):
    node = types.SimpleNamespace(to_dict=lambda: {"temperature": 2.0})
    assert FusedLoss("talr", node).objective.temperature == 2.0
    assert isinstance(FusedLoss().objective, fl.CrossEntropyLoss)


def test_automodel_that_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE, None)
    monkeypatch.delitem(sys.modules, "fused_losses.integrations.automodel", raising=False)
    module = importlib.import_module("fused_losses.integrations.automodel")
    with pytest.raises(ImportError, match="needs NeMo Automodel: pip install"):
        module.FusedLoss()
    sys.modules.pop("fused_losses.integrations.automodel", None)

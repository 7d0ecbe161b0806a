"""torchtitan's loss: against full logits, over its own base class or, where it is not installed, a stand-in."""

import contextlib
import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

import fused_losses as fl

NAME = "fused_losses.integrations.torchtitan"


class StandIn:
    """What is used of ChunkedLossWrapper, as read in torchtitan 0.3.0."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        num_chunks: int = 8
        loss_fn: object = field(default_factory=object)

    def set_lm_head(self, lm_head):
        self.lm_head = lm_head


def stand_ins():
    made = {name: types.ModuleType(name) for name in (
        "torchtitan", "torchtitan.components", "torchtitan.components.loss", "torchtitan.distributed",
        "torchtitan.distributed.spmd_types", "spmd_types",
    )}  # fmt: skip
    made["torchtitan.components.loss"].ChunkedLossWrapper = StandIn
    made["torchtitan.distributed.spmd_types"].spmd_mesh_size = lambda axis: 1
    made["spmd_types"].is_type_checking = lambda: False
    made["spmd_types"].no_typecheck = contextlib.nullcontext
    return made


@pytest.fixture
def module(monkeypatch):
    if importlib.util.find_spec("torchtitan") is None:
        for name, made in stand_ins().items():
            monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


@pytest.fixture
def make(module):
    def made(**config):
        config = module.FusedLoss.Config(**config)
        return module.FusedLoss(replace(config), compile_config=None)

    return made


def tensors(bias=False):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 16, generator=g, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(16, 31, bias=bias, dtype=torch.float64)
    nn.init.normal_(head.weight, generator=g)
    labels = torch.randint(31, (2, 7), generator=g)
    labels[0, :3] = -100
    return hidden, head, labels


def talr(nll, labels, documents=None):
    documents = torch.arange(2)[:, None].expand(2, 7) if documents is None else documents
    valid = labels >= 0
    means = torch.stack([nll[valid & (documents == i)].mean() for i in documents[valid].unique()])
    return (-nll / means.quantile(0.5)).exp().clamp(min=0.01)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("name, weigh", [
    ("sft", lambda nll, labels: 1.0), ("dft", lambda nll, labels: (-nll).exp()), ("talr", talr),
])  # fmt: skip
def test_loss_and_gradients(make, name, weigh, items, bias):
    hidden, head, labels = tensors(bias)
    loss = make(loss=name)
    loss.set_lm_head(head)
    found, metrics = loss(hidden, labels, None if items is None else torch.tensor(items))
    nll = nn.functional.cross_entropy(head(hidden).transpose(1, 2), labels, reduction="none")
    truth = (nll * weigh(nll.detach(), labels)).sum() / (items or 1)
    assert metrics == {}
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)
    wanted = (hidden, *head.parameters())
    for a, b in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(truth, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_documents_are_the_sequences_of_talr(make):
    """Of positions that go on by one within a row; the second row begins within a document."""
    hidden, head, labels = tensors()
    loss = make(loss="talr")
    loss.set_lm_head(head)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [4, 5, 0, 1, 0, 1, 2]])
    found, _ = loss(hidden, labels, positions=positions)
    nll = nn.functional.cross_entropy(head(hidden).transpose(1, 2), labels, reduction="none")
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [2, 2, 3, 3, 4, 4, 4]])
    truth = (nll * talr(nll, labels, documents)).sum()
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)
    assert not torch.allclose(truth, (nll * talr(nll, labels)).sum(), rtol=1e-3)


def test_other_losses_have_no_use_for_positions(make):
    hidden, head, labels = tensors()
    loss = make(loss="dft")
    loss.set_lm_head(head)
    assert torch.equal(loss(hidden, labels, positions=torch.arange(7).expand(2, 7))[0], loss(hidden, labels)[0])


def test_the_loss_runs_inside_the_heads_call(make):
    """FSDP gathers the weight in a hook before it, and lets it go after the backward of its output."""
    hidden, head, labels = tensors()
    seen = []
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    own = head.forward = head.forward  # of torchtitan's, on the instance
    loss = make()
    loss.set_lm_head(head)
    loss(hidden, labels)
    assert seen == [hidden.shape, torch.Size([])] and head.forward is own
    with pytest.raises(ValueError):
        loss(hidden, labels[:, :3])
    assert head.forward is own


def test_evaluation_without_gradients(make):
    hidden, head, labels = tensors()
    loss = make(loss="talr", options={"temperature": 2.0})
    loss.set_lm_head(head)
    with torch.no_grad():
        found, _ = loss(hidden, labels)
    assert not found.requires_grad
    assert torch.equal(found, loss(hidden, labels)[0])


@pytest.mark.parametrize("name, options, message", [
    ("lawf", {}, "LAwFLoss needs a frozen original, which torchtitan does not hand"),
    ("weighted", {}, "WeightedLoss needs weights, which torchtitan does not hand"),
    ("sft", {"class_weights": [1.0] * 31, "reduction": "weighted_mean"}, "takes means of groups"),
    ("tlar", {}, "did you mean talr"),
    ("talr", {"tau": 2}, "did you mean temperature"),
], ids=["reference", "field", "groups", "name", "option"])  # fmt: skip
def test_what_it_cannot_do_is_said(make, name, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(loss=name, options=options)


def test_a_spread_head_and_none_are_refused(make, module, monkeypatch):
    hidden, head, labels = tensors()
    loss = make()
    with pytest.raises(ValueError, match="lm_head: call set_lm_head first"):
        loss(hidden, labels)
    loss.set_lm_head(head)
    monkeypatch.setattr(module, "spmd_mesh_size", lambda axis: 2)
    with pytest.raises(ValueError, match="tensor_parallel_degree: expected 1"):
        loss(hidden, labels)
    assert "forward" not in vars(head)


def test_its_trainer_takes_it_for_its_own(module):
    """`isinstance` decides who is given the head and hidden states."""
    base = module.FusedLoss.__mro__[1]
    assert base.__name__ == "ChunkedLossWrapper" or base is StandIn
    loss = module.FusedLoss(module.FusedLoss.Config())
    assert isinstance(loss, base) and isinstance(loss.objective, fl.CrossEntropyLoss)


def test_torchtitan_that_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtitan.components.loss", None)
    monkeypatch.setitem(sys.modules, "spmd_types", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(ImportError, match="needs torchtitan: pip install torchtitan"):
        importlib.import_module(NAME)

"""Modules and whole models compiled into one graph: heads in any place, reports, export, training."""

import copy
import gc
import pickle

import pytest
import torch
from graphs import ROWS, D, V, assert_same, inputs, one_graph
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fused_losses as fl
from fused_losses import compiled

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()


def test_heads_and_modules_in_any_place():
    linear = nn.Linear(D, V)
    outside, weight = fl.LMHead(linear.weight, linear.bias), linear.weight

    def step(hidden, labels):
        made_here = fl.DFTLoss(gradient="sparse")
        return (
            made_here(hidden, linear, labels)
            + made_here(hidden, outside, labels)
            + fl.token_losses(hidden, linear.weight, labels).nll.mean()
        )

    def make_inputs():
        hidden, _, labels = inputs()
        return hidden, labels

    assert_same(step, make_inputs)
    loss = fl.CrossEntropyLoss()
    assert_same(loss, inputs, compiled_function=one_graph(fl.CrossEntropyLoss()))

    def kl(hidden, labels):
        return fl.token_losses(
            hidden, linear, labels, reference=fl.Reference(hidden.detach(), fl.LMHead(weight, linear.bias))
        ).kl

    assert not assert_same(kl, make_inputs)[0].any()  # exactly 0: recognised as the same head


def test_reports_go_to_the_objective_of_the_call():
    """Also where two share the compiled code, and where one is a copy; an objective that is gone takes no reports."""
    first = fl.CrossEntropyLoss(gradient="sparse")
    others = [
        copy.deepcopy(first),
        pickle.loads(pickle.dumps(first)),
        copy.copy(first),
        fl.CrossEntropyLoss(gradient="sparse"),
    ]
    counter = CompileCounterWithBackend("aot_eager")
    step = one_graph(lambda loss, *given: loss(*given), counter)
    for length, loss in enumerate([first, *others], 8):
        step(loss, *inputs(length)).backward()
    assert [loss.gradient_report.tokens for loss in [first, *others]] == [2 * n - 3 for n in range(8, 13)]
    assert all(loss.gradient_report.bound is not None for loss in [first, *others])
    assert counter.frame_count <= 2

    alive = len(compiled._objectives)
    value = step(others[0], *inputs())
    del others, loss
    gc.collect()
    assert len(compiled._objectives) <= alive - 4
    value.backward()


def test_export():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.loss = nn.Parameter(inputs()[1].detach()), fl.TALRLoss()

        def forward(self, hidden, labels):
            return self.loss(hidden, self.weight, labels)

    hidden, _, labels = inputs()
    model = Model()
    exported = torch.export.export(model, (hidden.detach(), labels)).module()
    assert exported(hidden.detach(), labels).item() == pytest.approx(model(hidden, labels).item(), rel=1e-6)


class TinyModel(nn.Module):
    """Embedding, one block and a tied head, called as those of Hugging Face are."""

    def __init__(self, loss):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.block = nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.lm_head = nn.Linear(D, V, bias=False)
        self.lm_head.weight = self.embedding.weight
        self.loss = loss

    def forward(self, input_ids, labels, num_items=None):
        x = self.embedding(input_ids)
        hidden = x + self.block(x)
        return self.loss(hidden[:, :-1], self.lm_head, labels[:, 1:], num_items=num_items), hidden


# Inductor's C++ takes seconds to compile; test_nothing_comes_from_ignored_tokens has it by default.
@pytest.mark.parametrize(
    ("gradient", "backend"),
    [
        ("exact", "aot_eager"),
        ("sparse", "aot_eager"),
        pytest.param("sparse", "inductor", marks=pytest.mark.exhaustive),
    ],
)
def test_training(gradient, backend):
    """Three steps of a whole model in one graph, over two accumulated batches each, end where eager ones do."""
    weights = []
    for captured in (False, True):
        torch.manual_seed(1)
        model = TinyModel(fl.TALRLoss(gradient=gradient))
        forward = one_graph(model, backend, dynamic=True) if captured else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            batches = []
            for length in (9, 14):
                ids = torch.randint(V, (ROWS, length))
                batches.append((ids, ids.masked_fill(torch.rand(ids.shape) < 0.4, -100)))
            items = sum((labels[:, 1:] != -100).sum() for _, labels in batches)
            for ids, labels in batches:
                loss, _ = forward(ids, labels, num_items=items)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)

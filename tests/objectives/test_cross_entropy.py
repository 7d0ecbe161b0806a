"""CrossEntropyLoss with its options: against PyTorch's own, where it costs nothing, what it refuses."""

import copy
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from cases import coarse, make, relative
from test_objective_twins import positive
from torch.nn import functional as F
from training import error, expected, llama, log_probs, rows, step, trainer

import fused_losses as fl
from fused_losses import backends
from fused_losses import reference as oracle
from fused_losses.autograd import Upstream
from fused_losses.sparse import softmax

V = 123
KERNELS = pytest.param(
    "cpu", marks=pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="no kernels")
)  # fmt: skip


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss, [t for t in (hidden, head.weight, head.bias) if t is not None])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_equals_that_of_pytorch(smoothing, weighted, reduction, softcap):
    """Its mean divides by the sum of the labels' weights, and so do we if asked."""
    case = make(33, 17, V, bias=True, softcap=softcap)
    hidden, head, _ = case.inputs(torch.float64)
    classes = positive(V) if weighted else None
    options = dict(label_smoothing=smoothing, reduction=reduction)
    truth = F.cross_entropy(oracle.logits(hidden, head), case.labels, classes, **options)
    how = {"reduction": "weighted_mean"} if reduction == "mean" else {}
    loss = fl.CrossEntropyLoss(smoothing, class_weights=classes, **how)
    got = loss(hidden, head, case.labels, num_items=None if reduction == "mean" else 1)
    assert got.item() == pytest.approx(truth.item(), rel=1e-12)
    for ours, theirs in zip(gradients(got, hidden, head), gradients(truth, hidden, head), strict=True):
        assert relative(ours, theirs) < 1e-12


def test_weighted_mean_of_an_accumulated_batch():
    case = make(33, 17, V, ignored=0)
    hidden, head, _ = case.inputs(torch.float64)
    classes, z = positive(V), oracle.logits(hidden, head)
    truth = F.cross_entropy(z, case.labels, classes, label_smoothing=0.1) + 0.01 * z.logsumexp(1).square().mean()
    loss = fl.CrossEntropyLoss(0.1, 0.01, class_weights=classes, reduction="weighted_mean")
    sums = classes[case.labels].sum()
    for items in ((sums, 33), (sums.item(), torch.tensor(33))):
        parts = [loss(hidden[a:b], head, case.labels[a:b], num_items=items) for a, b in ((0, 9), (9, 33))]
        assert sum(parts).item() == pytest.approx(truth.item(), rel=1e-12)


def test_labels_of_weight_0_alone_are_0_in_a_weighted_mean():
    classes = torch.zeros(V).index_fill(0, torch.tensor([7]), 1.0)
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(V, 8)
    loss = fl.CrossEntropyLoss(class_weights=classes, reduction="weighted_mean")(hidden, weight, torch.arange(4))
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_ids_that_a_bias_rules_out_may_have_weight_0(smoothing, softcap):
    case = make(20, 8, V, ignored=0)
    labels = case.labels.clamp(max=99)
    bias, classes = torch.zeros(V, dtype=torch.float64), torch.ones(V)
    bias[100:], classes[100:] = -torch.inf, 0
    hidden, head, _ = case.inputs(torch.float64)
    small = fl.LMHead(head.weight[:100], softcap=softcap)
    if softcap is not None:
        bias[100:] = 0  # a soft-cap makes finite logits of −∞
        z = oracle.logits(hidden, replace(head, softcap=softcap))
        truth = oracle.cross_entropy(z, labels, smoothing, class_weights=classes).mean()
    else:
        z = oracle.logits(hidden, small)
        log_p = z.log_softmax(1)
        truth = (-(1 - smoothing) * log_p.gather(1, labels[:, None])[:, 0] - smoothing / V * log_p.sum(1)).mean()
    head = fl.LMHead(head.weight, bias, softcap=softcap)
    loss = fl.CrossEntropyLoss(smoothing, class_weights=classes)(hidden, head, labels)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-12)
    assert relative(*(torch.autograd.grad(x, hidden)[0] for x in (loss, truth))) < 1e-12


# --- what it costs


def test_all_options_off_is_the_plain_objective():
    """No weights, no lse, no second term."""
    seen = []

    class Watched(fl.CrossEntropyLoss):
        def reduce(self, tokens, num_items, **per_token):
            seen.append((per_token, tokens.problem.has_reference))
            return super().reduce(tokens, num_items, **per_token)

    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    with mock.patch("fused_losses.objectives.cross_entropy.total_logits", side_effect=AssertionError):
        loss = Watched()(hidden, weight, torch.arange(4))
    assert seen == [({}, False)]
    assert torch.equal(loss, fl.Objective.forward(fl.CrossEntropyLoss(), hidden, weight, torch.arange(4)))
    Watched(z_loss=1e-4)(hidden, weight, torch.arange(4))
    assert seen[1][0].keys() == {"weight", "z_weight"}


def test_without_smoothing_lse_has_no_gradient():
    found = []
    single = Upstream.softmax.fget

    def softmax(self):
        found.append(self.lse is not None)
        return single(self)

    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(V, 8)
    with mock.patch.object(Upstream, "softmax", property(softmax)):
        fl.CrossEntropyLoss(class_weights=positive(V))(hidden, weight, torch.arange(4)).backward()
        assert found and not any(found)
        fl.CrossEntropyLoss(z_loss=0.1)(hidden, weight, torch.arange(4)).backward()
        assert found[-1]


def test_a_frozen_head_gets_no_gradient_of_the_smoothing():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(V, 8)
    fl.CrossEntropyLoss(0.1)(hidden, weight, torch.arange(4)).backward()
    assert weight.grad is None and hidden.grad is not None


def test_backward_twice_adds_up():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    loss = fl.CrossEntropyLoss(0.3, 0.1)(hidden, weight, torch.arange(4))
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once, rtol=1e-6, atol=1e-9)


# --- sparse gradients


@pytest.mark.parametrize("backend", ["torch", KERNELS])
@pytest.mark.parametrize("smoothing", [0.05, 0.5])
def test_smoothing_adds_nothing_to_the_error_of_sparse_gradients(backend, smoothing):
    """W the identity: the gradient of the hidden states is that of the logits, and the uniform part of it is exact."""
    n, v = 40, 300
    case = make(n, 8, v, spread=4.0, ignored=0)
    case = replace(case, hidden=case.hidden @ case.weight.T, weight=torch.eye(v, dtype=torch.float64))
    hidden, head, _ = case.inputs(torch.float64)
    sparse = fl.CrossEntropyLoss(smoothing, gradient="sparse", backend=backend)
    with coarse(1e-3):
        got = torch.autograd.grad(sparse(hidden, head, case.labels), hidden)[0]
    bound = sparse.gradient_report.bound
    exact = torch.autograd.grad(fl.CrossEntropyLoss(smoothing)(hidden, head, case.labels), hidden)[0]
    p = oracle.logits(hidden, head).softmax(1).detach()
    fused = (p - (1 - smoothing) * F.one_hot(case.labels, v)) / n  # what the sparse softmax is of
    assert 0 < (got - exact).abs().sum() <= bound * fused.abs().sum() <= 0.15 * fused.abs().sum()
    assert torch.autograd.grad(sparse(hidden, head, case.labels), hidden)[0].sum(1).abs().max() < 1e-12


def test_smoothing_under_a_softcap_is_exact_and_the_report_says_so():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(9000, 8)
    loss = fl.CrossEntropyLoss(0.1, gradient="sparse")
    loss(hidden, fl.LMHead(weight, softcap=5.0), torch.arange(5)).backward()
    assert str(loss.gradient_report).endswith("as label smoothing under a soft-cap has no sparse form")
    loss(hidden, fl.LMHead(weight), torch.arange(5)).backward()
    assert loss.gradient_report.mode == "sparse"
    half = fl.CrossEntropyLoss(0.1)
    half(hidden.bfloat16(), fl.LMHead(weight.bfloat16(), softcap=5.0), torch.arange(5)).backward()
    assert half.gradient_report.mode == "exact" and "soft-cap" in str(half.gradient_report)


# --- heads of other kinds


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_lora_on_the_head(weighted, softcap):
    case = make(33, 17, V, bias=True, scale=0.7)
    hidden, head, _ = case.inputs(torch.float64)
    b, a = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((V, 3), (3, 17)))
    lora = replace(head, softcap=softcap, low_rank=fl.LowRank(b, a))
    classes = positive(V) if weighted else None
    keep = case.labels >= 0
    z = oracle.logits(hidden[keep], lora)
    truth = oracle.cross_entropy(z, case.labels[keep], 0.3, 0.01, classes).mean()
    loss = fl.CrossEntropyLoss(0.3, 0.01, class_weights=classes)(hidden, lora, case.labels)
    leaves = (hidden, head.weight, head.bias, b, a)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, leaves), strict=True):
        assert relative(ours, theirs) < 1e-12


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_subclass_may_have_a_temperature(softcap):
    class Cooler(fl.CrossEntropyLoss):
        temperature_of_logits = 2.5

    case = make(33, 17, V, bias=True, softcap=softcap, ignored=0)
    hidden, head, _ = case.inputs(torch.float64)
    truth = oracle.cross_entropy(oracle.logits(hidden, head) / 2.5, case.labels, 0.3, 0.01, positive(V)).mean()
    loss = Cooler(0.3, 0.01, class_weights=positive(V))(hidden, head, case.labels)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-12)
    assert relative(*(torch.autograd.grad(x, head.weight)[0] for x in (loss, truth))) < 1e-12


def test_under_autocast_the_smoothing_is_not_rounded():
    hidden, weight = torch.randn(64, 32), torch.randn(V, 32)
    labels = torch.arange(64)
    with torch.autocast("cpu", torch.bfloat16):
        smoothed = fl.CrossEntropyLoss(1.0)(hidden, weight, labels)
        lse = fl.token_losses(hidden, weight, labels).lse.mean()
    torch.testing.assert_close(lse - smoothed, (hidden @ weight.T).mean(), rtol=1e-5, atol=2e-6)


def test_a_token_loss_of_ones_own_keeps_its_fields():
    class Mine(fl.CrossEntropyLoss):
        def token_loss(self, out, importance):
            return importance * out.nll

    hidden, weight, importance = torch.randn(4, 8), torch.randn(V, 8), torch.rand(4)
    nll = fl.token_losses(hidden, weight, torch.arange(4)).nll
    got = Mine()(hidden, weight, torch.arange(4), importance=importance)
    torch.testing.assert_close(got, (importance * nll).mean())
    assert Mine().batch_fields().keys() == {"importance"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # PyTorch's
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_part_of_a_graph(backend, gradient, monkeypatch):
    """Without a soft-cap; tests/test_compile.py has one. Hidden states of ignored tokens may hold anything."""
    monkeypatch.setattr(softmax, "FINEST_HALF", 1.0)  # float16 entries are another matter
    case = make(33, 17, V, bias=True, scale=0.7)
    options = dict(class_weights=positive(V), gradient=gradient, reduction="weighted_mean")
    loss = fl.CrossEntropyLoss(0.2, 0.01, **options)
    b, a = (torch.randn(*shape, requires_grad=True) for shape in ((V, 3), (3, 17)))

    def step(hidden, weight, bias, b, a, labels):
        return loss(hidden, fl.LMHead(weight, bias, 0.7, low_rank=fl.LowRank(b, a)), labels)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        hidden, head, _ = case.inputs(torch.float32)
        with torch.no_grad():
            hidden[case.labels < 0] = torch.nan
        leaves = (hidden, head.weight, head.bias, b, a)
        value = function(*leaves, case.labels)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for eager, captured in zip(*results, strict=True):
        torch.testing.assert_close(captured, eager, rtol=2e-5, atol=1e-6)
    assert all(value.isfinite().all() for value in results[1])


# --- class weights as an attribute


def test_class_weights_are_no_state_and_move_with_the_objective():
    loss = fl.CrossEntropyLoss(class_weights=positive(V))
    assert not loss.state_dict() and not list(loss.parameters())
    assert loss.to("meta").class_weights.device.type == "meta"
    loss = fl.CrossEntropyLoss(class_weights=positive(V).tolist())
    assert torch.equal(copy.deepcopy(loss).class_weights, positive(V).float())
    for form in (positive(V).numpy(), positive(V).float(), np.ones(V, dtype=np.int64), torch.ones(V).half()):
        loss.class_weights = form
        torch.testing.assert_close(loss.class_weights.double(), torch.as_tensor(form).double())
    loss.class_weights = None
    assert loss.is_plain
    assert repr(fl.CrossEntropyLoss()) == "CrossEntropyLoss()"
    assert repr(fl.CrossEntropyLoss(0.1, class_weights=positive(V))) == (
        "CrossEntropyLoss(label_smoothing=0.1, class_weights=[123], reduction='token_mean')"
    )


WRONG = {
    "infinite": ([1.0, float("inf")], ValueError, "got inf"),
    "not a number": ([1.0, float("nan")], ValueError, "got nan"),
    "all 0": ([0.0, 0.0], ValueError, "not all 0, got 0"),
    "two dimensions": (torch.ones(2, 2), ValueError, r"got shape \[2, 2\]; one for each class"),
    "a number": (2.0, ValueError, r"got shape \[\]"),
    "text": ("balanced", TypeError, "got str"),
    "a mask": (torch.tensor([True]), TypeError, "got torch.bool"),
    "trained": (torch.ones(2, requires_grad=True), ValueError, "requires a gradient, which would be lost; .*detached"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_class_weights_are_checked_whenever_they_are_set(name):
    wrong, kind, message = WRONG[name]
    with pytest.raises(kind, match=f"class_weights: expected .*{message}"):
        fl.CrossEntropyLoss(class_weights=wrong)
    loss = fl.CrossEntropyLoss(class_weights=[1.0, 2.0])
    with pytest.raises(kind, match=f"class_weights: expected .*{message}"):
        loss.class_weights = wrong
    assert loss.class_weights.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("smoothing, softcap", [(0.0, None), (0.2, None), (0.0, 4.0)])
def test_class_weights_below_0(smoothing, softcap):
    case = make(33, 17, V, bias=True, softcap=softcap)
    hidden, head, _ = case.inputs(torch.float64)
    classes = positive(V) - 1.0
    assert (classes < 0).any()
    truth = F.cross_entropy(oracle.logits(hidden, head), case.labels, classes, label_smoothing=smoothing)
    got = fl.CrossEntropyLoss(smoothing, class_weights=classes, reduction="weighted_mean")(hidden, head, case.labels)
    assert got.item() == pytest.approx(truth.item(), rel=1e-12)
    for ours, theirs in zip(gradients(got, hidden, head), gradients(truth, hidden, head), strict=True):
        assert relative(ours, theirs) < 1e-12


def test_class_weights_below_0_have_no_smoothing_under_a_softcap():
    loss = fl.CrossEntropyLoss(0.1, class_weights=[1.0, -2.0, 1.0])
    head = fl.LMHead(torch.randn(3, 8), softcap=4.0)
    with pytest.raises(ValueError, match=r"class_weights: expected numbers ≥ 0 .* got -2.0; take label_smoothing=0"):
        loss(torch.randn(4, 8), head, torch.zeros(4, dtype=torch.int64))
    loss.class_weights = [1.0, 2.0, 1.0]
    assert loss(torch.randn(4, 8), head, torch.zeros(4, dtype=torch.int64)).isfinite()


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_of_another_vocabulary(smoothing, softcap):
    loss = fl.CrossEntropyLoss(smoothing, class_weights=torch.ones(V - 1))
    with pytest.raises(
        ValueError, match=r"class_weights: expected \[V\] with V = 123.* got \[122\]; give one number for"
    ):
        loss(torch.randn(4, 8), fl.LMHead(torch.randn(V, 8), softcap=softcap), torch.arange(4))


@pytest.mark.parametrize("option, wrong", [("label_smoothing", 1.5), ("label_smoothing", -0.1), ("z_loss", -1)])
def test_options_have_bounds(option, wrong):
    with pytest.raises(ValueError, match=f"{option}: expected a finite number .*, got {wrong}"):
        fl.CrossEntropyLoss(**{option: wrong})


def test_names_of_others_are_told_ours():
    for theirs, ours in (("weight", "class_weights"), ("ce_weight", "class_weights"), ("lse_square_scale", "z_loss"),
                         ("label_smoothing_factor", "label_smoothing")):  # fmt: skip
        with pytest.raises(TypeError, match=f"CrossEntropyLoss: has no option {theirs}; did you mean {ours}?"):
            fl.CrossEntropyLoss(**{theirs: 0.1})
    with pytest.raises(TypeError, match="weight is an argument of the call"):
        fl.TALRLoss(weight=torch.ones(3))
    with pytest.raises(ValueError, match="reduction: expected token_mean or weighted_mean, got 'sum'"):
        fl.CrossEntropyLoss(reduction="sum")


@pytest.mark.parametrize("items", [3, (1.0,), (None, 3), "ab"])
def test_a_weighted_mean_takes_a_pair_of_items(items):
    loss = fl.CrossEntropyLoss(class_weights=torch.ones(V), reduction="weighted_mean")
    with pytest.raises((ValueError, TypeError), match=r"num_items: .*expected"):
        loss(torch.randn(4, 8), torch.randn(V, 8), torch.arange(4), num_items=items)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_label_out_of_range_is_an_error_of_labels(softcap):
    loss = fl.CrossEntropyLoss(0.1, class_weights=torch.ones(V))
    head = fl.LMHead(torch.randn(V, 8), softcap=softcap)
    labels = torch.tensor([0, V, -100])
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        with pytest.raises(ValueError, match="labels: expected 0 ≤ label < 123"):
            call(torch.randn(3, 8), head, labels)


def test_what_is_wrong_with_hidden_is_said_of_hidden():
    for hidden, kind in (([1.0], TypeError), (torch.ones(3, 8).long(), TypeError), (torch.randn(3, 9), ValueError)):
        with pytest.raises(kind, match=r"^hidden: expected"):
            fl.CrossEntropyLoss(0.1)(hidden, fl.LMHead(torch.randn(V, 8), softcap=2.0), torch.arange(3))
    with pytest.raises(TypeError, match="reference: CrossEntropyLoss has no use for one"):
        reference = fl.Reference(torch.randn(3, 8))
        fl.CrossEntropyLoss(0.1)(torch.randn(3, 8), torch.randn(V, 8), torch.arange(3), reference=reference)
    with pytest.raises(TypeError, match="weights: CrossEntropyLoss has no such field"):
        fl.CrossEntropyLoss(0.1)(torch.randn(3, 8), torch.randn(V, 8), torch.arange(3), weights=torch.ones(3))


# --- in a patched model


def test_a_trainer_with_smoothing_by_patch_has_the_gradient_of_one_with_its_own():
    """transformers smooths over the tokens of each batch, so all rows are in one."""
    ours = step(trainer(fl.patch(llama(), fl.CrossEntropyLoss(0.1))))
    theirs = step(trainer(llama(), label_smoothing_factor=0.1))
    assert error(ours, theirs) < 6e-7


def test_a_trainer_that_smooths_itself_is_told_what_to_write():
    """It trains as without the patch, from full logits, and hears which loss would spare them."""
    with pytest.warns(UserWarning, match=r"patch\(model, fused_losses.CrossEntropyLoss\(label_smoothing="):
        ours = step(trainer(fl.patch(llama()), label_smoothing_factor=0.1))
    assert error(ours, step(trainer(llama(), label_smoothing_factor=0.1))) < 1e-12


def test_evaluation_reports_the_mean_nll():
    model = fl.patch(llama(), fl.CrossEntropyLoss(0.3, class_weights=positive(97)))
    row = rows(1)[0]
    batch = {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])}
    truth, _ = expected(llama(), [row], "ce")
    model.eval()
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(truth, rel=1e-6)
    labels = batch["labels"][0, 1:]
    z = log_probs(llama(), row["input_ids"])[labels != -100]
    smoothed = oracle.cross_entropy(z, labels[labels != -100], 0.3, class_weights=positive(97)).mean().item()
    assert model.train()(**batch).loss.item() == pytest.approx(smoothed, rel=1e-6)


def test_a_weighted_mean_cannot_be_accumulated_by_a_trainer():
    loss = fl.CrossEntropyLoss(class_weights=torch.ones(97), reduction="weighted_mean")
    model = fl.patch(llama(), loss)
    assert not model.accepts_loss_kwargs
    with pytest.raises(ValueError, match=r"num_items_in_batch: .*reduction='token_mean'"):
        model(input_ids=torch.ones(1, 4).long(), labels=torch.ones(1, 4).long(), num_items_in_batch=3)

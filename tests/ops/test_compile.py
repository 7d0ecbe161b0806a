"""Callers compiled into one graph, `torch.compile(fullgraph=True)`: the same numbers as in eager mode, however they call."""

import copy
import gc
import pickle

import pytest
import torch
import torch._functorch.config
from cases import make
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fused_losses as fl
from fused_losses import compiled
from fused_losses.problem import DIFFERENTIABLE, OUTPUTS
from fused_losses.sparse import softmax

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
OPS = torch.ops.fused_losses
ROWS, LENGTH, D, V = 2, 12, 8, 60


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()


def one_graph(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def inputs(length=LENGTH, dtype=torch.float32, v=V, frozen=False, seed=0):
    """hidden, weight and labels, the first three of them ignored."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, length, D, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(v, D, generator=g).to(dtype).requires_grad_(not frozen)
    labels = torch.randint(v, (ROWS, length), generator=g)
    labels[0, :3] = -100
    return hidden, weight, labels


def results(function, arguments):
    value = function(*arguments)
    value.sum().backward()
    return [value.detach(), *(x.grad for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad)]


def assert_same(function, make_inputs=inputs, exactly=False, compiled_function=None, **options):
    if compiled_function is None:
        compiled_function = one_graph(function, **options)
    expected, got = results(function, make_inputs()), results(compiled_function, make_inputs())
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 2e-5, "atol": 1e-6}
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, **tolerance)
    return got


def operator_arguments(
    sparse=False, reference=None, frozen=False, grad=True, ignored=2, dtype=torch.float32, strided=False, bias=True,
    wanted="entropy", softcap=None, rank=0, ids=0, beta=None, entropy_gradient=False,
):  # fmt: skip
    hidden, weight, labels = torch.randn(11, D).to(dtype), torch.randn(V, D).to(dtype), torch.randint(V, (11,))
    if strided:
        hidden, weight = (x.t().contiguous().t() for x in (hidden, weight))
    labels[:ignored] = -100
    leaves = [hidden, weight, torch.randn(V).to(dtype) if bias else None, None]
    if rank:
        leaves[0], leaves[3] = torch.randn(11, D + rank).to(dtype), torch.randn(V, rank).to(dtype)
    needs = [grad, grad and not frozen, grad and bias and not frozen, grad and rank > 0]
    for leaf, need in zip(leaves, needs, strict=True):
        if leaf is not None:
            leaf.requires_grad_(need)
    ref_hidden = None if reference is None else torch.randn(11, D).to(dtype)
    ref_weight = torch.randn(V, D).to(dtype) if reference == "own" else None
    tolerance = 0.15 if sparse else None
    return compiled.Call(
        *leaves, labels, ref_hidden, ref_weight, None, None, torch.randint(-1, V, (11, ids)) if ids else None, -100, 1.5,
        softcap, 1.0, None, dtype, dtype, D + rank, wanted, entropy_gradient, beta, 20, tolerance, "auto", needs, None,
    )  # fmt: skip


OPTIONS = {
    "exact": {},
    "exact, frozen": {"frozen": True},
    "sparse": {"sparse": True},
    "sparse, frozen, all statistics": {
        "sparse": True,
        "frozen": True,
        "reference": "own",
        "wanted": "entropy,reference_entropy,topk_entropy",
    },
    "no gradient": {"grad": False, "reference": "own"},
    "all ignored": {"sparse": True, "ignored": 11},
    "strided, none ignored": {"strided": True, "ignored": 0, "bias": False},
    "float64, shared reference": {"dtype": torch.float64, "reference": "shared", "softcap": 3.0},
    "bfloat16": {"dtype": torch.bfloat16, "sparse": True},
    "single logits, sparse": {"ids": 4, "sparse": True, "softcap": 3.0},
    "single logits, frozen": {"ids": 4, "frozen": True, "softcap": 3.0},
    "everything": {
        "ids": 4,
        "beta": 0.5,
        "entropy_gradient": True,
        "reference": "own",
        "wanted": "entropy,reference_entropy,topk_entropy,rank,log_p2",
    },
    "everything, frozen": {"ids": 4, "beta": 1.0, "entropy_gradient": True, "reference": "shared", "frozen": True},
    "low rank, frozen": {"rank": 3, "frozen": True, "reference": "shared"},
    "low rank, sparse": {"rank": 3, "sparse": True, "reference": "own"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_operators(name):
    call = operator_arguments(**OPTIONS[name])
    opcheck(OPS.losses_forward.default, call)
    if not any(call.needs):
        return
    *outputs, saved, layout = OPS.losses_forward(*call)
    given = [v.detach() if isinstance(v, torch.Tensor) else v for v in call]
    if call.keeps_rows:
        left_out = ("hidden", "reference_hidden", "reference_weight", "reference_bias", "reference_low_rank")
        given = [None if name in left_out else v for name, v in zip(call._fields, given, strict=True)]
    found = dict(zip(OUTPUTS, outputs, strict=True))
    there = {
        "kl": call.reference_hidden is not None, "logits_at": call.ids is not None, "entropy": call.entropy_gradient,
        "divergence": call.beta is not None,
    }  # fmt: skip
    upstream = [torch.randn_like(found[name]) if there.get(name, True) else None for name in DIFFERENTIABLE]
    opcheck(OPS.losses_backward.default, (*upstream, saved, layout, *given))


def test_operators_of_the_objectives():
    opcheck(OPS.checked.default, (torch.rand(3, 2).t(), torch.rand(2, 3) > 0, "fractions", "x", 0))
    opcheck(OPS.median_temperature.default, (torch.rand(4), torch.arange(4) // 2, torch.arange(4) > 0))


def test_saved_bytes_are_the_tensors():
    tensors = [
        torch.rand(3, 5),
        None,
        torch.arange(7) > 3,
        torch.rand(0, 4).half(),
        torch.arange(5).int(),
        torch.rand(2).double(),
    ]
    saved, layout = compiled.pack(list(tensors), torch.device("cpu"), numbers=(6, 7))
    back, numbers = compiled.unpack(saved, layout)
    assert numbers == [6, 7]
    for a, b in zip(tensors, back, strict=True):
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))


class Own(fl.Objective):
    wanted = frozenset({"entropy"})

    def token_loss(self, out, w):
        return w * out.nll / out.entropy  # 0 / 0 where there is no label


TIMES = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
GARBAGE = TIMES // 5 - 1000 * (TIMES < 3)  # ids of ignored tokens can be anything
OBJECTIVES = {
    "CrossEntropy": (fl.CrossEntropyLoss, {}, {}),
    "TALR": (fl.TALRLoss, {}, {}),
    "TALR, packed": (fl.TALRLoss, {}, {"sequence_ids": GARBAGE}),
    "TALR, fixed": (fl.TALRLoss, {"temperature": 2.0}, {"num_items": 17}),
    "LAwF": (fl.LAwFLoss, {}, {"confidence": True, "reference": "own"}),
    "LAwF, group mean": (
        fl.LAwFLoss, {"retain_weight": 2.0, "reduction": "group_mean"}, {"confidence": True, "reference": "shared"},
    ),
    "LAwF, group mean of a batch": (
        fl.LAwFLoss, {"reduction": "group_mean"},
        {"confidence": True, "reference": "shared", "num_items": (torch.tensor(9), 50)},
    ),
    "FLOW": (fl.FLOWLoss, {"temperature": 1.3}, {"initial_nll": torch.tensor([1.0, 2.0])}),
    "FLOW, packed": (
        fl.FLOWLoss, {"temperature": 1.3},
        {"initial_nll": torch.tensor([1.0, 2.0, 0.0, 3.0, 1.1]), "sequence_ids": GARBAGE},
    ),
    "DFT": (fl.DFTLoss, {}, {"num_items": torch.tensor(31)}),
    "ASFT": (fl.ASFTLoss, {}, {"reference": "own"}),
    "EAFT": (fl.EAFTLoss, {}, {}),
    "PSFT": (fl.PSFTLoss, {}, {"old_nll": TIMES / 3}),
    "own": (Own, {}, {"w": TIMES - 4.0}),
}  # fmt: skip


@pytest.mark.each_value
@pytest.mark.parametrize(("gradient", "frozen"), [("exact", False), ("sparse", True)], ids=["exact", "sparse-frozen"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective(name, gradient, frozen, monkeypatch):
    # In a graph no upstream weight is known in forward; with a KL float16 numbers would be kept there.
    monkeypatch.setattr(softmax, "FINEST_HALF", 1.0)
    kind, options, given = OBJECTIVES[name]
    loss = kind(gradient=gradient, **options)
    case = make(ROWS * LENGTH, D, V, bias=True, reference=given.get("reference"), frozen=frozen)
    reports = []

    def step(hidden, weight, bias, labels, ref_hidden, ref_weight):
        keywords = dict(given)
        if "reference" in given:
            keywords["reference"] = fl.Reference(ref_hidden, ref_weight)
        if "confidence" in given:
            keywords["confidence"] = torch.where(labels < 0, torch.nan, (labels % 3 == 0) * 0.7)
        return 3 * loss(hidden.sin() * 2, fl.LMHead(weight, bias, 1.2, 9.0), labels, **keywords)

    def arguments():
        reports.append(loss.gradient_report)
        hidden, head, ref = case.inputs(torch.float32)
        hidden = hidden.detach().view(ROWS, LENGTH, D).requires_grad_()
        ref_hidden = None if ref is None else ref.hidden.view(ROWS, LENGTH, D)
        ref_weight = None if ref is None or ref.head is None else ref.head.weight
        labels = case.labels.view(ROWS, LENGTH).clone()
        labels[0, :3] = -100
        return hidden, head.weight, head.bias, labels, ref_hidden, ref_weight

    assert_same(step, arguments)
    # One report of each call, which backward has filled in; with a KL eager mode saves one number less per entry.
    eager, captured = reports[1], loss.gradient_report
    assert captured is not eager
    assert (captured.mode, captured.tokens, captured.exact_tokens) == (eager.mode, eager.tokens, eager.exact_tokens)
    assert captured.entries == eager.entries and captured.bound == pytest.approx(eager.bound, rel=1e-4, abs=1e-9)


@pytest.mark.pairwise
@pytest.mark.parametrize("reference", [None, "shared", "own"])
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_token_losses_are_bit_for_bit_those_of_eager_mode(gradient, reference, frozen):
    ref_hidden, ref_weight = torch.randn(ROWS, LENGTH, D), torch.randn(V, D)

    def call(hidden, weight, labels):
        ref = None if reference is None else fl.Reference(ref_hidden, ref_weight if reference == "own" else None)
        return fl.token_losses(hidden, weight, labels, reference=ref, gradient=gradient)

    def loss(hidden, weight, labels):
        out = call(hidden, weight, labels)
        per_token = out.nll * (out.entropy > 1) - (0 if out.kl is None else 0.3 * out.kl)
        return per_token + out.entropy

    def make_inputs():
        return inputs(frozen=frozen)

    assert_same(loss, make_inputs, exactly=True)
    expected, got = call(*make_inputs()), one_graph(call)(*make_inputs())
    for name in ("nll", "kl", "entropy", "prediction", "reference_nll", "reference_entropy"):
        a, b = getattr(expected, name), getattr(got, name)
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name
    assert (got.prediction[0, :3] == -1).all() and (got.nll[0, :3] == 0).all()
    report = got.gradient_report
    assert (report.mode, report.tokens) == (gradient, None) and str(report).startswith(f"{gradient} gradients")


def test_one_output_backward_without_the_other():
    for name in ("nll", "kl"):
        assert_same(
            lambda x, w, labels, name=name: getattr(
                fl.token_losses(x, w, labels, reference=fl.Reference(x.detach() * 0.9)), name
            ),
            exactly=True,
        )


def test_bfloat16_takes_sparse_gradients():
    loss = fl.LAwFLoss()

    def step(hidden, weight, labels):
        return loss(
            hidden.tanh(),
            weight,
            labels,
            confidence=(labels % 3 == 0).float(),
            reference=fl.Reference(hidden.detach() + 1),
        )

    expected, got = (
        results(f, inputs(dtype=torch.bfloat16, v=8192)) for f in (step, one_graph(step))
    )  # fmt: skip
    for a, b in zip(expected, got, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(b, a, rtol=2**-7, atol=1e-5)
    assert loss.gradient_report.mode == "sparse" and 0 < loss.gradient_report.bound < 0.15


@pytest.mark.parametrize("dynamic", [None, True])
def test_number_of_tokens_changes(dynamic):
    talr, lawf = fl.TALRLoss(gradient="sparse"), fl.LAwFLoss()

    def step(hidden, weight, labels):
        ref = fl.Reference(hidden.detach() + 1)
        return talr(hidden, weight, labels) + lawf(
            hidden.tanh(), weight, labels, confidence=(labels % 3 == 0).float(), reference=ref
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled_step = one_graph(step, counter, dynamic=dynamic)
    for seed, length in enumerate((12, 15, 24, 5, 4)):
        assert_same(step, lambda seed=seed, length=length: inputs(length, seed=seed), compiled_function=compiled_step)
    assert counter.frame_count <= 2


def test_options_change_between_calls():
    lawf, talr = fl.LAwFLoss(), fl.TALRLoss(2.0)

    def step(hidden, weight, labels, softcap, items):
        confidence, ref = (labels % 3 == 0).float(), fl.Reference(hidden.detach() + 1)
        head = fl.LMHead(weight, softcap=softcap)
        loss = lawf(hidden, head, labels, confidence=confidence, reference=ref, num_items=items)
        return loss + talr(hidden, head, labels, num_items=items)

    counter = CompileCounterWithBackend("aot_eager")
    compiled_step = one_graph(step, counter)
    for items in (5, 7, 9, 10.5, 11.25, 12.75, 15.5):
        lawf.anchor_weight, talr.temperature = items / 10, items / 3
        assert_same(step, lambda items=items: (*inputs(), 30.0, items), compiled_function=compiled_step)
    assert counter.frame_count <= 5
    assert_same(step, lambda: (*inputs(), 20.0, 15.5), compiled_function=compiled_step)


@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_all_ignored(gradient, frozen):
    losses = [fl.TALRLoss(gradient=gradient), fl.CrossEntropyLoss(gradient=gradient)]

    def make_inputs():
        hidden, weight, labels = inputs(frozen=frozen)
        return hidden, weight, torch.full_like(labels, -100)

    got = assert_same(lambda *given: sum(loss(*given) for loss in losses), make_inputs, exactly=True)
    assert all(not x.any() for x in got)


@pytest.mark.parametrize(("backend", "mode"), [("auto", "inductor"), ("reference", "aot_eager")])
def test_nothing_comes_from_ignored_tokens(backend, mode):
    """Fresh memory is NaN in these tests, and so are here the hidden states and confidences without a label."""
    loss = fl.LAwFLoss(backend=backend)

    def step(hidden, weight, labels):
        confidence = torch.where(labels < 0, torch.nan, (labels % 3 == 0).float())
        reference = fl.Reference(hidden.detach() * 0.9)
        return loss(hidden, weight, labels, confidence=confidence, reference=reference)

    def make_inputs():
        hidden, weight, labels = inputs()
        with torch.no_grad():
            hidden[labels < 0] = torch.nan
        return hidden, weight, labels

    _, d_hidden, d_weight = assert_same(step, make_inputs, backend=mode)
    assert not d_hidden[0, :3].any() and d_weight.isfinite().all()


@pytest.mark.each_value
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_backends(backend, dynamic):
    losses = [fl.EAFTLoss(backend=backend, top_k=100), fl.TALRLoss(backend=backend)]
    assert_same(lambda *given: sum(loss(*given) for loss in losses), dynamic=dynamic)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_autocast(gradient, outside):
    loss = fl.TALRLoss(gradient=gradient)

    def inside(*given):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(*given)

    if not outside:
        return assert_same(inside)
    plain = one_graph(lambda *given: loss(*given))

    def around(*given):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(*given)

    assert_same(inside, compiled_function=around)
    assert plain(*inputs()) != around(*inputs())


def test_checkpointing():
    loss = fl.TALRLoss(gradient="sparse")

    def both(x, w, labels):
        return loss(x.sin(), w, labels) + fl.token_losses(x.sin(), w, labels).nll.mean()

    assert_same(lambda x, w, labels: checkpoint(both, x, w, labels, use_reentrant=False))
    assert loss.gradient_report.bound is not None


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_backward_twice(gradient, frozen):
    loss = fl.CrossEntropyLoss(gradient=gradient)
    with torch._functorch.config.patch(donated_buffer=False):  # torch.compile asks for it
        hidden, weight, labels = inputs(frozen=frozen)
        value = one_graph(lambda *given: loss(*given))(hidden, weight, labels)
        first = torch.autograd.grad(value, hidden, retain_graph=True)[0]
        kept = first.clone()
        first.zero_()
        assert torch.equal(torch.autograd.grad(value, hidden)[0], kept)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_modes(mode):
    with mode():
        loss = fl.TALRLoss()
        value = one_graph(lambda *given: loss(*given))(*inputs())
        assert not value.requires_grad and value.item() == pytest.approx(loss(*inputs()).item(), rel=1e-6)
    assert loss.gradient_report.mode == "none"
    assert_same(lambda *given: loss(*given))


def test_second_derivatives_are_refused():
    value = one_graph(lambda *given: fl.token_losses(*given).nll.sum())
    hidden, weight, labels = inputs()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(value(hidden, weight, labels), hidden, create_graph=True)[0].sum().backward()
    call = operator_arguments()
    nll = OPS.losses_forward(*call)[0]
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(nll.sum(), call.hidden, create_graph=True)[0].sum().backward()


def test_values_are_checked_when_the_graph_runs():
    hidden, weight, labels = inputs()
    wrong = labels.clone()
    wrong[1, 2] = V

    def lawf(c):
        return fl.LAwFLoss()(hidden, weight, labels, confidence=c, reference=fl.Reference(hidden.detach()))

    def flow(ids, initial):
        return fl.FLOWLoss(1.0)(hidden, weight, labels, initial_nll=initial, sequence_ids=ids)

    ids = torch.zeros_like(labels)
    for function, given, message in (
        (
            lambda y: fl.CrossEntropyLoss()(hidden, weight, y),
            (wrong,),
            r"labels: expected 0 ≤ label < 60.*-100, got 60",
        ),
        (lambda y: fl.TALRLoss(backend="reference")(hidden, weight, y), (wrong,), r"0 ≤ label < 60.*-100, got 60"),
        (lawf, (labels * 1.0,), r"confidence: expected numbers in \[0, 1\]"),
        (lambda n: fl.CrossEntropyLoss()(hidden, weight, labels, num_items=n), (torch.tensor(0),), "num_items.*> 0"),
        (lambda x: fl.PSFTLoss()(hidden, weight, labels, old_nll=x), (labels / 0,), "old_nll.*finite"),
        (flow, (ids + 2, torch.ones(2)), "sequence_ids: expected 0 ≤ id < 2.*got 2 to 2"),
        (flow, (ids, -torch.ones(2)), "initial_nll: expected finite numbers ≥ 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            one_graph(function)(*given)


def test_a_process_group_is_no_part_of_a_graph():
    loss = fl.TALRLoss()
    loss.process_group = object()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no part of a graph with a process_group"):
        one_graph(lambda *given: loss(*given))(*inputs())


def test_without_fullgraph_the_call_is_a_graph_break_as_in_eager_mode():
    loss = fl.LAwFLoss(gradient="exact")
    counter = CompileCounterWithBackend("aot_eager")

    def step(hidden, weight, labels):
        reference = fl.Reference(hidden.detach() + 1)
        return 2 * loss(hidden.sin(), weight, labels, confidence=(labels % 3 == 0).float(), reference=reference)

    assert_same(step, compiled_function=torch.compile(step, backend=counter), exactly=True)
    assert counter.frame_count == 2


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

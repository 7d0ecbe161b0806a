"""Callers compiled into one graph, `torch.compile(fullgraph=True)`: the same numbers as in eager mode."""

import pytest
import torch
import torch._functorch.config
from cases import make
from graphs import LENGTH, ROWS, D, V, assert_same, inputs, one_graph, operator_arguments, results
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fused_losses as fl
from fused_losses.sparse import softmax

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
OPS = torch.ops.fused_losses


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()


class Own(fl.Objective):
    wanted = frozenset({"entropy"})

    def token_loss(self, out, w):
        return w * out.nll / out.entropy  # 0 / 0 where there is no label


TIMES = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
GARBAGE = TIMES // 5 - 1000 * (TIMES < 3)  # ids of ignored tokens can be anything
NAMED = {
    "teacher_ids": torch.stack([TIMES % 7 + 1, TIMES % 5 + 10, -100 + 0 * TIMES], -1) + 1000 * (TIMES < 3)[..., None],
    "teacher_logprobs": torch.stack([-1.0 - TIMES / 9, -2.0 + 0 * TIMES, TIMES * torch.nan], -1),
}
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
    "smoothing, soft-cap": (fl.CrossEntropyLoss, {"label_smoothing": 0.1, "z_loss": 0.01}, {}),
    "class weights": (
        fl.CrossEntropyLoss,
        {"label_smoothing": 0.2, "class_weights": torch.arange(V) % 3, "reduction": "weighted_mean"}, {},
    ),
    "InfoSFT": (fl.InfoSFTLoss, {}, {}),
    "STM": (fl.STMLoss, {"threshold": 40.0}, {"reference": "shared"}),
    "STM, kept": (fl.STMLoss, {"threshold": 40.0, "reduction": "kept_mean"}, {"reference": "own"}),
    "STM, kept, field": (fl.STMLoss, {"reduction": "kept_mean"}, {"initial_token_nll": TIMES % 3 / 2}),
    "Mask the Target": (fl.MaskTheTargetLoss, {"kl_weight": 0.7}, {"reference": "own"}),
    "SFT + KL": (fl.SFTKLLoss, {"kl_weight": 0.3}, {"reference": "shared"}),
    "LAwF, target": (fl.LAwFLoss, {"target_probability": 0.1}, {"confidence": True, "reference": "own"}),
    "LAwF, targets, group mean": (
        fl.LAwFLoss, {"reduction": "group_mean"},
        {"confidence": True, "reference": "shared", "target_probability": 0.3 / (1 + TIMES % 7)},
    ),
    "EKSFT": (fl.EKSFTLoss, {}, {"reference": "shared"}),
    "EKSFT, intersection": (
        fl.EKSFTLoss, {"fraction": 0.5, "selection": "intersection", "reduction": "token_mean"},
        {"reference": "own", "num_items": 17},
    ),
    "TALR, lower": (fl.TALRLoss, {"even_median": "lower"}, {}),
    "PSFT, high": (fl.PSFTLoss, {"epsilon_high": 0.28}, {"old_nll": TIMES / 3}),
    "EAFT, normaliser": (fl.EAFTLoss, {"normaliser": 3.0}, {}),
    "weighted": (fl.WeightedLoss, {}, {"weights": TIMES - 4.0}),
    "JSD": (fl.JSDLoss, {"beta": 0.3}, {"reference": "own"}),
    "JSD, forward": (fl.JSDLoss, {"beta": 0, "nll_weight": 0.5}, {"reference": "shared", "num_items": 7}),
    "JSD, two softmaxes": (fl.JSDLoss, {"beta": 0, "temperature": 2.0, "nll_weight": 0.5}, {"reference": "own"}),
    "reverse KL": (fl.ReverseKLLoss, {"temperature": 2.0}, {"reference": "own"}),
    "top k": (fl.TopKDistillationLoss, {"nll_weight": 0.5}, NAMED),
    "top k, jsd, rest": (fl.TopKDistillationLoss, {"divergence": "jsd", "rest": "bucket", "temperature": 2.0}, NAMED),
    "top k, reverse, two softmaxes": (
        fl.TopKDistillationLoss, {"divergence": "reverse", "temperature": 2.0, "nll_weight": 0.5},
        NAMED | {"num_items": 9},
    ),
    "own": (Own, {}, {"w": TIMES - 4.0}),
}  # fmt: skip
# In a graph they differ from another by a number, or by what two others have.
LIKE_ANOTHER = (
    "TALR, fixed", "TALR, lower", "PSFT, high", "EAFT, normaliser", "LAwF, target", "LAwF, group mean",
    "STM, kept", "JSD", "EKSFT", "top k, reverse, two softmaxes", "FLOW", "SFT + KL",
)  # fmt: skip


@pytest.mark.each_value
@pytest.mark.parametrize(("gradient", "frozen"), [("exact", False), ("sparse", True)], ids=["exact", "sparse-frozen"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name in LIKE_ANOTHER else name for name in OBJECTIVES]
)
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
    # Single logits become entries where their weights are known: in eager mode in forward, in a graph in backward.
    singles = eager.entries - captured.entries
    assert 0 <= singles <= eager.tokens * 3 if "teacher_ids" in given else singles == 0
    assert captured.bound == pytest.approx(eager.bound, rel=1e-4, abs=1e-9)


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


def test_bfloat16_takes_sparse_gradients(monkeypatch):
    monkeypatch.setattr(softmax, "FINEST_HALF", 1.0)  # float16 entries are another matter
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


@pytest.mark.each_value
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


@pytest.mark.each_value
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


@pytest.mark.each_value
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

"""Bad input: each error names the argument, what was expected, what came, and the remedy."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import fused_losses as fl

HIDDEN, WEIGHT, LABELS = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 6, -100])
REFERENCE = fl.Reference(torch.randn(3, 4))
CONFIDENCE = torch.tensor([0.0, 1.0, 0.0])


def losses(hidden=HIDDEN, head=WEIGHT, labels=LABELS, **options):
    return fl.token_losses(hidden, head, labels, **options)


def lawf(confidence=CONFIDENCE, reference=REFERENCE, **options):
    return fl.LAwFLoss(**options)(HIDDEN, WEIGHT, LABELS, confidence=confidence, reference=reference)


class Custom(fl.Objective):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def token_loss(self, out, **per_token):
        return self.function(out, **per_token)


def hooked():
    linear = torch.nn.Linear(4, 7)
    linear.register_forward_hook(lambda module, inputs, output: output * 2)
    return linear


META = torch.empty(3, 4, device="meta")

BAD = {
    "hidden: wrong width": (lambda: losses(torch.randn(3, 5)), ValueError, r"hidden.*D = 4.*\[7, 4\].*\[3, 5\]"),
    "hidden: weight transposed": (lambda: losses(torch.randn(3, 7)), ValueError, r"logits.*transposed .give weight\.T"),
    "hidden: sparse": (lambda: losses(HIDDEN.to_sparse()), TypeError, r"hidden.*dense.*sparse_coo.*to_dense\(\)"),
    "head: sparse": (lambda: losses(head=WEIGHT.to_sparse()), TypeError, r"head weight.*dense.*sparse_coo.*to_dense"),
    "reference: sparse": (lambda: fl.Reference(HIDDEN.to_sparse()), TypeError, "reference hidden.*dense.*sparse_coo"),
    "hidden: integers": (lambda: losses(HIDDEN.long()), TypeError, "hidden.*float64.*int64"),
    "hidden: a list": (lambda: losses([[1.0]]), TypeError, "hidden.*tensor.*list"),
    "hidden: no tokens": (lambda: losses(torch.randn(0, 4), labels=LABELS[:0]), ValueError, r"at least one token.*\[0, 4\]"),
    "hidden: a scalar": (lambda: losses(torch.tensor(1.0)), ValueError, r"hidden.*\[\]"),
    "hidden: another dtype than the head": (
        lambda: losses(HIDDEN.bfloat16()), TypeError, r"bfloat16.*float32.*hidden\.to\(weight\.dtype\)",
    ),
    "hidden: on another device": (lambda: losses(META), ValueError, "hidden is on meta, head weight on cpu"),
    "labels: one token more": (lambda: losses(labels=torch.arange(4)), ValueError, r"labels.*\[3\].*\[4\].*labels\[:, 1:\]"),
    "labels: wrong rank": (lambda: losses(labels=LABELS[None]), ValueError, r"labels.*\[3\].*\[1, 3\]"),
    "labels: floats": (lambda: losses(labels=LABELS.float()), TypeError, r"labels.*int64.*float32.*\.long\(\)"),
    "labels: int32": (lambda: losses(labels=LABELS.int()), TypeError, r"labels.*int64.*int32.*\.long\(\)"),
    "labels: too large": (lambda: losses(labels=torch.tensor([0, 7, 1])), ValueError, "labels.*< 7.*got 7.*resize"),
    "labels: negative": (lambda: losses(labels=torch.tensor([0, -1, 1])), ValueError, "0 ≤ label.*-100, got -1"),
    "labels: on another device": (lambda: losses(labels=LABELS.to("meta")), ValueError, "labels are on meta"),
    "labels: a list": (lambda: losses(labels=[1, 2, 3]), TypeError, "labels.*tensor.*list"),
    "head: a vector": (lambda: losses(head=WEIGHT[0]), ValueError, r"head weight.*\[V, D\].*\[4\]"),
    "head: quantised": (lambda: losses(head=WEIGHT.to(torch.int8)), TypeError, "int8.*dequantised"),
    "head: a string": (lambda: losses(head="lm_head"), TypeError, "head.*LMHead.*str"),
    "head: another module": (lambda: losses(head=torch.nn.Bilinear(2, 2, 2)), TypeError, "Bilinear.*LMHead"),
    "bias: wrong length": (lambda: fl.LMHead(WEIGHT, torch.zeros(6)), ValueError, r"bias.*\[7\].*\[6\]"),
    "bias: integers": (lambda: fl.LMHead(WEIGHT, torch.zeros(7).long()), TypeError, "bias.*int64"),
    "bias: on another device": (lambda: fl.LMHead(WEIGHT, torch.zeros(7, device="meta")), ValueError, "bias is on meta"),
    "bias: a number": (lambda: fl.LMHead(WEIGHT, 1.0), TypeError, "bias.*float"),
    "softcap: zero": (lambda: fl.LMHead(WEIGHT, softcap=0.0), ValueError, "softcap.*> 0.*0.0"),
    "softcap: negative": (lambda: fl.LMHead(WEIGHT, softcap=-30.0), ValueError, "softcap.*-30.0"),
    "logit_scale: zero": (lambda: fl.LMHead(WEIGHT, logit_scale=0.0), ValueError, "logit_scale.*0.0"),
    "logit_scale: NaN": (lambda: fl.LMHead(WEIGHT, logit_scale=float("nan")), ValueError, "logit_scale.*nan"),
    "reference: a tensor": (lambda: losses(reference=HIDDEN), TypeError, r"fused_losses\.Reference.*Tensor"),
    "reference: other tokens": (
        lambda: losses(reference=fl.Reference(torch.randn(2, 4))), ValueError, r"reference hidden.*\[3\].*\[2, 4\].*same tokens",
    ),
    "reference: other width": (
        lambda: losses(reference=fl.Reference(torch.randn(3, 5))), ValueError, "reference hidden.*4.*shared.*5.*own head",
    ),
    "reference: other vocabulary": (
        lambda: losses(reference=fl.Reference(HIDDEN, torch.randn(8, 4))), ValueError, "reference head.*V = 7.*8.*pad",
    ),
    "reference: on another device": (lambda: losses(reference=fl.Reference(META)), ValueError, "reference hidden is on meta"),
    "reference: integers": (lambda: fl.Reference(HIDDEN.long()), TypeError, "reference hidden.*int64"),
    "gradient": (lambda: losses(gradient="sparser"), ValueError, "gradient.*auto, exact.*'sparser'"),
    "backend": (lambda: losses(backend="cuda9"), ValueError, "backend.*torch, reference.*'cuda9'"),
    "ignore_index": (lambda: losses(ignore_index=None), TypeError, "ignore_index.*None"),
    "confidence: above 1": (lambda: lawf(torch.tensor([0.0, 1.5, 0])), ValueError, r"confidence.*\[0, 1\].*1\.5"),
    "confidence: negative": (lambda: lawf(torch.tensor([-0.5, 1.0, 0])), ValueError, r"confidence.*-0\.5"),
    "confidence: NaN": (lambda: lawf(torch.tensor([torch.nan, 1.0, 0])), ValueError, "confidence.*nan"),
    "confidence: wrong shape": (lambda: lawf(torch.zeros(2)), ValueError, r"confidence.*\[3\].*\[2\]"),
    "confidence: missing": (lambda: lawf(None), ValueError, "needs confidence"),
    "confidence: a list": (lambda: lawf([0.0, 1.0, 0.0]), TypeError, "confidence.*list"),
    "LAwF without a reference": (lambda: lawf(reference=None), ValueError, r"LAwFLoss needs reference=fused_losses\.Reference"),
    "ASFT without a reference": (
        lambda: fl.ASFTLoss()(HIDDEN, WEIGHT, LABELS), ValueError, r"ASFTLoss needs reference=fused_losses\.Reference",
    ),
    "LAwF reduction": (lambda: fl.LAwFLoss(reduction="mean"), ValueError, "reduction.*token_mean or group_mean.*'mean'"),
    "LAwF weight": (lambda: fl.LAwFLoss(anchor_weight=-1.0), ValueError, "anchor_weight.*≥ 0.*-1.0"),
    "group_mean with one count": (
        lambda: fl.LAwFLoss(reduction="group_mean")(
            HIDDEN, WEIGHT, LABELS, confidence=CONFIDENCE, reference=REFERENCE, num_items=5
        ), ValueError, "num_items.*pair",
    ),
    "TALR temperature": (lambda: fl.TALRLoss("mean"), ValueError, "temperature.*median.*'mean'"),
    "TALR temperature zero": (lambda: fl.TALRLoss(0), ValueError, "temperature.*> 0.*got 0"),
    "TALR floor": (lambda: fl.TALRLoss(floor=1.5), ValueError, "floor.*≤ 1.*1.5"),
    "TALR of flat labels": (lambda: fl.TALRLoss()(HIDDEN, WEIGHT, LABELS), ValueError, r"\[sequences, tokens\].*sequence_ids"),
    "sequence_ids: floats": (
        lambda: fl.TALRLoss()(HIDDEN, WEIGHT, LABELS, sequence_ids=torch.zeros(3)), TypeError, "sequence_ids.*integers.*float32",
    ),
    "sequence_ids: wrong shape": (
        lambda: fl.TALRLoss()(HIDDEN, WEIGHT, LABELS, sequence_ids=torch.zeros(2).long()), ValueError, r"sequence_ids.*\[3\]",
    ),
    "num_items: zero": (lambda: fl.CrossEntropyLoss()(HIDDEN, WEIGHT, LABELS, num_items=0), ValueError, "num_items.*> 0.*got 0"),
    "num_items: two": (
        lambda: fl.CrossEntropyLoss()(HIDDEN, WEIGHT, LABELS, num_items=torch.ones(2)), ValueError, "num_items.*one number",
    ),
    "num_items: a string": (lambda: fl.CrossEntropyLoss()(HIDDEN, WEIGHT, LABELS, num_items="3"), TypeError, "num_items.*'3'"),
    "FLOW temperature": (lambda: fl.FLOWLoss(-1.0), ValueError, "temperature.*> 0"),
    "FLOW initial_nll": (
        lambda: fl.FLOWLoss(1.0)(HIDDEN[None], WEIGHT, LABELS[None], initial_nll=torch.ones(2)), ValueError, "expected 1 numbers.*2",
    ),
    "FLOW initial_nll NaN": (
        lambda: fl.FLOWLoss(1.0)(HIDDEN[None], WEIGHT, LABELS[None], initial_nll=torch.tensor([torch.nan])), ValueError, "finite.*nan",
    ),
    "FLOW sequence_ids": (
        lambda: fl.FLOWLoss(1.0)(HIDDEN, WEIGHT, LABELS, initial_nll=torch.ones(2), sequence_ids=torch.tensor([0, 2, 1])),
        ValueError, "sequence_ids.*< 2.*0 to 2",
    ),
    "EAFT top_k": (lambda: fl.EAFTLoss(top_k=1), ValueError, "top_k.*≥ 2.*1"),
    "PSFT old_nll": (
        lambda: fl.PSFTLoss()(HIDDEN, WEIGHT, LABELS, old_nll=torch.tensor([torch.inf, 0, 0])), ValueError, "old_nll.*finite",
    ),
    "PSFT without old_nll": (lambda: fl.PSFTLoss()(HIDDEN, WEIGHT, LABELS), ValueError, "PSFTLoss needs old_nll"),
    "FLOW without initial_nll": (lambda: fl.FLOWLoss(1.0)(HIDDEN, WEIGHT, LABELS), ValueError, "FLOWLoss needs initial_nll"),
    "backend of an objective": (lambda: fl.TALRLoss(backend="cuda9"), ValueError, "backend.*'cuda9'"),
    "token_loss: a scalar": (lambda: Custom(lambda out: out.nll.mean())(HIDDEN, WEIGHT, LABELS), ValueError, r"token_loss.*\[2\].*\[\]"),
    "token_loss: nothing": (lambda: Custom(lambda out: None)(HIDDEN, WEIGHT, LABELS), ValueError, "token_loss.*NoneType"),
    "token_loss: booleans": (lambda: Custom(lambda out: out.nll > 1)(HIDDEN, WEIGHT, LABELS), ValueError, "token_loss.*bool"),
    "token_loss: trainable parameters": (
        lambda: Custom(torch.nn.Linear(1, 1))(HIDDEN, WEIGHT, LABELS), TypeError, "trainable parameters.*token_losses",
    ),
    "token_loss: a tensor with a gradient": (
        lambda: Custom(lambda out, w: w * out.nll)(HIDDEN, WEIGHT, LABELS, w=torch.ones(3, requires_grad=True)),
        TypeError, r"w: requires a gradient.*w\.detach\(\)",
    ),
    "head: a linear with hooks": (lambda: losses(head=hooked()), TypeError, "hooks of its own.*dropped"),
    "head weight: a module": (lambda: fl.LMHead(torch.nn.Linear(4, 7)), TypeError, r"give its \.weight"),
    "hidden: a model output": (
        lambda: losses(type("Output", (), {"last_hidden_state": HIDDEN})()), TypeError, "give its last_hidden_state",
    ),
    "PSFT epsilon": (lambda: fl.PSFTLoss(0.0), ValueError, "epsilon.*> 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_error(name):
    attempt, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        attempt()


def test_good_input_is_good():
    losses(), losses(reference=REFERENCE), lawf()


# torch.func, forward mode, second derivatives, tensors without numbers

TRAINED = torch.randn(3, 4, requires_grad=True)


def objective(hidden, labels=LABELS, weight=WEIGHT, **options):
    return fl.CrossEntropyLoss(**options)(hidden, weight, labels)


def per_token(hidden, labels=LABELS, weight=WEIGHT, **options):
    return fl.token_losses(hidden, weight, labels, **options).nll.sum()


def forward_mode(function, hidden=HIDDEN, weight=WEIGHT):
    with forward_ad.dual_level():
        hidden, weight = (forward_ad.make_dual(t, torch.ones_like(t)) for t in (hidden, weight))
        return forward_ad.unpack_dual(function(hidden, weight=weight)).tangent


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f)(HIDDEN),
    "grad of the weight": lambda f: torch.func.grad(lambda w: f(HIDDEN, weight=w))(WEIGHT),
    "vjp": lambda f: torch.func.vjp(f, HIDDEN)[1](torch.ones(())),
    "jacrev": lambda f: torch.func.jacrev(f)(HIDDEN),
    "jacfwd": lambda f: torch.func.jacfwd(f)(HIDDEN),
    "jvp": lambda f: torch.func.jvp(f, (HIDDEN,), (HIDDEN,)),
    "hessian": lambda f: torch.func.hessian(f)(HIDDEN),
    "grad and value": lambda f: torch.func.grad_and_value(f)(HIDDEN),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # PyTorch's own, at the first dual number
@pytest.mark.parametrize("function", [objective, per_token])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_are_refused_but_by_the_reference(function, name):
    for options in ({}, {"backend": "torch"}, {"gradient": "sparse"}):
        with pytest.raises(
            NotImplementedError, match=r"torch\.func .*not supported.*backward\(\).*backend='reference'"
        ):
            TRANSFORMS[name](functools.partial(function, **options))
    TRANSFORMS[name](functools.partial(function, backend="reference"))


def test_the_reference_has_the_gradient_of_torch_func():
    expected = torch.autograd.grad(objective(TRAINED), TRAINED)[0]
    got = torch.func.grad(functools.partial(objective, backend="reference"))(TRAINED.detach())
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_vmap_is_refused():
    pairs = (torch.randn(5, 3, 4), LABELS.expand(5, 3))
    for options, message in (
        ({}, r"torch\.func .*vmap.*not supported"),
        ({"backend": "reference"}, "vmap over labels"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            torch.func.vmap(functools.partial(objective, **options))(*pairs)


def test_functional_call_alone_is_no_transform():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(4, 7)

        def forward(self, hidden):
            return objective(hidden, weight=self.head)

    model = Model()
    parameters = dict(model.named_parameters())
    assert torch.func.functional_call(model, parameters, (HIDDEN,)).item() == model(HIDDEN).item()
    with pytest.raises(NotImplementedError, match=r"functional_call under these"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (HIDDEN,)))(parameters)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # PyTorch's own, at the first dual number
@pytest.mark.parametrize("function", [objective, per_token])
def test_forward_mode_is_refused_but_by_the_reference(function):
    for hidden, weight in ((HIDDEN, WEIGHT), (TRAINED, WEIGHT)):
        with pytest.raises(NotImplementedError, match=r"forward-mode.*not supported.*backend='reference'"):
            forward_mode(function, hidden, weight)
        assert forward_mode(functools.partial(function, backend="reference"), hidden, weight).isfinite()
    with forward_ad.dual_level():
        function(HIDDEN)  # nothing here has a tangent


@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("function", [objective, per_token])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_second_derivatives_are_refused_but_by_the_reference(function, gradient, frozen):
    weight = WEIGHT.clone().requires_grad_(not frozen)
    for hidden in (TRAINED, TRAINED * 2):
        with pytest.raises(RuntimeError, match=r"no second derivatives \(create_graph=True\).*backend='reference'"):
            torch.autograd.grad(function(hidden, weight=weight, gradient=gradient), TRAINED, create_graph=True)
    first = torch.autograd.grad(function(TRAINED, weight=weight, backend="reference"), TRAINED, create_graph=True)[0]
    assert torch.autograd.grad(first.square().sum(), TRAINED)[0].isfinite().all()


@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("function", [objective, per_token])
def test_a_batched_backward_is_refused(function, gradient):
    loss = function(TRAINED, weight=WEIGHT.clone().requires_grad_(), gradient=gradient)
    with pytest.raises(NotImplementedError, match=r"no batched backward.*one gradient after the other"):
        torch.autograd.grad(loss, TRAINED, torch.ones(3), is_grads_batched=True)


@pytest.mark.parametrize("options", [{}, {"backend": "reference"}], ids=str)
@pytest.mark.parametrize("function", [objective, per_token])
def test_tensors_without_numbers_are_refused(function, options):
    weight, labels = WEIGHT.to("meta"), LABELS.to("meta")
    with pytest.raises(ValueError, match="hidden: expected a tensor with numbers, got one on meta"):
        function(META, labels, weight, **options)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(ValueError, match="got one that is fake"):
        function(mode.from_tensor(HIDDEN), LABELS, mode.from_tensor(WEIGHT), **options)

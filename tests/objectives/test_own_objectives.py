"""Objectives of a user's own, and mistakes in making any: errors that say what to write."""

import pytest
import torch

import fused_losses as fl


def own(**body):
    """An objective of a user's own."""
    body.setdefault("token_loss", lambda self, out: out.nll)
    return type("Mine", (fl.Objective,), body)


def tried(cls, backend="auto", needs_gradient=True, **given):
    hidden = torch.randn(2, 5, 8, requires_grad=needs_gradient)
    objective = cls() if backend == "auto" else cls(backend=backend)
    return objective(hidden, torch.randn(30, 8), torch.randint(30, (2, 5)), **given)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["entropy", "reference_entropy", "topk_entropy"])
def test_a_statistic_that_is_not_wanted_says_so(name, backend):
    reads = {"token_loss": lambda self, out: (getattr(out, name) > 1) * out.nll}
    for equal in (reads, {"token_loss": lambda self, out: (getattr(out, name) == 1) * out.nll}):
        with pytest.raises(TypeError, match=rf'out.{name}: .*wanted = frozenset\({{"{name}"}}\)'):
            tried(own(**equal), backend)
    reference = fl.Reference(torch.randn(2, 5, 8))
    tried(own(wanted=frozenset({name}), **reads), backend, reference=reference).backward()
    other = "topk_entropy" if name == "entropy" else "entropy"
    both = ", ".join(f'"{n}"' for n in ("entropy", "reference_entropy", "topk_entropy") if n in (name, other))
    with pytest.raises(TypeError, match=f"frozenset.*{both}"):
        tried(own(wanted=frozenset({other}), **reads), backend)


def test_a_statistic_that_is_not_wanted_is_absent_for_hasattr():
    seen = []

    def token_loss(self, out):
        seen.append((hasattr(out, "entropy"), hasattr(out, "nll"), getattr(out, "topk_entropy", None), repr(out)))
        return out.nll

    tried(own(token_loss=token_loss))
    assert seen == [(False, True, None, "Statistics(nll, prediction, lse)")]


def test_a_statistic_of_the_reference_without_one_says_so():
    with pytest.raises(TypeError, match=r"out.kl and out.reference_nll are None without a reference: give reference="):
        tried(own(token_loss=lambda self, out: out.nll + out.kl))
    with pytest.raises(TypeError, match=r"out.kl .*None without a reference"):
        tried(own(token_loss=lambda self, out: out.nll * out.reference_nll.exp()))
    with pytest.raises(TypeError, match=r"out.reference_entropy: .*give reference="):
        tried(own(wanted={"reference_entropy"}, token_loss=lambda self, out: out.nll * out.reference_entropy))
    tried(own(token_loss=lambda self, out: out.nll if out.kl is None else out.nll + out.kl)).backward()


def test_a_statistic_that_does_not_exist_lists_those_that_do():
    with pytest.raises(AttributeError, match=r"out.entropi: there is no such statistic; there are nll, .*topk_entropy"):
        tried(own(token_loss=lambda self, out: out.entropi * out.nll))


def test_a_statistic_that_is_not_wanted_says_so_in_median_talr_too():
    class Mine(fl.TALRLoss):
        def token_loss(self, out, temperature=None):
            return super().token_loss(out, temperature) * out.entropy

    with pytest.raises(TypeError, match=r'wanted = frozenset\({"entropy"}\)'):
        tried(Mine)


@pytest.mark.parametrize(
    "wanted, message",
    [
        (frozenset({"entropi"}), "wanted: expected a set of names among entropy, reference_entropy, topk_entropy, rank, log_p2, got 'entropi'"),
        (("entropy", "top_k_entropy"), "got 'top_k_entropy'"),
        ("entropy", r"got 'entropy'; write frozenset\({'entropy'}\)"),
        (None, "got None"),
        ([3], "got 3"),
    ],
)  # fmt: skip
def test_names_that_nobody_knows_in_wanted_are_an_error_when_it_is_made(wanted, message):
    with pytest.raises(ValueError, match=message):
        own(wanted=wanted)()
    objective = own()()
    objective.wanted = wanted
    with pytest.raises(ValueError, match=message):
        objective(torch.randn(3, 8), torch.randn(30, 8), torch.arange(3))


def test_wanted_may_be_any_collection_and_name_what_is_always_there():
    for wanted in ({"entropy"}, ["entropy"], ("entropy", "nll", "kl")):
        tried(own(wanted=wanted, token_loss=lambda self, out: out.nll * out.entropy)).backward()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("reference", [None, "given"])
def test_a_loss_without_a_gradient_is_an_error_where_one_is_needed(reference, backend):
    given = {} if reference is None else {"reference": fl.Reference(torch.randn(2, 5, 8))}
    for token_loss in (
        lambda self, out: out.nll.detach(),
        lambda self, out: torch.zeros_like(out.nll),
        lambda self, out: (out.prediction == 3).to(out.nll),
    ):
        cls = own(token_loss=token_loss)
        with pytest.raises(ValueError, match="token_loss: the loss has no gradient"):
            tried(cls, backend, **given)
        tried(cls, backend, needs_gradient=False, **given)
        with torch.no_grad():
            tried(cls, backend, **given)
    tried(own(token_loss=lambda self, out: (-out.nll).exp().detach() * out.nll), backend, **given).backward()


def test_a_loss_of_the_kl_alone_has_a_gradient():
    loss = tried(
        own(token_loss=lambda self, out: out.nll.detach() + out.kl), reference=fl.Reference(torch.randn(2, 5, 8))
    )
    loss.backward()


def test_a_tensor_with_a_gradient_in_token_loss_would_be_lost():
    scale = torch.ones(1, requires_grad=True)
    for token_loss in (lambda self, out: scale * out.nll, lambda self, out: (scale * 2 * out.nll.detach()).exp()):
        with pytest.raises(TypeError, match=r"uses a tensor \[1\] that requires a gradient"):
            tried(own(token_loss=token_loss))
    tried(own(token_loss=lambda self, out: scale.detach() * out.nll)).backward()


def nothing(self):
    pass


def an_attribute(self):
    self.x = 1


def a_module(self):
    self.layer = torch.nn.ReLU()


def a_parameter(self):
    self.scale = torch.nn.Parameter(torch.ones(1))


def another_base(self):
    torch.nn.Module.__init__(self)


@pytest.mark.parametrize("init", [nothing, an_attribute, a_module, a_parameter, another_base])
def test_an_objective_whose_base_was_not_made_says_so(init):
    with pytest.raises(TypeError, match=r"Mine: Objective.__init__ has not run; call super\(\).__init__\(\) first"):
        tried(own(__init__=init))


def test_attributes_may_be_set_before_the_base_is_made():
    def init(self):
        self.x = 2.0
        assert not hasattr(self, "y")
        fl.Objective.__init__(self)

    tried(own(__init__=init, token_loss=lambda self, out: self.x * out.nll)).backward()


ALL = (
    fl.CrossEntropyLoss, fl.TALRLoss, fl.LAwFLoss, fl.FLOWLoss, fl.DFTLoss, fl.ASFTLoss, fl.EAFTLoss, fl.PSFTLoss,
    fl.WeightedLoss, fl.JSDLoss, fl.ReverseKLLoss, fl.TopKDistillationLoss, fl.STMLoss, fl.InfoSFTLoss, fl.EKSFTLoss,
)  # fmt: skip


@pytest.mark.parametrize("cls", [*ALL, own(), type("Mine", (fl.TALRLoss,), {})], ids=lambda cls: cls.__name__)
def test_tensors_belong_to_the_call(cls):
    hidden, weight, labels = torch.randn(2, 5, 8), torch.randn(30, 8), torch.randint(30, (2, 5))
    for head in (weight, torch.nn.Linear(8, 30), fl.LMHead(weight)):
        with pytest.raises(TypeError, match=rf"{cls.__name__}\(\)\(hidden, head, labels\)"):
            cls(hidden, head, labels)
    with pytest.raises(TypeError, match=rf"{cls.__name__}\(\)\(hidden, head, labels\)"):
        cls(hidden)
    with pytest.raises(TypeError, match=rf"labels.*argument of the call, {cls.__name__}\(\)"):
        cls(**({"temperature": 1.0} if cls is fl.FLOWLoss else {}), labels=labels)


def test_an_objective_of_ones_own_may_take_tensors():
    class Weighted(fl.Objective):
        def __init__(self, weights, **options):
            super().__init__(**options)
            self.weights = weights

        def token_loss(self, out):
            return self.weights[out.prediction] * out.nll

    loss = Weighted(torch.ones(30), gradient="exact")
    loss(torch.randn(3, 8, requires_grad=True), torch.randn(30, 8), torch.arange(3)).backward()
    with pytest.raises(
        TypeError, match=r"Weighted\(\)\(hidden, head, labels\), with the options \(weights, ignore_index"
    ):
        Weighted(torch.randn(3, 8), torch.randn(30, 8), torch.arange(3))


@pytest.mark.parametrize(
    "cls, option, meant",
    [
        (fl.TALRLoss, "tau", "temperature"), (fl.TALRLoss, "temprature", "temperature"), (fl.PSFTLoss, "eps", "epsilon"),
        (fl.EAFTLoss, "k", "top_k"), (fl.ASFTLoss, "beta", "kl_weight"), (fl.LAwFLoss, "anchor_weigth", "anchor_weight"),
        (fl.CrossEntropyLoss, "ignored_index", "ignore_index"), (fl.DFTLoss, "tolerence", "tolerance"),
        (fl.JSDLoss, "kd_temperature", "temperature"), (fl.JSDLoss, "weight_hard_loss", "nll_weight"),
        (fl.CrossEntropyLoss, "zzz", None), (own(), "gradients", "gradient"),
    ],
)  # fmt: skip
def test_an_unknown_option_lists_those_there_are(cls, option, meant):
    with pytest.raises(TypeError) as error:
        cls(**{option: 1.0})
    message = str(error.value)
    assert message.startswith(f"{cls.__name__}: has no option {option}; ")
    assert ("did you mean" not in message) if meant is None else f"did you mean {meant}?" in message
    assert message.endswith("ignore_index, gradient, tolerance, backend, scan")

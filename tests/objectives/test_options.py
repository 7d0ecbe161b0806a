"""The options of objectives and heads: numbers of every kind, checked whenever they are set."""

import pytest
import torch

import fused_losses as fl


def forms(value):
    import numpy as np

    whole = isinstance(value, int)
    types = (np.int32, np.int64, np.uint8) if whole else (np.float64, np.float32, np.float16)
    return [*(kind(value) for kind in types), np.array(value), torch.tensor(value)]


OPTIONS = [
    (fl.TALRLoss, "temperature", 0.5), (fl.TALRLoss, "floor", 0.25), (fl.LAwFLoss, "anchor_weight", 2),
    (fl.LAwFLoss, "retain_weight", 0.5), (fl.FLOWLoss, "temperature", 1.5), (fl.ASFTLoss, "kl_weight", 0.25),
    (fl.EAFTLoss, "alpha", 1.5), (fl.EAFTLoss, "top_k", 7), (fl.PSFTLoss, "epsilon", 0.25),
    (fl.PSFTLoss, "epsilon_high", 0.25), (fl.EAFTLoss, "normaliser", 3), (fl.CrossEntropyLoss, "label_smoothing", 0.25),
    (fl.CrossEntropyLoss, "z_loss", 0.5), (fl.STMLoss, "threshold", 2.5), (fl.InfoSFTLoss, "max_probability", 0.75),
    (fl.LAwFLoss, "target_probability", 0.5), (fl.EKSFTLoss, "fraction", 0.25), (fl.EKSFTLoss, "entropy_weight", 2),
    (fl.JSDLoss, "beta", 0.25), (fl.JSDLoss, "temperature", 2), (fl.JSDLoss, "nll_weight", 0.5),
    (fl.ReverseKLLoss, "temperature", 0.5), (fl.TopKDistillationLoss, "beta", 0.25),
    (fl.TopKDistillationLoss, "temperature", 2), (fl.TopKDistillationLoss, "nll_weight", 0.5),
    (fl.CrossEntropyLoss, "tolerance", 0.125), (fl.CrossEntropyLoss, "ignore_index", 3),
]  # fmt: skip


@pytest.mark.parametrize("cls, option, value", OPTIONS, ids=lambda x: getattr(x, "__name__", x))
def test_options_take_numbers_of_numpy_and_tensors(cls, option, value):
    required = {"temperature": 1.0} if cls is fl.FLOWLoss else {}
    for form in forms(value):
        objective = cls(**required | {option: form})
        assert getattr(objective, option) == value and type(getattr(objective, option)) is type(value)
        assert repr(objective) == repr(cls(**required | {option: value}))


@pytest.mark.parametrize("cls, option, value", OPTIONS, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize(
    "wrong",
    [float("nan"), float("inf"), "0.5", True, -1.0, None, 1j, [0.5], torch.tensor([0.5]), torch.tensor(True), torch.ones(())
     .requires_grad_(), torch.ones((), device="meta")],
    ids=str,
)  # fmt: skip
def test_options_refuse_what_is_no_number(cls, option, value, wrong):
    required = {"temperature": 1.0} if cls is fl.FLOWLoss else {}
    if wrong is None and option in ("epsilon_high", "normaliser", "target_probability"):
        assert getattr(cls(**{option: None}), option) is None
        return
    with pytest.raises((ValueError, TypeError), match=rf"^{option}: expected .*got "):
        cls(**required | {option: wrong})


def test_numpy_scalars_of_no_number_are_refused():
    import numpy as np

    for wrong in (np.float32("nan"), np.float32("inf"), np.bool_(True), np.str_("1"), np.array([0.5]), np.float32(-1)):
        with pytest.raises(ValueError, match=r"floor: expected a finite number.*got"):
            fl.TALRLoss(floor=wrong)
        with pytest.raises((ValueError, TypeError), match="num_items: expected"):
            fl.CrossEntropyLoss()(torch.randn(3, 8), torch.randn(30, 8), torch.arange(3), num_items=wrong)


def test_num_items_takes_numbers_of_numpy_and_tensors():
    hidden, weight, labels = torch.randn(3, 8), torch.randn(30, 8), torch.arange(3)
    expected = fl.CrossEntropyLoss()(hidden, weight, labels, num_items=7).item()
    for form in forms(7):
        assert fl.CrossEntropyLoss()(hidden, weight, labels, num_items=form).item() == pytest.approx(expected, rel=1e-7)
    confidence, reference = torch.tensor([1.0, 0, 0]), fl.Reference(hidden + 1)
    module = fl.LAwFLoss(reduction="group_mean")
    expected = module(hidden, weight, labels, confidence=confidence, reference=reference, num_items=(3, 4)).item()
    for three, four in zip(forms(3), forms(4), strict=True):
        pair = dict(confidence=confidence, reference=reference, num_items=(three, four))
        assert module(hidden, weight, labels, **pair).item() == pytest.approx(expected, rel=1e-7)
    with pytest.raises(ValueError, match="num_items: expected a pair of numbers"):
        module(hidden, weight, labels, confidence=confidence, reference=reference, num_items=(None, 4))


def test_heads_and_token_losses_take_numbers_of_numpy_and_tensors():
    hidden, weight, labels = torch.randn(3, 8), torch.randn(30, 8), torch.arange(3)
    expected = fl.token_losses(hidden, fl.LMHead(weight, logit_scale=0.5, softcap=4.0), labels).nll
    for half, four in zip(forms(0.5), forms(4.0), strict=True):
        head = fl.LMHead(weight, logit_scale=half, softcap=four)
        assert torch.equal(
            fl.token_losses(hidden, head, labels, tolerance=half, ignore_index=torch.tensor(-100)).nll, expected
        )
    for wrong in (True, "1", torch.ones(1), torch.ones((), requires_grad=True)):
        with pytest.raises(ValueError, match="logit_scale: expected a finite number"):
            fl.LMHead(weight, logit_scale=wrong)
        with pytest.raises(ValueError, match="softcap: expected a finite number"):
            fl.LMHead(weight, softcap=wrong)


@pytest.mark.parametrize(
    "loss, name, value",
    [
        (fl.TALRLoss(0.7), "temperature", -1), (fl.TALRLoss(0.7), "temperature", 0), (fl.TALRLoss(), "temperature", "mean"),
        (fl.TALRLoss(), "floor", 2), (fl.LAwFLoss(), "retain_weight", "x"), (fl.LAwFLoss(), "anchor_weight", -1),
        (fl.LAwFLoss(), "reduction", "mean"), (fl.FLOWLoss(1.0), "temperature", 0), (fl.ASFTLoss(), "kl_weight", float("nan")),
        (fl.EAFTLoss(), "alpha", -1), (fl.PSFTLoss(), "epsilon", 2), (fl.JSDLoss(), "beta", 1.1),
        (fl.JSDLoss(), "temperature", 0), (fl.JSDLoss(), "nll_weight", -0.1), (fl.ReverseKLLoss(), "temperature", 0),
        (fl.TopKDistillationLoss(), "beta", -0.1), (fl.TopKDistillationLoss(), "rest", "tail"),
    ],
)  # fmt: skip
def test_options_are_checked_whenever_they_are_set(loss, name, value):
    before = getattr(loss, name)
    with pytest.raises(ValueError, match=f"{name}: expected .*, got "):
        setattr(loss, name, value)
    assert getattr(loss, name) == before


def test_options_that_may_be_set():
    loss = fl.TALRLoss()
    loss.temperature = 0.5
    assert loss.temperature == 0.5
    loss.temperature = "median"
    assert loss.temperature == "median"


def test_a_process_group_is_one():
    with pytest.raises(ValueError, match=r"process_group: expected a group of torch\.distributed"):
        fl.TALRLoss(process_group="world")


def test_log_probabilities_in_place_of_losses():
    hidden, weight, labels = torch.randn(2, 3, 4), torch.randn(7, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="old_nll: expected finite numbers ≥ 0, got -1"):
        fl.PSFTLoss()(hidden, weight, labels, old_nll=torch.full((2, 3), -1.0))

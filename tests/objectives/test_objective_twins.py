"""Objectives against their twins in reference.py: heads, references, dtypes, backends, both kinds of gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import HEADS, Case, coarse, make, name, relative
from torch import Tensor

import fused_losses as fl
from fused_losses import backends
from fused_losses import reference as oracle

BACKENDS = [
    "torch",
    pytest.param("cpu", marks=pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="no kernels")),
]
SHAPES = [(1, 3, 5), (33, 17, 123), (65, 33, 507)]
Z = Tensor


@dataclass(frozen=True)
class Entry:
    """An objective, the fields of its call for N tokens, and its twin: (z, z_ref, labels, fields of these tokens)."""

    make: Callable[..., fl.Objective]
    twin: Callable[[Z, Z, Tensor, dict[str, Tensor]], Tensor]
    fields: Callable[[int], dict[str, Tensor]] = lambda n: {}
    total: bool = False  # the twin gives the loss, and not one per token
    reference: bool = True  # is given where it is taken


def signed(n: int) -> Tensor:
    return torch.linspace(-1, 2, n, dtype=torch.float64) + 0.013


def positive(v: int) -> Tensor:
    return (torch.arange(v) % 5).double() / 3 + (torch.arange(v) % 2)


class PerVocabulary:
    """CrossEntropyLoss with class weights, whose length is only known with the head."""

    def __init__(self, **options):
        self.options = options

    def __call__(self, v=507, **more):
        return fl.CrossEntropyLoss(class_weights=positive(v), **self.options, **more)


def smoothed(label_smoothing: float = 0.0, z_loss: float = 0.0, classes: bool = False) -> Callable:
    return lambda z, r, y, f: oracle.cross_entropy(
        z, y, label_smoothing, z_loss, positive(z.shape[1]) if classes else None
    )


def weighted_mean(z, r, y, f):
    w = positive(z.shape[1])
    cross_entropy = oracle.cross_entropy(z, y, 0.1, class_weights=w).sum() / w[y].sum()
    return cross_entropy + 1e-2 * z.logsumexp(-1).square().mean()


def anchors(n: int) -> dict[str, Tensor]:
    return {"confidence": (torch.arange(n) % 3 == 0).double() * 0.3}


def target_groups(z, r, y, f):
    marked, target = f["confidence"] > 0, torch.full((len(y),), 0.4, dtype=z.dtype)
    losses = oracle.lawf_with_target(z, r, y, marked, target)
    is_anchor = marked & (oracle.nll(r, y).exp() > 1 / 0.4)
    means = [losses[group].sum() / group.sum().clamp(min=1) for group in (is_anchor, ~is_anchor)]
    return 2.1 * means[0] + 0.3 * means[1]


def kept_mean(z, r, y, f):
    kept = oracle.nll(r, y).exp() < 40
    return oracle.nll(z, y)[kept].sum() / kept.sum().clamp(min=1)


def kept_mean_of_a_field(z, r, y, f):
    return oracle.nll(z, y)[f["initial_token_nll"] < math.log(2.5)].sum() / max(
        int((f["initial_token_nll"] < math.log(2.5)).sum()), 1
    )


def talr_lower(z, r, y, f):
    tau = oracle.talr_temperature(oracle.nll(z, y), f["sequence_ids"], "lower")
    return oracle.talr(z, y, tau)


TABLE = {
    "cross-entropy": Entry(fl.CrossEntropyLoss, smoothed()),
    "smoothing": Entry(lambda **o: fl.CrossEntropyLoss(0.1, **o), smoothed(0.1)),
    "smoothing alone": Entry(lambda **o: fl.CrossEntropyLoss(1, **o), smoothed(1.0)),
    "z-loss": Entry(lambda **o: fl.CrossEntropyLoss(z_loss=1e-2, **o), smoothed(0, 1e-2)),
    "class weights": Entry(PerVocabulary(), smoothed(classes=True)),
    "class weights, smoothing": Entry(PerVocabulary(label_smoothing=0.2), smoothed(0.2, classes=True)),
    "all of cross-entropy": Entry(PerVocabulary(label_smoothing=0.2, z_loss=1e-2), smoothed(0.2, 1e-2, True)),
    "eksft": Entry(fl.EKSFTLoss, lambda z, r, y, f: oracle.eksft(z, r, y), total=True),
    "eksft, intersection": Entry(
        lambda **o: fl.EKSFTLoss(0.5, 0.3, 0.7, "intersection", "token_mean", **o),
        lambda z, r, y, f: oracle.eksft(z, r, y, 0.5, 0.3, 0.7, "intersection", "token_mean"), total=True,
    ),
    "lawf, target": Entry(
        lambda **o: fl.LAwFLoss(2.1, 0.3, target_probability=0.4, **o),
        lambda z, r, y, f: oracle.lawf_with_target(
            z, r, y, f["confidence"] > 0, torch.full_like(f["confidence"], 0.4), 2.1, 0.3
        ),
        anchors,
    ),
    "lawf, targets": Entry(
        fl.LAwFLoss,
        lambda z, r, y, f: oracle.lawf_with_target(z, r, y, f["confidence"] > 0, f["target_probability"]),
        lambda n: anchors(n) | {"target_probability": 0.01 + torch.arange(n).double() % 10 / 11},
    ),
    "lawf, target, groups": Entry(
        lambda **o: fl.LAwFLoss(2.1, 0.3, "group_mean", 0.4, **o), target_groups, anchors, total=True
    ),
    "infosft": Entry(fl.InfoSFTLoss, lambda z, r, y, f: oracle.infosft(z, y)),
    "infosft, P": Entry(lambda **o: fl.InfoSFTLoss(0.6, **o), lambda z, r, y, f: oracle.infosft(z, y, 0.6)),
    "mask the target": Entry(
        lambda **o: fl.MaskTheTargetLoss(0.7, **o), lambda z, r, y, f: oracle.mask_the_target(z, r, y, 0.7)
    ),
    "sft + kl": Entry(lambda **o: fl.SFTKLLoss(0.3, **o), lambda z, r, y, f: oracle.sft_kl(z, r, y, 0.3)),
    "stm": Entry(lambda **o: fl.STMLoss(40.0, **o), lambda z, r, y, f: oracle.stm(z, y, oracle.nll(r, y), 40)),
    "stm, field": Entry(
        fl.STMLoss, lambda z, r, y, f: oracle.stm(z, y, f["initial_token_nll"]),
        lambda n: {"initial_token_nll": torch.arange(n).double() % 7 / 4}, reference=False,
    ),
    "stm, kept": Entry(lambda **o: fl.STMLoss(40.0, "kept_mean", **o), kept_mean, total=True),
    "stm, kept, field": Entry(
        lambda **o: fl.STMLoss(reduction="kept_mean", **o), kept_mean_of_a_field,
        lambda n: {"initial_token_nll": torch.arange(n).double() % 7 / 4}, total=True, reference=False,
    ),
    "psft, high": Entry(
        lambda **o: fl.PSFTLoss(0.2, 0.6, **o), lambda z, r, y, f: oracle.psft(z, y, f["old_nll"], 0.2, 0.6),
        lambda n: {"old_nll": torch.linspace(0.5, 6.0, n, dtype=torch.float64)},
    ),
    "eaft, normaliser": Entry(
        lambda **o: fl.EAFTLoss(1.5, 7, 3.0, **o), lambda z, r, y, f: oracle.eaft(z, y, 1.5, 7, 3.0)
    ),
    "talr, lower": Entry(
        lambda **o: fl.TALRLoss(even_median="lower", **o), talr_lower, lambda n: {"sequence_ids": torch.arange(n) // 6}
    ),
    "weighted mean": Entry(
        PerVocabulary(label_smoothing=0.1, z_loss=1e-2, reduction="weighted_mean"), weighted_mean, total=True
    ),
    "weighted": Entry(
        fl.WeightedLoss, lambda z, r, y, f: oracle.weighted(z, y, f["weights"]), lambda n: {"weights": signed(n)}
    ),
}  # fmt: skip
NAMES = sorted(TABLE)


def case_of(entry: Entry, *shape: int, reference: str = "shared", **options: Any) -> Case:
    needs = entry.make().takes_reference and entry.reference
    return make(*shape, reference=reference if needs else None, **options)


def arguments(entry: Entry, case: Case, module: fl.Objective, reference: Any) -> dict[str, Any]:
    fields = entry.fields(len(case.labels))
    for field, declared in type(module).fields.items():
        if declared.labelled and field in fields:
            fields[field] = fields[field].masked_fill(case.labels < 0, 0)
    return fields | ({"reference": reference} if reference is not None else {})


def leaves(hidden: Tensor, head: fl.LMHead) -> dict[str, Tensor]:
    named = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    return {name: t for name, t in named.items() if t is not None and t.requires_grad}


def made(entry: Entry, case: Case, **options: Any) -> fl.Objective:
    if isinstance(entry.make, PerVocabulary):
        options["v"] = len(case.weight)
    return entry.make(**options)


def ours(entry: Entry, case: Case, dtype: torch.dtype, num_items: Any = None, **options: Any) -> dict[str, Tensor]:
    module = made(entry, case, **options)
    hidden, head, reference = case.inputs(dtype)
    given = arguments(entry, case, module, reference)
    loss = module(hidden, head, case.labels, num_items=num_items, **given)
    tensors = leaves(hidden, head)
    found = dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))
    found["report"] = module.gradient_report
    return found | {"loss": loss.detach()}


def twin(entry: Entry, case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    hidden, head, reference = case.inputs(dtype)
    keep = case.labels != -100
    if not entry.reference:
        assert reference is None
    fields = arguments(entry, case, entry.make(), None)
    z, z_ref = oracle.logits(hidden[keep], head), None
    if reference is not None:
        own = head if reference.head is None else reference.head
        z_ref = oracle.logits(reference.hidden[keep], own).detach()
    losses = entry.twin(z, z_ref, case.labels[keep], {name: values[keep].to(z) for name, values in fields.items()})
    loss = losses if entry.total else losses.sum() / keep.sum()
    tensors = leaves(hidden, head)
    found = dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))
    return found | {"loss": loss.detach()}


def errors(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {name: relative(got[name], truth[name]) for name in truth}


@pytest.mark.pairwise
@pytest.mark.parametrize("entry", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("reference", ["shared", "own"])
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_equals_its_twin(entry, shape, head, reference, frozen, backend, dtype, tolerance):
    entry = TABLE[entry]
    case = case_of(entry, *shape, reference=reference, frozen=frozen, **head).rounded(dtype)
    for output, error in errors(ours(entry, case, dtype, backend=backend), twin(entry, case)).items():
        assert error <= tolerance, output


@pytest.mark.parametrize("entry", NAMES)
@pytest.mark.parametrize("reference", ["shared", "own"])
def test_of_full_logits_equals_its_twin(entry, reference):
    entry = TABLE[entry]
    case = case_of(entry, 33, 17, 123, reference=reference, bias=True, scale=-1.7, softcap=4.0)
    for output, error in errors(ours(entry, case, torch.float64, backend="reference"), twin(entry, case)).items():
        assert error <= 1e-10, output


@pytest.mark.pairwise
@pytest.mark.parametrize("entry", NAMES)
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("reference", ["shared", "own"])
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_gradients_are_no_worse_than_those_of_plain_pytorch(entry, head, reference, frozen, dtype):
    """Over several cases together: in one, a few tokens of large weight may decide."""
    entry, all_ours, all_plain = TABLE[entry], {}, {}
    for seed in range(4):
        options = dict(reference=reference, frozen=frozen, spread=4.0, seed=seed, **head)
        case = case_of(entry, 129, 65, 507, **options).rounded(dtype)
        truth = twin(entry, case)
        for got, total in (
            (ours(entry, case, dtype, gradient="exact"), all_ours), (twin(entry, case, dtype), all_plain)
        ):  # fmt: skip
            for output, error in errors(got, truth).items():
                total[output] = total.get(output, 0) + error**2 / 4
    # An objective forms its gradient in that dtype and scales it in backward: up to two roundings more.
    rounding = (torch.finfo(dtype).eps * 0.3) ** 2
    for output in all_ours.keys() - {"loss"}:
        assert all_ours[output] <= (all_plain[output] + rounding) * 1.1, (output, all_ours, all_plain)


@pytest.mark.parametrize("entry", NAMES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(entry, softcap):
    entry = TABLE[entry]
    case = case_of(entry, 6, 4, 11, reference="own", bias=True, scale=0.7, softcap=softcap, ignored=0.3)
    hidden, head, reference = case.inputs(torch.float64)
    module = made(entry, case)
    given = arguments(entry, case, module, reference)

    def loss(hidden, weight, bias):
        # Weights are constants: the loss whose gradient is taken is linear in what has one.
        return module(hidden, fl.LMHead(weight, bias, head.logit_scale, head.softcap), case.labels, **given)

    found = torch.autograd.grad(loss(hidden, head.weight, head.bias), (hidden, head.weight, head.bias))
    for got, expected in zip(found, [twin(entry, case)[n] for n in ("hidden", "weight", "bias")], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("entry", [name for name in NAMES if TABLE[name].make().divides_by_items])
def test_num_items_replaces_the_count(entry):
    entry = TABLE[entry]
    case = case_of(entry, 33, 17, 123)
    total = ours(entry, case, torch.float64)["loss"] * (case.labels != -100).sum()
    for items in (7, 7.0, torch.tensor(7)):
        assert ours(entry, case, torch.float64, num_items=items)["loss"].item() == pytest.approx(
            total.item() / 7, rel=1e-12
        )


@pytest.mark.parametrize("entry", NAMES)
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_all_ignored_is_zero_and_connected(entry, gradient):
    entry = TABLE[entry]
    case = case_of(entry, 9, 5, 31, bias=True)
    case = replace(case, labels=torch.full_like(case.labels, -100))
    got = ours(entry, case, torch.float32, gradient=gradient)
    assert got["loss"] == 0
    assert all((got[name] == 0).all() for name in ("hidden", "weight", "bias"))


@pytest.mark.parametrize("entry", NAMES)
def test_what_ignored_tokens_hold_does_not_matter(entry):
    entry = TABLE[entry]
    case = case_of(entry, 33, 17, 123)
    truth = ours(entry, case, torch.float64)
    hidden = case.hidden.masked_fill((case.labels < 0)[:, None], torch.nan)
    garbage = replace(entry, fields=lambda n: {
        name: values.masked_fill(case.labels < 0, torch.nan if values.is_floating_point() else -7)
        for name, values in entry.fields(n).items()
    })  # fmt: skip
    got = ours(garbage, replace(case, hidden=hidden), torch.float64)
    assert all(relative(got[output], truth[output]) == 0 for output in ("loss", "hidden", "weight"))


@pytest.mark.pairwise
@pytest.mark.parametrize("entry", NAMES)
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_gradients_are_near_the_twin(entry, head, frozen, backend):
    """The value is the exact one; all of the gradient's error comes from a certified softmax."""
    entry = TABLE[entry]
    case = case_of(entry, 65, 33, 507, frozen=frozen, spread=4.0, **head)
    truth = twin(entry, case)
    with coarse(1e-3):
        got = ours(entry, case, torch.float64, backend=backend, gradient="sparse")
    assert relative(got["loss"], truth["loss"]) < 1e-10
    report = got["report"]
    assert report.mode == "exact" or report.bound <= 0.15
    for output in truth.keys() - {"loss"}:
        assert relative(got[output], truth[output]) < 0.15, output

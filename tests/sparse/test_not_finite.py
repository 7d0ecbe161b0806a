"""Numbers that are not finite anywhere in the operands: no error, gradients that say so too, and no bound of them."""

import math

import pytest
import torch
from sparse_checks import needs_kernels

import fused_losses as fl

V, D, R = 3001, 32, 3


def parts(n, scale, **bad):
    made = {
        "hidden": scale * torch.randn(n, D), "reference": torch.randn(n, D), "upstream": torch.rand(n),
        "weight": torch.randn(V, D), "bias": torch.randn(V), "a": torch.randn(R, D), "b": torch.randn(V, R),
    }  # fmt: skip
    for name, value in bad.items():
        made[name].view(-1)[len(made[name].view(-1)) // 2] = value
    return made


def report_of(parts, trained, with_reference, kind, **options):
    leaves = {name: t.clone() for name, t in parts.items()}
    leaves["hidden"].requires_grad_()
    for name in trained:
        leaves[name].requires_grad_()
    head = fl.LMHead(leaves["weight"], bias=leaves["bias"], low_rank=fl.LowRank(leaves["b"], leaves["a"]))
    labels = torch.arange(len(leaves["hidden"]))
    if kind == "objective":
        loss = fl.CrossEntropyLoss(gradient="sparse", **options)
        value = loss(leaves["hidden"], head, labels)
        value.backward()
        return value, leaves, loss.gradient_report
    reference = {"reference": fl.Reference(leaves["reference"])} if with_reference else {}
    out = fl.token_losses(leaves["hidden"], head, labels, gradient="sparse", **reference, **options)
    value = (leaves["upstream"] * (out.kl if with_reference else out.nll)).sum()
    value.backward()
    return value, leaves, out.gradient_report


@pytest.mark.parametrize("n", [16, 300])
@pytest.mark.parametrize("scale", [0.1, 1.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "a", "b", "reference", "upstream"])
@pytest.mark.parametrize("trained", [(), ("weight",), ("b", "a"), ("weight", "bias", "b", "a")], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["token losses", "a divergence", "objective"])
@pytest.mark.parametrize("scan", ["full", pytest.param("int8", marks=needs_kernels)])
@pytest.mark.pairwise
def test_no_bound(scan, kind, value, trained, name, scale, n):
    with_reference = kind == "a divergence"
    if (name == "reference" and not with_reference) or (name == "upstream" and kind == "objective"):
        pytest.skip("has none")
    loss, leaves, report = report_of(parts(n, scale, **{name: value}), trained, with_reference, kind, scan=scan)
    if name == "bias" and value == -math.inf:
        assert loss.isfinite() and report.bound <= 0.15
        return
    assert not loss.isfinite()
    assert not leaves["hidden"].grad.isfinite().all()
    assert math.isnan(report.bound) and "no bound" in str(report)
    assert all(b is None or math.isnan(b) for b in (report.hidden_bound, report.weight_bound))


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_low_rank_part_beside_entries(value, name):
    """Not flat, so that the certificate asks for the singular values of the part."""
    loss, _, report = report_of(parts(300, 1.0, **{name: value}), (), False, "objective")
    assert not loss.isfinite() and math.isnan(report.bound)

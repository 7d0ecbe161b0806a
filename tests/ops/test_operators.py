"""The operators of a graph: their schemas, fakes and autograd formulas by `opcheck`, and the bytes they save."""

import pytest
import torch
from graphs import operator_arguments
from torch.library import opcheck

from fused_losses import compiled
from fused_losses.problem import DIFFERENTIABLE, OUTPUTS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
OPS = torch.ops.fused_losses

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
    for factors in (None, torch.rand(3)):
        opcheck(OPS.combined_rows.default, (torch.randn(3, 2, requires_grad=True), factors, torch.float32))
    for way in ("linear", "lower"):
        opcheck(OPS.median_temperature.default, (torch.rand(4), torch.arange(4) // 2, torch.arange(4) > 0, way))


def test_saved_bytes_are_the_tensors():
    tensors = [
        torch.rand(3, 5),
        None,
        torch.arange(7) > 3,
        torch.rand(0, 4).half(),
        torch.arange(5).int(),
        torch.arange(5).short(),
        torch.rand(2).double(),
    ]
    saved, layout = compiled.pack(list(tensors), torch.device("cpu"), numbers=(6, 7))
    back, numbers = compiled.unpack(saved, layout)
    assert numbers == [6, 7]
    for a, b in zip(tensors, back, strict=True):
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))

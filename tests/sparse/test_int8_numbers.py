"""scan="int8" of numbers that are hard to round, and of some that are not finite."""

from dataclasses import replace

import pytest
import torch
from cases import coarse, make, run, run_with_report
from sparse_checks import needs_kernels

pytestmark = needs_kernels


def wild(kind: str, x: torch.Tensor) -> torch.Tensor:
    """Rows that are hard to round, of rows [n, d]."""
    if kind == "one-hot":
        return torch.zeros_like(x).scatter_(1, x.argmax(1, keepdim=True), 30.0)
    if kind == "zero channels":
        return x * (torch.arange(x.shape[1]) % 2)
    if kind == "constant":
        return x[:, :1].expand_as(x).clone()
    if kind == "heavy-tailed":
        return x / torch.randn_like(x).abs().clamp(min=1e-3)
    return x * {"huge": 1e8, "tiny": 1e-30, "zeros": 0.0}[kind]


WILD = ["one-hot", "zero channels", "constant", "heavy-tailed", "huge", "tiny", "zeros"]


@pytest.mark.parametrize("kind", WILD)
@pytest.mark.parametrize("of_weight", [False, True], ids=["hidden", "weight"])
@pytest.mark.parametrize("reference", [None, "shared"])
def test_wild_numbers(kind, of_weight, reference):
    """What is finite stays so, and bounds are held to."""
    case = make(70, 20, 600, reference=reference, spread=3.0)
    case = replace(
        case, **{("weight" if of_weight else "hidden"): wild(kind, case.weight if of_weight else case.hidden)}
    )
    if reference:
        case.reference_hidden[:] = case.hidden * 1.01
    with coarse(1e-3):
        got, report = run_with_report(case, torch.float32, "cpu", "sparse", scan="int8")
    assert all(values.isfinite().all() for values in got.values())
    assert report.scan == "int8" and report.value_error >= 0 and report.bound <= 0.15
    if report.scan_note is None and kind != "huge":
        truth = run(case, torch.float64, "reference")["nll"]
        assert (got["nll"] - truth).abs().median() < 0.01


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("token", [0, 1], ids=["measured", "not-measured"])
def test_tokens_that_are_not_finite(value, token):
    """No other token's loss or gradient of its hidden state is touched."""
    case = make(30, 20, 600, spread=3.0, ignored=0)
    with coarse(1e-3):
        expected, _ = run_with_report(case, torch.float32, "cpu", "sparse", scan="int8")
    case.hidden[token, 3] = value
    with coarse(1e-3):
        got, report = run_with_report(case, torch.float32, "cpu", "sparse", scan="int8")
    others = torch.arange(30) != token
    assert not got["nll"][token].isfinite() and report.scan == "int8" and report.bound != report.bound
    assert (got["nll"] - expected["nll"])[others].abs().max() < 0.01
    assert got["d_hidden"][others].isfinite().all()

"""scan="int8" of numbers that are hard to round, and of some that are not finite."""

import functools
from dataclasses import replace

import pytest
import torch
from cases import coarse, make, name, relative, run, run_with_report
from sparse_checks import needs_kernels

import fused_losses as fl

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
    assert report.bound <= 0.15
    if report.scan == "full":
        assert "8 bits are too few for" in report.scan_note and kind in ("heavy-tailed", "huge")
    else:
        assert report.value_error >= 0
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("reference", [None, "shared"])
@pytest.mark.parametrize("frozen", [False, True], ids=name)
def test_tokens_that_8_bits_are_too_few_for_have_full_products(dtype, reference, frozen):
    """None of them is measured. A large number that the head does not see ruins the others of its hidden state."""
    case = make(300, 64, 9000, reference=reference, ignored=0, spread=4.0, frozen=frozen, near=0.3)
    bad = [7, 101, 203, 299]
    case.weight[:, 3] = 0
    case.hidden[bad, 3] = 1000.0
    if reference:
        case.reference_hidden[:, 3] = case.hidden[:, 3]
        case.reference_hidden[bad[:2], 3] *= -1  # the difference is as large
    case = case.rounded(dtype)
    got, report = run_with_report(case, dtype, "cpu", "sparse", scan="int8")
    truth = run(case, torch.float64, "reference")
    states = 4 if reference is None else 6
    assert report.scan_note == f"8 bits are too few for {states} hidden states, which alone have them"
    assert (got["nll"] - truth["nll"])[bad].abs().max() < 1.5e-4  # measured 4.8e-5
    if reference:
        assert (got["kl"] - truth["kl"])[bad].abs().max() < 3.6e-5  # measured 1.2e-5
    assert relative(got["d_hidden"], truth["d_hidden"]) < report.hidden_bound < 0.03
    if not frozen:
        assert relative(got["d_weight"], truth["d_weight"]) < report.weight_bound < 0.04


@pytest.mark.parametrize("reference", [False, True], ids=["alone", "reference"])
@pytest.mark.parametrize("backend, scan", [("cpu", "int8"), ("cpu", "full"), ("torch", "full")])
def test_autocast_rounds_both_models(reference, backend, scan):
    """Hidden states in float32 under autocast are as those that were rounded before."""
    options = dict(backend=backend, scan=scan)
    case = make(200, 64, 9000, reference="shared", ignored=0, spread=4.0, near=0.3)
    hidden, head, ref = case.inputs(torch.float32)
    narrow = fl.Reference(ref.hidden.bfloat16()) if reference else None
    with torch.no_grad():
        rounded = fl.token_losses(hidden.bfloat16(), head.weight.bfloat16(), case.labels, reference=narrow, **options)
        with torch.autocast("cpu", torch.bfloat16):
            wide = fl.token_losses(hidden, head.weight, case.labels, reference=ref if reference else None, **options)
    assert torch.equal(wide.nll, rounded.nll) and wide.gradient_report.scan_note is None
    if reference:
        assert torch.equal(wide.kl, rounded.kl)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_graph_of_token_losses_does_not_say_which_products_it_had():
    """Its report is made while the graph is."""
    torch._dynamo.reset()
    hidden, weight, labels = torch.randn(40, 16), torch.randn(300, 16), torch.randint(300, (40,))

    def scan_of(kind):
        call = functools.partial(fl.token_losses, backend="cpu", scan=kind)
        return torch.compile(call, fullgraph=True, backend="aot_eager")(hidden, weight, labels).gradient_report.scan

    assert (scan_of("int8"), scan_of("full")) == (None, "full")

"""What sparse gradients leave out in directions of the head, on a GPU: the kernels' sums, and the gradients made of
them with their certificates in L2."""

import low_rank_cases
import pytest
import torch
from cases import HEADS, REFERENCES, coarse, make, name, relative, run, run_with_report
from machine import BACKENDS, DEVICE, DTYPES, HALVES, ROUNDING, pick
from scan_truth import deviations, misleading, problem_of

import fused_losses as fl
from fused_losses.backends import gpu_scan
from fused_losses.sparse import softmax, spectrum

SHAPE = pick((21, 16, 300), (40, 96, 507))
CHANCE = pick(1.2, 1.02)

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def directions_of_few_tokens(monkeypatch):
    monkeypatch.setattr(softmax, "FEWEST_TOKENS", 1)


@every_backend
@pytest.mark.parametrize("shape", [SHAPE], ids=name)
@pytest.mark.parametrize("head", pick(HEADS[::4], HEADS), ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("path", ["scan", "logits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_left_out(backend, shape, head, reference, path, dtype, within, monkeypatch):
    """`scan` and `left_out` against float64 with the same entries; their operands are rounded to half precision."""
    problem = problem_of(make(*shape, **head, reference=reference).rounded(dtype), dtype, DEVICE)
    monkeypatch.setattr(gpu_scan, "LOGITS_FASTER", frozenset())
    if path == "logits":
        monkeypatch.setattr(gpu_scan, "choose_tile", lambda problem, directed=False: None)
    elif gpu_scan.choose_tile(problem, True) is None:
        pytest.skip("takes chunks of logits: float32, or a soft-cap with a reference")
    # Σ (p − p_ref) cancels.
    close = {"kl_left": 5e-5, "kl_square": 1e-4} if dtype == torch.float32 else {}
    for field, error in deviations(problem, backend).items():
        within(**{field: (error, close.get(field, 1e-5 if dtype == torch.float32 else 8e-4))})


@every_backend
@pytest.mark.parametrize("shape", pick([(12, 16, 300)], [(200, 96, 1003)]), ids=name)
@pytest.mark.parametrize("head", pick(HEADS[::4], HEADS), ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("dtype", pick(HALVES, DTYPES), ids=name)
def test_gradients_are_within_their_certificates(backend, shape, head, reference, frozen, dtype, within):
    case = make(*shape, **head, reference=reference, frozen=frozen, ignored=0, spread=3.0).rounded(dtype)
    truth = run(case, torch.float64, "reference")
    with coarse(2e-3, tolerance=0.9):
        got, report = run_with_report(case, dtype, backend, "sparse", DEVICE, tolerance=0.9)
    assert report.mode == "sparse" and 0 < report.hidden_bound <= 0.9, report
    # Each gradient is rounded once, and so is the difference of the two hidden states.
    rounding = 1e-5 + 6 * ROUNDING[dtype]
    figures = {"d_hidden": (relative(got["d_hidden"], truth["d_hidden"]), report.hidden_bound + rounding)}
    if not frozen:
        figures["d_weight"] = (relative(got["d_weight"], truth["d_weight"]), report.weight_bound + rounding)
    within(nll=(relative(got["nll"], truth["nll"]), 1e-5 + ROUNDING[dtype]), **figures)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_products_of_the_probes_have_the_digits_of_float32(dtype, within):
    """By them it is decided how far a head that is trained has moved."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(1003, 96, generator=g).to(DEVICE, dtype)
    probes = torch.randn(8, 96, generator=g).bfloat16().float().to(DEVICE)
    got = spectrum._times(probes, weight)
    assert got.dtype == torch.float32
    # A small number of bfloat16 may have a digit more than float16.
    within(error=(relative(got, probes.double() @ weight.double().t()), 1e-5 if dtype == torch.float16 else 2e-6))


@every_backend
@pytest.mark.parametrize("form", pick(["a"], ["a", "rows"]))
@pytest.mark.parametrize("reference", pick([None, "off"], [None, "off", "copy", "other model"]), ids=name)
@pytest.mark.parametrize("frozen", pick([True], [False, True]), ids=name)
@pytest.mark.parametrize("dtype", pick(HALVES, DTYPES), ids=name)
def test_lora_on_the_head(backend, form, reference, frozen, dtype, within):
    """A rank of 8, so that rows of [W, B] are whole units of 16 bytes and the scan takes them."""
    shape = pick((12, 16, 200), (150, 96, 1003))
    given = low_rank_cases.inputs(form, reference, frozen, bias=True, scale=0.8, shape=shape, rank=8, spread=3.0)
    with coarse(1e-30 if dtype == torch.float32 else 1e-6, capacity=shape[2]):
        ours = low_rank_cases.errors(on_device(given), dtype, backend, gradient="sparse")
    if dtype == torch.float32:
        within(**{output: (error, 1e-5) for output, error in ours.items()})
    else:
        plain = low_rank_cases.errors(on_device(given), dtype, "reference")
        within(**{output: (error, plain[output] * CHANCE) for output, error in ours.items()})


def on_device(given: low_rank_cases.Inputs) -> low_rank_cases.Inputs:
    return given.cast(torch.float64).to(DEVICE)


@every_backend
@pytest.mark.parametrize("dtype", pick(HALVES, DTYPES), ids=name)
def test_a_head_made_to_mislead_does_not(backend, dtype, within, monkeypatch):
    hidden, weight, labels = misleading(*pick((32, 16, 600), (256, 64, 6000)))
    hidden, weight, labels = hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE)
    exact = hidden.double().requires_grad_()
    fl.token_losses(exact, weight.double(), labels, backend="reference").nll.sum().backward()
    errors = []
    for found in (softmax.directions_of, lambda *_: None):
        monkeypatch.setattr(softmax, "directions_of", found)
        x = hidden.clone().requires_grad_()
        with coarse(4e-3, tolerance=0.5):
            out = fl.token_losses(x, weight, labels, gradient="sparse", tolerance=0.5, backend=backend)
            out.nll.sum().backward()
        errors.append(relative(x.grad, exact.grad))
        if len(errors) == 1:
            bound = out.gradient_report.hidden_bound
    within(certified=(bound, 0.5), error=(errors[0], bound + 1e-5 + 3 * ROUNDING[dtype]))
    within(beside_one_profile=(errors[0], 0.3 * errors[1]))

"""The losses as a whole on a GPU: against the oracle, the certificate, the same results every time, and large sizes."""

import itertools

import pytest
import torch
from cases import HEADS, REFERENCES, coarse, errors, make, name, near_the_reference, relative, rounded_difference, run
from machine import BACKENDS, DEVICE, DRY, DTYPES, HALVES, ROUNDING, pick, repeats_that_differ
from test_objectives import NAMES, objectives
from torch import Tensor

import fused_losses as fl
from fused_losses import backends
from fused_losses.kernels import measure
from fused_losses.sparse.certificate import L1_SHARE

# (shape, head frozen): sizes that tensor cores like, and such that leave a tail of one in every tile.
SHAPES = pick(
[((9, 16, 70), False)], [((64, 96, 1000), False), ((64, 96, 1000), True), ((129, 65, 507), False)]
)  # fmt: skip
GRADIENTS = ("exact", "sparse")
# Room for chance beside plain PyTorch's error; more for a dry run's few numbers.
CHANCE = pick(1.2, 1.02)

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_gradient = pytest.mark.parametrize("gradient", GRADIENTS)


def labelled(case):
    (shape, frozen), head, reference = case
    return "-".join([name(shape), name(frozen), name(head), name(reference)])


GRID = pick(
    [(SHAPES[0], HEADS[-1], None), (SHAPES[0], HEADS[0], "own")], list(itertools.product(SHAPES, HEADS, REFERENCES))
)


@every_backend
@every_gradient
@pytest.mark.parametrize("case", GRID, ids=labelled)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_against_the_oracle(backend, gradient, case, dtype, within):
    """float32: nothing but rounding. Halves: no further from the truth than plain PyTorch of that dtype.

    ε as on the CPU.
    """
    (shape, frozen), head, reference = case
    inputs = make(*shape, **head, reference=reference, frozen=frozen, spread=2.0 if dtype == torch.float32 else 4.0)
    with coarse(1e-30 if dtype == torch.float32 else 1e-6, capacity=shape[2]):
        ours = errors(inputs, dtype, backend, gradient=gradient, device=DEVICE)
    if dtype == torch.float32:
        within(**{output: (error, 1e-5) for output, error in ours.items()})
    else:
        plain = errors(inputs, dtype, "reference", device=DEVICE)
        least = of_roundings(inputs, dtype, gradient)
        within(**{output: (error, max(plain[output], least.get(output, 0)) * CHANCE) for output, error in ours.items()})


def of_roundings(case, dtype: torch.dtype, gradient: str) -> dict[str, float]:
    """Errors that come of the operands' format alone, where plain PyTorch has not got these roundings.

    A shared reference: x − x_ref is rounded once. Sparse: dx is rounded as the rows are stored, as they are weighted
    and at the end; the bias takes rounded values and is rounded. Independent roundings add as squares.
    """
    case = case.rounded(dtype)
    truth, least = run(case, torch.float64, "reference"), {}
    if case.reference_hidden is not None and case.reference_weight is None:
        least["kl"] = relative(run(rounded_difference(case, dtype), torch.float64, "reference")["kl"], truth["kl"])
    for output, times in (("d_hidden", 3), ("d_bias", 2)) if gradient == "sparse" else ():
        if output in truth:
            least[output] = times**0.5 * relative(truth[output].to(dtype), truth[output])
    return least


@every_backend
@every_gradient
@pytest.mark.parametrize("objective", pick(["talr-median", "lawf"], NAMES))
@pytest.mark.parametrize("dtype", pick(DTYPES[:1], DTYPES), ids=name)
def test_objectives(backend, gradient, objective, dtype, within):
    case = make(24, pick(8, 32), pick(40, 1000), bias=True, reference="shared", spread=4.0).rounded(dtype)

    def result(dtype: torch.dtype, device: str, backend: str, gradient: str, case=case) -> dict[str, Tensor]:
        module, arguments, _ = objectives()[objective]
        module.backend, module.gradient = backend, gradient
        hidden, head, reference = case.inputs(dtype, device)
        arguments = {k: v.to(device) for k, v in arguments.items()}
        if "confidence" in arguments:  # is of tokens with a label
            arguments["confidence"][case.labels == -100] = 0
        if module.needs_reference:
            arguments["reference"] = reference
        value = module(hidden, head, case.labels.to(device), **arguments)
        value.backward()
        found = {"loss": value, "d_hidden": hidden.grad, "d_weight": head.weight.grad, "d_bias": head.bias.grad}
        return {key: tensor.detach().double().cpu() for key, tensor in found.items()}

    truth = result(torch.float64, "cpu", "reference", "exact")
    plain = result(dtype, DEVICE, "reference", "exact")
    # x − x_ref is rounded to the operands' dtype; plain PyTorch's loss has not got that rounding.
    seen = result(torch.float64, "cpu", "reference", "exact", rounded_difference(case, dtype))
    with coarse(1e-30 if dtype == torch.float32 else 1e-6, capacity=1000):
        ours = result(dtype, DEVICE, backend, gradient)
    for output, value in truth.items():
        bound = 1e-5 if dtype == torch.float32 else relative(plain[output], value) * CHANCE
        if output == "loss":
            rounded = relative(seen[output], value) * CHANCE if dtype in HALVES else 0.0
            bound = max(bound, rounded, 1e-6)  # one number may be right by chance
        within(**{output: (relative(ours[output], value), bound)})


@every_backend
@every_gradient
@pytest.mark.parametrize("reference", pick(["shared"], ["shared", "own"]))
def test_kl_gradient_near_the_reference_survives(backend, gradient, reference, within):
    """In bf16, dry in fp16: KL about 0.003, where bf16 logits lose a third of the gradient and more."""
    dtype = HALVES[-1]
    case = near_the_reference(reference, *pick((6, 32, 120), (64, 256, 4096)))
    truth = run(case, torch.float64, "reference")
    with coarse(1e-6, capacity=4096):
        ours = run(case, dtype, backend, gradient=gradient, device=DEVICE)
    # As far off as x − x_ref, rounded to the operands' dtype, makes it.
    seen = relative(run(rounded_difference(case, dtype), torch.float64, "reference")["kl"], truth["kl"])
    bound = 0.005 + ROUNDING[dtype]  # the gradient comes out in the half dtype
    within(
        kl=(relative(ours["kl"], truth["kl"]), max(pick(1e-3, 5e-5), seen * CHANCE if reference == "shared" else 0.0)),
        **{k: (relative(ours[k], truth[k]), bound) for k in ("d_hidden", "d_weight")},
    )


def heavy_tailed(n: int, v: int) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.randn(n, v, generator=g) / torch.randn(n, v, generator=g).abs().clamp(min=0.05)).clamp(-30, 30)


@every_backend
@pytest.mark.parametrize("kind", pick(["flat", "heavy-tailed"], ["language-like", "flat", "heavy-tailed"]))
@pytest.mark.parametrize("reference", pick([True], [False, True]), ids=lambda given: "kl" if given else "nll")
@pytest.mark.parametrize("tolerance", pick([0.1], [0.1, 0.02]))
def test_certificate(backend, kind, reference, tolerance, within):
    """The head is the identity, so dx is the gradient of the logits itself and its L1 error is what is certified."""
    n, v = pick((8, 66), (512, 4096))
    dtype = HALVES[-1]
    if kind == "heavy-tailed":
        z = heavy_tailed(n, v)
        labels = z.argmax(1)
        labels[::3] = torch.arange(n)[::3] % v
    else:
        given = measure.DISTRIBUTIONS[kind](n, 64, v, torch.float32, "cpu")
        z, labels = given.hidden @ given.weight.T, given.labels
    z = z.to(DEVICE, dtype)
    z_ref = (z.float() + 0.1 * torch.randn(n, v, generator=torch.Generator().manual_seed(1)).to(DEVICE)).to(dtype)
    labels = labels.to(DEVICE)
    a = (0.5 + torch.rand(n, generator=torch.Generator().manual_seed(2))).to(DEVICE)

    def gradient(dtype: torch.dtype, **options):
        x = z.to(dtype, copy=True).requires_grad_()
        head = fl.LMHead(torch.eye(v, dtype=dtype, device=DEVICE))
        given = fl.Reference(z_ref.to(dtype)) if reference else None
        out = fl.token_losses(x, head, labels, reference=given, **options)
        ((out.kl if reference else out.nll) * a).sum().backward()
        return x.grad.double(), out.gradient_report

    truth, _ = gradient(torch.float64, backend="reference")
    with coarse(pick(1e-3, 1.1e-4), tolerance=tolerance):
        got, report = gradient(dtype, backend=backend, gradient="sparse", tolerance=tolerance)
    error = ((got - truth).abs().sum() / truth.abs().sum()).item()
    within(bound=(report.bound, L1_SHARE * tolerance), error=(error, report.bound + 3 * ROUNDING[dtype] + 1e-5))


@every_backend
@every_gradient
@pytest.mark.parametrize("what", pick(["bias"], ["nll and kl", "bias", "TALR", "frozen"]))
def test_the_same_results_every_time(backend, gradient, what, within):
    n, d, v = pick((8, 16, 66), (1000, 512, 32000))
    given = measure.language_like(n, d, v, HALVES[-1], DEVICE)
    ones = torch.linspace(-1, 2, n, device=DEVICE)
    torch.use_deterministic_algorithms(False)  # nobody asks for them here

    def result() -> list[Tensor]:
        x = given.hidden.clone().requires_grad_()
        w = given.weight.clone().requires_grad_(what != "frozen")
        b = torch.zeros(v, device=DEVICE, requires_grad=True) if what == "bias" else None
        head = fl.LMHead(w, b)
        if what == "TALR":
            loss = fl.TALRLoss(backend=backend, gradient=gradient)(x[None], head, given.labels[None])
            values = [loss]
        else:
            reference = fl.Reference(given.reference_hidden) if what != "bias" else None
            out = fl.token_losses(x, head, given.labels, reference=reference, backend=backend, gradient=gradient)
            values = [v for v in (out.nll, out.kl, out.entropy) if v is not None]
            loss = (out.nll * ones).sum() + (0 if reference is None else (out.kl * ones.flip(0)).sum())
        loss.backward()
        grads = [t.grad for t in (x, w, b) if t is not None and t.grad is not None]
        return [value.detach().clone() for value in values + grads]

    within(different=(repeats_that_differ(result), 0))


@every_backend
@pytest.mark.parametrize("path", pick(["logits", "reference"], ["scan", "logits", "exact", "reference", "frozen"]))
def test_more_logits_than_an_int32_counts(backend, path, within):
    """N·V past 2³¹: loss, and gradients at some tokens and some ids, the last among them."""
    n, d, v = pick((15, 16, 70), (20000, 64, 128256))
    dtype = HALVES[-1]
    given = measure.language_like(n, d, v, dtype, DEVICE)
    x, w = given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_(path != "frozen")
    reference = fl.Reference(given.reference_hidden, given.weight.clone()) if path == "reference" else None
    options = dict(backend=backend, gradient="exact" if path == "exact" else "sparse")
    if path == "logits":  # the entropy of the largest needs logits
        objective = fl.EAFTLoss(alpha=0.0, **options)
        value = objective(x, w, given.labels)
        (value * n).backward()
        report = objective.gradient_report
    else:
        out = fl.token_losses(x, w, given.labels, reference=reference, **options)
        value = out.nll.mean()
        (out.nll if reference is None else out.kl).sum().backward()
        report = out.gradient_report

    tokens = torch.cat([torch.arange(0, n, max(1, n // 7)), torch.tensor([n - 1])]).to(DEVICE)
    ids = torch.cat([given.labels[:: max(1, n // 7)], torch.tensor([0, v - 1], device=DEVICE)])
    weight = given.weight.double()
    dw = torch.zeros(len(ids), d, dtype=torch.float64, device=DEVICE)
    dx = torch.zeros(len(tokens), d, dtype=torch.float64, device=DEVICE)
    total = 0.0
    for at in torch.arange(n, device=DEVICE).split(500):
        h = given.hidden[at].double()
        log_p = (h @ weight.T).log_softmax(1)
        picked = given.labels[at, None]
        total -= log_p.gather(1, picked).sum().item()
        dz = log_p.exp()
        if reference is None:
            dz.scatter_add_(1, picked, -torch.ones_like(picked, dtype=torch.float64))
        else:
            dz -= (given.reference_hidden[at].double() @ weight.T).softmax(1)
        dw += dz[:, ids].T @ h
        here = (tokens >= at[0]) & (tokens <= at[-1])
        dx[here] = dz[tokens[here] - at[0]] @ weight
    within(loss=(abs(value.item() * n / total - 1), 1e-5), bound=(report.bound, 0.15))
    # Relative L2 errors of sparse gradients, as on real text: docs/method.md.
    allowed = {"exact": 0.001, "reference": 0.1}.get(path, 0.05) + 3 * ROUNDING[dtype]
    within(d_hidden=(relative(x.grad[tokens], dx), allowed))
    if path != "frozen":
        within(d_weight=(relative(w.grad[ids], dw), allowed))


@every_backend
@every_gradient
def test_operands_that_are_not_aligned_for_descriptors(backend, gradient, within):
    """A D that is no multiple of 8, and a V that leaves part of a tile."""
    for n, d, v in pick([(9, 17, 70)], [(70, 65, 100), (70, 65, 33000), (200, 575, 33100), (70, 7, 333)]):
        for reference in pick(["own"], [None, "own"]):
            case = make(n, d, v, spread=4.0, reference=reference)
            with coarse(1e-6, capacity=v):
                ours = errors(case, HALVES[-1], backend, gradient=gradient, device=DEVICE)
            plain = errors(case, HALVES[-1], "reference", device=DEVICE)
            within(**{k: (ours[k], plain[k] * CHANCE) for k in ours})


@every_backend
def test_another_device_is_current(backend, within):
    if DRY or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = make(64, 96, 1000, reference="shared")
    assert torch.cuda.current_device() == 0
    found = errors(case, torch.float32, backend, gradient="sparse", device="cuda:1", tolerance=0.01)
    within(**{k: (e, 1e-2) for k, e in found.items()})


@every_backend
@every_gradient
def test_compiled_caller(backend, gradient, within):
    """torch.compile(fullgraph=True) of a function that calls a loss."""
    case = make(pick(8, 32), 32, pick(70, 2000), ignored=0.1)
    hidden, head, _ = case.inputs(torch.float32, DEVICE)
    weight, labels = head.weight, case.labels.to(DEVICE)

    def step(x: Tensor, w: Tensor) -> Tensor:
        out = fl.token_losses(x * 1.5, w, labels, backend=backend, gradient=gradient)
        return (out.nll * 2).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager" if DRY else "inductor")
    expected = torch.autograd.grad(step(hidden, weight), (hidden, weight))
    try:
        value = compiled(hidden, weight)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip("a graph break: " + str(error).strip().splitlines()[0])
    got = torch.autograd.grad(value, (hidden, weight))
    for what, one, other in zip(("d_hidden", "d_weight"), got, expected, strict=True):
        within(**{what: (relative(one, other), 1e-6)})


@every_backend
def test_backend_is_the_one_asked_for(backend):
    assert backends.choose(backend, DEVICE) == backend


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, in a dry run
@every_backend
@every_gradient
@pytest.mark.parametrize("bias", pick([False], [False, True]), ids=lambda b: "bias" if b else "no-bias")
def test_bad_logits_reach_their_own_token_only(backend, gradient, bias):
    """NaN must not get lost: a GPU's maximum of NaN and a number is the number."""
    case = make(20, 16, pick(60, 1000), ignored=0, bias=bias)
    hidden, head, _ = case.inputs(DTYPES[-1], device=DEVICE)
    with torch.no_grad():
        hidden[7], hidden[9] = torch.inf, torch.nan
    with coarse(1e-3):
        out = fl.token_losses(hidden, head, case.labels.to(DEVICE), gradient=gradient, backend=backend)
        out.nll.sum().backward()
    bad = ~out.nll.isfinite()
    assert bad.nonzero().flatten().tolist() == [7, 9]
    assert not hidden.grad[bad].isfinite().all() and hidden.grad[~bad].isfinite().all()

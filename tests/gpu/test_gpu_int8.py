"""The scan with operands of 8 bits on a GPU: the kernels by themselves, and losses with scan="int8".

Integers everywhere but on sm_100, which takes e4m3; a dry run has both.
"""

import math

import low_rank_cases
import pytest
import torch
from cases import HEADS, coarse, make, name, relative, run, run_with_report
from machine import BACKENDS, DEVICE, DRY, HALVES, ROUNDING, pick, repeats_that_differ
from scan_truth import finished, logits, logits_of_8_bits, problem_of, swept

import fused_losses as fl
from fused_losses.backends import gpu_int8, gpu_scan, int8
from fused_losses.kernels import measure
from fused_losses.kernels.triton import quantized, tiles
from fused_losses.kernels.triton.scan import UNIT, Known, Left, Sum
from fused_losses.problem import Head, Int8
from fused_losses.sparse import softmax
from fused_losses.sparse.spectrum import directions_of

INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
SHAPE = pick((9, 16, 130), (40, 96, 507))

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=name)
every_head = pytest.mark.parametrize("head", pick(HEADS[::4], HEADS), ids=name)
every_operand = pytest.mark.parametrize("operand", [INT8, FLOAT8], ids=name)


@pytest.fixture(autouse=True)
def directions_of_few_tokens(monkeypatch):
    monkeypatch.setattr(softmax, "FEWEST_TOKENS", 1)


def skip_what_is_not_taken_here(operand: torch.dtype) -> None:
    if not DRY:
        floats = tiles.architecture(torch.cuda.get_device_capability()) in tiles.FLOAT8
        if floats != (operand == FLOAT8):
            pytest.skip(f"operands of 8 bits are {'floats' if floats else 'integers'} on this GPU")


@every_operand
@every_half
@pytest.mark.parametrize("shape", pick([(9, 16, 37)], [(1, 16, 1), (40, 96, 75), (300, 4096, 4096)]), ids=name)
@pytest.mark.parametrize("with_factor", [False, True])
def test_quantize_rows(operand, dtype, shape, with_factor, within):
    skip_what_is_not_taken_here(operand)
    g = torch.Generator().manual_seed(0)
    n, _, d = shape
    matrix = (torch.randn(n, d, generator=g) * torch.logspace(-3, 3, n)[:, None]).to(DEVICE, dtype)
    matrix[n // 2] = 0
    factor = (torch.rand(d, generator=g) + 0.5).to(DEVICE) if with_factor else None
    out, scale = gpu_int8.rows_of(matrix, factor, operand)
    scaled = matrix.double() if factor is None else matrix.double() * factor
    expected = (scaled.abs().amax(1) / (127 if operand == INT8 else 448)).clamp(min=1e-37)
    y, got = scaled / scale[:, None].double(), out[:, :d].float().double()
    # Half a unit of the last place, and what the division rounds.
    most = torch.full_like(y, 0.501) if operand == INT8 else (y.abs() * 2.0**-4).clamp(min=2.0**-10) * 1.001
    wrong = (got - y).abs() > most
    if DRY and operand == FLOAT8:  # Triton's interpreter halves what it rounds up to a power of two
        wrong &= y.float().to(FLOAT8).float().abs().log2() % 1 != 0
    beyond = out[:, d:].float().abs().sum().item()
    within(scale=(((scale - expected) / expected).abs().max().item(), 1e-6), wrong=(wrong.sum().item(), 0))
    within(beyond=(beyond, 0))


@every_operand
def test_a_row_that_is_not_finite_has_the_scale_nan(operand):
    skip_what_is_not_taken_here(operand)
    matrix = torch.ones(3, 5, dtype=HALVES[-1], device=DEVICE)
    matrix[1, 2], matrix[2, 4] = float("nan"), float("-inf")
    assert gpu_int8.rows_of(matrix, None, operand)[1].isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize("shape", [SHAPE], ids=name)
@every_operand
@every_half
@every_head
@pytest.mark.parametrize("directed", [False, True], ids=["alone", "directions"])
def test_scan_of_8_bits(shape, operand, dtype, head, directed, within):
    """Sums over what has no bit, and bits, beside the same quantised numbers in float64."""
    skip_what_is_not_taken_here(operand)
    problem = problem_of(make(*shape, ignored=0, **head).rounded(dtype), dtype, DEVICE)
    n, _, v = shape
    tile = gpu_scan.choose_tile(problem, directed, eight_bit=True)
    x, w = (gpu_int8.rows_of(m, None, operand) for m in (problem.hidden, problem.head.weight))
    eight = gpu_int8.Eight(tile, *x, *w)
    z = logits_of_8_bits(problem, eight)
    known = torch.zeros(3, n, device=DEVICE)
    known[Known.BOUND] = z.quantile(0.9, dim=1)
    bound = known[Known.BOUND].double()[:, None]
    rows = directions_of(problem.head.weight).rows if directed else None
    height, width = -(-n // tile.block_n) * tile.block_n, -(-v // tile.block_v) * tile.block_v // 32
    bits = torch.zeros(height, width, dtype=torch.int32, device=DEVICE)
    found = gpu_scan.Operands(problem, tile, rows, eight).run(slice(0, n), known, bits, v)
    unpacked = ((bits[:n, :, None] >> torch.arange(32, device=DEVICE)) & 1).reshape(n, -1) != 0
    kept = unpacked[:, :v]
    wrong = (kept != (z > bound)) & ((z - bound).abs() > 1e-4)

    labels = problem.labels[:, None]
    z = z.masked_fill(kept, -torch.inf).scatter(1, labels, -torch.inf)
    top, moved = gpu_scan._moved(found.partial[:, Sum.TOP])
    total = (found.partial[:, Sum.SUM] * moved).sum(0)
    figures = {
        "wrong": (wrong.sum().item(), 0), "beyond": (unpacked[:, v:].sum().item(), 0),
        "top": (relative(top, z.amax(1)), 1e-5),
        "total": (relative(total, (z - z.amax(1, keepdim=True)).exp().sum(1)), 1e-5),
    }  # fmt: skip
    if directed:
        slope = 1.0 if problem.head.softcap is None else 1 - (z.clamp(min=-100) / problem.head.softcap) ** 2
        left = (z - bound).exp() * slope
        low = found.low.sum(0)[0] / UNIT.value
        figures |= {
            "left": (relative(found.left.sum(0)[Left.SUM], left.sum(1)), 1e-5),
            "square": (relative(found.left.sum(0)[Left.SQUARE], left.square().sum(1)), 1e-5),
            "low": (relative(torch.ldexp(low, exponent_of(rows)), left @ rows.double()), 8e-4),
        }
    within(**figures)


def exponent_of(rows: torch.Tensor) -> torch.Tensor:
    """Of the directions in half precision."""
    from fused_losses.problem import in_half_precision

    return in_half_precision(rows)[1]


@pytest.mark.parametrize("n", [9, pick(12, 40)], ids=lambda n: f"N{n}")
@every_head
def test_kept_sums(n, head, within):
    g = torch.Generator().manual_seed(0)
    scale, softcap = head.get("scale", 1.0), head.get("softcap")
    # None, one; more than a block of the kernel.
    counts = torch.randint(2, 60, (n,), generator=g)
    counts[0], counts[1], counts[2] = 0, 1, 300
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    columns = torch.cat([torch.randperm(1000, generator=g)[:c].sort().values for c in counts.tolist()]).int()
    labels = columns[offsets[:-1].clamp(max=len(columns) - 1)].long()
    labels[0] = 5
    z = 3 * torch.randn(len(columns), generator=g)
    partial = torch.full((len(Sum), n), float("nan"), device=DEVICE)
    quantized.kept_sums(
        z.to(DEVICE), labels.to(DEVICE), offsets.to(DEVICE), columns.to(DEVICE), scale, softcap, partial
    )
    got, worst = partial.double().cpu(), {}
    truth = finished(z.double(), Head(z[None], None, scale, softcap))
    for t in range(n):
        here = slice(int(offsets[t]), int(offsets[t + 1]))
        others = truth[here][columns[here] != labels[t]]
        if len(others) == 0:
            assert got[Sum.SUM, t] == 0 and got[Sum.TOP, t] < -1e38
            continue
        shifted = others - others.max()
        e = shifted.exp()
        wanted = {Sum.TOP: others.max(), Sum.SUM: e.sum(), Sum.WEIGHTED: (e * shifted).sum()}
        if softcap is not None:
            wanted[Sum.SLOPED] = (e * (1 - (others / softcap) ** 2)).sum()
        for row, value in wanted.items():
            error = (abs(got[row, t] - value) / value.abs().clamp(min=1e-2)).item()
            worst[row.name] = max(worst.get(row.name, 0.0), error)
        index = partial[Sum.INDEX, t].view(torch.int32).item()
        assert index == columns[here][columns[here] != labels[t]][others.argmax()]
    within(**{row: (error, 1e-5) for row, error in worst.items()})


@every_backend
@every_half
@every_head
@pytest.mark.parametrize("frozen", [False, True], ids=name)
def test_losses(backend, dtype, head, frozen, within):
    """Against float64. The certificate is of what is left out; of the rest 8 bits are an error of their own."""
    shape = pick((16, 16, 300), (200, 96, 1003))
    case = make(*shape, **head, frozen=frozen, ignored=0, spread=3.0).rounded(dtype)
    truth = run(case, torch.float64, "reference")
    with coarse(2e-3, tolerance=0.9):
        got, report = run_with_report(case, dtype, backend, "sparse", DEVICE, scan="int8", tolerance=0.9)
    assert (report.mode, report.scan, report.scan_note) == ("sparse", "int8", None), report
    error = (got["nll"] - truth["nll"]).abs()
    rounding = 0.008 + 3 * ROUNDING[dtype]
    figures = {"d_hidden": (relative(got["d_hidden"], truth["d_hidden"]), report.hidden_bound + rounding)}
    if not frozen:
        figures["d_weight"] = (relative(got["d_weight"], truth["d_weight"]), report.weight_bound + rounding)
    within(nll=(error.mean().item(), 0.004), largest=(error.max().item(), 0.1), **figures)
    within(value_error=(report.value_error, gpu_int8.MOST_ERROR))


@every_backend
@every_half
@pytest.mark.parametrize("form", pick(["a"], ["a", "rows"]))
@pytest.mark.parametrize("frozen", pick([True], [False, True]), ids=name)
def test_lora_on_the_head(backend, dtype, form, frozen, within):
    shape = pick((16, 16, 200), (200, 96, 1003))
    given = low_rank_cases.inputs(form, None, frozen, bias=True, scale=0.8, shape=shape, rank=8, spread=3.0)
    given = given.cast(torch.float64).to(DEVICE).cast(dtype)
    exact = given.cast(torch.float64)
    keep, upstream = given.labels != -100, given.upstream[0]
    z, _ = exact.logits()
    nll = torch.nn.functional.cross_entropy(z, given.labels[keep], reduction="none")
    truth = exact.results((nll * upstream[keep]).sum(), nll=nll.detach())
    hidden, head, labels, _ = given.arguments()
    with coarse(2e-3, tolerance=0.9):
        out = fl.token_losses(hidden, head, labels, backend=backend, gradient="sparse", scan="int8", tolerance=0.9)
        got = given.results((out.nll * upstream.to(out.nll)).sum(), nll=out.nll.detach()[keep])
    report = out.gradient_report
    assert (report.scan, report.scan_note) == ("int8", None), report
    within(nll=((got["nll"] - truth["nll"]).abs().mean().item(), 0.004))
    within(d_hidden=(relative(got["d_hidden"], truth["d_hidden"]), report.hidden_bound + 0.008 + 3 * ROUNDING[dtype]))


@every_backend
@every_half
@every_head
def test_values_without_gradients(backend, dtype, head, within):
    shape = pick((16, 16, 300), (200, 96, 1003))
    case = make(*shape, **head, ignored=0, spread=3.0).rounded(dtype)
    hidden, lm_head, _ = case.inputs(dtype, DEVICE)
    with torch.no_grad():
        out = fl.token_losses(hidden, lm_head, case.labels.to(DEVICE), backend=backend, scan="int8")
    assert (out.gradient_report.scan, out.gradient_report.scan_note) == ("int8", None)
    z = logits(problem_of(case, dtype, DEVICE))
    labels = case.labels.to(DEVICE)
    error = (out.nll.double() - torch.nn.functional.cross_entropy(z, labels, reduction="none")).abs()
    entropy = -(z.log_softmax(1) * z.softmax(1)).sum(1)
    within(nll=(error.mean().item(), 0.004), entropy=(relative(out.entropy, entropy), 0.004))


def why_full(what: str) -> tuple[tuple[int, int, int], dict, str]:
    shape, options, note = pick((16, 16, 130), (200, 96, 1003)), {}, ""
    if what == "reference":
        options, note = dict(reference="shared"), "for losses without a reference"
    elif what == "hidden size":
        shape, note = (shape[0], shape[1] + 1, shape[2]), "takes chunks of logits"
    return shape, options, note


@every_backend
@pytest.mark.parametrize("what", pick(["reference"], ["reference", "hidden size"]))
def test_full_products_where_8_bits_cannot(backend, what, within):
    """The report says why, and the results are those of scan="full"."""
    shape, options, note = why_full(what)
    case = make(*shape, **options)
    outputs = []
    for scan in ("int8", "full"):
        got, report = run_with_report(case, HALVES[-1], backend, "sparse", DEVICE, scan=scan)
        outputs.append(got)
        if scan == "int8":
            assert report.scan == "full" and note in report.scan_note, report
    within(different=(sum(not torch.equal(outputs[0][key], outputs[1][key]) for key in outputs[1]), 0))


@every_backend
def test_full_products_where_8_bits_are_too_far_off(backend, within, monkeypatch):
    """One channel far larger than the rest, and no factors that would share it."""
    monkeypatch.setattr(gpu_int8, "channel_of", lambda problem: None)
    monkeypatch.setattr(int8, "MOST_SPREAD", math.inf)  # which would see it without measuring
    n, d, v = pick((16, 16, 300), (200, 96, 1003))
    case = make(n, d, v, ignored=0)
    larger = pick(1e3, 1e6)  # e4m3 has more powers of two than a row of integers
    case.hidden[:, 3] *= larger
    case.weight[:, 3] /= larger
    case = case.rounded(HALVES[-1])
    truth = run(case, torch.float64, "reference")
    with coarse(0.05):
        got, report = run_with_report(case, HALVES[-1], backend, "sparse", DEVICE, scan="int8")
    assert report.value_error > gpu_int8.MOST_ERROR and "nats on average" in report.scan_note, report
    within(nll=(relative(got["nll"], truth["nll"]), 1e-5))


@every_backend
def test_tokens_with_too_many_entries_have_full_products(backend, within):
    shape = pick((9, 16, 130), (60, 96, 1003))
    problem = problem_of(make(*shape, ignored=0).rounded(HALVES[-1]), HALVES[-1], DEVICE, Int8())
    problem.hidden[:4] *= 0.01  # flat
    out, found, _ = swept(problem, backend, threshold=5e-3 if DRY else 5e-4, capacity=shape[2] // 4)
    full = torch.cat([c.counts for c in found]) < 0
    assert full[:4].all() and not full.all()
    truth = torch.nn.functional.cross_entropy(logits(problem), problem.labels, reduction="none")
    within(nll=((out.nll - truth)[full].abs().max().item(), 1e-5))


@every_backend
@pytest.mark.parametrize("what", pick(["frozen"], ["trainable", "frozen", "bias", "TALR", "no gradients"]))
def test_the_same_results_every_time(backend, what, within):
    n, d, v = pick((8, 16, 66), (1000, 512, 32000))
    given = measure.language_like(n, d, v, HALVES[-1], DEVICE)
    torch.use_deterministic_algorithms(False)  # nobody asks for them here

    def result() -> list[torch.Tensor]:
        x = given.hidden.clone().requires_grad_(what != "no gradients")
        w = given.weight.clone().requires_grad_(what in ("trainable", "TALR"))
        b = torch.zeros(v, device=DEVICE) if what == "bias" else None
        head, options = fl.LMHead(w, b), dict(backend=backend, scan="int8")
        if what == "TALR":
            values = [fl.TALRLoss(gradient="sparse", **options)(x[None], head, given.labels[None])]
        else:
            out = fl.token_losses(x, head, given.labels, gradient="sparse", **options)
            assert out.gradient_report.scan == "int8", out.gradient_report
            values = [out.nll, out.entropy]
        if what != "no gradients":
            values[0].sum().backward()
        grads = [t.grad for t in (x, w) if t.grad is not None]
        return [value.detach().clone() for value in values + grads]

    within(different=(repeats_that_differ(result), 0))


@every_backend
def test_a_token_of_nan_stays_the_only_one(backend):
    problem = problem_of(make(*SHAPE, ignored=0).rounded(HALVES[-1]), HALVES[-1], DEVICE, Int8())
    problem.hidden[5] = float("nan")
    out, *_ = swept(problem, backend)
    assert (~out.nll.isfinite()).nonzero().flatten().tolist() == [5]

"""The bound of the weight's gradient from products with normal numbers: these, the products, and that it is a bound."""

import math
from types import SimpleNamespace

import pytest
import torch
from cases import coarse, make, relative, run, run_with_report
from half_logits import KINDS, OPS, directions_as
from sparse_checks import BACKENDS, needs_kernels

import fused_losses as fl
from fused_losses.backends import int8
from fused_losses.sparse import gradients, softmax, spectrum
from fused_losses.sparse.spectrum import SKETCH_FACTORS, directions_of


@pytest.fixture
def computed(monkeypatch):
    """How often a spectrum is computed, with nothing known before."""
    calls = []
    monkeypatch.setattr(spectrum, "_known", [])
    plain = spectrum.spectrum
    monkeypatch.setattr(spectrum, "spectrum", lambda weight: calls.append(1) or plain(weight))
    return calls


@pytest.mark.parametrize("columns", SKETCH_FACTORS)
def test_factors_fail_once_in_a_million(columns):
    """P(χ² < columns / factor²), and with the 2 % for what is rounded taken off."""
    for factor, least, most in (
        (SKETCH_FACTORS[columns], 0.5e-6, 1e-6),
        (SKETCH_FACTORS[columns] / 1.02, 0.7e-6, 1.1e-6),
    ):
        x = torch.tensor(columns / factor**2, dtype=torch.float64)
        assert least < torch.special.gammainc(torch.tensor(columns / 2, dtype=torch.float64), x / 2) < most


def drawn(rows, columns, start=0, dtype=torch.float32):
    out = torch.full((rows, columns), torch.nan, dtype=dtype)
    spectrum._draw(out, start)
    return out


def call_of(error, hidden, sketch, shard=None):
    """What `_weight_error` looks at, of one call with these error rows [N, V]."""
    columns = drawn(error.shape[1], sketch)
    sparse = SimpleNamespace(sketch=error @ columns, row_error=torch.zeros(len(error)), left=None)
    head = SimpleNamespace(weight=torch.empty(error.shape[1], hidden.shape[1]), shard=shard)
    return SimpleNamespace(problem=SimpleNamespace(hidden=hidden, head=head), sparse=sparse, scale=1.0)


@pytest.mark.parametrize("columns", SKETCH_FACTORS)
@pytest.mark.parametrize("kind", ["one token", "alike", "random"])
def test_the_error_is_below_its_bound_and_about_the_estimate(columns, kind):
    ratios = []
    for seed in range(600):
        g = torch.Generator().manual_seed(seed)
        error, hidden = torch.randn(20, 40, generator=g), torch.randn(20, 12, generator=g)
        if kind == "one token":
            error[1:] = 0
        elif kind == "alike":
            error, hidden = error[:1].expand(20, 40) * torch.rand(20, 1, generator=g), hidden + 3
        found = gradients._weight_error(call_of(error, hidden, columns), torch.zeros(20, dtype=torch.bool))
        ratios.append(float(found / torch.linalg.matrix_norm(error.t() @ hidden)))
    ratios = torch.tensor(ratios)
    assert ratios.min() > 1
    mean_square = float((ratios / SKETCH_FACTORS[columns]).square().mean())
    # One sketch is taken for all of them, so where the errors are alike their mean has its own.
    assert mean_square == pytest.approx(1, abs=0.15)
    assert (ratios / SKETCH_FACTORS[columns] < 1).float().mean() > 0.3  # so that the factor is needed


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_bound_of_hidden_states_of_any_size(size):
    g = torch.Generator().manual_seed(0)
    error, hidden = torch.randn(30, 50, generator=g), torch.randn(30, 8, generator=g)
    none = torch.zeros(30, dtype=torch.bool)
    usual, found = (float(gradients._weight_error(call_of(error, hidden * s, 16), none)) for s in (1.0, size))
    assert found == pytest.approx(usual * size, rel=1e-5)
    assert float(gradients._weight_error(call_of(error * size, hidden, 16), none)) == pytest.approx(
        usual * size, rel=1e-5
    )
    assert float(gradients._weight_error(call_of(error, hidden, 16), ~none)) == 0
    hidden[3, 2] = math.nan
    assert math.isnan(float(gradients._weight_error(call_of(error, hidden, 16), none)))


def test_what_is_rounded_by_row_comes_on_top():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 2048, generator=g)  # in several parts
    call = call_of(torch.zeros(700, 5), hidden, 16)
    call.sparse.row_error = torch.rand(700, generator=g)
    exact = torch.rand(700, generator=g) < 0.3
    expected = (hidden.double().norm(dim=1) * call.sparse.row_error)[~exact].sum()
    assert float(gradients._weight_error(call, exact)) == pytest.approx(float(expected), rel=1e-5)


def test_numbers_are_normal_and_those_of_their_id(computed):
    whole = drawn(5000, 32)
    assert abs(float(whole.mean())) < 0.01 and float(whole.std()) == pytest.approx(1, abs=0.01)
    assert float((whole.t() @ whole / 5000 - torch.eye(32)).abs().max()) < 0.1
    halves = whole[:1024], whole[1024:2048]
    assert abs(float((halves[0] * halves[1]).mean())) < 0.02
    for start, count in ((0, 1), (1000, 100), (1024, 1024), (2047, 2000), (4999, 1), (3000, 0)):
        assert torch.equal(drawn(count, 32, start), whole[start : start + count])


@pytest.mark.parametrize("first", [0, 16, 32])
def test_one_spectrum_for_all_columns(computed, first):
    weight = torch.randn(301, 40)
    found = {sketch: directions_of(weight, None, sketch) for sketch in dict.fromkeys([first, 0, 16, 32])}
    assert len(computed) == 1 and all(directions_of(weight, None, s) is d for s, d in found.items())
    plain = found[0]
    for sketch in (16, 32):
        rows = found[sketch].rows
        assert rows.dtype == torch.bfloat16 and rows.shape == (301, 16 + sketch)
        assert torch.equal(rows[:, :16].float(), plain.rows)
        assert found[sketch].basis is plain.basis and plain.sigma <= found[sketch].sigma < 1.05 * plain.sigma
        left = weight.double() - spectrum._known[-1].spectrum.mean - rows[:, :16].double() @ plain.basis.double().t()
        assert float(torch.linalg.svdvals(left)[0]) <= found[sketch].sigma
    spectrum._known.clear()
    for sketch in (0, 16, 32):  # in another order
        again = directions_of(weight, None, sketch)
        assert again.sigma == found[sketch].sigma and torch.equal(again.rows, found[sketch].rows)
    found = {sketch: directions_of(weight, None, sketch) for sketch in found}
    weight += 1e-3 * torch.randn(301, 40)
    moved = {sketch: directions_of(weight, None, sketch) for sketch in found}
    assert len(computed) == 2
    assert all(moved[s].sigma > d.sigma and moved[s].rows is d.rows for s, d in found.items())


def test_of_float64_nothing_is_rounded(computed):
    found = directions_of(torch.randn(300, 40, dtype=torch.float64), None, 16)
    assert found.rows.dtype == torch.float64 and found.pairs is None and found.rounding == 0


def test_a_direction_that_stands_out_far_is_multiplied_unrounded(computed):
    """What products with pairs round would be most of what is left without it."""
    weight = torch.randn(300, 40)
    assert directions_of(weight, None, 16).rounding == spectrum.IN_PAIRS
    weight[:, 3] *= 1000
    found = directions_of(weight, None, 16)
    assert found.rounding == 0 and found.pairs is None


def test_pairs_have_all_rows(computed):
    rows = torch.arange(70 * 32).view(70, 32).bfloat16()
    pairs = spectrum._paired(rows)
    assert pairs.shape == (48, 32, 2)
    for v in range(96):
        found = pairs[v // 32 * 16 + v % 16, :, v % 32 // 16]
        assert torch.equal(found, rows[v]) if v < 70 else not found.any()


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reference", [False, True], ids=["alone", "reference"])
@pytest.mark.parametrize("n, v, width", [(1, 17, 16), (7, 301, 32), (9, 1000, 48), (3, 64, 64), (2, 40, 0)], ids=str)
def test_products_of_what_is_left_out(kind, reference, n, v, width):
    g = torch.Generator().manual_seed(n)
    z = 3 * torch.randn(n, v, generator=g)
    r = z + 0.3 * torch.randn(n, v, generator=g) if reference else None
    labels = torch.randint(v, (n,), generator=g)
    directions, pairs = directions_as(kind, torch.randn(v, width, generator=g)) if width else (None, None)
    counts, columns = torch.empty(n, dtype=torch.int64), torch.empty(n, v, dtype=torch.int32)
    low = [torch.full((n, width), torch.nan) for _ in range(2)]
    squares, values = torch.full((2, n), torch.nan), [torch.empty(n, v) for _ in range(2)]
    numbers, p, gap = [torch.empty(n) for _ in range(3)], z.double().softmax(1), None
    if reference:
        gap = p - r.double().softmax(1)
    OPS.compact(
        z.clone(), None if r is None else r.clone(), False, labels, 0.0, 1e-2, numbers[0], counts.clone(),
        numbers[1] if reference else None, None, numbers[2] if reference else None, None, torch.empty(8, n), counts,
        columns, values[0], values[1] if reference else None, directions, pairs, low[0] if width else None,
        low[1] if width and reference else None, squares if width else None, *int8.NO_OPERANDS,
    )  # fmt: skip
    kept = torch.zeros(n, v, dtype=torch.bool)
    for t, count in enumerate(counts.tolist()):
        kept[t, columns[t, :count].long()] = True
    assert kept.any(1).all() and not kept.all()
    if not width:
        assert squares.isnan().all()
        return
    for found, square, truth in zip(low, squares, (p, gap), strict=True):
        if truth is None:
            assert found.isnan().all()
            continue
        left = truth.masked_fill(kept, 0)
        rounded = spectrum.IN_PAIRS if kind == "pairs" else 0.0
        allowed = (left.abs() @ directions.double().abs()) * (rounded + 2e-6) + 1e-9
        assert ((found.double() - left @ directions.double()).abs() <= allowed).all()
        torch.testing.assert_close(square.double(), left.square().sum(1), rtol=3.7e-6, atol=1e-15)  # measured 1.3e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reference", [None, "shared", "own"], ids=str)
@pytest.mark.parametrize("head", [dict(), dict(bias=True, scale=0.7), dict(softcap=8.0)], ids=str)
def test_bound_is_above_the_error_and_near_it(backend, reference, head, monkeypatch):
    """And below that of the worst case, which is taken without a sketch."""
    options = dict(head)
    case = make(300, 32, 3000, spread=3.0, ignored=0.1, reference=reference, near=0.3, **options)
    truth = run(case, torch.float64, "reference")
    bounds = []
    for sketch in (16, 32, 0):
        monkeypatch.setattr(softmax, "sketch_columns", lambda has_reference, sketch=sketch: sketch)
        with coarse(2e-4, tolerance=0.5):
            got, report = run_with_report(case, torch.float32, backend, "sparse", tolerance=0.5)
        error = relative(got["d_weight"], truth["d_weight"])
        assert report.exact_tokens == 0 and error < report.weight_bound
        bounds.append(report.weight_bound / error)
    assert bounds[0] < 5 and bounds[1] < 3.5 and bounds[2] > 1.2 * bounds[0]  # measured 4.3, 3.0, 1.23 to 1.9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-25, 1e-20, 1e20, 1e25], ids=str)
def test_bound_of_upstream_weights_of_any_size(backend, size):
    """Squares of the gradient would be none in float32."""
    case = make(200, 32, 3000, spread=3.0, ignored=0.1)
    found = []
    for factor in (1.0, size):
        hidden, head, _ = case.inputs(torch.float32)
        with coarse(2e-4, tolerance=0.5):
            out = fl.token_losses(hidden, head, case.labels, gradient="sparse", tolerance=0.5, backend=backend)
            (out.nll.sum() * factor).backward()
        found.append(out.gradient_report)
    usual, report = found
    assert report.weight_bound == pytest.approx(usual.weight_bound, rel=1e-3)
    assert report.hidden_bound == pytest.approx(usual.hidden_bound, rel=1e-3)

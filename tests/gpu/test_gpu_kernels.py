"""Every kernel of the GPU backends by itself against float64, with the inputs that the pipeline gives it."""

import functools
from dataclasses import dataclass, replace

import oracles
import pytest
import torch
from cases import make, name, relative
from machine import BACKENDS, DEVICE, DTYPES, ROUNDING, pick
from torch import Tensor

from fused_losses import backends
from fused_losses.backends import gpu_scan
from fused_losses.backends.gpu_products import in_memory_of
from fused_losses.kernels import measure
from fused_losses.kernels.schemas import Row
from fused_losses.kernels.triton import directions
from fused_losses.kernels.triton import rows as triton_rows
from fused_losses.kernels.triton.rows import BLOCK
from fused_losses.problem import Head, Problem, Segments

ALL = dict(bias=True, scale=-1.7, softcap=4.0)
LARGE = pick((9, 16, 130), (300, 2048, 128256))
# The least; odd sizes; rows of whole 16-byte words and not; one token and one id more than whole tiles; a real model's.
CASES = pick(
    [((5, 17, 70), ALL, "own")],
    [
        ((1, 1, 2), {}, None), ((1, 1, 2), {}, "shared"), ((5, 17, 33), ALL, "own"), ((33, 64, 123), {}, None),
        ((33, 64, 123), ALL, "shared"), ((40, 96, 507), {}, "own"), ((40, 96, 507), ALL, None),
        ((129, 72, 4097), {}, "shared"), ((129, 75, 4097), dict(bias=True), None),
    ],
)  # fmt: skip
CASES = [*CASES, *pick([], [(LARGE, {}, None)]), (LARGE, {}, "shared")]

every_case = pytest.mark.parametrize("shape, head, reference", CASES, ids=name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@dataclass
class World:
    """Operands of a call, the float64 truth of all that follows from them, and which entries are kept."""

    hidden: Tensor  # of the reference where `difference` is given, as the kernels have it
    model_hidden: Tensor
    difference: Tensor | None
    reference_hidden: Tensor | None
    reference_weight: Tensor | None
    weight: Tensor
    bias: Tensor | None
    rows: oracles.Rows
    threshold: float

    @property
    def kept(self) -> Tensor:
        return self.rows.entries(self.threshold)

    @property
    def problem(self) -> Problem:
        rows = self.rows
        own = None if self.reference_weight is None else Head(self.reference_weight, None, 1.0, None)
        return Problem(
            self.model_hidden, rows.labels, Head(self.weight, self.bias, rows.scale, rows.softcap or None),
            self.reference_hidden, own, self.weight.dtype, wanted=frozenset({"entropy", "reference_entropy"}),
        )  # fmt: skip


@functools.lru_cache(maxsize=2)
def world_of(shape, scale, softcap, bias, reference, dtype) -> World:
    if shape == LARGE:
        given = measure.language_like(*shape, dtype, DEVICE)
        x, w, labels, b = given.hidden, given.weight, given.labels, None
        x_ref = None if reference is None else given.reference_hidden
        w_ref = None
    else:
        case = make(*shape, ignored=0, bias=bias, reference=reference)

        def move(value: Tensor | None, to: torch.dtype) -> Tensor | None:
            return None if value is None else value.to(DEVICE, to)

        x, w, b = move(case.hidden, dtype), move(case.weight, dtype), move(case.bias, torch.float32)
        x_ref, w_ref = move(case.reference_hidden, dtype), move(case.reference_weight, dtype)
        labels = case.labels.to(DEVICE)

    def product(hidden: Tensor, weight: Tensor, add: Tensor | None) -> Tensor:
        out = hidden.double() @ weight.double().T
        return out if add is None else out + add.double()

    difference = None
    if x_ref is None:
        z, r = product(x, w, b), None
    elif w_ref is None:
        difference = (x.float() - x_ref.float()).to(dtype)
        z, r = product(difference, w, None), product(x_ref, w, b)
    else:
        z, r = product(x, w, b), product(x_ref, w_ref, None)
    shared = difference is not None
    rows = oracles.Rows(
        z, r, shared, labels, scale, softcap or 0.0, scale if shared else 1.0, (softcap or 0.0) if shared else 0.0
    )
    hidden = x_ref if shared else x
    return World(hidden, x, difference, x_ref, w_ref, w, b, rows, 1.1e-4 if shape == LARGE else 2e-3)


def world(shape, head, reference, dtype) -> World:
    return world_of(shape, head.get("scale", 1.0), head.get("softcap"), head.get("bias", False), reference, dtype)


def of_float32_logits(w: World) -> oracles.Rows:
    """The truth for logits as they are in memory."""
    r = w.rows.r_raw
    return replace(w.rows, z_raw=w.rows.z_raw.float(), r_raw=None if r is None else r.float())


def logits_of(rows: oracles.Rows) -> tuple:
    """The first arguments of the kernels over logits; fresh copies, as some work in place."""
    r = None if rows.r_raw is None else rows.r_raw.clone()
    scales = (rows.scale, rows.softcap, rows.reference_scale, rows.reference_softcap)
    return rows.z_raw.clone(), r, rows.difference, rows.labels, *scales


def empty(*shape, dtype=torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def against(value: Tensor, truth: Tensor, least: Tensor | float = 0.0) -> float:
    """Relative error, with a norm of at least that of `least`: for what cancels."""
    error = (value.double() - truth.double()).norm()
    scale = torch.as_tensor(least, dtype=torch.float64, device=truth.device)
    scale = (scale if scale.dim() else scale * len(truth) ** 0.5).norm()
    return (error / torch.maximum(truth.double().norm(), scale).clamp(min=1e-30)).item()


@every_backend
@every_case
def test_row_statistics(backend, shape, head, reference, within):
    rows = of_float32_logits(world(shape, head, reference, torch.float32))
    n = len(rows.labels)
    nll, entropy, known = empty(n), empty(n), empty(len(Row), n)
    prediction = torch.full((n,), -1, device=DEVICE)
    kl, ref_nll, ref_entropy = (empty(n) if reference else None for _ in range(3))
    backends.load(backend).kernels.row_statistics(
        *logits_of(rows), nll, prediction, kl, entropy, ref_nll, ref_entropy, known
    )
    figures = {"nll": (relative(nll, rows.nll), 3e-6), "entropy": (relative(entropy, rows.entropy), 3e-6)}
    figures["prediction"] = ((prediction != rows.prediction).sum().item(), 0)
    # Of two nearly equal logits, either.
    best = rows.z.amax(1) - rows.z.gather(1, prediction[:, None])[:, 0]
    figures["prediction"] = (best.max().item(), 1e-5)
    names = [Row.TOP, Row.LOG_SUM, Row.REST]
    if reference:
        # The KL is a difference: its error is that of the logits' rounding, not its own.
        figures |= {
            "kl": (against(kl, rows.kl, 1e-2), 1e-5), "reference_nll": (relative(ref_nll, rows.reference_nll), 3e-6),
            # Sums about 1 are rounded by 2⁻²⁴, and their logarithms by as much again, however near 0 the entropy is.
            "reference_entropy": (against(ref_entropy, rows.reference_entropy, 1e-1), 3e-6),
        }  # fmt: skip
        names = list(Row)
    least = {Row.SHIFT: 1.0, Row.MISSED: 1.0, Row.LOG_SUM: 1.0, Row.REF_LOG_SUM: 1.0}
    for row in names:
        scale = rows.known[Row.GAP_L1] if row == Row.GAP else least.get(row, 0.0)
        # p − p_ref takes over the rounding of lse − lse_ref, which is far larger where the models are near each other.
        bound = 1e-4 if row in (Row.GAP, Row.GAP_L1) else 1e-5
        figures[row.name] = (against(known[row], rows.known[row], scale), bound)
    within(**figures)


@every_case
def test_logit_bits(shape, head, reference, within):
    rows = of_float32_logits(world(shape, head, reference, torch.float32))
    z, r, difference, _, *scales = logits_of(rows)
    bounds = torch.stack([rows.z.mean(1) + 1.0, (rows.z if r is None else rows.r).mean(1) + 1.0]).float()
    words = -(-z.shape[1] // BLOCK) * BLOCK // 32
    bits = torch.full((len(z), words), -1, dtype=torch.int32, device=DEVICE)
    triton_rows.logit_bits(z, r, difference, bounds, *scales, bits)
    got = oracles.unpacked(bits)
    over = [rows.z - bounds[0, :, None]] + ([] if r is None else [rows.r - bounds[1, :, None]])
    wanted = torch.stack([o > 0 for o in over]).any(0)
    clear = torch.stack([o.abs() > 1e-4 for o in over]).all(0)
    wrong = (got[:, : z.shape[1]] != wanted) & clear
    within(wrong=(wrong.sum().item(), 0), beyond=(got[:, z.shape[1] :].sum().item(), 0))


@every_case
@every_dtype
@pytest.mark.parametrize("weights", pick(["both", "separate"], ["nll", "kl", "both", "separate"]))
def test_directions_in_place(shape, head, reference, dtype, weights, within):
    if reference is None and weights != "nll":
        pytest.skip("without a reference there is no KL")
    rows = of_float32_logits(world(shape, head, reference, torch.float32))
    n = len(rows.labels)
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, generator=g).to(DEVICE) for _ in range(2))
    z, r, *rest = logits_of(rows)
    out, kl_out = in_memory_of(z, dtype), None if r is None or weights != "separate" else in_memory_of(r, dtype)
    pair = {"nll": (a, None), "kl": (None, b), "both": (a, b), "separate": (None, None)}[weights]
    directions.directions(z, r, *rest, rows.known.float().contiguous(), rows.nll.float(), *pair, out, kl_out)
    bound = 1e-5 + 2 * ROUNDING[dtype]
    if weights == "separate":
        within(nll=(relative(out, rows.d_nll), bound), kl=(relative(kl_out, rows.gap), bound))
    else:
        wanted = sum(
            w.double()[:, None] * d for w, d in zip(pair, (rows.d_nll, getattr(rows, "gap", None)), strict=True)
            if w is not None
        )  # fmt: skip
        within(direction=(relative(out, wanted), bound))


@every_case
@every_dtype
def test_extended_statistics_and_directions(shape, head, reference, dtype, within):
    rows = of_float32_logits(world(shape, head, reference, torch.float32))
    n, beta = len(rows.labels), 0.25
    known, nll, entropy = rows.known.float().contiguous(), rows.nll.float(), rows.entropy.float()
    log_p2, rank, extended = empty(n), torch.full((n,), -1, device=DEVICE), empty(len(directions.Extended), n)
    divergence = empty(n) if reference else None
    directions.extended_statistics(*logits_of(rows), beta, known, nll, log_p2, rank, divergence, extended)
    # Of nearly equal logits, any.
    close = ((rows.z - rows.z.gather(1, rows.labels[:, None])).abs() < 1e-5).sum(1) - 1
    # The logarithm of a sum near 1, which is rounded by 2⁻²⁴ more than once.
    figures = {"log_p2": (against(log_p2, rows.log_p2, 3e-2), 1e-5)}
    figures["rank"] = (((rank - rows.rank).abs() > close).sum().item(), 0)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(n, generator=g).to(DEVICE) for _ in range(3)]
    options, wanted = dict(entropy_weight=weights[1], entropy=entropy), [rows.d_nll, rows.d_entropy]
    if reference:
        truth, direction = rows.divergence(beta)
        figures["divergence"] = (against(divergence, truth, 1e-2), 1e-5)
        options |= dict(divergence_weight=weights[2], extended=extended, beta=beta)
        wanted.append(direction)
    z, r, *rest = logits_of(rows)
    out = in_memory_of(z, dtype)
    directions.directions(z, r, *rest, known, nll, weights[0], None, out, None, **options)
    total = sum(w.double()[:, None] * d for w, d in zip(weights, wanted, strict=False))
    figures["direction"] = (relative(out, total), 1e-5 + 2 * ROUNDING[dtype])
    within(**figures)


@every_case
def test_tail_profile(shape, head, reference, within):
    w = world(shape, head, None, torch.float32)
    rows = of_float32_logits(w)
    v, kept = rows.z.shape[1], rows.entries(2e-3)
    bits = oracles.packed(kept & ~rows.one_hot.bool(), -(-v // 32) + 1)
    profile = torch.ones(v, device=DEVICE)
    half = v // 2
    for first, last in ((0, half), (half, v)):
        z = rows.z_raw[:, first:last].contiguous()
        triton_rows.tail_profile(
            z, rows.labels, rows.lse.float(), bits, first, rows.scale, rows.softcap, profile
        ) if last > first else None
    wanted = 1 + (rows.p * rows.slope * ~kept).sum(0)
    within(profile=(relative(profile, wanted), 3e-6))


@every_backend
@pytest.mark.parametrize("n, v", pick([(7, 33), (18, 130)], [(1, 2), (7, 33), (18, 130), LARGE[::2]]))
def test_bits_to_columns(backend, n, v, within):
    kernels = backends.load(backend).kernels
    g = torch.Generator().manual_seed(n)
    kept = torch.rand(n, v, generator=g) < torch.rand(n, 1, generator=g) ** 4
    kept[-1] = True
    labels = torch.randint(v, (n,), generator=g)
    labels[0] = v - 1
    capacity = max(2, v - 1)
    bits, kept, labels = oracles.packed(kept.to(DEVICE), -(-v // 32) + 3), kept.to(DEVICE), labels.to(DEVICE)
    kept[torch.arange(n, device=DEVICE), labels] = True
    wanted = torch.where(kept.sum(1) > capacity, -1, kept.sum(1))
    counts = torch.full((n,), -7, device=DEVICE)
    kernels.count_bits(bits, labels, capacity, counts)
    offsets = oracles.offsets_of(wanted.clamp(min=0))
    columns = torch.full((int(offsets[-1]),), -7, dtype=torch.int32, device=DEVICE)
    kernels.columns_of_bits(bits, labels, offsets, columns)
    expected = (kept & (wanted >= 0)[:, None]).nonzero()[:, 1]
    within(counts=((counts != wanted).sum().item(), 0), columns=((columns != expected).sum().item(), 0))


@every_backend
@every_case
@every_dtype
def test_entry_logits(backend, shape, head, reference, dtype, within):
    w = world(shape, head, None, dtype)
    kept = w.kept
    offsets, columns = oracles.offsets_of(kept.sum(1)), kept.nonzero()[:, 1].int()
    out = empty(len(columns))
    backends.load(backend).kernels.entry_logits(w.hidden, w.weight, w.bias, offsets, columns, out)
    within(logits=(relative(out, w.rows.z_raw[kept]), 3e-6))


@every_backend
@every_case
@every_dtype
@pytest.mark.parametrize("with_rows", pick([True], [True, False]), ids=lambda given: "rows" if given else "no-rows")
def test_attention(backend, shape, head, reference, dtype, with_rows, within):
    w = world(shape, head, reference, dtype)
    rows, kept = w.rows, w.kept
    n, d = w.hidden.shape
    if n > 2:
        kept[2] = False  # a token with too many entries has none
    offsets, columns = oracles.offsets_of(kept.sum(1)), kept.nonzero()[:, 1].int()
    values, kl_values = empty(len(columns)), empty(len(columns)) if reference else None
    sums = torch.zeros(4, n, device=DEVICE)
    nll_rows = empty(n, d, dtype=dtype) if with_rows else None
    kl_rows = empty(n, d, dtype=dtype) if with_rows and reference else None
    given = rows.r[kept].float() if reference == "own" else None
    backends.load(backend).kernels.attention(
        w.hidden, w.difference, given, w.weight, w.bias, rows.labels, offsets, columns, rows.known.float().contiguous(),
        rows.nll.float(), rows.scale, rows.softcap, values, kl_values, sums, nll_rows, kl_rows,
    )  # fmt: skip
    others = kept & ~rows.one_hot.bool()
    figures = {
        "values": (relative(values, rows.d_nll[kept]), 1e-5),
        "sum": (against(sums[0], (rows.p * rows.slope * others).sum(1), 1e-3), 1e-5),
    }
    if with_rows:
        figures["nll_rows"] = (relative(nll_rows, (rows.d_nll * kept) @ w.weight.double()), 1e-5 + 2 * ROUNDING[dtype])
    if reference:
        gap = rows.gap * kept
        # r of another head comes in rounded to float32, which p − p_ref feels.
        bound = 1e-4 if reference == "own" else 1e-5
        figures["kl_values"] = (relative(kl_values, rows.gap[kept]), bound)
        scale = gap.abs().sum(1)
        for i, wanted in ((1, gap.sum(1)), (2, scale), (3, scale)):
            figures[f"kl_sum_{i}"] = (against(sums[i], wanted, scale), bound)
        if with_rows:
            figures["kl_rows"] = (relative(kl_rows, gap @ w.weight.double()), bound + 2 * ROUNDING[dtype])
    within(**figures)


@every_backend
@every_dtype
@pytest.mark.parametrize("shape", pick([(15, 17, 33)], [(37, 1, 53), (37, 17, 53), (3000, 576, 4097)]), ids=name)
@pytest.mark.parametrize("base", [False, True], ids=["alone", "onto-base"])
def test_products_of_entries(backend, dtype, shape, base, within):
    """`segment_product` as it is used: segments of any length, empty and hot ones; and `weighted_sum`."""
    n, d, v = shape
    module = backends.load(backend)
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(0, pick(5, 60), (n,), generator=g)
    counts[3], counts[5], counts[6], counts[7] = 0, 512, 513, pick(600, 5000)
    offsets = oracles.offsets_of(counts)
    total = int(offsets[-1])
    columns = torch.randint(v, (total,), generator=g)
    columns[torch.rand(total, generator=g) < 0.4] = 7  # a hot column
    columns[columns == 9] = 10  # an empty one
    values, scale, vector = torch.randn(total, generator=g), torch.randn(n, generator=g), torch.randn(d, generator=g)
    x, w = torch.randn(n, d, generator=g).to(dtype), torch.randn(v, d, generator=g).to(dtype)
    q, onto = torch.randn(v, generator=g), torch.randn(v, d, generator=g) if base else None
    offsets, columns, values, scale, vector, x, w, q = (
        t.to(DEVICE) for t in (offsets, columns.int(), values, scale, vector, x, w, q)
    )
    onto = None if onto is None else onto.to(DEVICE)
    rows = torch.repeat_interleave(torch.arange(n, device=DEVICE), offsets.diff())
    order = columns.sort(stable=True).indices
    starts = oracles.offsets_of(torch.bincount(columns.long(), minlength=v))
    truth = oracles.segment_product(offsets, columns, values, w, scale, vector, None, 0.0)
    truth_of_columns = oracles.segment_product(starts, rows[order], values[order], x, q, vector, onto, 0.5)
    for out_dtype in {dtype, torch.float32}:
        bound = 3e-6 + 2 * ROUNDING[out_dtype]
        got = module.rows_product(Segments(offsets, columns, values), w, scale, vector, out_dtype)
        other = module.columns_product(Segments(offsets, columns, values), x, q, vector, onto, 0.5, out_dtype)
        within(rows=(relative(got, truth), bound), columns=(relative(other, truth_of_columns), bound))
    within(weighted_sum=(relative(module.weighted_sum(w, q), q.double() @ w.double()), 3e-6))


@every_backend
@every_case
@every_dtype
@pytest.mark.parametrize("with_bits", [True, False], ids=["bits", "no-bits"])
def test_scan(backend, shape, head, reference, dtype, with_bits, within):
    """`scan` and `scan_with_reference` with what joins their parts: statistics, and bits that miss no entry."""
    w = world(shape, head, reference, dtype)
    tile = gpu_scan.choose_tile(w.problem)
    if tile is None:
        pytest.skip("takes chunks of logits: float32, or a soft-cap with a reference")
    module, rows, problem = backends.load(backend), w.rows, w.problem
    out = module.empty_statistics(problem)
    if with_bits:
        missing = beyond = 0
        least = w.threshold * torch.expm1(-rows.nll).neg().sqrt()[:, None] * 1.001
        wanted = rows.p > least
        if reference:
            wanted |= rows.p_ref > least
        wanted &= ~rows.one_hot.bool()
        for span, known, bits in module._bits_of_scan(problem, out, w.threshold, tile):
            got = oracles.unpacked(bits)
            missing += (wanted[span.tokens] & ~got[:, : wanted.shape[1]]).sum().item()
            beyond += got[:, wanted.shape[1] :].sum().item()
            truth = rows.known[:, span.tokens]
            for row in (Row.TOP, Row.LOG_SUM, Row.REST):
                within(**{row.name: (against(known[row], truth[row], 1.0), 1e-5)})
        within(missing=(missing, 0), beyond=(beyond, 0))
    else:
        module._scan_statistics(problem, out, tile)
    figures = {"nll": (relative(out.nll, rows.nll), 1e-5), "entropy": (relative(out.entropy, rows.entropy), 1e-5)}
    best = rows.z.amax(1) - rows.z.gather(1, out.prediction[:, None])[:, 0]
    figures["prediction"] = (best.max().item(), 1e-4)
    if reference:
        figures |= {
            "kl": (against(out.kl, rows.kl, 1e-2), 1e-4 if reference == "own" else 1e-5),
            "reference_nll": (relative(out.reference_nll, rows.reference_nll), 1e-5),
            "reference_entropy": (relative(out.reference_entropy, rows.reference_entropy), 1e-5),
        }
    within(**figures)

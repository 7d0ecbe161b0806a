"""Logits in float16 by the compiled kernels for CPUs, and what is made of them, against float64.

A process that takes other instruction sets imports it too.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from int8_products import BLOCK, OPS, Rough, head_of, operands, product
from torch import Tensor

from fused_losses.backends import half, int8
from fused_losses.kernels import schemas
from fused_losses.sparse import spectrum

# Of directions.
KINDS = [
    "float32", "bfloat16",
    pytest.param("pairs", marks=pytest.mark.skipif(not schemas.has_pairs(), reason="no products of bfloat16")),
]  # fmt: skip
SHAPES = [(1, 1, 1), (3, 20, 127), (5, 64, 128), (65, 19, 129), (130, 600, 300)]


def widths(vocabulary: int) -> tuple[int, int]:
    """Columns, and maxima of a row."""
    blocks = -(-vocabulary // BLOCK)
    return blocks * BLOCK, -(-blocks // 2) * 2 * half.MAXIMA


def maxima_of(z: Tensor) -> Tensor:
    """[N, columns] as blocks' maxima, those of the same id modulo MAXIMA."""
    found = z.view(len(z), -1, BLOCK // half.MAXIMA, half.MAXIMA).amax(2).flatten(1)
    odd = found.shape[1] % (2 * half.MAXIMA)
    return torch.nn.functional.pad(found, (0, half.MAXIMA if odd else 0), value=-torch.inf)


def offsets_of(label_logits: Tensor) -> Tensor:
    return torch.where(label_logits.abs() < 1e4, label_logits, 0)


def check_logits(dtype: torch.dtype, n: int, d: int, v: int) -> None:
    """As the float32 logits of the same products, to half a step; −∞ beyond the vocabulary; the maxima to the bit."""
    hidden, weight, bias, channel = operands(n, d, v, dtype)
    bias[2::5] = -torch.inf
    label_logits = torch.linspace(-20, 30, n)
    label_logits[n // 2] = torch.tensor([3e4, -torch.inf, torch.nan, torch.inf])[n % 4]
    columns, maxima = widths(v)
    mean = weight.float().mean(0)
    for b, scale, shared in ((None, 1.0, None), (bias, 0.3, None), (bias, 1.0, channel)):
        z, largest = torch.full((n, columns), 7.0).half(), torch.full((n, maxima), 7.0).half()
        of_mean = mean if shared is None else mean * shared
        inverse = None if shared is None else shared.reciprocal()
        OPS.half_logits(
            hidden, inverse, weight, shared, of_mean, *head_of(weight, shared, 1), b, scale, label_logits, z, largest
        )
        expected = product(hidden, weight, None, shared, 0, of_mean).double()
        expected = (expected if b is None else expected + b.clamp(min=-1e30)) * scale - offsets_of(label_logits)[
            :, None
        ]
        torch.testing.assert_close(
            z[:, :v].double(), expected.half().double(), rtol=2**-10, atol=2e-4 * expected[expected > -1e9].abs().max()
        )
        assert (z[:, v:] == -torch.inf).all()
        blocks = columns // BLOCK * half.MAXIMA
        assert torch.equal(largest[:, :blocks], maxima_of(z)[:, :blocks])


@dataclass
class Compacted:
    """What `compact_half` made, and the logits that it was to take: exact ones where they stand out."""

    case: Rough
    before: Tensor  # [N, V] float64, as the rounded logits were
    z: Tensor
    label_logits: Tensor
    nll: Tensor
    prediction: Tensor
    lse: Tensor
    entropy: Tensor
    tail: Tensor
    nll_l1: Tensor
    counts: Tensor
    columns: Tensor
    values: Tensor
    low: Tensor
    square: Tensor
    directions: Tensor

    def mixed(self) -> tuple[Tensor, Tensor]:
        """[N, V] float64: the logits, exact where p is above what is made exact; and where that is not for sure."""
        case, exact = self.case, self.case.exact()[0]
        at = (torch.arange(case.n), case.labels)
        rough = self.before.clone()
        rough[at] = exact[at]
        wrong = -torch.expm1(rough[at] - rough.logsumexp(1))
        log_p = rough - rough.logsumexp(1)[:, None]
        least = (int8.REFINED * case.threshold * wrong.clamp(min=1e-30).sqrt()).log()[:, None]
        unsure = (log_p - least).abs() < 2 * case.off + 0.3
        mixed = torch.where(log_p > least, exact, rough)
        mixed[at], unsure[at] = exact[at], False
        return mixed, unsure

    def entries(self) -> Tensor:
        """[N, V] bool"""
        kept = torch.zeros(self.case.n, self.case.v, dtype=torch.bool)
        for t, count in enumerate(self.counts.tolist()):
            kept[t, self.columns[t, :count].long()] = True
        return kept


def compacted(
    capacity: int | None = None, width: int = 16, entropy: bool = True, kind: str = "float32", **options
) -> Compacted:
    """`kind`: of the directions."""
    case = Rough(**options)
    exact = case.exact()[0]
    n, v = exact.shape
    label_logits = torch.empty(n)
    exact_operands = (case.hidden, case.weight, case.bias_row, case.scale)
    OPS.label_logits(*exact_operands, case.labels, label_logits)
    at_label = exact[torch.arange(n), case.labels]
    torch.testing.assert_close(label_logits.double(), at_label, rtol=1e-6, atol=1e-5)
    offsets = offsets_of(label_logits)
    columns, _ = widths(v)
    z = torch.full((n, columns), -torch.inf, dtype=torch.float16)
    z[:, :v] = (exact + case.noise[0] - offsets[:, None]).clamp(max=6e4).half()
    before = z[:, :v].double() + offsets[:, None]
    largest = maxima_of(z)
    capacity = capacity or v
    g = torch.Generator().manual_seed(5)
    directions, pairs = directions_as(kind, torch.randn(v, width, generator=g)) if width else (None, None)
    numbers = [torch.full((n,), torch.nan) for _ in range(6)]
    nll, lse, entropies, tail, nll_l1, square = numbers
    prediction, counts = (torch.full((n,), -7) for _ in range(2))
    ids, values = torch.full((n, capacity), -7, dtype=torch.int32), torch.full((n, capacity), torch.nan)
    low = torch.full((n, width), torch.nan)
    OPS.compact_half(
        z, largest, label_logits, case.labels, case.threshold, nll, prediction, lse, entropies if entropy else None,
        tail, nll_l1, counts, ids, values, directions, pairs, low if width else None, square if width else None,
        *exact_operands,
    )  # fmt: skip
    return Compacted(
        case, before, z, label_logits, nll, prediction, lse, entropies, tail, nll_l1, counts, ids, values, low, square,
        directions,
    )  # fmt: skip


def directions_as(kind: str, directions: Tensor) -> tuple[Tensor, Tensor | None]:
    """Directions and pairs, as `compact` and `compact_half` take them."""
    if kind == "float32":
        return directions, None
    directions = directions.bfloat16()
    return directions, spectrum._paired(directions) if kind == "pairs" else None


def check_compacted(**options) -> Compacted:
    found = compacted(**options)
    case, n, v = found.case, found.case.n, found.case.v
    mixed, unsure = found.mixed()
    p = mixed.softmax(1)
    at = (torch.arange(n), case.labels)
    # What is exact or not changes the sum by no more than it is off where that is not for sure.
    truth = mixed.logsumexp(1) - mixed[at]
    slack = 2e-5 + 3 * case.off * (p * unsure).sum(1) + 1e-6 * truth
    assert ((found.nll - truth).abs() <= slack).all()
    assert ((found.lse - mixed.logsumexp(1)).abs() <= slack + 1e-6 * mixed.abs().amax(1)).all()
    assert ((found.entropy + (p * p.clamp(min=1e-300).log()).sum(1)).abs() <= 15 * slack).all()
    assert torch.equal(mixed[torch.arange(n), found.prediction], mixed.amax(1))

    kept = found.entries()
    wrong = -torch.expm1(-found.nll.double())
    least = case.threshold * wrong.clamp(min=1e-30).sqrt()[:, None]
    near = (p.log() - least.log()).abs() < 2 * case.off + 0.3
    assert kept[at].all() and torch.equal((kept | near)[p > least], torch.ones_like(p[p > least], dtype=torch.bool))
    assert not (kept & ~near & (p < least))[~torch.nn.functional.one_hot(case.labels, v).bool()].any()
    for t in range(n):
        ids = found.columns[t, : found.counts[t]].long()
        assert (ids.diff() > 0).all()
        expected = p[t, ids] - (ids == case.labels[t]).double()
        torch.testing.assert_close(
            found.values[t, : found.counts[t]].double(), expected, rtol=1e-4 + 6 * case.off, atol=1e-7 + float(slack[t])
        )
    # What is left: to the bit what it was, and together with the entries all there is.
    z = found.z[:, :v]
    assert torch.equal(z == -torch.inf, kept | (found.before == -torch.inf))
    left = (
        found.z[:, :v].double() + offsets_of(found.label_logits).double()[:, None] - found.lse.double()[:, None]
    ).exp()
    torch.testing.assert_close(found.tail.double(), left.sum(1), rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(
        found.tail.double() + (p * kept).sum(1), torch.ones(n).double(), rtol=0, atol=float(slack[truth < 1e3].max())
    )
    torch.testing.assert_close(found.nll_l1.double(), 2 * wrong, rtol=1e-5, atol=1e-7)
    if found.directions is not None:
        low = left @ found.directions.double()
        # What is left out is rounded to bfloat16 for products with pairs.
        rounded = spectrum.IN_PAIRS if options.get("kind") == "pairs" else 0.0
        allowed = left @ found.directions.double().abs() * rounded + 2e-5 * left.sum(1).max() + 1e-9
        assert ((found.low.double() - low).abs() <= allowed).all()
        torch.testing.assert_close(found.square.double(), left.square().sum(1), rtol=5e-5, atol=1e-15)
    profile = torch.zeros(v)
    which = torch.arange(n)
    OPS.half_tail_profile(found.z, found.label_logits, found.lse, found.counts, which + 100, 100, profile)
    torch.testing.assert_close(profile.double(), left.sum(0), rtol=2e-5, atol=1e-9)
    return found


def check_all() -> None:
    """For another instruction set."""
    assert schemas.load() is None and OPS.has_half_logits()
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES[:4]:
            check_logits(dtype, *shape)
        check_compacted(dtype=dtype, v=1000)
        check_compacted(dtype=dtype, v=129, bias=True, scale=0.6, kind="bfloat16", width=48)

"""Products of 8-bit numbers by the compiled kernels for CPUs, and logits made exact, against float64.

A process that takes other instruction sets imports them too.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fused_losses.backends import int8
from fused_losses.kernels import schemas

BLOCK = 128
OPS = torch.ops.fused_losses
SEGMENT, MANY = 16, 128  # of csrc/cpu/refine.inc
LANES = {"AVX-512": 16, "AVX2": 8, "128-bit SIMD": 4}
HEADS: list[dict] = [
    dict(), dict(bias=True), dict(scale=0.3), dict(softcap=7.0), dict(rank=3),
    dict(bias=True, scale=-1.7, softcap=4.0, rank=2),
]  # fmt: skip


def quantised(rows: Tensor, channel: Tensor | None) -> tuple[Tensor, Tensor]:
    """q [rows, D] and the scales [rows], float64, as the kernels round them."""
    y = rows.float() if channel is None else rows.float() * channel
    scale = y.abs().amax(1) / 127 + (y - y).sum(1)
    inverse = torch.where(scale > 0, 1 / scale, 0)[:, None]
    fused = OPS.simd() != "128-bit SIMD" or platform.machine() != "x86_64"  # multiplies and adds in one rounding
    ratio = y.double() * inverse.double() if fused else (y * inverse).double()
    return ratio.round(), scale.double()


def logits_of(hidden: Tensor, inverse: Tensor | None, weight: Tensor, channel: Tensor | None) -> Tensor:
    (x, of_x), (w, of_w) = quantised(hidden, inverse), quantised(weight, channel)
    return (x @ w.t()) * (of_x[:, None] * of_w)


def head_of(weight: Tensor, channel: Tensor | None, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` blocks; poisoned before."""
    blocks = torch.full((count, -(-weight.shape[1] // 4), BLOCK, 4), 85, dtype=torch.uint8)
    scales = torch.full((count * BLOCK,), torch.nan)
    sums = torch.full((count * BLOCK,), 85, dtype=torch.int32)
    if count:
        OPS.int8_head(weight, channel, blocks, scales, sums, None, None, None, None)
    return blocks, scales, sums


def product(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, channel: Tensor | None, kept: int, mean: Tensor | None = None
) -> Tensor:  # fmt: skip
    out = torch.full((len(hidden), len(weight)), torch.nan)
    inverse = None if channel is None else channel.reciprocal()
    OPS.int8_logits(hidden, inverse, weight, channel, mean, *head_of(weight, channel, kept), bias, out)
    return out


def operands(n: int, d: int, v: int, weight_dtype: torch.dtype, hidden_dtype: torch.dtype | None = None, seed: int = 0):
    """hidden, weight, bias and channel; a row of zeros in each of the first two."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g)
    hidden[-1], weight[v // 2] = 0, 0
    channel = torch.rand(d, generator=g) * 3 + 0.2
    return hidden.to(hidden_dtype or weight_dtype), weight.to(weight_dtype), torch.randn(v, generator=g), channel


def check_head(dtype: torch.dtype, d: int, v: int, shared: bool) -> None:
    _, weight, _, channel = operands(1, d, v, dtype)
    given = channel if shared else None
    count, padded = -(-v // BLOCK), -(-d // 4) * 4
    blocks, scales, sums = head_of(weight, given, count)
    q, scale = quantised(weight, given)
    found = blocks.view(torch.int8).transpose(1, 2).reshape(count * BLOCK, padded).double()
    assert torch.equal(found[:v, :d], q) and not found[v:].any() and not found[:, d:].any()
    assert torch.equal(scales[:v].double(), scale) and not scales[v:].any()
    assert torch.equal(sums[:v].double(), q.sum(1)) and not sums[v:].any()


def check_logits(dtype: torch.dtype, n: int, d: int, v: int, hidden_dtype: torch.dtype | None = None) -> None:
    """With a bias and shared channels and without; all, some and none of the head's blocks made before."""
    hidden, weight, bias, channel = operands(n, d, v, dtype, hidden_dtype)
    blocks = -(-v // BLOCK)
    for shared in (None, channel):
        truth = logits_of(hidden, None if shared is None else shared.reciprocal(), weight, shared)
        for b in (None, bias):
            results = [product(hidden, weight, b, shared, kept) for kept in {0, blocks // 2, blocks}]
            expected = truth if b is None else truth + b
            torch.testing.assert_close(results[0].double(), expected, rtol=4e-7, atol=1e-6)  # measured 1.2e-7
            assert all(torch.equal(results[0], other) for other in results)


def check_not_finite(dtype: torch.dtype) -> None:
    """A row with NaN or an infinite number has no finite logit, and no other is touched."""
    hidden, weight, _, channel = operands(7, 18, 130, dtype)
    truth = product(hidden, weight, None, channel, 0)
    hidden[1, 3], hidden[2, 17], hidden[3, 0] = torch.nan, torch.inf, -torch.inf
    weight[5, 3], weight[129, 16], weight[64, 17] = torch.nan, -torch.inf, torch.inf
    for kept in (0, 1, 2):
        found = product(hidden, weight, None, channel, kept)
        odd = torch.zeros_like(found, dtype=torch.bool)
        odd[1:4] = odd[:, [5, 64, 129]] = True
        assert not found[odd].isfinite().any() and torch.equal(found[~odd], truth[~odd])


@dataclass
class Rough:
    """A chunk whose logits are off, the exact ones in float64, and what the latter are made from."""

    n: int = 9
    d: int = 37
    v: int = 203
    dtype: torch.dtype = torch.float32
    reference: bool = False
    bias: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    rank: int = 0
    spread: float = 4.0
    off: float = 0.01
    threshold: float = 1e-2 / int8.REFINED
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        n, d, v = self.n, self.d, self.v
        self.labels = torch.randint(v, (n,), generator=g)
        self.hidden = (normal(n, d) * self.spread).to(self.dtype).float()
        near = (self.hidden + 0.3 * normal(n, d)).to(self.dtype).float()
        self.near = near if self.reference else None
        self.weight = (normal(v, d) / d**0.5).to(self.dtype)
        self.bias_row = None
        if self.bias:
            self.bias_row = normal(v)
            self.bias_row[::17] = -torch.inf
        self.low_rank = normal(v, self.rank) if self.rank else None
        self.low_hidden = normal(n, self.rank) if self.rank else None
        self.low_reference = normal(n, self.rank) if self.rank and self.reference else None
        self.difference = self.reference and not self.softcap
        self.noise = [self.off * normal(n, v) for _ in range(2)]

    def _finished(self, x: Tensor, low: Tensor | None) -> Tensor:
        z = x.double() @ self.weight.double().t()
        if low is not None:
            z = z + low.double() @ self.low_rank.double().t()
        if self.bias_row is not None:
            z = (z + self.bias_row.double()).clamp(min=-1e30)
        z = z * self.scale
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z

    def exact(self) -> tuple[Tensor, Tensor | None]:
        """z and r as `compact` takes them."""
        z = self._finished(self.hidden, self.low_hidden)
        if not self.reference:
            return z, None
        r = self._finished(self.near, self.low_reference)
        if not self.difference:
            return z, r
        gap = (self.hidden - self.near).double() @ self.weight.double().t()
        if self.rank:
            gap = gap + (self.low_hidden - self.low_reference).double() @ self.low_rank.double().t()
        return gap * self.scale, r

    def operands(self) -> tuple:
        hidden, low = self.hidden, self.low_hidden
        if self.difference:
            hidden = hidden - self.near
            low = None if low is None else low - self.low_reference
        return hidden, self.near, self.weight, self.low_rank, low, self.low_reference, self.bias_row, self.scale


def check_exact_logits(flat: bool = False, **options) -> None:
    """`compact` makes those exact that stand out, and leaves the others as they are. `flat`: the labels' alone do."""
    case = Rough(**options)
    n, v, reference = case.n, case.v, case.reference
    (exact, exact_r), (z_off, r_off) = case.exact(), case.noise
    z, r = (exact + z_off).float(), None if exact_r is None else (exact_r + r_off).float()
    before, before_r = z.clone(), None if r is None else r.clone()

    def empty(wanted: bool = True) -> Tensor | None:
        return torch.empty(n) if wanted else None

    counts, prediction = (torch.empty(n, dtype=torch.int64) for _ in range(2))
    rows, columns = torch.empty(8, n), torch.empty(n, v, dtype=torch.int32)
    values = [torch.empty(n, v) if wanted else None for wanted in (True, reference)]
    nll = torch.empty(n)
    OPS.compact(
        z, r, case.difference, case.labels, case.softcap, case.threshold, nll, prediction, empty(reference), None,
        empty(reference), None, rows, counts, columns, *values, None, None, None, None, None, *case.operands(),
    )  # fmt: skip

    above = _above(case, before, before_r)
    sure, not_kept = above > 1e-4, above < -1e-4
    assert sure.sum() == n if flat else 1.5 * n < sure.sum() < n * v / 2
    for found, old, truth in ((z, before, exact), (r, before_r, exact_r)):
        if found is not None:
            torch.testing.assert_close(found[sure].double(), truth[sure], rtol=1e-6, atol=6e-6)  # measured 1.9e-6
            assert torch.equal(found[not_kept], old[not_kept])
    if not case.difference:
        torch.testing.assert_close(
            nll, z.double().logsumexp(1).float() - z[torch.arange(n), case.labels], rtol=1e-5, atol=1e-5
        )


def _above(case: Rough, z: Tensor, r: Tensor | None) -> Tensor:
    """By how much log p or log p_ref of the rough logits, exact at the label alone, is above what is made exact."""
    at_label = (torch.arange(case.n), case.labels)
    rough = [None if t is None else t.double().clone() for t in (z, r)]
    for t, truth in zip(rough, case.exact(), strict=True):
        if t is not None:
            t[at_label] = truth[at_label]
    if case.difference:
        rough[0] += rough[1]
    z_rough = rough[0]

    def log_threshold(lse: Tensor) -> Tensor:
        wrong = -torch.expm1(z_rough[at_label] - lse)
        return (int8.REFINED * case.threshold * wrong.clamp(min=1e-30).sqrt()).log()

    lse = lse_of(z_rough, log_threshold)
    least = log_threshold(lse)
    log_p = [z_rough - lse[:, None]]
    if rough[1] is not None:
        log_p.append(rough[1] - lse_of(rough[1], lambda _: least)[:, None])
    above = torch.stack(log_p).amax(0) - least[:, None]
    above[at_label] = 1
    return above


def lse_of(z: Tensor, log_threshold: Callable[[Tensor], Tensor]) -> Tensor:
    """From the largest logits of each lane in each segment, where few of them pass; else that of all."""
    lanes = LANES[OPS.simd()]
    size = SEGMENT * lanes
    padded = torch.nn.functional.pad(z, (0, -z.shape[1] % size), value=-torch.inf)
    largest = padded.view(len(z), -1, SEGMENT, lanes).amax(2).flatten(1)
    lower = largest.logsumexp(1)
    passed = (largest > (lower + log_threshold(lower))[:, None]).sum(1)
    return torch.where(passed <= z.shape[1] // MANY, lower, z.logsumexp(1))


def check_all() -> None:
    """For another instruction set."""
    assert schemas.load() is None
    for dtype in (torch.float32, torch.bfloat16):
        check_head(dtype, 19, 200, True)
        for shape in ((1, 3, 1), (65, 20, 130), (70, 1030, 257)):
            check_logits(dtype, *shape)
        check_not_finite(dtype)
        for head in HEADS:
            for reference in (False, True):
                check_exact_logits(dtype=dtype, reference=reference, **head)

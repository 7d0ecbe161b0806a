"""Directions of a head: its leading singular vectors, and a bound of what is left without them.

Error rows E of a sparse softmax sum to 0, so E W = E (W − 1cᵀ) for any row c, and what E says in the directions U is
taken exactly (`Directions`). Then ‖E W‖ ≤ ‖E‖ σ, σ the largest singular value of (W − 1cᵀ)(I − UUᵀ). Any orthonormal U
is valid, a better one makes σ smaller.

G = (W − 1cᵀ)U is rounded to numbers that float16 and bfloat16 have, once; what is left is then W − 1cᵀ − GUᵀ, and what
the rounding changes is orthogonal to the rest of it, so that σ grows by next to nothing.

A head that is trained moves a little from call to call. U, c and G stay, and what is wrong then is
E(W' − 1cᵀ − GUᵀ): with δ ≥ ‖W' − W‖_F its norm is at most ‖E‖ √((σ + δ)² + δ²), as the parts that W' − W adds outside
of U and in it are orthogonal. δ is `PROBE_FACTOR` ‖(W' − W)Ω‖_F / √8 of Gaussian Ω [D, 8], of which W Ω is kept. It is
less than ‖W' − W‖_F with a probability of 1e-6 where W' − W has rank one, of 5e-6 at most (docs/method.md). Where W
moved too far, all is computed anew.

**The weight's gradient.** Its error is Eᵀx. With Ω [V, 16] of normal numbers ‖xᵀEΩ‖²_F / 16 is on average the square
of its norm, and 3.4² times that is at least that square, but for a probability of 1e-6 where the error has rank one,
of 8e-6 at most. So 16 columns more of G, the sketch Ω, give a bound that knows how the errors of tokens add up;
without them it is that of the worst case (`norm_bound`).

Of a head whose rows are spread over ranks, W is all rows: the ranks add up what is a sum over rows (mean, Gram matrix,
‖(W' − W)Ω‖²), and each keeps its own of W Ω and G. U and the bounds are those of the first rank, the same on all.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import shards
from ..devices import multiplies_wide
from ..kernels import schemas
from ..problem import Directions, in_half_precision
from ..shards import Shard

COUNT = 16  # directions
PROBES = 8
POWER = 6
# P(χ²_8 < 8 / 7.6²) = 1e-6.
PROBE_FACTOR = 7.6
# σ may have grown by this part of itself before the spectrum is computed anew.
MOST_GROWTH = 0.25
BLOCK = 1 << 22  # numbers of the head at a time, 16 MiB
KEPT = 4  # heads whose spectrum is kept
_SAMPLED = 4096
# By columns of a sketch: P(χ²_16 < 16 / 3.33²) = P(χ²_32 < 32 / 2.14²) = 1e-6; that it is rounded to bfloat16 is
# counted with 2 %.
SKETCH_FACTORS = {16: 3.4, 32: 2.18}
SKETCH_BLOCK = 1024  # ids whose numbers are drawn together
# What is left out is rounded to bfloat16 for products with pairs, by so much of itself; not where that makes σ larger
# than it would be by more than a thirtieth.
IN_PAIRS = 2.0**-8
MOST_ROUNDED = 0.25


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The largest singular values of a head's weight minus its mean row, W − 1cᵀ.

    Attributes:
        basis: [D, k] U, orthonormal columns: approximately the right singular vectors, largest first.
        mean: [D] c.
        values: [k] the singular values, as ‖(W − 1cᵀ) U_j‖, descending.
        sigma: upper bound of the largest singular value of (W − 1cᵀ)(I − UUᵀ), rounding included.
        longest: upper bound of the norm of a row of W.
    """

    basis: Tensor
    mean: Tensor
    values: Tensor
    sigma: float
    longest: float

    def __repr__(self) -> str:
        leading = ", ".join(f"{value:.3g}" for value in self.values[:4].tolist())
        return f"Spectrum({self.basis.shape[1]} directions of [{leading}, ...], sigma={self.sigma:.4g})"


def blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Its rows in that dtype, some 16 MiB at a time."""
    for part in weight.split(max(1, BLOCK // weight.shape[1])):
        yield part.to(dtype)


@torch.no_grad()
def spectrum(weight: Tensor, count: int = COUNT, shard: Shard | None = None) -> Spectrum | None:
    """Of a weight [V, D]; None where it is not finite. 2·V·D² FLOP, and some D³ in float64; 24·D² bytes, and 32 MiB.
    With a shard the weight is this rank's rows, and D² numbers in float64 are added up over the ranks.

    σ² is proved by a Cholesky factorisation: t·I − A has one only where no eigenvalue of A is above t.
    """
    weight = weight.detach()
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    dim, device = weight.shape[1], weight.device
    count = min(count, dim)
    mean = torch.zeros(dim, dtype=torch.float64, device=device)
    for part in blocks(weight, dtype):
        mean += part.sum(0, dtype=torch.float64)
    rows = len(weight) if shard is None else shard.vocabulary
    mean = (shards.total(shard, mean) / rows).to(dtype)
    gram = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    longest = torch.zeros((), dtype=dtype, device=device)
    for part in blocks(weight, dtype):
        if len(part):
            longest = torch.maximum(longest, part.square().sum(1).amax())
        part = part - mean
        gram += part.t() @ part
    if shard is not None:
        shards.summed_(shard.group, gram)
        longest = shards.gathered(shard.group, longest).amax()
    if not bool(gram.isfinite().all()):
        return None
    rounding = 4 * torch.finfo(dtype).eps * float(gram.diagonal().sum())
    basis, rest = _leading(gram, count)
    values = (basis * (gram @ basis)).sum(0).clamp(min=0).sqrt()
    gram -= basis @ (basis.t() @ gram)
    gram -= (gram @ basis) @ basis.t()
    sigma = math.sqrt(_largest(gram, rest) + rounding)
    if shard is not None:
        # Of a matrix that is the same on all ranks, but by their own linear algebra.
        numbers = torch.cat([basis.flatten(), values, values.new_tensor([sigma])])
        numbers = shards.gathered(shard.group, numbers)[0]
        basis, values, sigma = numbers[: dim * count].view(dim, count), numbers[dim * count : -1], float(numbers[-1])
    # Contiguous: a compiled graph saves it so, and another layout is another order of summation.
    return Spectrum(basis.to(dtype).contiguous(), mean, values.to(dtype), sigma, math.sqrt(float(longest)) * (1 + 1e-5))


def _leading(gram: Tensor, count: int, extra: int = 8, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """[D, count] orthonormal, close to the leading eigenvectors; and [D, *] where what is left is largest."""
    dim = len(gram)
    if dim <= count + extra:
        vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)
        return vectors[:, :count], vectors[:, count:]
    block = _gaussian(dim, count + extra, torch.float64, gram.device)
    for _ in range(iterations):
        block = torch.linalg.qr(gram @ block).Q
    vectors = block @ torch.linalg.eigh(block.t() @ gram @ block).eigenvectors.flip(1)
    return torch.linalg.qr(vectors[:, :count]).Q, vectors[:, count:]


def _largest(matrix: Tensor, start: Tensor, iterations: int = 6) -> float:
    """At least the largest eigenvalue of a symmetric positive semidefinite matrix, and not much more."""
    if not start.shape[1]:
        return 0.0
    block = torch.linalg.qr(start).Q
    for _ in range(iterations):
        block = torch.linalg.qr(matrix @ block).Q
    bound = 1.01 * float(torch.linalg.eigvalsh(block.t() @ matrix @ block)[-1].clamp(min=0))
    scale = float(matrix.diagonal().sum().abs())
    bound += 1e-12 * scale + torch.finfo(torch.float64).tiny
    shifted = -matrix  # its lower triangle is what the factorisation reads
    diagonal = matrix.diagonal()
    for _ in range(40):
        shifted.diagonal().copy_(bound - diagonal)
        if int(torch.linalg.cholesky_ex(shifted).info) == 0:
            return bound
        bound *= 1.05
    return scale


@functools.lru_cache(16)  # on a GPU the host waits for the copy
def _gaussian(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same in every run; not to be written to."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(device, dtype)


def sketch_columns(has_reference: bool) -> int:
    """Of a KL, whose errors are larger, twice as many."""
    return 32 if has_reference else 16


def _draw(out: Tensor, start: int) -> None:
    """Normal numbers for the ids from `start` on, a row each, the same in every run and on every rank."""
    generator, end = torch.Generator(), start + len(out)
    for block in range(start // SKETCH_BLOCK, -(-end // SKETCH_BLOCK)):
        generator.manual_seed((1 << 40) + block)
        numbers = torch.randn(SKETCH_BLOCK, out.shape[1], generator=generator, dtype=torch.float64)
        first, last = max(start, block * SKETCH_BLOCK), min(end, (block + 1) * SKETCH_BLOCK)
        out[first - start : last - start] = numbers[first - block * SKETCH_BLOCK :][: last - first]


def padded(count: int) -> int:
    """Columns that so many directions take: a multiple of 16."""
    return -(-count // 16) * 16


def _paired(rows: Tensor) -> Tensor:
    """[V, K] as `pairs` of the kernels."""
    count, width = rows.shape
    whole = rows.new_zeros(-(-count // 32) * 32, width)
    whole[:count] = rows
    return whole.view(-1, 2, 16, width).permute(0, 2, 3, 1).contiguous().view(-1, width, 2)


@torch.no_grad()
def largest_singular_value(matrix: Tensor) -> float:
    """Upper bound of that of a matrix [r, D] or [V, r] with few numbers r; inf where it has one that is not finite."""
    wide = matrix.double()
    gram = wide @ wide.t() if len(wide) < wide.shape[1] else wide.t() @ wide
    if not bool(gram.isfinite().all()):
        return math.inf
    values = torch.linalg.eigvalsh(gram)
    return math.sqrt(max(0.0, float(values[-1]))) * (1 + 1e-6)


@torch.no_grad()
def limits_of_low_rank(b: Tensor) -> tuple[float, float]:
    """Upper bounds of the largest singular value of B [V, r] minus its mean row, and of the norm of its rows."""
    wide = b.double()
    return largest_singular_value(wide - wide.mean(0)), float(wide.norm(dim=1).amax())


@torch.no_grad()
def norm_bound(rows: Tensor, factor: Tensor) -> Tensor:
    """At least the largest singular value of factor · rows, factors [N] in [0, 1]: a number on the device, of some 50
    operations, none of which is waited for; one copy of the rows in fp32 is made. At most 1.8 times the largest
    singular value at D = 4096, 1.2 times where few stand out.

    With Gaussian Ω [D, 8] and B = matrixᵀ matrix, ‖Bᵏ Ω‖_F ≥ λᵏ ‖g‖ of its largest eigenvalue λ and 8 normal numbers g;
    k = 6. Not finite where the matrix is not.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    scale = torch.zeros((), dtype=torch.float64, device=rows.device)
    if not rows.numel():
        return scale
    tiny = torch.finfo(dtype).tiny
    largest = (torch.linalg.vector_norm(rows, ord=math.inf, dim=1) * factor).amax().to(dtype)
    matrix = rows * (factor / largest.clamp(min=tiny))[:, None]  # so that squares stay within the range
    dim = matrix.shape[1]
    block = _gaussian(dim, PROBES, matrix.dtype, matrix.device).t().contiguous()
    for _ in range(POWER):
        block = (block @ matrix.t()) @ matrix
        size = torch.linalg.vector_norm(block)
        scale += size.double().log()
        block = block / size.clamp(min=tiny)
    eigenvalue = torch.exp((scale + math.log(PROBE_FACTOR / math.sqrt(PROBES))) / POWER)
    # Of operands that are rounded to tf32, 2 of each product.
    rounding = torch.finfo(matrix.dtype).eps if torch.get_float32_matmul_precision() == "highest" else 2.0**-11
    rounded = 1 + 8 * math.sqrt(dim) * torch.finfo(matrix.dtype).eps + 4 * POWER * rounding
    return largest * (eigenvalue * rounded).sqrt()


def _times(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [m, D] times weightᵀ, [m, V], in the dtype of rows; these are numbers that bfloat16 has."""
    if not len(weight):
        return rows.new_empty(len(rows), 0)
    if weight.device.type == "cpu" and schemas.has_logits(weight.dtype):
        out = torch.empty(len(rows), len(weight), dtype=torch.float32)
        if torch.ops.fused_losses.logits(rows.to(weight.dtype), weight.contiguous(), None, out):
            return out
    if weight.device.type != "cpu" and weight.dtype == rows.dtype:
        return rows @ weight.t()
    if multiplies_wide(weight):
        return torch.mm(rows.to(weight.dtype), weight.t(), out_dtype=rows.dtype)
    return torch.cat([rows @ part.t() for part in blocks(weight, rows.dtype)], 1)


class _Known:
    """A head's spectrum, and what it gives for the weight that was seen last. With a shard, of this rank's rows."""

    def __init__(self, weight: Tensor, found: Spectrum, shard: Shard | None = None) -> None:
        self.spectrum, self.shard = found, shard
        self.number = 0  # of one that is spread: the same on all ranks
        probes = _gaussian(weight.shape[1], PROBES, torch.bfloat16, weight.device).t()
        self.probes = probes.to(found.basis.dtype).contiguous()
        self.probed = _times(self.probes, weight)
        count = found.basis.shape[1]
        rows = found.basis.new_zeros(len(weight), padded(count))
        start = 0
        for part in blocks(weight, rows.dtype):
            rows[start : start + len(part), :count] = (part - found.mean) @ found.basis
            start += len(part)
        self.rows, rounded = _rounded(rows)
        self.rounded = {0: self._norm(rounded)}  # by columns of the sketch, as the next
        self.moved = 0.0
        self.directions: dict[int, Directions] = {}
        self._remember(weight)

    def of(self, sketch: int) -> Directions:
        """What it gives, with so many columns of a sketch."""
        if sketch not in self.directions:
            found = self.spectrum
            rows = self.rows.to(found.basis.dtype).contiguous()
            given = Directions(found.basis, rows, found.sigma, found.longest)
            self.directions[sketch] = self._now(self._with_sketch(given, sketch) if sketch else given, sketch)
        return self.directions[sketch]

    def _with_sketch(self, given: Directions, sketch: int) -> Directions:
        """What products with pairs round is counted on all processors, so that all ranks have the same bounds."""
        count, wide = given.rows.shape[1], given.rows.dtype == torch.float64
        rows = given.rows.new_empty(len(self.rows), count + sketch, dtype=torch.float64 if wide else torch.bfloat16)
        rows[:, :count] = given.rows
        _draw(rows[:, count:], 0 if self.shard is None else self.shard.start)
        pairs, rounded, rounding = None, self.rounded[0], 0.0
        if not wide:
            in_products = IN_PAIRS * self._norm(float(given.rows.norm()) * (1 + 1e-3))
            if in_products <= MOST_ROUNDED * self.spectrum.sigma:
                rounding, rounded = IN_PAIRS, rounded + in_products
                if rows.device.type == "cpu" and schemas.has_pairs():
                    pairs = _paired(rows)
        self.rounded[sketch] = rounded
        self.rows = rows[:, :count]  # the same numbers, in one memory
        return given._replace(rows=rows, pairs=pairs, rounding=rounding)

    def _take(self, moved: float) -> None:
        """For a weight that is at most so far from that of the spectrum."""
        self.moved = moved
        self.directions = {sketch: self._now(before, sketch) for sketch, before in self.directions.items()}

    def _now(self, directions: Directions, sketch: int) -> Directions:
        found, moved = self.spectrum, self.moved
        sigma = math.hypot(found.sigma + moved, moved + self.rounded[sketch])
        return directions._replace(sigma=sigma, longest=found.longest + moved)

    def _norm(self, norm: float) -> float:
        """Of all rows, from that of this rank's."""
        if self.shard is None:
            return norm
        square = torch.tensor(norm * norm, dtype=torch.float64, device=self.probed.device)
        return math.sqrt(float(shards.total(self.shard, square)))

    def _remember(self, weight: Tensor) -> None:
        self.storage = StorageWeakRef(weight.untyped_storage())
        self.seen = _mark(weight)

    def is_of(self, weight: Tensor) -> bool:
        """Whether the weight is the one seen last, unchanged as far as its version and a sample of it say."""
        return (
            not self.storage.expired()
            and self.storage.cdata == weight.untyped_storage()._cdata
            and _same_mark(self.seen, _mark(weight))
        )

    def fits(self, weight: Tensor) -> bool:
        basis = self.spectrum.basis
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return (
            self.probed.shape[1] == weight.shape[0]
            and basis.shape[0] == weight.shape[1]
            and basis.dtype == dtype
            and basis.device == weight.device
        )

    def moved_to(self, weight: Tensor) -> bool:
        """Takes the weight for a later state of the head, unless it is too far from the one of the spectrum."""
        difference = _times(self.probes, weight).sub_(self.probed)
        change = self._norm(float(torch.linalg.vector_norm(difference, dtype=torch.float64)))
        moved = PROBE_FACTOR * change / math.sqrt(PROBES)
        if not moved <= MOST_GROWTH * self.spectrum.sigma:
            return False
        self._take(moved)
        self._remember(weight)
        return True


def _rounded(rows: Tensor) -> tuple[Tensor, float]:
    """[V, K] as tensor cores and products of pairs take them, in numbers that float16 and bfloat16 have, and the
    Frobenius norm of what that changes. float64 stays."""
    if rows.dtype == torch.float64 or not len(rows):
        return rows, 0.0
    half, exponent = in_half_precision(rows)
    rounded = torch.ldexp(half.float(), exponent).bfloat16().float()
    return rounded, float((rounded - rows).norm()) * (1 + 1e-3)


def _mark(weight: Tensor) -> tuple[object, Tensor]:
    version = None if weight.is_inference() else weight._version
    flat = weight.detach().reshape(-1) if weight.is_contiguous() else weight.detach()[:, 0]
    return (version, weight.shape, weight.stride(), weight.dtype, weight.storage_offset()), flat[
        :: max(1, len(flat) // _SAMPLED)
    ].clone()


def _same_mark(one: tuple[object, Tensor], other: tuple[object, Tensor]) -> bool:
    return one[0] == other[0] and torch.equal(one[1], other[1])


_known: list[_Known] = []  # latest last
_spread: list[_Known] = []  # of heads that are spread over ranks
_lock = threading.Lock()


@torch.no_grad()
def directions_of(weight: Tensor, shard: Shard | None = None, sketch: int = 0) -> Directions | None:
    """The directions of a weight [V, D], float32 (float64 of float64); None where it is not finite, or D < 2.
    With a shard all ranks call, each with its rows. `sketch`: columns of it.

    Computed once for a weight that does not change; see above for one that does. That it does not is told by its
    storage, version and a sample of its numbers, so writing to a few rows through `.data` goes unseen.
    """
    weight = weight.detach()
    if shard is not None:
        return _spread_directions(weight, shard, sketch) if weight.shape[1] >= 2 else None
    if weight.shape[1] < 2 or not len(weight):
        return None
    with _lock:
        for known in reversed(_known):
            if known.fits(weight) and known.is_of(weight):
                _known.remove(known)
                _known.append(known)
                return known.of(sketch)
        for known in reversed(_known):
            if known.fits(weight) and known.moved_to(weight):
                _known.remove(known)
                _known.append(known)
                return known.of(sketch)
        found = spectrum(weight)
        if found is None:
            return None
        # A head that moved far takes the place of what it was.
        cdata = weight.untyped_storage()._cdata
        _known[:] = [k for k in _known if k.storage.expired() or k.storage.cdata != cdata][-KEPT + 1 :]
        _known.append(_Known(weight, found))
        return _known[-1].of(sketch)


def _spread_directions(weight: Tensor, shard: Shard, sketch: int) -> Directions | None:
    """Which of the heads that are known it is, all ranks decide together, as they may have forgotten different ones."""
    with _lock:
        here = [k for k in reversed(_spread) if k.shard == shard and k.fits(weight)][:KEPT]
        numbers = [k.number for k in here]
        unchanged = next((k.number for k in here if k.is_of(weight)), 0)
        newest = max((k.number for k in _spread), default=0)
        mine = torch.tensor([unchanged, newest, *numbers, *[0] * (KEPT - len(numbers))], device=weight.device)
        everyone = shards.gathered(shard.group, mine).tolist()
        common = [n for n in everyone[0][2:] if n and all(n in theirs[2:] for theirs in everyone)]
        known = None
        if unchanged in common and all(theirs[0] == unchanged for theirs in everyone):
            known = here[numbers.index(unchanged)]
        else:
            tried = (here[numbers.index(n)] for n in common)
            known = next((k for k in tried if k.moved_to(weight)), None)
        if known is not None:
            _spread.remove(known)
        else:
            found = spectrum(weight, shard=shard)
            if found is None:
                return None
            known = _Known(weight, found, shard)
            known.number = 1 + max(theirs[1] for theirs in everyone)
            _spread[:] = [k for k in _spread if not k.storage.expired()][-KEPT + 1 :]
        _spread.append(known)
        return known.of(sketch)

"""Chunks of tokens with their logits, and what backends share of them: products, scaling, empty results."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..devices import multiplies_bfloat16, multiplies_wide
from ..problem import OPTIONAL, Gradients, Head, Needs, Problem, Rows, Statistics

# Logits and their copies of one chunk. Measured on 2 CPU cores: at 64 MiB 3 to 7 % slower, at 128 MiB no faster.
CHUNK_BYTES = 96 << 20
# Columns of the head that are converted at a time where a product needs another dtype.
COLUMNS = 4096
# Rows of the head whose mean is taken for what all rows have in common, which counts where it is so many times as long
# as what they have besides. Measured in bf16: at 4 times the error of dx is 1.4 times, at 10 times 2.7 times, at 100
# times 25 times as large.
SAMPLED_ROWS = 512
LARGE_MEAN = 4.0
# Numbers of a direction that are rounded at a time where what that loses is wanted: they stay in a core's cache.
ROUNDED = 1 << 18
# Fills its first argument with hidden @ weight.T + bias, in fp32 whatever the operands' dtype. It may have attributes:
# takes_wide: hidden may be fp32 where the weight is not; whole: the same with all digits, where it drops some.
Product = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], object]


def empty_rows(problem: Problem, count: int) -> Rows:
    """What `keep_chunk_rows` fills, for so many tokens."""
    acc, device = problem.accumulator, problem.hidden.device

    def rows(wanted: bool) -> Tensor | None:
        return torch.empty(count, problem.width, dtype=acc, device=device) if wanted else None

    return Rows(rows(True), rows(problem.has_reference), rows(problem.entropy_gradient), rows(problem.beta is not None))


def empty_gradients(problem: Problem, needs: Needs) -> Gradients:
    """What `add_chunk` fills: the rows of hidden are written, the others are sums."""
    acc, head = problem.accumulator, problem.head
    # The caller scales the sums, which in fp16 would come too late for what overflowed or underflowed. And what other
    # ranks add to is rounded after that.
    wide = problem.hidden.dtype == torch.float16 or head.shard is not None
    hidden_dtype = acc if wide else problem.hidden.dtype
    return Gradients(
        hidden=torch.empty_like(problem.hidden, dtype=hidden_dtype) if needs.hidden else None,
        weight=head.weight.new_zeros(head.weight.shape, dtype=acc) if needs.weight else None,
        bias=head.weight.new_zeros(len(head.weight), dtype=acc) if needs.bias else None,
        low_rank=torch.zeros_like(head.low_rank, dtype=acc) if needs.low_rank else None,
    )


def by_column(offsets: Tensor, columns: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entries by column: offsets [V + 1], the entries' rows, and their order, in which rows ascend in each column."""
    ids = torch.arange(len(offsets) - 1, device=columns.device)
    rows = torch.repeat_interleave(ids, offsets.diff(), output_size=len(columns))
    sorted_columns, order = columns.sort(stable=True)
    ids = torch.arange(vocabulary + 1, dtype=columns.dtype, device=columns.device)
    return torch.searchsorted(sorted_columns, ids), rows[order], order


def bytes_of_rounding(problem: Problem, sums: Tensor | None) -> int:
    """What rounding the fp32 sums of dW takes at the end. Until then logits may have them: each chunk reads and writes
    the sums once, so the fewer the better."""
    head = problem.head
    if sums is None or head.weight.dtype == sums.dtype:
        return 0
    return head.most_rows * head.weight.shape[1] * head.weight.element_size()


class Stage(enum.Enum):
    """What the buffers of a chunk hold, one after the other."""

    PRODUCTS = "x Wᵀ + b, or with `difference` that of x − x_ref"
    LOGITS = "scaled and soft-capped; with `difference` and no soft-cap, z is logits minus r"
    DIRECTIONS = "z ∂nll/∂z, r ∂kl/∂z, and the others theirs"
    SPENT = "nothing of use"


@dataclass
class Chunk:
    """Tokens with their logits, which the row passes turn into directions in place, and the products of these."""

    # Whether products of rounded directions come out in fp32, with what rounding took of the mean row given back.
    wide_sums: ClassVar[bool] = False

    tokens: slice
    hidden: Tensor  # [C, D]
    weight: Tensor
    z: Tensor  # [C, V], see `stage`
    r: Tensor | None  # [C, V] of the reference
    half: Tensor | None
    low_rank: Tensor | None = None  # [V, r]
    low_rank_rows: Tensor | None = None  # [C, r]
    difference: bool = False
    entropy: Tensor | None = None  # [C, V] for ∂entropy/∂z
    divergence: Tensor | None = None  # [C, V] for ∂divergence/∂z
    common: Tensor | None = None  # [D] fp32, see `common_row`
    stage: Stage = Stage.PRODUCTS
    refill: Callable[[Chunk], None] | None = None  # by full products, where these are not: to PRODUCTS once more
    # The same tokens with full products, where z is none of float32.
    pieces: Callable[[], Iterator[Chunk]] | None = None
    # The statistics of exact mode and its [7, C], where they have been made of these logits.
    exact: tuple[Statistics, Tensor] | None = None

    def enter(self, stage: Stage, *allowed: Stage) -> None:
        """To `stage`, from one of `allowed`."""
        assert self.stage in allowed, f"the chunk's buffers hold {self.stage.name}, not {allowed[0].name}"
        self.stage = stage

    def directions(self) -> tuple[Tensor | None, ...]:
        """∂/∂z of nll, kl, entropy and divergence, in the order of `Rows.tensors`."""
        assert self.stage is Stage.DIRECTIONS, f"the chunk's buffers hold {self.stage.name}, not DIRECTIONS"
        return self.z, self.r, self.entropy, self.divergence

    @property
    def rounds(self) -> bool:
        """Whether the operands of the products are rounded; then the upstream weights must be in before that."""
        return self.weight.dtype != self.z.dtype and (self.half is not None or multiplies_wide(self.weight))

    def times_weight(self, direction: Tensor, exact: bool = False) -> Tensor:
        """direction @ [weight, low_rank], [C, D + r], in fp32; `exact`: nothing is rounded on a CPU, as more work on
        it, or a sum, follows."""
        product = self._times_weight(direction, exact)
        if self.low_rank is None:
            return product
        return torch.cat([product, direction @ self.low_rank.to(direction.dtype)], 1)

    def _times_weight(self, direction: Tensor, exact: bool) -> Tensor:
        weight = self.weight
        if direction.dtype == weight.dtype:
            return direction @ weight
        if self.rounds and not (exact and not multiplies_wide(weight)):
            narrow, lost = self._narrow(direction), None
            if self.common is not None:
                lost = _lost(direction, narrow)
            if multiplies_wide(weight):
                product = torch.mm(narrow, weight, out_dtype=direction.dtype)
            else:
                product = (narrow @ weight).to(direction.dtype)
            if lost is not None:
                product.addr_(lost, self.common)
            return product
        product = direction.new_zeros(len(direction), weight.shape[1])
        for columns in slices(len(weight), COLUMNS):
            product.addmm_(direction[:, columns], weight[columns].to(direction.dtype))
        return product

    def add_outer(self, total: Tensor, direction: Tensor, row_weight: Tensor | None) -> None:
        """total += (row_weight · direction)ᵀ hidden, total in fp32. The weights go to the smaller factor."""
        if self.rounds and multiplies_wide(total):
            narrow = self._narrow(direction)
            for columns in slices(len(total), COLUMNS):
                product = torch.mm(narrow[:, columns].t(), self.hidden, out_dtype=total.dtype)
                total[columns] += product if row_weight is None else product.mul_(row_weight[0])
        else:
            # Also for bf16 on a CPU: its product would be rounded once per chunk.
            hidden = self.hidden.to(total.dtype)
            total.addmm_(direction.t(), hidden if row_weight is None else hidden * row_weight)

    def _narrow(self, direction: Tensor) -> Tensor:
        if self.half is None:
            return direction.to(self.weight.dtype)
        return self.half[: len(direction)].copy_(direction)


def logit_chunks(
    problem: Problem, product: Product | None = None, *, narrow: bool, extra: int = 0, budget: int | None = None,
    separate: bool = True, tokens: slice | None = None, kind: type[Chunk] | None = None,
) -> Iterator[Chunk]:  # fmt: skip
    """Chunks of tokens with z = x Wᵀ + u Bᵀ + b in their buffers, and r that of the reference; neither scaled nor
    capped.

    With a shared head z is (x − x_ref) Wᵀ + (u − u_ref) Bᵀ (`difference`), unless `product` takes bf16 operands and x −
    x_ref has digits that bf16 has not: then z and r, both fp32, are nearer the truth than the product of a rounded
    difference. Where two of its numbers lie within a factor of two of each other, theirs has none. `product` replaces
    the plain matrix products with W; that with B is fp32, on CUDA of operands of their dtype. `narrow`: a buffer for
    rounded operands of further products is wanted, and if `separate` one for each direction. `extra`: bytes per token
    that the caller adds to the chunk. `budget`: bytes of a chunk, where not CHUNK_BYTES.
    `tokens`: of which they are; None: of all. `kind`: of chunks with products of their own.
    """
    span = tokens or slice(0, len(problem.labels))
    count, columns = span.stop - span.start, len(problem.head.weight)
    if count == 0:
        return
    dtype, acc, device = problem.dtype, problem.accumulator, problem.hidden.device
    model = _Operands.of(problem, problem.head, product)
    reference = None if problem.reference_head is None else _Operands.of(problem, problem.reference_head, product)
    # On a CPU no product of bf16 matrices in PyTorch comes out in fp32. Without a reference, bf16 logits are then
    # taken, as plain PyTorch does, where they are 2–3 times as fast as fp32. But p − p_ref cancels near the reference,
    # so there fp32 operands are worth their time; for the products of directions too, unless what rounding takes from
    # these is given back (`wide_sums`).
    kind = kind or Chunk
    halves = dtype == torch.bfloat16 and device.type == "cpu" and multiplies_bfloat16()
    halves &= not problem.has_reference or kind.wide_sums
    round_logits = halves and product is None and not problem.has_reference

    separate &= narrow
    others = separate * (problem.entropy_gradient + (problem.beta is not None))
    numbers = acc.itemsize * (1 + problem.has_reference + others) + 2 * (dtype != acc and narrow)
    per_token = problem.head.most_rows * numbers + extra
    size = balanced(count, max(1, (budget or CHUNK_BYTES) // per_token))
    z_buffer = torch.empty(size, columns, dtype=acc, device=device)
    r_buffer = torch.empty_like(z_buffer) if problem.has_reference else None
    entropy_buffer = torch.empty_like(z_buffer) if separate and problem.entropy_gradient else None
    divergence_buffer = torch.empty_like(z_buffer) if separate and problem.beta is not None else None
    half = torch.empty(size, columns, dtype=dtype, device=device) if round_logits or (halves and narrow) else None
    rounds = narrow and dtype != acc and (half is not None or multiplies_wide(z_buffer))
    common = common_row(model.weight, 0 if kind.wide_sums else LARGE_MEAN) if rounds else None

    for tokens in slices(span.stop, size, span.start):
        here = tokens.stop - tokens.start
        z, r, entropy, divergence = (
            None if buffer is None else buffer[:here]
            for buffer in (z_buffer, r_buffer, entropy_buffer, divergence_buffer)
        )
        hidden, low_rank_rows = model.split(problem.hidden[tokens])
        is_difference = False
        if r is not None and problem.shared_head:
            is_difference = _shared_logits(problem, model, tokens, z, r)
        else:
            model.fill(z, hidden, low_rank_rows, rounded=half[:here] if round_logits else None)
            if r is not None:
                reference.fill(r, *reference.split(problem.reference_hidden[tokens]))
        chunk = kind(
            tokens, hidden, model.weight, z, r, half, model.low_rank, low_rank_rows, is_difference, entropy, divergence,
            common,
        )  # fmt: skip
        whole = getattr(product, "whole", None)
        if whole is not None and not getattr(product, "full", False):
            chunk.refill = functools.partial(_refill, problem, replace(model, multiply=whole), low_rank_rows)
        yield chunk


def _refill(problem: Problem, model: _Operands, low_rank_rows: Tensor | None, chunk: Chunk) -> None:
    """The products of a chunk by those of `model`, without a reference or with one on the same head."""
    assert problem.reference_head is None
    chunk.stage, chunk.difference, chunk.refill = Stage.PRODUCTS, False, None
    if chunk.r is None:
        model.fill(chunk.z, chunk.hidden, low_rank_rows)
    else:
        chunk.difference = _shared_logits(problem, model, chunk.tokens, chunk.z, chunk.r)


def common_row(weight: Tensor, large: float) -> Tensor | None:
    """[D] fp32: nearly the mean c of the rows of a head [V, D]; None where it is not `large` times as long as what rows
    have besides.

    A direction sums to about 0, so direction @ W has next to nothing of c. A rounded one does not, and its product has
    what the sum has lost times c, which is added.
    """
    rows = weight[:: max(1, len(weight) // SAMPLED_ROWS)].float()
    mean = rows.mean(0)
    rest = (rows - mean).norm(dim=1).mean()
    return mean if bool(mean.norm() > large * rest) else None


def _lost(direction: Tensor, narrow: Tensor) -> Tensor:
    """[C] Σ_v (direction − narrow)."""
    if direction.device.type != "cpu":
        return direction.sum(1) - narrow.sum(1, dtype=direction.dtype)
    rows = slices(len(direction), max(1, ROUNDED // direction.shape[1]))
    return torch.cat([torch.sub(direction[at], narrow[at]).sum(1) for at in rows])


@dataclass(frozen=True)
class _Operands:
    """A head as the products of a chunk take it."""

    weight: Tensor
    low_rank: Tensor | None
    bias: Tensor | None
    multiply: Product

    @classmethod
    def of(cls, problem: Problem, head: Head, product: Product | None) -> _Operands:
        dtype = problem.dtype
        low_rank_dtype = dtype if multiplies_wide(problem.hidden) else problem.accumulator
        weight = head.weight.to(dtype)
        return cls(
            weight if product is None else weight.contiguous(),
            None if head.low_rank is None else head.low_rank.to(low_rank_dtype), head.bias, product or project,
        )  # fmt: skip

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """[x, u] in the dtypes of their factors; u is None where there are no such columns."""
        dim = self.weight.shape[1]
        hidden = rows[:, :dim].to(self.weight.dtype).contiguous()
        no_low_rank = self.low_rank is None or rows.shape[1] == dim
        return hidden, None if no_low_rank else rows[:, dim:].to(self.low_rank.dtype)

    def fill(self, out: Tensor, hidden: Tensor, low_rank_rows: Tensor | None, rounded: Tensor | None = None) -> None:
        """out = x Wᵀ + u Bᵀ + b; with `rounded` by way of that buffer."""
        if rounded is None:
            self.multiply(out, hidden, self.weight, self.bias)
        else:
            out.copy_(project(rounded, hidden, self.weight, self.bias))
        self._add_low_rank(out, low_rank_rows)

    def fill_difference(self, out: Tensor, difference: Tensor) -> bool:
        """Without the bias, of a difference of hidden states in fp32; False: not done, as its dtype would round it."""
        dim = self.weight.shape[1]
        wide = difference[:, :dim]
        takes_wide = getattr(self.multiply, "takes_wide", self.multiply is project)
        narrow = wide if takes_wide else wide.to(self.weight.dtype)
        if narrow.dtype != wide.dtype and not _holds(narrow, wide):
            return False
        self.multiply(out, narrow, self.weight, None)
        self._add_low_rank(out, difference[:, dim:])
        return True

    def _add_low_rank(self, out: Tensor, rows: Tensor | None) -> None:
        if rows is not None and self.low_rank is not None:
            add_product(out, rows.to(self.low_rank.dtype), self.low_rank.t())


def _shared_logits(problem: Problem, model: _Operands, tokens: slice, z: Tensor, r: Tensor) -> bool:
    """r, and z or, where x − x_ref is not rounded, z − r; which."""
    rows, ref_rows = problem.hidden[tokens], problem.reference_hidden[tokens]
    model.fill(r, *model.split(ref_rows))
    difference = difference_of(problem, rows, ref_rows)
    if model.fill_difference(z, difference):
        return True
    model.fill(z, *model.split(rows))
    return False


def difference_of(problem: Problem, rows: Tensor, ref_rows: Tensor) -> Tensor:
    """[x, u] − [x_ref, u_ref], not rounded, of x and x_ref as the products round them (wider ones under autocast)."""
    dim = problem.head.weight.shape[1]

    def seen(part: Tensor) -> Tensor:
        wide = part.to(problem.accumulator)
        if torch.finfo(part.dtype).bits > torch.finfo(problem.dtype).bits:
            wide = torch.cat([wide[:, :dim].to(problem.dtype).to(wide.dtype), wide[:, dim:]], 1)
        return wide

    return seen(rows) - widened(seen(ref_rows), rows.shape[1])


def _holds(narrow: Tensor, wide: Tensor) -> bool:
    """Whether nothing of `wide` was rounded."""
    return not bool(((narrow.to(wide.dtype) != wide) & (wide == wide)).any())


def widened(rows: Tensor, width: int) -> Tensor:
    """[x] as [x, 0]."""
    return rows if rows.shape[1] == width else nn.functional.pad(rows, (0, width - rows.shape[1]))


def add_product(total: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> None:
    """total += factor · left @ right, in fp32 whatever the operands."""
    if left.dtype == total.dtype or not multiplies_wide(left):
        total.addmm_(left.to(total.dtype), right.to(total.dtype), alpha=factor)
    else:
        torch.addmm(total, left, right, alpha=factor, out_dtype=total.dtype, out=total)


def keeps_difference(problem: Problem, chunk: Chunk) -> bool:
    """Whether, after `finish` too, z is the difference of both models' logits; a soft-cap is not linear."""
    return chunk.difference and problem.head.softcap is None


def finish(problem: Problem, z: Tensor, r: Tensor | None, difference: bool) -> None:
    """Scale and soft-cap, in place: z and r become logits. `difference`: z is logits minus r and stays so without a
    soft-cap."""
    head = problem.head
    if r is None:
        finish_logits(z, head)
        return
    if difference and head.softcap is None:
        if head.logit_scale != 1:
            z.mul_(head.logit_scale)
    else:
        if difference:
            z.add_(r)
        finish_logits(z, head)
    finish_logits(r, problem.reference_head or head)


def finish_logits(z: Tensor, head: Head) -> None:
    if head.bias is not None:
        z.clamp_(min=-1e30)  # a token ruled out by −inf must not make 0 · ∞
    if head.logit_scale != 1:
        z.mul_(head.logit_scale)
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)


def project(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """out = hidden @ weight.T + bias, in the dtype of `out` whatever that of the weight; returns out."""
    if weight.dtype == out.dtype:
        if bias is None:
            return torch.mm(hidden, weight.t(), out=out)
        return torch.addmm(bias.to(out.dtype), hidden, weight.t(), out=out)
    if multiplies_wide(weight):
        torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=out.dtype, out=out)
    else:
        hidden = hidden.to(out.dtype)
        for columns in slices(len(weight), COLUMNS):
            torch.mm(hidden, weight[columns].to(out.dtype).t(), out=out[:, columns])
    return out if bias is None else out.add_(bias)


def empty_statistics(problem: Problem) -> Statistics:
    count, acc, device = len(problem.labels), problem.accumulator, problem.hidden.device

    def empty(wanted: bool = True, *shape: int, dtype: torch.dtype = acc) -> Tensor | None:
        return torch.empty(count, *shape, dtype=dtype, device=device) if wanted else None

    wanted = {name: name in problem.wanted for name in OPTIONAL}
    reference, ids = problem.has_reference, problem.ids
    return Statistics(
        nll=empty(),
        prediction=empty(dtype=torch.int64),
        kl=empty(reference),
        reference_nll=empty(reference),
        entropy=empty(wanted["entropy"] or problem.entropy_gradient),
        reference_entropy=empty(wanted["reference_entropy"] and reference),
        topk_entropy=empty(wanted["topk_entropy"]),
        lse=empty(),
        logits_at=None if ids is None else empty(True, ids.shape[1]),
        rank=empty(wanted["rank"], dtype=torch.int64),
        log_p2=empty(wanted["log_p2"]),
        divergence=empty(problem.beta is not None),
    )


def balanced(count: int, most: int) -> int:
    """A chunk size ≤ `most` (rounded up to 16) that splits `count` evenly."""
    chunks = -(-count // most)
    size = -(-count // chunks)
    return min(count, -(-size // 16) * 16)


def scaled(total: Tensor, factor: Tensor | float, dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor, total · factor, rounded once: a scalar tensor alone would be cast to a half dtype first."""
    out = torch.empty_like(total, dtype=dtype)
    if isinstance(factor, Tensor):
        factor = factor.reshape((1,) * total.dim())
    # Where a CPU changes the dtype, PyTorch makes a copy of all it is given.
    whole = out.dtype == total.dtype or total.device.type != "cpu" or not total.numel()
    size = len(total) if whole else max(1, ROUNDED * len(total) // total.numel())
    for rows in slices(len(total), max(1, size)):
        torch.mul(total[rows], factor, out=out[rows])
    return out


def slices(stop: int, size: int, start: int = 0) -> Iterator[slice]:
    for begin in range(start, stop, size):
        yield slice(begin, min(begin + size, stop))

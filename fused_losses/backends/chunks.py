"""Chunks of tokens with their logits, and the steps that backends share: logits, row statistics, directions,
products."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..problem import OPTIONAL, Gradients, Head, Needs, Problem, Rows, Statistics, Upstream

# Logits and their copies of one chunk. Measured on 2 CPU cores: at 64 MiB 3 to 7 % slower, at 128 MiB no faster.
CHUNK_BYTES = 96 << 20
# Row statistics make several passes; a block of this many numbers stays in a core's cache between them. On an
# accelerator the launch of a kernel costs more than its cache saves.
BLOCK_NUMBERS = {"cpu": 1 << 18}
BLOCK_NUMBERS_ELSEWHERE = 1 << 23
# Columns of the head that are converted at a time where a product needs another dtype.
COLUMNS = 4096
# Fills its first argument with hidden @ weight.T + bias, in fp32 whatever the operands' dtype.
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


class Stage(enum.Enum):
    """What the buffers of a chunk hold, one after the other."""

    PRODUCTS = "x Wᵀ + b, or with `difference` that of x − x_ref"
    LOGITS = "scaled and soft-capped; with `difference` and no soft-cap, z is logits minus r"
    DIRECTIONS = "z ∂nll/∂z, r ∂kl/∂z, and the others theirs"
    SPENT = "nothing of use"


@dataclass
class Chunk:
    """Tokens with their logits, which the row passes turn into directions in place, and the products of these."""

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
    stage: Stage = Stage.PRODUCTS

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
        return self.weight.dtype != self.z.dtype and (self.half is not None or self.weight.is_cuda)

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
        if self.rounds and weight.is_cuda:
            return torch.mm(self._narrow(direction), weight, out_dtype=direction.dtype)
        if self.rounds and not exact:
            return (self._narrow(direction) @ weight).to(direction.dtype)
        product = direction.new_zeros(len(direction), weight.shape[1])
        for columns in slices(len(weight), COLUMNS):
            product.addmm_(direction[:, columns], weight[columns].to(direction.dtype))
        return product

    def add_outer(self, total: Tensor, direction: Tensor, row_weight: Tensor | None) -> None:
        """total += (row_weight · direction)ᵀ hidden, total in fp32. The weights go to the smaller factor."""
        if self.rounds and total.is_cuda:
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
    separate: bool = True,
) -> Iterator[Chunk]:  # fmt: skip
    """Chunks of tokens with z = x Wᵀ + u Bᵀ + b in their buffers, and r that of the reference; neither scaled nor
    capped.

    With a shared head z is (x − x_ref) Wᵀ + (u − u_ref) Bᵀ (`difference`), unless `product` takes bf16 operands and x −
    x_ref has digits that bf16 has not: then z and r, both fp32, are nearer the truth than the product of a rounded
    difference. Where two of its numbers lie within a factor of two of each other, theirs has none. `product` replaces
    the plain matrix products with W; that with B is fp32, on CUDA of operands of their dtype. `narrow`: a buffer for
    rounded operands of further products is wanted, and if `separate` one for each direction. `extra`: bytes per token
    that the caller adds to the chunk. `budget`: bytes of a chunk, where not CHUNK_BYTES.
    """
    count, columns = len(problem.labels), len(problem.head.weight)
    if count == 0:
        return
    head, reference = problem.head, problem.reference_head
    dtype, acc, device = problem.dtype, problem.accumulator, problem.hidden.device
    weight = head.weight.to(dtype)
    ref_weight = None if reference is None else reference.weight.to(dtype)
    low_rank_dtype = dtype if device.type == "cuda" else acc
    low_rank, ref_low_rank = (
        None if h is None or h.low_rank is None else h.low_rank.to(low_rank_dtype) for h in (head, reference)
    )
    if product is not None:
        weight = weight.contiguous()
        ref_weight = None if ref_weight is None else ref_weight.contiguous()
    # On a CPU no product of bf16 matrices in PyTorch comes out in fp32. Without a reference, bf16 logits are then
    # taken, as plain PyTorch does: 2–3 times as fast as fp32. But p − p_ref cancels near the reference, so there fp32 operands
    # are worth their time.
    halves = dtype == torch.bfloat16 and device.type == "cpu" and not problem.has_reference
    round_logits = halves and product is None

    separate &= narrow
    others = separate * (problem.entropy_gradient + (problem.beta is not None))
    numbers = acc.itemsize * (1 + problem.has_reference + others) + 2 * (dtype != acc and narrow)
    per_token = head.most_rows * numbers + extra
    size = _balanced(count, max(1, (budget or CHUNK_BYTES) // per_token))
    z_buffer = torch.empty(size, columns, dtype=acc, device=device)
    r_buffer = torch.empty_like(z_buffer) if problem.has_reference else None
    entropy_buffer = torch.empty_like(z_buffer) if separate and problem.entropy_gradient else None
    divergence_buffer = torch.empty_like(z_buffer) if separate and problem.beta is not None else None
    half = torch.empty(size, columns, dtype=dtype, device=device) if round_logits or (halves and narrow) else None
    multiply = project if product is None else product

    for tokens in slices(count, size):
        rows = problem.hidden[tokens]
        hidden, low_rank_rows = _split(rows, weight, low_rank)
        z = z_buffer[: len(hidden)]
        r, is_difference = None, False
        if r_buffer is not None:
            r = r_buffer[: len(hidden)]
            ref_rows = problem.reference_hidden[tokens]
            if problem.shared_head:
                ref_hidden, ref_low_rank_rows = _split(ref_rows, weight, low_rank)
                multiply(r, ref_hidden, weight, head.bias)
                _add_low_rank(r, ref_low_rank_rows, low_rank)
                difference = rows.to(acc) - widened(ref_rows, rows.shape[1]).to(acc)
                difference, low_rank_difference = difference[:, : weight.shape[1]], difference[:, weight.shape[1] :]
                narrow_difference = difference if product is None else difference.to(dtype)
                is_difference = narrow_difference.dtype == acc or _holds(narrow_difference, difference)
                if is_difference:
                    multiply(z, narrow_difference, weight, None)
                    _add_low_rank(z, low_rank_difference, low_rank)
                else:
                    multiply(z, hidden, weight, head.bias)
                    _add_low_rank(z, low_rank_rows, low_rank)
            else:
                multiply(z, hidden, weight, head.bias)
                _add_low_rank(z, low_rank_rows, low_rank)
                ref_hidden, ref_low_rank_rows = _split(ref_rows, ref_weight, ref_low_rank)
                multiply(r, ref_hidden, ref_weight, reference.bias)
                _add_low_rank(r, ref_low_rank_rows, ref_low_rank)
        else:
            if round_logits:
                z.copy_(project(half[: len(hidden)], hidden, weight, head.bias))
            else:
                multiply(z, hidden, weight, head.bias)
            _add_low_rank(z, low_rank_rows, low_rank)
        entropy, divergence = (
            None if buffer is None else buffer[: len(hidden)] for buffer in (entropy_buffer, divergence_buffer)
        )
        yield Chunk(
            tokens, hidden, weight, z, r, half, low_rank, low_rank_rows, is_difference, entropy, divergence
        )  # fmt: skip


def _holds(narrow: Tensor, wide: Tensor) -> bool:
    """Whether nothing of `wide` was rounded."""
    return not bool(((narrow.to(wide.dtype) != wide) & (wide == wide)).any())


def _split(rows: Tensor, weight: Tensor, low_rank: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """[x, u] in the dtypes of their factors; u is None where there are no such columns."""
    dim = weight.shape[1]
    hidden = rows[:, :dim].to(weight.dtype).contiguous()
    return hidden, None if low_rank is None or rows.shape[1] == dim else rows[:, dim:].to(low_rank.dtype)


def widened(rows: Tensor, width: int) -> Tensor:
    """[x] as [x, 0]."""
    return rows if rows.shape[1] == width else nn.functional.pad(rows, (0, width - rows.shape[1]))


def _add_low_rank(z: Tensor, rows: Tensor | None, low_rank: Tensor | None) -> None:
    if rows is not None and low_rank is not None:
        add_product(z, rows.to(low_rank.dtype), low_rank.t())


def add_product(total: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> None:
    """total += factor · left @ right, in fp32 whatever the operands."""
    if left.dtype == total.dtype or not left.is_cuda:
        total.addmm_(left.to(total.dtype), right.to(total.dtype), alpha=factor)
    else:
        torch.addmm(total, left, right, alpha=factor, out_dtype=total.dtype, out=total)


def row_passes(
    problem: Problem, out: Statistics, chunk: Chunk, directions: bool, then: Callable[[slice], None] | None = None
) -> None:
    """Fill `out`, and with `directions` turn the chunk's logits into directions, in blocks of rows; after each,
    `then(rows)`."""
    size, vocabulary = chunk.z.shape
    device = chunk.z.device
    finished = chunk.stage is Stage.LOGITS
    chunk.enter(Stage.DIRECTIONS if directions else Stage.SPENT, Stage.PRODUCTS, Stage.LOGITS)
    block = min(size, max(1, BLOCK_NUMBERS.get(device.type, BLOCK_NUMBERS_ELSEWHERE) // vocabulary))
    scratch = torch.empty(block, vocabulary, dtype=chunk.z.dtype, device=device)
    labels, ids = problem.labels[chunk.tokens], None if problem.ids is None else problem.ids[chunk.tokens]
    keeps = keeps_difference(problem, chunk)
    for rows in slices(size, block):
        z, r, entropy, divergence = (
            None if buffer is None else buffer[rows] for buffer in (chunk.z, chunk.r, chunk.entropy, chunk.divergence)
        )
        if not finished:
            finish(problem, z, r, chunk.difference)
        some = RowBlock(labels[rows, None], z, r, keeps, scratch[: len(z)], entropy, divergence, directions)
        _row_pass(problem, out.at(rows), some, None if ids is None else ids[rows])
        if then is not None:
            then(rows)


def keeps_difference(problem: Problem, chunk: Chunk) -> bool:
    """Whether, after `finish` too, z is the difference of both models' logits; a soft-cap is not linear."""
    return chunk.difference and problem.head.softcap is None


def finish(problem: Problem, z: Tensor, r: Tensor | None, difference: bool) -> None:
    """Scale and soft-cap, in place: z and r become logits. `difference`: z is logits minus r and stays so without a
    soft-cap."""
    head = problem.head
    if r is None:
        _finish_logits(z, head)
        return
    if difference and head.softcap is None:
        if head.logit_scale != 1:
            z.mul_(head.logit_scale)
    else:
        if difference:
            z.add_(r)
        _finish_logits(z, head)
    _finish_logits(r, problem.reference_head or head)


@dataclass
class RowBlock:
    """A few rows of a chunk: their logits in z and r, which become directions."""

    labels: Tensor  # [rows, 1]
    z: Tensor
    r: Tensor | None
    difference: bool  # z is logits minus r
    scratch: Tensor
    entropy: Tensor | None
    divergence: Tensor | None
    directions: bool


def _row_pass(problem: Problem, out: Statistics, rows: RowBlock, ids: Tensor | None) -> None:
    """Statistics of a few rows; with `directions`, z becomes ∂nll/∂z, r ∂kl/∂z and so on (all without logit_scale)."""
    z, head = rows.z, problem.head
    shared_difference = None
    if rows.difference:
        shared_difference = z.clone()
        z.add_(rows.r)
    # At least 0: rounding would make it negative where the soft-cap is all but reached.
    slope = (1 - (z / head.softcap) ** 2).clamp_(min=0) if rows.directions and head.softcap is not None else None
    _of_logits(problem, out, z, rows.labels, ids)
    if rows.r is None:
        _pass_without_reference(out, rows)
    else:
        _pass_with_reference(problem, out, rows, shared_difference)
    if slope is not None:
        for direction in (z, rows.r, rows.entropy, rows.divergence):
            if direction is not None:
                direction.mul_(slope)


def _of_logits(problem: Problem, out: Statistics, z: Tensor, labels: Tensor, ids: Tensor | None) -> None:
    """The statistics that are read off the logits themselves, where wanted."""
    if out.topk_entropy is not None:
        out.topk_entropy.copy_(entropy_of(z.topk(min(problem.top_k, z.shape[1]), dim=1).values))
    if out.top_logits is not None:
        out.top_logits.copy_(z.topk(out.top_logits.shape[1], dim=1).values)
    if out.rank is not None:
        out.rank.copy_(rank_of(z, z.gather(1, labels)))
    if out.logits_at is not None:
        out.logits_at.copy_(picked(z, ids))


def more_statistics(problem: Problem, chunk: Chunk, out: Statistics) -> None:
    """Fills what kernels of a sparse softmax do not: of a chunk of logits, which stay. In blocks of rows, as
    `row_passes`."""
    assert chunk.stage is Stage.LOGITS, f"the chunk's buffers hold {chunk.stage.name}, not LOGITS"
    ids = None if problem.ids is None else problem.ids[chunk.tokens]
    labels, keeps = problem.labels[chunk.tokens, None], keeps_difference(problem, chunk)
    if out.logits_at is not None:
        at = picked(chunk.z, ids)
        out.logits_at.copy_(at + picked(chunk.r, ids) if keeps else at)
    if out.topk_entropy is None and out.rank is None and out.log_p2 is None:
        return
    numbers = BLOCK_NUMBERS.get(chunk.z.device.type, BLOCK_NUMBERS_ELSEWHERE)
    for rows in slices(len(chunk.z), max(1, numbers // chunk.z.shape[1])):
        z = chunk.z[rows] + chunk.r[rows] if keeps else chunk.z[rows]
        some = replace(out.at(rows), logits_at=None)
        _of_logits(problem, some, z, labels[rows], None)
        if some.log_p2 is not None:
            log_p = z.log_softmax(1)
            some.log_p2.copy_(log_p.mul_(2).logsumexp(1))


def _pass_without_reference(out: Statistics, rows: RowBlock) -> None:
    z = rows.z
    total, log_sum = _exponentials_(z, rows.labels, out, rows.scratch)
    if not rows.directions:
        return
    z.div_(total)
    if rows.entropy is not None:  # scratch holds z − top
        torch.add(rows.scratch, (out.entropy - log_sum)[:, None], out=rows.entropy).mul_(z).neg_()
    # p of the label minus 1 is expm1(−nll): exact also where p is nearly 1.
    z.scatter_(1, rows.labels, torch.expm1(-out.nll)[:, None])


def _pass_with_reference(
    problem: Problem, out: Statistics, rows: RowBlock, shared_difference: Tensor | None
) -> None:  # fmt: skip
    """Log-probabilities of both models, in place, and what follows from them. `shared_difference`: z − r before
    that."""
    labels, scratch, directions = rows.labels, rows.scratch, rows.directions
    log_p, log_r = rows.z, rows.r
    top, prediction = log_p.max(1, keepdim=True)
    out.prediction.copy_(prediction[:, 0])
    log_sum = _log_softmax_(log_p, top, prediction, scratch)
    top_ref, ref_prediction = log_r.max(1, keepdim=True)
    log_sum_ref = _log_softmax_(log_r, top_ref, ref_prediction, scratch)
    out.lse.copy_((top + log_sum)[:, 0])
    if out.normaliser is not None:
        torch.cat([top, log_sum], 1, out=out.normaliser)
        torch.cat([top_ref, log_sum_ref], 1, out=out.reference_normaliser)
    out.nll.copy_(-log_p.gather(1, labels)[:, 0])
    out.reference_nll.copy_(-log_r.gather(1, labels)[:, 0])
    # d = log p − log p_ref; from the difference of the hidden states where that is to be had.
    if shared_difference is None:
        d = log_p - log_r
    else:
        d = shared_difference.sub_((top - top_ref) + (log_sum - log_sum_ref))

    p_ref = scratch.copy_(log_r).exp_()
    if out.reference_entropy is not None:
        out.reference_entropy.copy_(-row_dot(p_ref, log_r))
    wants_p = directions or out.entropy is not None or out.log_p2 is not None or out.divergence is not None
    p = log_p.exp() if wants_p else None
    if out.entropy is not None:
        out.entropy.copy_(-row_dot(p, log_p))
    if out.log_p2 is not None:
        at_top = p.gather(1, prediction)
        p.scatter_(1, prediction, 0)
        out.log_p2.copy_(torch.log1p(row_dot(p, p) * (2 * log_sum[:, 0]).exp()) - 2 * log_sum[:, 0])
        p.scatter_(1, prediction, at_top)
    # p − p_ref = p_ref · expm1(d) keeps its relative accuracy where the two models nearly agree.
    gap = torch.where(d.abs() < 1, torch.expm1(d).mul_(p_ref), log_p.exp() - p_ref if p is None else p - p_ref)
    # Σ gap is 0 up to rounding; with it the error of d cancels to first order and the sum has no negative part.
    out.kl.copy_((gap.sum(1) - row_dot(p_ref, d)).clamp_(min=0))
    if out.divergence is not None:
        divergence, student = mixture_sums(problem.beta, p, p_ref, d, gap)
        out.divergence.copy_(divergence.clamp(min=0))
        if rows.divergence is not None:
            rows.divergence.copy_(mixture_direction(problem.beta, p, d, student[:, None]))
    if directions:
        if rows.entropy is not None:
            torch.add(log_p, out.entropy[:, None], out=rows.entropy).mul_(p).neg_()
        rows.r.copy_(gap)
        rows.z.copy_(p).scatter_(1, labels, torch.expm1(-out.nll)[:, None])


def mixture_sums(beta: float, p: Tensor, p_ref: Tensor, d: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """The generalised Jensen-Shannon divergence of rows, and KL(p ‖ m), m = β p_ref + (1 − β) p, over these columns.

    d = log p − log p_ref, gap = p − p_ref. Every term of the sums is ≥ 0, so nothing cancels near the reference.
    """
    if beta == 1:
        kl = row_dot(p, d) - gap.sum(1)
        return kl, kl
    log_ratio = log_of_mixture(d, beta)  # log m / p_ref
    gaps = gap.sum(1)
    student = row_dot(p, d - log_ratio) - beta * gaps
    teacher = (1 - beta) * gaps - row_dot(p_ref, log_ratio)
    return beta * teacher + (1 - beta) * student, student


def mixture_direction(beta: float, p: Tensor, d: Tensor, student: Tensor) -> Tensor:
    """Its derivative by the logits; student [rows, 1]: KL(p ‖ m)."""
    if beta == 1:
        return (d - student).mul_(p)
    return (d - log_of_mixture(d, beta)).sub_(student).mul_(p).mul_(1 - beta)


def log_of_mixture(d: Tensor, beta: float) -> Tensor:
    """log(β + (1 − β) eᵈ), accurate near d = 0 and without overflow."""
    near = torch.log1p(torch.expm1(d.clamp(max=20)).mul_(1 - beta))
    far = d + math.log1p(-beta) + torch.log1p(torch.exp(-d.clamp(min=20)).mul_(beta / (1 - beta)))
    return torch.where(d < 20, near, far)


def rank_of(z: Tensor, label_logit: Tensor) -> Tensor:
    """How many logits are larger than the label's, [rows]."""
    return (z > label_logit).sum(1)


def picked(z: Tensor, ids: Tensor) -> Tensor:
    """z[t, ids[t, j]], 0 where the id is negative."""
    return z.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0)


def _finish_logits(z: Tensor, head: Head) -> None:
    if head.bias is not None:
        z.clamp_(min=-1e30)  # a token ruled out by −inf must not make 0 · ∞
    if head.logit_scale != 1:
        z.mul_(head.logit_scale)
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)


def _exponentials_(z: Tensor, labels: Tensor, out: Statistics, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """z becomes exp(z − top); fills the statistics of a model alone. Returns the sums, [rows, 1], and their logarithms,
    [rows].

    The largest logit is taken out before anything is summed, and 1 + rest goes through log1p: nll is accurate
    also where it is tiny, never negative, and no common offset of the logits enters it.
    """
    top, prediction = z.max(1, keepdim=True)
    out.prediction.copy_(prediction[:, 0])
    z.sub_(top)
    label_logit = z.gather(1, labels)[:, 0]
    shifted = scratch.copy_(z) if out.entropy is not None else None
    z.exp_().scatter_(1, prediction, 0)
    rest = z.sum(1) + (top - top)[:, 0]  # NaN where the largest logit is infinite, and so everything that follows
    log_sum = torch.log1p(rest)
    out.nll.copy_(log_sum - label_logit)
    out.lse.copy_(top[:, 0] + log_sum)
    if out.normaliser is not None:
        torch.stack([top[:, 0], log_sum], 1, out=out.normaliser)
    if shifted is not None:
        out.entropy.copy_(log_sum - row_dot(z, shifted) / (1 + rest))
    if out.log_p2 is not None:
        out.log_p2.copy_(torch.log1p(row_dot(z, z)) - 2 * log_sum)
    z.scatter_(1, prediction, 1)
    return (1 + rest)[:, None], log_sum


def _log_softmax_(z: Tensor, top: Tensor, prediction: Tensor, scratch: Tensor) -> Tensor:
    """z becomes log softmax(z); returns log Σ exp(z − top), [rows, 1]."""
    exp = torch.exp(z.sub_(top), out=scratch).scatter_(1, prediction, 0)
    log_sum = torch.log1p(exp.sum(1, keepdim=True) + (top - top))  # NaN where the largest logit is infinite
    z.sub_(log_sum)
    return log_sum


def entropy_of(z: Tensor) -> Tensor:
    """Of softmax(z), [rows]."""
    log_p = z.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ_v a[t, v] · b[t, v], without a temporary of that size."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).flatten()


def project(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """out = hidden @ weight.T + bias, in the dtype of `out` whatever that of the weight; returns out."""
    if weight.dtype == out.dtype:
        if bias is None:
            return torch.mm(hidden, weight.t(), out=out)
        return torch.addmm(bias.to(out.dtype), hidden, weight.t(), out=out)
    if weight.is_cuda:
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


def add_picked_(direction: Tensor, problem: Problem, out: Statistics, upstream: Upstream) -> None:
    """Adds the weights of single logits to a direction [C, V]: those of `logits_at`, and that of lse at the label.

    All of these tokens alone. With a shard the direction has this rank's columns.
    """
    single = picked_weights(problem, picked_slopes(problem, out), upstream)
    if single is None or not direction.shape[1]:
        return
    columns, weights = single
    if direction.device.type == "cpu":
        direction.scatter_add_(1, columns, weights)
    else:  # in any order there, where an id comes twice
        tokens = torch.arange(len(direction), device=direction.device)[:, None].expand_as(columns)
        direction.index_put_((tokens, columns), weights, accumulate=True)


def picked_slopes(problem: Problem, out: Statistics) -> Tensor | None:
    """The soft-cap's slope at the label and at the ids, [N, 1 + k]; None without soft-cap."""
    softcap = problem.head.softcap
    if softcap is None:
        return None
    logits = (out.lse - out.nll)[:, None]
    if out.logits_at is not None:
        logits = torch.cat([logits, out.logits_at], 1)
    return (1 - (logits / softcap) ** 2).clamp(min=0)


def picked_weights(problem: Problem, slopes: Tensor | None, upstream: Upstream) -> tuple[Tensor, Tensor] | None:
    """The single logits that have a weight of their own: columns of this rank's weight [N, k], and weights with the
    soft-cap's slope in them; None: there are none.

    That of lse at the label, as its gradient is p = (p − onehot) + onehot, and those of `logits_at`.
    """
    columns, weights = [], []
    if upstream.lse is not None:
        columns.append(problem.labels[:, None])
        weights.append(upstream.lse[:, None] if slopes is None else (upstream.lse * slopes[:, 0])[:, None])
    if upstream.logits_at is not None:
        at = upstream.logits_at.masked_fill(problem.ids < 0, 0)
        columns.append(problem.ids.clamp(min=0))
        weights.append(at if slopes is None else at * slopes[:, 1:])
    if not columns:
        return None
    column, weight, shard = torch.cat(columns, 1), torch.cat(weights, 1), problem.head.shard
    if shard is not None:
        column, rows = column - shard.start, len(problem.head.weight)
        weight = weight.masked_fill((column < 0) | (column >= rows), 0)
        column = column.clamp(0, max(rows - 1, 0))
    return column, weight


def _balanced(count: int, most: int) -> int:
    """A chunk size ≤ `most` (rounded up to 16) that splits `count` evenly."""
    chunks = -(-count // most)
    size = -(-count // chunks)
    return min(count, -(-size // 16) * 16)


def slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))

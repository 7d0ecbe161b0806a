"""Passes over rows of logits in PyTorch operations: statistics, and directions in place of the logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..problem import Problem, Statistics
from .chunks import Chunk, Stage, finish, keeps_difference, slices

# Row statistics make several passes; a block of this many numbers stays in a core's cache between them. On an
# accelerator the launch of a kernel costs more than its cache saves.
BLOCK_NUMBERS = {"cpu": 1 << 18}
BLOCK_NUMBERS_ELSEWHERE = 1 << 23


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
    out.nll.copy_(-log_p.gather(1, labels)[:, 0])
    out.reference_nll.copy_(-log_r.gather(1, labels)[:, 0])
    # d = log p − log p_ref; from the difference of the hidden states where that is to be had.
    if shared_difference is None:
        d, shift = log_p - log_r, (top - top_ref) + (log_sum - log_sum_ref)
    else:
        # The largest logit is a rounded sum: what is taken off is made of its parts, which are not.
        at_top, sums = shared_difference.gather(1, prediction), log_r.gather(1, prediction) + log_sum
        d, shift = shared_difference.sub_(at_top).sub_(sums), at_top + sums

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
    gaps = gap.sum(1, keepdim=True)
    out.kl.copy_((gaps[:, 0] - row_dot(p_ref, d)).clamp_(min=0))
    if out.normaliser is not None:
        torch.cat([top, log_sum], 1, out=out.normaliser)
        torch.cat([top_ref, log_sum_ref, shift + gaps], 1, out=out.reference_normaliser)
    if p is not None:
        # So it does here. Where one id has nearly all of p, its gap is as small as all others together, and less than
        # that error.
        gap.addcmul_(p, gaps, value=-1)
    if out.divergence is not None:
        d.sub_(torch.log1p(gaps))
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
    of_p, of_reference = logs_of_mixture(d, beta)
    gaps = gap.sum(1)
    student = -beta * gaps - row_dot(p, of_p)
    teacher = (1 - beta) * gaps - row_dot(p_ref, of_reference)
    return beta * teacher + (1 - beta) * student, student


def mixture_direction(beta: float, p: Tensor, d: Tensor, student: Tensor) -> Tensor:
    """Its derivative by the logits; student [rows, 1]: KL(p ‖ m)."""
    if beta == 1:
        return (d - student).mul_(p)
    return logs_of_mixture(d, beta)[0].add_(student).mul_(p).mul_(beta - 1)


def logs_of_mixture(d: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log m/p and log m/p_ref. That of the larger of p and p_ref is at most log 2 or so, and accurate however large d
    is; so nothing overflows, and no rounding of d comes into the sums."""
    ahead, less = d > 0, -d.abs()
    larger = torch.where(ahead, _log_of_mixture(less, beta), _log_of_mixture(less, 1 - beta))
    return torch.where(ahead, larger, larger - d), torch.where(ahead, larger + d, larger)


def _log_of_mixture(d: Tensor, share: float) -> Tensor:
    """log(1 − share + share eᵈ), d ≤ 0."""
    near = torch.expm1(d).mul_(share).log1p_()
    far = torch.exp(d).mul_(share / (1 - share)).log1p_().add_(math.log1p(-share))
    return torch.where(d > -1, near, far)


def rank_of(z: Tensor, label_logit: Tensor) -> Tensor:
    """How many logits are larger than the label's, [rows]."""
    return (z > label_logit).sum(1)


def picked(z: Tensor, ids: Tensor) -> Tensor:
    """z[t, ids[t, j]], 0 where the id is negative."""
    return z.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0)


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
    """Of softmax(z), [rows], logits in descending order; accurate also where the first has nearly all of p."""
    shifted = (z[:, 1:] - z[:, :1]).clamp_(min=-1e30)
    e = shifted.exp()
    rest = e.sum(1)
    return torch.log1p(rest) - row_dot(e, shifted) / (1 + rest)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ_v a[t, v] · b[t, v], without a temporary of that size."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).flatten()

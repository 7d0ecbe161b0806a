"""Exact losses where the vocabulary is spread over the ranks of a process group, by their rows of the head.

Each rank takes a chunk of tokens through the steps of backends/torch.py as though its rows were all there are, which
gives the losses of p_i = p(· | the token is one of rank i's). With the mass P_i of rank i, that is p = P_i p_i, the
chain rule makes those of the whole of them; r is the reference, R_i its masses, and rank i holds the label y::

    −log p[y] = −log p_i[y] − log P_i
    H(p)      = Σ_i P_i (H(p_i) − log P_i)
    KL(r ‖ p) = Σ_i R_i KL(r_i ‖ p_i) + KL(R ‖ P)
    p − r     = R_i (p_i − r_i) + (P_i − R_i) p_i         at the entries of rank i

No term is negative, so nothing cancels that does not on one rank. What is needed of the other ranks is the statistics
alone: one all-gather per chunk. All ranks add them up in the same order, so that results are the same on all, and from
run to run.

`backends` chooses it for such heads, where gradients are exact: it has no part of a sparse softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .. import shards
from ..problem import Gradients, Needs, Problem, Rows, Segments, Statistics
from . import chunks, row_passes
from . import torch as chunked
from .chunks import Chunk, Product, Stage
from .torch import UpstreamOf

# In the place of the largest logit of a rank without rows; its mass is 0.
NO_LOGIT = -1e30
# Statistics of a token that travel whenever they are wanted, beside normalisers, prediction and top logits.
SHARED = ("nll", "entropy", "reference_nll", "kl", "reference_entropy")


def statistics(problem: Problem, keep_rows: bool = False) -> tuple[Statistics, Rows]:
    out, rows = chunked.statistics(problem, keep_rows, sweep=sweep)
    for total in rows.tensors():
        shards.summed_(problem.head.shard.group, total)
    return out, rows


def gradients(problem: Problem, upstream: UpstreamOf, needs: Needs) -> tuple[Statistics, Gradients]:
    """Of weight and bias those of this rank's rows."""
    out, total = chunked.gradients(problem, upstream, needs, sweep=sweep)
    shards.summed_(problem.head.shard.group, total.hidden)
    return out, total


def rows_product(segments: Segments, matrix: Tensor, scale: Tensor, vector: Tensor, dtype: torch.dtype) -> Tensor:
    """Of this rank's rows."""
    return chunked.rows_product(segments, matrix, scale, vector, dtype)


def sweep(problem: Problem, out: Statistics, directions: bool, product: Product | None = None) -> Iterator[Chunk]:
    """That of backends/torch.py, where the buffers hold this rank's entries and `out` the whole vocabulary's
    statistics."""
    shard, rows = problem.head.shard, len(problem.head.weight)
    nearest = (problem.labels - shard.start).clamp(0, max(rows - 1, 0))
    mine = nearest + shard.start == problem.labels
    # Of each label the rank that holds it: as many ranks end before it.
    owner = torch.searchsorted(problem.labels.new_tensor(shard.ends), problem.labels, right=True)
    local = replace(problem, labels=nearest, ids=None, beta=None, entropy_gradient=False)
    for chunk in chunks.logit_chunks(problem, product, narrow=directions):
        at = chunk.tokens
        part = _part(problem, out.at(at))
        logits = _kept_logits(problem, chunk, out.at(at))
        if rows:
            row_passes.row_passes(local, part, replace(chunk, entropy=None, divergence=None), directions)
        chunk.stage = Stage.DIRECTIONS if directions else Stage.SPENT
        log_p, log_r, gap = _combine(problem, part, owner[at], out.at(at))
        if logits is not None:
            _of_kept_logits(problem, chunk, logits, out.at(at), part, directions)
        if directions and rows:
            _whole_directions(problem, part, chunk, nearest[at], mine[at], out.nll[at], log_p, log_r, gap)
        yield chunk


def _part(problem: Problem, out: Statistics) -> Statistics:
    """For the statistics of this rank's rows; filled as without rows."""
    k = min(problem.top_k, len(problem.head.weight))
    normaliser = out.nll.new_tensor([NO_LOGIT, 0.0]).repeat(len(out.nll), 1)
    return Statistics(
        nll=torch.zeros_like(out.nll),
        prediction=torch.zeros_like(out.prediction),
        normaliser=normaliser,
        reference_normaliser=torch.nn.functional.pad(normaliser, (0, 1)) if problem.has_reference else None,
        top_logits=None if out.topk_entropy is None else out.nll.new_empty(len(out.nll), k),
        lse=torch.zeros_like(out.nll),
        **{name: None if getattr(out, name) is None else torch.zeros_like(out.nll) for name in SHARED[1:]},
    )


def _combine(
    problem: Problem, part: Statistics, owner: Tensor, out: Statistics
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Fill `out` from the parts of all ranks. Returns log P_i, log R_i and P_i − R_i of this rank, [C] each."""
    shard = problem.head.shard
    # As the bits of a float: it is copied and never computed with.
    prediction = (part.prediction + shard.start).to(torch.int32 if out.nll.itemsize == 4 else torch.int64)
    lines = [*part.normaliser.t(), prediction.view(out.nll.dtype)]
    if part.reference_normaliser is not None:
        lines += part.reference_normaliser.t()
    names = [name for name in SHARED if getattr(out, name) is not None]
    lines += [getattr(part, name) for name in names]
    if part.top_logits is not None:
        missing = min(problem.top_k, problem.head.most_rows) - part.top_logits.shape[1]
        lines += torch.nn.functional.pad(part.top_logits, (0, missing), value=-torch.inf).t()
    everyone = iter(shards.gathered(shard.group, torch.stack(lines)).unbind(1))

    top, log_sum, predictions = (next(everyone) for _ in range(3))
    log_p = _log_masses(top, log_sum)
    log_r = _log_masses(next(everyone), next(everyone)) if problem.has_reference else None
    shift = next(everyone) if problem.has_reference else None
    of = {name: next(everyone) for name in names}
    p, owner = log_p.exp(), owner[None]
    heaviest = log_p.max(0, keepdim=True).indices  # of a rank without rows, and without mass, nothing can be read off
    out.lse.copy_((top + log_sum - log_p).gather(0, heaviest)[0])
    out.nll.copy_((of["nll"] - log_p).gather(0, owner)[0])
    # The first of equals, as within a rank.
    ids = predictions.gather(0, top.max(0, keepdim=True).indices)[0]
    out.prediction.copy_(ids.view(prediction.dtype))
    if out.entropy is not None:
        out.entropy.copy_((p * (of["entropy"] - log_p)).sum(0))
    if part.top_logits is not None:
        candidates = torch.cat([logits.t() for logits in everyone], 1)
        k = min(problem.top_k, problem.head.vocabulary)
        out.topk_entropy.copy_(row_passes.entropy_of(candidates.topk(k, dim=1).values))
    if log_r is None:
        return log_p[shard.rank], None, None
    # log P − log R from what each rank knows best: of a head that both models share, from its difference of logits.
    r, d = log_r.exp(), shift - (shift + log_r).logsumexp(0)
    out.reference_nll.copy_((of["reference_nll"] - log_r).gather(0, owner)[0])
    if out.reference_entropy is not None:
        out.reference_entropy.copy_((r * (of["reference_entropy"] - log_r)).sum(0))
    # KL(R ‖ P) in the form that backends/torch.py has for one rank.
    gap = torch.where(d.abs() < 1, torch.expm1(d) * r, p - r)
    out.kl.copy_((gap - r * d + r * of["kl"]).sum(0).clamp_(min=0))
    # Σ gap is 0 but for the error of d, by P times which each is off.
    gap -= p * gap.sum(0)
    return log_p[shard.rank], log_r[shard.rank], gap[shard.rank]


def _log_masses(top: Tensor, log_sum: Tensor) -> Tensor:
    """log P_i from each rank's largest logit and log Σ exp(z − it), [ranks, C].

    The heaviest rank's is −log1p(the others' weight): accurate also where the others have next to nothing.
    """
    heaviest = (top + log_sum).max(0, keepdim=True).indices
    relative = (top - top.gather(0, heaviest)) + (log_sum - log_sum.gather(0, heaviest))
    others = relative.exp().scatter(0, heaviest, 0).sum(0, keepdim=True)
    return relative - torch.log1p(others)


def _whole_directions(
    problem: Problem, part: Statistics, chunk: Chunk, labels: Tensor, mine: Tensor, nll: Tensor, log_p: Tensor,
    log_r: Tensor | None, gap: Tensor | None,
) -> None:  # fmt: skip
    """From the directions of this rank's rows alone, in the chunk's buffers, to its entries of those of the whole
    vocabulary."""
    z, r, labels = chunk.z, chunk.r, labels[:, None]
    p = log_p.exp()
    slope = torch.ones_like(nll)
    if problem.head.softcap is not None:
        slope -= ((part.normaliser.sum(1) - part.nll) / problem.head.softcap) ** 2
    at_label = (-part.nll).exp()
    if r is not None:
        z.scatter_(1, labels, (at_label * slope)[:, None])  # p_i, where the label's 1 had been taken off
        r.mul_(log_r.exp()[:, None]).addcmul_(z, gap[:, None])
    z.mul_(p[:, None]).scatter_(1, labels, (torch.where(mine, torch.expm1(-nll), at_label * p) * slope)[:, None])


# What is kept of a chunk's logits, this rank's columns: z, r, and d = z − r where the products were of x − x_ref.
Kept = tuple[Tensor, "Tensor | None", "Tensor | None"]


def _kept_logits(problem: Problem, chunk: Chunk, out: Statistics) -> Kept | None:
    """Copies of a chunk's logits, where something is wanted that needs the normalisers of all ranks, or single
    logits."""
    if not (
        problem.has_dense_directions or out.logits_at is not None or out.rank is not None or out.log_p2 is not None
    ):
        return None
    z, r = chunk.z.clone(), None if chunk.r is None else chunk.r.clone()
    chunks.finish(problem, z, r, chunk.difference)
    if chunks.keeps_difference(problem, chunk):
        return z + r, r, z
    return z, r, None


def _of_kept_logits(
    problem: Problem, chunk: Chunk, logits: Kept, out: Statistics, part: Statistics, directions: bool
) -> None:  # fmt: skip
    """Single logits, rank, log Σp², divergence, and the directions that are not of nll and kl; all ranks add up in one
    order."""
    shard, (z, r, d) = problem.head.shard, logits
    group = shard.group
    if out.logits_at is not None:
        ids = problem.ids[chunk.tokens] - shard.start
        ids = ids.masked_fill((ids >= z.shape[1]) | (problem.ids[chunk.tokens] < 0), -1)
        at = row_passes.picked(z, ids) if z.shape[1] else torch.zeros_like(out.logits_at)
        out.logits_at.copy_(shards.gathered(group, at).sum(0))
    if out.rank is not None:
        label = (problem.labels[chunk.tokens] - shard.start)[:, None]
        mine = (label >= 0) & (label < z.shape[1])
        at = row_passes.picked(z, label.masked_fill(~mine, -1)) if z.shape[1] else torch.zeros_like(out.nll)[:, None]
        label_logit = shards.gathered(group, at).sum(0)
        out.rank.copy_(shards.gathered(group, row_passes.rank_of(z, label_logit)).sum(0))
    log_p = z - out.lse[:, None]
    if out.log_p2 is not None:
        squares = (2 * log_p).logsumexp(1) if z.shape[1] else torch.full_like(out.nll, -torch.inf)
        out.log_p2.copy_(shards.gathered(group, squares).logsumexp(0))
    if not problem.has_dense_directions:
        return
    p, slope = log_p.exp(), None
    if directions and problem.head.softcap is not None:
        slope = (1 - (z / problem.head.softcap) ** 2).clamp_(min=0)
    if problem.entropy_gradient and directions:
        torch.add(log_p, out.entropy[:, None], out=chunk.entropy).mul_(p).neg_()
    if problem.beta is not None:
        ref_lse = _reference_lse(group, part)[:, None]
        log_r = r - ref_lse
        p_ref = log_r.exp()
        d = log_p - log_r if d is None else d - (out.lse[:, None] - ref_lse)
        gap = torch.where(d.abs() < 1, torch.expm1(d).mul_(p_ref), p - p_ref)
        sums = torch.stack(row_passes.mixture_sums(problem.beta, p, p_ref, d, gap))
        divergence, student = shards.gathered(group, sums).sum(0)
        out.divergence.copy_(divergence.clamp(min=0))
        if directions:
            chunk.divergence.copy_(row_passes.mixture_direction(problem.beta, p, d, student[:, None]))
    for direction in (chunk.entropy, chunk.divergence):
        if direction is not None and slope is not None:
            direction.mul_(slope)


def _reference_lse(group: object, part: Statistics) -> Tensor:
    top, log_sum, _ = shards.gathered(group, part.reference_normaliser).unbind(-1)
    return (top + log_sum).logsumexp(0)

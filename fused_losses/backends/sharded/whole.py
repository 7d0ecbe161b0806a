"""From the statistics of each rank's rows to those of the whole vocabulary.

A rank's own are the losses of p_i = p(· | the token is one of rank i's). With the mass P_i of rank i, that is
p = P_i p_i, the chain rule makes those of the whole of them; r is the reference, R_i its masses, and rank i holds the
label y::

    −log p[y] = −log p_i[y] − log P_i
    H(p)      = Σ_i P_i (H(p_i) − log P_i)
    KL(r ‖ p) = Σ_i R_i KL(r_i ‖ p_i) + KL(R ‖ P)
    p − r     = R_i (p_i − r_i) + (P_i − R_i) p_i         at the entries of rank i

No term is negative, so nothing cancels that does not on one rank. What is needed of the other ranks is the statistics
alone: one all-gather per chunk. All ranks add them up in the same order, so that results are the same on all, and from
run to run.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ... import shards
from ...devices import has_float64
from ...problem import Entries, Problem, Statistics, Tails
from .. import row_passes

# In the place of the largest logit of a rank without rows; its mass is 0.
NO_LOGIT = -1e30
# Statistics of a token that travel whenever they are wanted, beside normalisers, prediction and top logits.
SHARED = ("nll", "entropy", "reference_nll", "kl", "reference_entropy")


@dataclass
class Labels:
    """Of some tokens: which column of this rank's rows is the label's."""

    nearest: Tensor  # [C] the label's column, or of another rank's label the first or last
    mine: Tensor  # [C] bool: the label is one of this rank's rows
    owner: Tensor  # [C] the rank whose it is

    @staticmethod
    def of(problem: Problem, at: slice) -> Labels:
        shard, labels, rows = problem.head.shard, problem.labels[at], len(problem.head.weight)
        nearest = (labels - shard.start).clamp(0, max(rows - 1, 0))
        mine = (nearest + shard.start == labels) & (rows > 0)
        # As many ranks end before it.
        owner = torch.searchsorted(labels.new_tensor(shard.ends), labels, right=True)
        return Labels(nearest, mine, owner)


@dataclass
class Masses:
    """What a rank has of each token's softmax, [C] each; float64 where the device has it."""

    log_p: Tensor  # log P_i
    others: Tensor  # log Σ exp z over the other ranks' logits
    # With a reference: log R_i; log P_i − log R_i; P_i − R_i; others of the reference, and `others` − that.
    log_r: Tensor | None = None
    ratio: Tensor | None = None
    gap: Tensor | None = None
    ref_others: Tensor | None = None
    others_ratio: Tensor | None = None


def part_of(problem: Problem, out: Statistics) -> Statistics:
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


def combine(problem: Problem, part: Statistics, owner: Tensor, out: Statistics) -> Masses:
    """Fill `out` from the parts of all ranks."""
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
    gathered = shards.gathered(shard.group, torch.stack(lines))
    predictions = gathered[:, 2].clone()
    if has_float64(gathered.device.type):
        gathered = gathered.double()
    everyone = iter(gathered.unbind(1))

    top, log_sum, _ = (next(everyone) for _ in range(3))
    log_p = _log_masses(top, log_sum)
    log_r = ref_lse = None
    if problem.has_reference:
        ref_top, ref_log_sum, shift = (next(everyone) for _ in range(3))
        log_r, ref_lse = _log_masses(ref_top, ref_log_sum), ref_top + ref_log_sum
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
    mine = shard.rank
    others = _without(top + log_sum, mine).logsumexp(0)
    if log_r is None:
        return Masses(log_p[mine], others)
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
    other_r = _without(log_r, mine)
    return Masses(
        log_p[mine], others, log_r[mine], d[mine], gap[mine], _without(ref_lse, mine).logsumexp(0),
        (_without(shift, mine) + other_r).logsumexp(0) - other_r.logsumexp(0),
    )  # fmt: skip


def _without(values: Tensor, rank: int) -> Tensor:
    return torch.cat([values[:rank], values[rank + 1 :]])


def _log_masses(top: Tensor, log_sum: Tensor) -> Tensor:
    """log P_i from each rank's largest logit and log Σ exp(z − it), [ranks, C].

    The heaviest rank's is −log1p(the others' weight): accurate also where the others have next to nothing.
    """
    heaviest = (top + log_sum).max(0, keepdim=True).indices
    relative = (top - top.gather(0, heaviest)) + (log_sum - log_sum.gather(0, heaviest))
    others = relative.exp().scatter(0, heaviest, 0).sum(0, keepdim=True)
    return relative - torch.log1p(others)


# What is known of the entries of a sparse softmax


def no_entries(problem: Problem, count: int, directions: Tensor | None) -> Entries:
    """Of a rank without rows."""
    labels, reference = problem.labels, problem.has_reference
    zero = torch.zeros(count, dtype=problem.accumulator, device=labels.device)
    tails = Tails(zero, zero)
    if reference:
        tails.kl_left = tails.kl_left_l1 = tails.kl_l1 = zero
    if directions is not None:
        tails.nll_low, tails.nll_square = zero.new_zeros(count, directions.shape[1]), zero
        if reference:
            tails.kl_low, tails.kl_square = tails.nll_low, zero
    counts = torch.zeros(count, dtype=torch.int64, device=labels.device)
    return Entries(counts, labels.new_empty(0).int(), zero[:0], zero[:0] if reference else None, tails)


def of_all_ranks(problem: Problem, entries: Entries) -> Entries:
    """This rank's entries, with what all ranks leave out; a token that has too many on one rank has none on any.

    Only `nll_low` and `kl_low` stay those of this rank: they are added up in the gradient of the hidden states.
    """
    tails, group = entries.tails, problem.head.shard.group
    names = [f.name for f in fields(Tails) if getattr(tails, f.name) is not None and not f.name.endswith("_low")]
    lines = [(entries.counts < 0).to(tails.nll_left.dtype), *(getattr(tails, name) for name in names)]
    full, *sums = shards.gathered(group, torch.stack(lines)).sum(0)
    return replace(_none_of(entries, full > 0), tails=replace(tails, **dict(zip(names, sums, strict=True))))


def _none_of(entries: Entries, full: Tensor) -> Entries:
    """Without the entries of these tokens, which have too many on some rank."""
    counts = entries.counts.masked_fill(full, -1)
    if not bool((full & (entries.counts > 0)).any()):
        return replace(entries, counts=counts)
    kept = ~torch.repeat_interleave(full, entries.counts.clamp(min=0), output_size=len(entries.columns))
    kl = None if entries.kl_values is None else entries.kl_values[kept]
    return replace(
        entries, counts=counts, columns=entries.columns[kept], nll_values=entries.nll_values[kept], kl_values=kl
    )

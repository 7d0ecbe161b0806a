"""Single logits with upstream weights of their own: those of `logits_at`, and the label's with the weight of lse."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem, Statistics, Upstream


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

"""The chunked losses with the compiled kernels of csrc/cpu: logits in float32 from oneDNN's micro-kernels, row statistics
and compaction in three passes over a row in cache, and the two sparse products. What has no kernel is `backends.torch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels import schemas
from ..problem import Entries, Gradients, Problem, Statistics, Tails
from . import chunks
from . import torch as chunked
from .torch import SAMPLED_TOKENS, Chunk, Product, Upstream, empty_gradients, empty_statistics

__all__ = [
    "SAMPLED_TOKENS", "add_dense", "columns_product", "dense_rows", "empty_gradients", "empty_statistics", "gradients",
    "rows_product", "scan", "statistics", "weighted_sum",
]  # fmt: skip

HALF_OR_SINGLE = (torch.float32, torch.bfloat16)


def statistics(problem: Problem, keep_rows: bool = False) -> tuple[Statistics, Gradients]:
    return chunked.statistics(problem, keep_rows, product(problem))


def gradients(
    problem: Problem, upstream: Upstream, hidden: bool, weight: bool, bias: bool, low_rank: bool = False
) -> tuple[Statistics, Gradients]:
    return chunked.gradients(problem, upstream, hidden, weight, bias, low_rank, product(problem))


def product(problem: Problem) -> Product | None:
    """The compiled product where it takes these operands; bf16 pairs need an even D."""
    widths = [head.weight.shape[1] for head in (problem.head, problem.reference_head) if head is not None]
    fits = problem.dtype == torch.float32 or not any(width % 2 for width in widths)
    return _logits if fits and schemas.has_logits(problem.dtype) else None


def _logits(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    torch.ops.fused_losses.logits(hidden.contiguous(), weight, None if bias is None else bias.float().contiguous(), out)


def scan(
    problem: Problem, out: Statistics, threshold: float, capacity: int, sampled: Tensor, profile: Tensor,
    with_rows: bool = False,
) -> Iterator[tuple[Chunk, Entries]]:  # fmt: skip
    if problem.accumulator != torch.float32:
        yield from chunked.scan(problem, out, threshold, capacity, sampled, profile)
        return
    values = 1 + problem.has_reference
    buffers: tuple[Tensor, ...] = ()
    softcap = problem.head.softcap or 0.0
    for chunk in chunks.logit_chunks(problem, product(problem), narrow=True, extra=capacity * 4 * (1 + values)):
        size = len(chunk.z)
        if not buffers:
            buffers = (
                torch.empty(size, capacity, dtype=torch.int32),
                *(torch.empty(size, capacity, dtype=torch.float32) for _ in range(values)),
            )
        labels, results = problem.labels[chunk.tokens].contiguous(), out.at(chunk.tokens)
        finish(problem, chunk)
        if results.topk_entropy is not None:
            z = chunk.z if chunk.r is None or not chunks.keeps_difference(problem, chunk) else chunk.z + chunk.r
            results.topk_entropy.copy_(chunks.entropy_of(z.topk(min(problem.top_k, z.shape[1]), dim=1).values))
        logits = (chunk.z, chunk.r, chunks.keeps_difference(problem, chunk), labels, softcap)
        columns, *entries = (b[:size] for b in buffers)
        rows, counts = torch.empty(8, size, dtype=torch.float32), torch.empty(size, dtype=torch.int64)
        torch.ops.fused_losses.compact(
            *logits, threshold, results.nll, results.prediction, results.kl, results.entropy, results.reference_nll,
            results.reference_entropy, rows, counts, columns, entries[0], entries[1] if values == 2 else None,
        )  # fmt: skip
        here = sampled[(sampled >= chunk.tokens.start) & (sampled < chunk.tokens.stop)] - chunk.tokens.start
        here = here[(counts[here] >= 0) & results.nll[here].isfinite()]
        torch.ops.fused_losses.tail_profile(*logits, rows, here, profile)
        total = int(counts.clamp(min=0).sum())
        packed = [torch.empty(total, dtype=source.dtype) for source in (columns, *entries)]
        for source, target in zip((columns, *entries), packed, strict=True):
            torch.ops.fused_losses.pack(counts, source, target)
        tails = Tails(rows[schemas.TAIL], rows[schemas.NLL_L1])
        if values == 2:
            tails.kl, tails.kl_left, tails.kl_l1 = rows[schemas.KL_TAIL], rows[schemas.KL_TAIL_L1], rows[schemas.KL_L1]
        yield chunk, Entries(counts, packed[0], packed[1], packed[2] if values == 2 else None, tails)


def finish(problem: Problem, chunk: Chunk) -> None:
    heads = [head for head in (problem.head, problem.reference_head) if head is not None]
    if all(head.bias is None and head.logit_scale == 1 and head.softcap is None for head in heads):
        return
    for rows in chunks.slices(len(chunk.z), 16):
        chunks.finish(problem, chunk.z[rows], None if chunk.r is None else chunk.r[rows], chunk.difference)


def dense_rows(problem: Problem, chunk: Chunk) -> Gradients:
    _directions(problem, chunk)
    return chunked.dense_rows(problem, chunk)


def add_dense(problem: Problem, chunk: Chunk, a: Tensor | None, b: Tensor | None, total: Gradients) -> None:
    _directions(problem, chunk)
    chunked.add_dense(problem, chunk, a, b, total)


def _directions(problem: Problem, chunk: Chunk) -> None:
    """Turn the buffers of a chunk from `scan` into ∂nll/∂z and ∂kl/∂z; its statistics are known, so these are dropped."""
    if problem.accumulator != torch.float32:
        return
    known = empty_statistics(replace(problem, labels=problem.labels[chunk.tokens], wanted=frozenset()))
    chunks.row_passes(problem, known, chunk, directions=True, finished=True)


def rows_product(
    offsets: Tensor, columns: Tensor, values: Tensor, matrix: Tensor, scale: Tensor, vector: Tensor, dtype: torch.dtype
) -> Tensor:
    if matrix.dtype not in HALF_OR_SINGLE or values.dtype != torch.float32:
        return chunked.rows_product(offsets, columns, values, matrix, scale, vector, dtype)
    out = torch.empty(len(offsets) - 1, matrix.shape[1], dtype=dtype if dtype in HALF_OR_SINGLE else torch.float32)
    torch.ops.fused_losses.rows_product(offsets, columns, values, matrix.contiguous(), scale, vector, out)
    return out.to(dtype)


def columns_product(
    offsets: Tensor, columns: Tensor, values: Tensor, matrix: Tensor, scale: Tensor, vector: Tensor,
    base: Tensor | None, base_scale: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if matrix.dtype not in HALF_OR_SINGLE or values.dtype != torch.float32:
        return chunked.columns_product(offsets, columns, values, matrix, scale, vector, base, base_scale, dtype)
    out = torch.empty(len(scale), matrix.shape[1], dtype=dtype if dtype in HALF_OR_SINGLE else torch.float32)
    torch.ops.fused_losses.columns_product(
        offsets, columns, values, matrix.contiguous(), scale, vector, base, base_scale, out
    )
    return out.to(dtype)


def weighted_sum(matrix: Tensor, scale: Tensor) -> Tensor:
    if matrix.dtype not in HALF_OR_SINGLE or scale.dtype != torch.float32:
        return chunked.weighted_sum(matrix, scale)
    out = torch.empty(matrix.shape[1], dtype=torch.float32)
    torch.ops.fused_losses.weighted_sum(matrix.contiguous(), scale, out)
    return out

"""The chunked losses with the compiled kernels of csrc/cpu: logits in float32 from oneDNN's micro-kernels, row statistics
and compaction in three passes over a row in cache, and the two sparse products. What has no kernel is `backends.torch`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels import schemas
from ..problem import Entries, Gradients, Needs, Problem, Rows, Segments, Selection, Statistics, Tails, Upstream
from . import chunks
from . import torch as chunked
from .chunks import Chunk, Product, Stage, empty_gradients, empty_statistics
from .torch import SAMPLED_TOKENS, UpstreamOf

__all__ = [
    "SAMPLED_TOKENS", "add_dense", "columns_product", "dense_rows", "empty_gradients", "empty_statistics", "gradients",
    "rows_product", "scan", "statistics", "weighted_sum",
]  # fmt: skip

HALF_OR_SINGLE = (torch.float32, torch.bfloat16)


def statistics(problem: Problem, keep_rows: bool = False) -> tuple[Statistics, Rows]:
    return chunked.statistics(problem, keep_rows, product(problem))


def gradients(problem: Problem, upstream: UpstreamOf, needs: Needs) -> tuple[Statistics, Gradients]:
    return chunked.gradients(problem, upstream, needs, product(problem))


def product(problem: Problem) -> Product | None:
    """The compiled product where it takes these operands; bf16 pairs need an even D."""
    widths = [head.weight.shape[1] for head in (problem.head, problem.reference_head) if head is not None]
    fits = problem.dtype == torch.float32 or not any(width % 2 for width in widths)
    return _logits if fits and schemas.has_logits(problem.dtype) else None


def _logits(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    torch.ops.fused_losses.logits(hidden.contiguous(), weight, None if bias is None else bias.float().contiguous(), out)


def scan(problem: Problem, out: Statistics, selection: Selection) -> Iterator[tuple[Chunk, Entries]]:
    if problem.accumulator != torch.float32:
        yield from chunked.scan(problem, out, selection)
        return
    values = 1 + problem.has_reference
    capacity = selection.capacity
    buffers: tuple[Tensor, ...] = ()
    for chunk in chunks.logit_chunks(problem, product(problem), narrow=True, extra=capacity * 4 * (1 + values)):
        size = len(chunk.z)
        if not buffers:
            buffers = (
                torch.empty(size, capacity, dtype=torch.int32),
                *(torch.empty(size, capacity, dtype=torch.float32) for _ in range(values)),
            )
        yield chunk, _compact(problem, out.at(chunk.tokens), chunk, selection, [b[:size] for b in buffers])


def _compact(
    problem: Problem, out: Statistics, chunk: Chunk, selection: Selection, buffers: list[Tensor]
) -> Entries:  # fmt: skip
    """The statistics and the entries of a chunk of products, of which logits are made."""
    finish(problem, chunk)
    chunks.more_statistics(problem, chunk, out)
    labels, softcap = problem.labels[chunk.tokens].contiguous(), problem.head.softcap or 0.0
    logits = (chunk.z, chunk.r, chunks.keeps_difference(problem, chunk), labels, softcap)
    columns, nll_values, *kl_values = buffers
    size, with_kl = len(chunk.z), bool(kl_values)
    rows, counts = torch.empty(8, size, dtype=torch.float32), torch.empty(size, dtype=torch.int64)
    torch.ops.fused_losses.compact(
        *logits, selection.threshold, out.nll, out.prediction, out.kl, out.entropy, out.reference_nll,
        out.reference_entropy, rows, counts, columns, nll_values, kl_values[0] if with_kl else None,
    )  # fmt: skip
    out.lse.copy_(rows[schemas.LOG_SUM])
    sampled, tokens = selection.sampled, chunk.tokens
    here = sampled[(sampled >= tokens.start) & (sampled < tokens.stop)] - tokens.start
    here = here[(counts[here] >= 0) & out.nll[here].isfinite()]
    torch.ops.fused_losses.tail_profile(*logits, rows, here, selection.profile)
    total = int(counts.clamp(min=0).sum())
    packed = [torch.empty(total, dtype=source.dtype) for source in buffers]
    for source, target in zip(buffers, packed, strict=True):
        torch.ops.fused_losses.pack(counts, source, target)
    tails = Tails(rows[schemas.TAIL], rows[schemas.NLL_L1])
    if with_kl:
        tails.kl_left, tails.kl_left_l1 = rows[schemas.KL_TAIL], rows[schemas.KL_TAIL_L1]
        tails.kl_l1 = rows[schemas.KL_L1]
    return Entries(counts, packed[0], packed[1], packed[2] if with_kl else None, tails)


def finish(problem: Problem, chunk: Chunk) -> None:
    """Products become logits, in a core's cache."""
    chunk.enter(Stage.LOGITS, Stage.PRODUCTS)
    heads = [head for head in (problem.head, problem.reference_head) if head is not None]
    if all(head.bias is None and head.logit_scale == 1 and head.softcap is None for head in heads):
        return
    for rows in chunks.slices(len(chunk.z), 16):
        chunks.finish(problem, chunk.z[rows], None if chunk.r is None else chunk.r[rows], chunk.difference)


def dense_rows(problem: Problem, chunk: Chunk) -> Rows:
    _directions(problem, chunk)
    return chunked.dense_rows(problem, chunk)


def add_dense(problem: Problem, chunk: Chunk, out: Statistics, upstream: Upstream, total: Gradients) -> None:
    _directions(problem, chunk)
    chunked.add_dense(problem, chunk, out, upstream, total)


def _directions(problem: Problem, chunk: Chunk) -> None:
    """Turn the logits of a chunk from `scan` into directions; its statistics are known, so these are dropped."""
    if problem.accumulator != torch.float32:
        return
    known = empty_statistics(problem.part(chunk.tokens).for_gradients())
    chunks.row_passes(problem, known, chunk, directions=True)


def rows_product(segments: Segments, matrix: Tensor, scale: Tensor, vector: Tensor, dtype: torch.dtype) -> Tensor:
    if matrix.dtype not in HALF_OR_SINGLE or segments.values.dtype != torch.float32:
        return chunked.rows_product(segments, matrix, scale, vector, dtype)
    rows = len(segments.offsets) - 1
    out = torch.empty(rows, matrix.shape[1], dtype=dtype if dtype in HALF_OR_SINGLE else torch.float32)
    torch.ops.fused_losses.rows_product(*segments, matrix.contiguous(), scale, vector, out)
    return out.to(dtype)


def columns_product(
    segments: Segments, matrix: Tensor, scale: Tensor, vector: Tensor, base: Tensor | None, base_scale: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if matrix.dtype not in HALF_OR_SINGLE or segments.values.dtype != torch.float32:
        return chunked.columns_product(segments, matrix, scale, vector, base, base_scale, dtype)
    out = torch.empty(len(scale), matrix.shape[1], dtype=dtype if dtype in HALF_OR_SINGLE else torch.float32)
    torch.ops.fused_losses.columns_product(*segments, matrix.contiguous(), scale, vector, base, base_scale, out)
    return out.to(dtype)


def weighted_sum(matrix: Tensor, scale: Tensor) -> Tensor:
    if matrix.dtype not in HALF_OR_SINGLE or scale.dtype != torch.float32:
        return chunked.weighted_sum(matrix, scale)
    out = torch.empty(matrix.shape[1], dtype=torch.float32)
    torch.ops.fused_losses.weighted_sum(matrix.contiguous(), scale, out)
    return out

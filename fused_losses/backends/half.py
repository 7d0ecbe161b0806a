"""Sweeps with 8-bit products whose logits are kept in float16, less that of their token's label: half as much to write
and to read, and twice as many tokens in a chunk. That rounds logits that are some 10 from the label's by 0.004 at most,
which 8 bits have put off by 0.1. What stands out is exact, as in every sweep with such products.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..problem import Entries, Problem, Selection, Statistics, Tails
from . import chunks, int8
from .chunks import Chunk, Stage

MAXIMA = 8  # of a block: HALF_MAXIMA of csrc/cpu/kernels.h
# What only whole logits give, besides what `int8.missing` names.
WHOLE = {"topk_entropy", "log_p2"}


def is_possible(problem: Problem, none_wide: bool) -> bool:
    """Whether logits may be kept so. `none_wide`: no token needs full products, whose logits may be anywhere."""
    head = problem.head
    plain = not problem.has_reference and head.softcap is None and head.low_rank is None and head.logit_scale > 0
    return plain and none_wide and not WHOLE & problem.wanted and torch.ops.fused_losses.has_half_logits()


def scan(
    problem: Problem, out: Statistics, selection: Selection, sweep: int8.Sweep
) -> Iterator[tuple[Chunk, Entries]]:  # fmt: skip
    """Up to the first chunk whose products are to be full, which is not among them."""
    head, weight = problem.head, problem.head.weight.to(problem.dtype).contiguous()
    bias = None if head.bias is None else head.bias.float().contiguous()
    (vocabulary, dim), count, capacity = weight.shape, len(problem.labels), selection.capacity
    blocks = -(-vocabulary // int8.BLOCK)
    columns, maxima = blocks * int8.BLOCK, -(-blocks // 2) * 2 * MAXIMA
    per_token = 2 * (columns + maxima) + 8 * capacity
    most = sweep.chunk_bytes // per_token
    if sweep.chunk_bytes <= int8.HALF_CHUNK[1]:
        most = min(most, int8.HALF_CHUNK[0] // (2 * columns))
    size = chunks.balanced(count, max(1, most))
    z, largest = (torch.empty(size, width, dtype=torch.float16) for width in (columns, maxima))
    buffers = [torch.empty(size, capacity, dtype=dtype) for dtype in (torch.int32, torch.float32)]
    sampled = selection.sampled.tolist()

    for tokens in chunks.slices(count, size):
        here, at = out.at(tokens), slice(0, min(size, count - tokens.start))
        hidden, labels = problem.hidden[tokens, :dim].to(weight.dtype).contiguous(), problem.labels[tokens].contiguous()
        exact = (hidden.float(), weight, bias, head.logit_scale)
        label_logits = _empty(len(labels))
        torch.ops.fused_losses.label_logits(*exact, labels, label_logits)
        sweep.product.half(z[at], largest[at], hidden, weight, bias, head.logit_scale, label_logits)
        logits, some = (z[at], largest[at], label_logits, labels), [b[at] for b in buffers]
        counts, tails = _compact(logits, selection, here, some, exact)
        if sweep.is_off(here, tokens):
            return
        first, last = int8.within(sampled, tokens)
        if first < last:
            which = selection.sampled[first:last]
            torch.ops.fused_losses.half_tail_profile(
                z[at], label_logits, here.lse, counts, which, tokens.start, selection.profile
            )
        entries = int8.packed(counts, some, tails)
        chunk = Chunk(tokens, hidden, weight, z[at], None, None, stage=Stage.LOGITS, pieces=sweep.whole_chunks(tokens))
        yield chunk, entries
        # Where an exact gradient took full products the next chunk's is likely to take its own.
        if chunk.stage is not Stage.LOGITS:
            sweep.product.flat = True
            return


def _compact(
    logits: tuple[Tensor, ...], selection: Selection, out: Statistics, buffers: list[Tensor], exact: tuple
) -> tuple[Tensor, Tails]:  # fmt: skip
    """The statistics of a chunk; how many entries each token has in the buffers, and what these leave out."""
    size, directions = len(out.nll), selection.directions
    counts, tails = torch.empty(size, dtype=torch.int64), Tails(_empty(size), _empty(size))
    if directions is not None:
        tails.nll_low, tails.nll_square = _empty(size, directions.shape[1]), _empty(size)
    torch.ops.fused_losses.compact_half(
        *logits, selection.threshold, out.nll, out.prediction, out.lse, out.entropy, tails.nll_left, tails.nll_l1,
        counts, *buffers, directions, selection.pairs, tails.nll_low, tails.nll_square, *exact,
    )  # fmt: skip
    return counts, tails


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)

"""What the entries of a sparse softmax leave out, on a GPU: its mass, its share in directions of the head, its profile.

The scan sums it in its epilogue, against the bounds of the probe (`Left` in kernels/triton/scan.py); where there are
logits, `left_out` does so with the final sums. Without directions the mass is what the entries leave of the whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.schemas import KEPT, KEPT_GAP, KEPT_GAP_L1, KEPT_GAP_L1_OF_TOTALS, Row
from ..kernels.triton import left_out as kernels
from ..kernels.triton import rows as row_kernels
from ..kernels.triton.scan import UNIT, Known, Left
from ..problem import Problem, Tails
from . import chunks
from .gpu_scan import Operands, Scanned

# Logits of the sampled tokens at a time.
PROFILE_BYTES = 32 << 20
# A probe whose lse − lse of the reference is so far off says nothing of p − p_ref: such tokens become exact.
FARTHEST = 40.0
# Of the sum of squares that is a sum of three, what their rounding is at most.
ROUNDING = 1e-5


class LeftOut(NamedTuple):
    """The fields of `Tails` that directions give, [C] and [C, K]."""

    nll_left: Tensor
    nll_low: Tensor
    nll_square: Tensor
    kl_left: Tensor | None = None
    kl_low: Tensor | None = None
    kl_square: Tensor | None = None


def of_scan(operands: Operands, scanned: Scanned, known: Tensor, rows: Tensor) -> LeftOut | None:
    """From what the scan sums as parts of exp(BOUND) and exp(REF_BOUND); `rows` [9, C]. None without directions.

    With c = 1 − exp(MISSED), p − p_ref = p_ref (exp(z − r − SHIFT) − 1) + c p.
    """
    if scanned.left is None:
        return None
    left, low = scanned.left.sum(0), torch.ldexp(scanned.low.sum(0) / UNIT.value, operands.exponent)
    unit = torch.exp((known[Known.BOUND] - rows[Row.TOP]) - rows[Row.LOG_SUM])
    total, square = unit * left[Left.SUM], unit.square() * left[Left.SQUARE]
    found = LeftOut(total, unit[:, None] * low[0], square)
    if len(low) == 1:
        return found
    c = -torch.expm1(rows[Row.MISSED].clamp(max=FARTHEST))
    ref_unit = torch.exp((known[Known.REF_BOUND] - rows[Row.REF_TOP]) - rows[Row.REF_LOG_SUM])
    own, moved = ref_unit.square() * left[Left.GAP_SQUARE], c.square() * square
    squares = (own + moved + 2 * c * ref_unit * unit * left[Left.CROSS]).clamp(min=0)
    return found._replace(
        kl_left=ref_unit * left[Left.GAP] + c * total,
        kl_low=ref_unit[:, None] * low[1] + c[:, None] * found.nll_low,
        kl_square=squares + ROUNDING * (own + moved),
    )


def of_logits(arguments: Any, bits: Tensor, rows: Tensor, directions: Tensor) -> LeftOut:
    """From a chunk of logits, the first arguments of the kernels over these; `rows` [9, C], directions [V, K]."""
    left, low = kernels.left_out(*arguments, bits, rows, directions.contiguous())  # type: ignore[call-arg]
    found = LeftOut(left[Left.SUM], low[0], left[Left.SQUARE])
    if len(low) == 1:
        return found
    return found._replace(kl_left=left[Left.GAP], kl_low=low[1], kl_square=left[Left.GAP_SQUARE])


def tails_of(
    problem: Problem, nll: Tensor, labels: Tensor, known: Tensor, kept: Tensor, left_out: LeftOut | None
) -> Tails:
    """Of a chunk's tokens, from `known` [9, C] and the sums `kept` [4, C] of `attention`."""
    rest, wrong = known[Row.REST], -torch.expm1(-nll)
    tail = rest - kept[KEPT]
    l1 = 2 * wrong
    if problem.head.softcap is not None:
        # Σ p·slope over the others and the label's |p − 1|·slope; the label is an entry, but where there are too many.
        slope = 1 - (_label_logit(problem, nll, known) / problem.head.softcap) ** 2
        l1 = (rest + wrong * slope.clamp(min=0)).clamp(min=0)  # rounding, where the soft-cap is all but reached
    tails = Tails(torch.where(tail < 0, 0, tail), l1)
    if problem.has_reference:
        tails.kl_left = known[Row.GAP] - kept[KEPT_GAP]
        # The totals were summed with another shift c: |p − p_ref| ≤ κ |p' − p_ref| + |κ − 1| p_ref, κ = exp(c − shift).
        moved = torch.exp(-known[Row.MISSED])
        left = known[Row.GAP_L1] - kept[KEPT_GAP_L1_OF_TOTALS]
        ref_tail = tails.nll_left - tails.kl_left
        tails.kl_left_l1 = moved * torch.where(left < 0, 0, left) + (moved - 1).abs() * torch.where(
            ref_tail < 0, 0, ref_tail
        )
        exact = moved == 1
        tails.kl_l1 = torch.where(exact, known[Row.GAP_L1], kept[KEPT_GAP_L1] + tails.kl_left.abs())
    return tails if left_out is None else replace(tails, **left_out._asdict())


def _label_logit(problem: Problem, nll: Tensor, known: Tensor) -> Tensor:
    """z of the label: lse − nll, within rounding."""
    return known[Row.TOP] + known[Row.LOG_SUM] - nll


def add_profile(problem: Problem, tokens: Tensor, lse: Tensor, bits: Tensor, profile: Tensor) -> None:
    """profile += Σ p·slope over what these tokens leave out, by blocks of the vocabulary: the weight is read once."""
    head = problem.head
    hidden, labels = problem.hidden[tokens].to(problem.dtype), problem.labels[tokens]
    width = max(256, PROFILE_BYTES // (4 * max(1, len(tokens))))
    for first in range(0, head.vocabulary, width):
        block = slice(first, min(first + width, head.vocabulary))
        weight = head.weight[block].to(problem.dtype)
        z = torch.empty(len(tokens), len(weight), dtype=torch.float32, device=hidden.device)
        chunks.project(z, hidden, weight, None if head.bias is None else head.bias[block])
        row_kernels.tail_profile(z, labels, lse, bits, first, head.logit_scale, head.softcap or 0.0, profile)

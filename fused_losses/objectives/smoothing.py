"""Label smoothing without logits: Σ_v c_v z_v of all tokens, which without a soft-cap is linear in the hidden states.

    Σ_t Σ_v c_v z[t, v] = logit_scale · (Σ_t x_t · Σ_v c_v W_v + Σ_t u_t · Σ_v c_v B_v + N Σ_v c_v b_v)

A soft-cap is not linear. There −Σ_v c_v log p_v is, Σc = 1, a KL to a reference whose distribution is c at every token:
KL(c ‖ p) + the entropy of c.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import compiled, shards
from ..backends.torch import weighted_sum
from ..head import LMHead, Reference
from ..tokens import Tokens, TracedTokens

# In place of a class weight of 0, whose logarithm is finite so.
NEXT_TO_NOTHING = 1e-37


def total_logits(tokens: Tokens, factors: Tensor | None) -> Tensor:
    """Σ_t Σ_v factors[v] · z[t, v] over the valid tokens, differentiable; factors: [V] of all ranks, None for ones."""
    problem = tokens.problem
    head, rows, acc = problem.head, problem.hidden, problem.accumulator
    if isinstance(tokens, TracedTokens):
        rows = torch.where(tokens.valid[:, None], rows, 0)
    if factors is not None and head.shard is not None:
        factors = factors[head.shard.start :][: len(head.weight)]
    with torch.autocast(rows.device.type, enabled=False):
        parts = [combined_rows(head.weight, factors, acc)]
        if head.low_rank is not None:
            parts.append(combined_rows(head.low_rank, factors, acc))
        if head.bias is not None:
            # As the logits themselves: a class that −inf rules out must not make 0 · ∞.
            bias = head.bias.to(acc).clamp(min=-1e30)
            parts.append((bias if factors is None else factors * bias).sum()[None])
        combined = torch.cat(parts)
        if head.shard is not None:
            combined = _OverRanks.apply(combined, head.shard.group)
        width = problem.width
        total = (rows.sum(0, dtype=acc) * combined[:width]).sum()
        if head.bias is not None:
            total = total + tokens.count * combined[width]
    return total * head.logit_scale


def combined_rows(matrix: Tensor, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Σ_v factors[v] · matrix[v], [D] of that dtype; differentiable by the matrix, whose gradient is of rank one."""
    return torch.ops.fused_losses.combined_rows(matrix, factors, dtype)


def _combined_rows(matrix: Tensor, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
    if factors is None:
        factors = matrix.new_ones(len(matrix), dtype=dtype)
    return weighted_sum(matrix, factors.to(dtype))


def _keep_factors(ctx: Any, inputs: tuple, output: Tensor) -> None:
    matrix, factors, _ = inputs
    ctx.save_for_backward(factors)
    ctx.shape, ctx.dtype = matrix.shape, matrix.dtype


def _rank_one(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (factors,) = ctx.saved_tensors
    if factors is None:
        return gradient.to(ctx.dtype).expand(ctx.shape), None, None
    return (factors[:, None] * gradient).to(ctx.dtype), None, None


compiled.register(
    "combined_rows",
    "(Tensor matrix, Tensor? factors, ScalarType dtype) -> Tensor",
    _combined_rows,
    lambda matrix, factors, dtype: matrix.new_empty(matrix.shape[1], dtype=dtype),
)
torch.library.register_autograd("fused_losses::combined_rows", _rank_one, setup_context=_keep_factors)


class _OverRanks(torch.autograd.Function):
    """The sum over the ranks, in the same order on all; all know its gradient, which is that of each part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        return shards.gathered(group, part).sum(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def reference_of_classes(hidden: Tensor, head: LMHead, class_weights: Tensor | None, temperature: float) -> Reference:
    """A reference whose distribution is class_weights / Σ class_weights at every token; None: the uniform one.

    `temperature` will divide its logits.
    """
    weight, bias = head.weight, None
    if class_weights is not None:
        factors = _rows_of_this_rank(head, class_weights.to(weight.device))
        wide = factors.to(torch.promote_types(weight.dtype, torch.float32))
        bias = wide.clamp(min=NEXT_TO_NOTHING).log() * temperature
    zeros = LMHead(weight.new_zeros(len(weight), 1), bias, process_group=head.process_group)
    return Reference(weight.new_zeros(*hidden.shape[:-1], 1), zeros)


def _rows_of_this_rank(head: LMHead, values: Tensor) -> Tensor:
    """Of [V] numbers those of the head's rows."""
    if not head.is_spread:
        return values
    group, mine = head.process_group, len(head.weight)
    sizes = shards.gathered(group, torch.tensor([mine], device=head.weight.device)).flatten().tolist()
    if len(values) != sum(sizes):
        raise ValueError(
            f"class_weights: expected [V] with V = {sum(sizes)}, the rows of the head's weight on all ranks, got "
            f"[{len(values)}]; give all of them on each rank"
        )
    start = sum(sizes[: torch.distributed.get_rank(group)])
    return values[start : start + mine]


def entropy_of_classes(class_weights: Tensor | None, vocabulary: int) -> Tensor | float:
    """Of class_weights / Σ class_weights."""
    if class_weights is None:
        return math.log(vocabulary)
    p = class_weights / class_weights.sum()
    return -torch.xlogy(p, p).sum()

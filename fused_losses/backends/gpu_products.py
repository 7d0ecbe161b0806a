"""Directions on a GPU: the memory they lie in, and their products with the head."""

from __future__ import annotations

import torch
from torch import Tensor

from ..devices import multiplies_wide
from . import chunks

ROUNDED_ROWS = 128


def in_memory_of(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """[C, V] numbers of another dtype in the memory of fp32 logits: the first part of each row."""
    return logits.view(dtype)[:, : logits.shape[1]]


def rounded(direction: Tensor, dtype: torch.dtype) -> Tensor:
    """In its own memory, some rows at a time, as a copy of all of them would be half as large as the chunk."""
    narrow = in_memory_of(direction, dtype)
    for rows in chunks.slices(len(direction), ROUNDED_ROWS):
        narrow[rows] = direction[rows].to(dtype)
    return narrow


def times_head(direction: Tensor, chunk: chunks.Chunk) -> Tensor:
    """direction @ [weight, low_rank], fp32."""
    factors = (chunk.weight,) if chunk.low_rank is None else (chunk.weight, chunk.low_rank)
    products = [_times(direction, factor) for factor in factors]
    return products[0] if len(products) == 1 else torch.cat(products, 1)


def _times(direction: Tensor, weight: Tensor) -> Tensor:
    """direction @ weight, fp32 whatever the operands."""
    if direction.dtype == torch.float32:
        return direction @ weight
    if multiplies_wide(direction):
        return torch.mm(direction, weight, out_dtype=torch.float32)
    return direction.float() @ weight.float()

"""Which tokens make a sequence: rows of 2-D labels, or equal `sequence_ids`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tokens import Tokens
from .arguments import integers


def numbered(ids: Tensor) -> tuple[Tensor, int]:
    unique, inverse = ids.unique(return_inverse=True)
    return inverse, len(unique)


def sequences(tokens: Tokens, labels: Tensor, sequence_ids: Tensor | None) -> tuple[Tensor, int]:
    """For each valid token the number of its sequence, [N], and how many sequences there may be."""
    ids = sequence_numbers(tokens, labels, sequence_ids)
    return numbered(ids) if sequence_ids is not None else (ids, labels.shape[0])


def sequence_numbers(tokens: Tokens, labels: Tensor, sequence_ids: Tensor | None) -> Tensor:
    """For each valid token a number that is the same for all of its sequence."""
    if sequence_ids is not None:
        return integers(tokens.select(sequence_ids, "sequence_ids"), "sequence_ids")
    if labels.dim() != 2:
        raise ValueError(
            f"labels: expected [sequences, tokens] so that rows are sequences, got shape {list(labels.shape)}; give "
            "sequence_ids of that shape"
        )
    rows = torch.arange(labels.shape[0], device=labels.device)[:, None].expand(labels.shape)
    return tokens.select(rows, "rows")

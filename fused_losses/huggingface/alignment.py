"""Which label each row of a head's input belongs to, whatever the model did to its hidden states before; and which
sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Alignment:
    """Rows of a head's input beside the [B, T] labels that the batch has."""

    index: Tensor  # [rows] position of each row's label in the flattened labels, −1 where it has none
    shifted: bool  # a row predicts the token after it, else the one that it is at
    shape: torch.Size  # [B, T]

    def moved(self, values: Tensor, several: bool = False) -> Tensor:
        """[rows] what a tensor in the layout of the labels holds for each row, 0 where a row has no label.

        `several`: k numbers a token, [rows, k].
        """
        more = values.shape[-1:] if several else ()
        taken = values.to(self.index.device).reshape(-1, *more)[self.index.clamp(min=0)]
        return taken.masked_fill((self.index < 0)[:, None] if several else self.index < 0, 0)

    def row_of_batch(self) -> Tensor:
        return self.index.clamp(min=0) // self.shape[-1]

    def column(self) -> Tensor:
        """[rows] position within its row of the token that a row of the head's input is at."""
        return self.index.clamp(min=0) % self.shape[-1] - int(self.shifted)


def align(
    labels: Tensor, target: Tensor, positions: Tensor, lead: torch.Size, ignore_index: int, shifted_already: bool
) -> Alignment | None:
    """How the model came from `labels` to `target`; None where that cannot be told.

    Args:
        labels: [B, T] of the batch, or [T].
        target: [M] that the model's cross-entropy got, `positions` [M] the rows of the head's input [*lead, D] that
        they belong to.
        shifted_already: labels are those of the next token.

    Models hand their head [B, T], the same flattened or transposed, without the last token, or only the tokens with a
    label.
    """
    device, rows = target.device, lead.numel()
    labels = labels.to(device)
    if labels.dim() > 2 or not labels.numel():
        return None
    two = labels if labels.dim() == 2 else labels[None]
    padded = torch.cat([two.reshape(-1), two.new_tensor([ignore_index])])  # at −1
    for index, shifted in _layouts(two, rows, ignore_index, shifted_already):
        flat = index.reshape(-1)
        if torch.equal(padded[flat][positions], target):
            return Alignment(flat, shifted, two.shape)
    return None


def _layouts(labels: Tensor, rows: int, ignore_index: int, shifted_already: bool) -> Iterator[tuple[Tensor, bool]]:
    """Position of the label for each of so many rows, in the order in which models do it."""
    size, length = labels.shape
    number = torch.arange(labels.numel(), device=labels.device).view(size, length)
    following = nn.functional.pad(number, (0, 1), value=-1)[:, 1:]
    kinds = [(number, False)] if shifted_already else [(following, True), (number, False)]
    if rows == labels.numel():
        for index, shifted in kinds:
            yield index, shifted
            yield index.T, shifted
    shorter, rest = divmod(rows, size)
    if not rest and 0 < shorter < length:
        if not shifted_already:
            yield number[:, 1 : shorter + 1], True
        yield number[:, :shorter], False
        yield number[:, -shorter:], False
        if not shifted_already:
            yield following[:, -shorter:], True
    for index, shifted in kinds:
        given = index[(index >= 0) & (labels.reshape(-1)[index.clamp(min=0)] != ignore_index)]
        if len(given) == rows:
            yield given, shifted


def packed_sequences(inputs: dict[str, Any], labels: Tensor) -> Tensor | None:
    """[B, T] numbers of the sequences, where the batch tells that rows hold several; None where it does not.

    By cu_seq_lens_q (or cu_seq_lens: ends of the sequences in the flattened batch), else seq_idx [B, T] (numbered anew
    in each row), else
    position_ids: a sequence begins where a position is not its predecessor's successor. Each token of left padding may
    then count as one; none has a label. M-RoPE's position_ids are [3, B, T] of time, height and width, where one begins
    with three zeros, or [4, B, T] with those of the text first.
    """
    if labels.dim() != 2:
        return None
    ends = next((inputs[n] for n in ("cu_seq_lens_q", "cu_seq_lens") if isinstance(inputs.get(n), Tensor)), None)
    if ends is not None:
        fits = ends.dim() == 1 and len(ends) > 1 and ends[0] == 0 and ends[-1] == labels.numel()
        if not fits or bool((ends.diff() < 0).any()):
            raise ValueError(
                f"cu_seq_lens_q: expected ends of sequences from 0 to the {labels.numel()} tokens of the batch, got "
                f"{ends.tolist()[:12]}; give sequence_ids of the labels' shape in its place"
            )
        where = torch.arange(labels.numel(), device=ends.device)
        return torch.bucketize(where, ends, right=True).reshape(labels.shape)
    index = inputs.get("seq_idx")
    if isinstance(index, Tensor) and index.shape == labels.shape:
        return in_each_row(index)
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.shape[-1] != labels.shape[-1]:
        return None
    if positions.dim() == 3 and positions.shape[0] == 4:
        positions = positions[0]
    if positions.dim() == 3 and positions.shape[0] == 3:
        starts = (positions == 0).all(0).expand(labels.shape).clone()
    elif positions.dim() == 2:
        positions = positions.expand(labels.shape)
        starts = torch.ones_like(positions, dtype=torch.bool)
        starts[:, 1:] = positions.diff(dim=-1) != 1
    else:
        return None
    starts[:, 0] = True
    return (starts.reshape(-1).cumsum(0) - 1).reshape(labels.shape)


def in_each_row(numbers: Tensor) -> Tensor:
    """Numbers of sequences that begin anew in each row, [B, T], as numbers that differ from row to row."""
    if numbers.dim() != 2 or len(numbers) == 1:
        return numbers
    _, dense = numbers.unique(return_inverse=True)
    rows = torch.arange(len(numbers), device=numbers.device)[:, None]
    return dense + rows * (int(dense.max()) + 1)

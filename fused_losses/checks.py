"""Checks of the numbers inside tensors: called in eager mode, one operator in a compiled graph (`compiled.checked`)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def labels(values: Tensor, ignore_index: int | str, vocabulary: int) -> None:
    if len(values):
        low, high = (int(x) for x in torch.stack(torch.aminmax(values)).tolist())
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise ValueError(
                f"labels: expected 0 ≤ label < {vocabulary} (the rows of the head's weight) or "
                f"ignore_index = {ignore_index}, got {wrong}; mask it with ignore_index or resize the head"
            )


def fractions(values: Tensor, name: str, _: int = 0) -> None:
    if len(values) and not bool(((values >= 0) & (values <= 1)).all()):
        wrong = values[~((values >= 0) & (values <= 1))][0].item()
        raise ValueError(f"{name}: expected numbers in [0, 1] at every token with a label, got {wrong}")


def finite(values: Tensor, name: str, _: int = 0) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers at tokens with a label, got NaN or infinity")


def losses(values: Tensor, name: str, _: int = 0) -> None:
    wrong = ~(values.isfinite() & (values >= 0))
    if bool(wrong.any()):
        raise ValueError(f"{name}: expected finite numbers ≥ 0, got {values[wrong][0].item()}")


def indices(values: Tensor, name: str, count: int) -> None:
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < count:
        raise ValueError(
            f"{name}: expected 0 ≤ id < {count}, the length of initial_nll, got {int(values.min())} to {int(values.max())}"
        )


def items(number: object, name: str = "num_items", _: int = 0) -> None:
    if not 0 < float(number) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"{name}: expected the number of tokens the loss is divided by, > 0, got {number!r}")


BY_NAME: dict[str, Callable] = {check.__name__: check for check in (labels, fractions, finite, losses, indices, items)}

"""Checks of the numbers inside tensors: called in eager mode, one operator in a compiled graph (`compiled.checked`)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


class MissingAttribute(TypeError, AttributeError):
    """What is not there for a reason; `hasattr` and the default of `getattr` take it as absent."""


GIVE_REFERENCE = (
    "give reference=fused_losses.Reference(hidden states) to the call, or reference='base', 'start' or a model to "
    "fused_losses.patch"
)


SLIP = 0.84  # how like a known name another is, by difflib, that must be meant for it: anchor, fused_los_options


def slip_of(name: str, names: Iterable[str]) -> str | None:
    """The known name that this one is meant for, where names that nobody knows would pass; None otherwise."""
    close = difflib.get_close_matches(name.lower().replace("-", "_"), list(names), 1, SLIP)
    return close[0] if close and close[0] != name else None


def meant(name: str, names: Iterable[str]) -> str:
    """A question, where one of the names is nearly this one."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]}?" if close else ""


def unknown_argument(who: str, given: Iterable[str], names: Sequence[str]) -> str:
    """Of the first that is not among the names that a call takes."""
    name = next(n for n in given if n not in names)
    return f"{name}: a call of {who} has no such argument{meant(name, names)}; it takes {', '.join(names)}"


def number(value: Any) -> int | float | None:
    """A Python number of one of Python's, of numpy's or a 0-d tensor; None where it is none or would lose a
    gradient."""
    if type(value) in (int, float):
        return value
    if isinstance(value, Tensor):
        if value.dim() or value.requires_grad or value.device.type == "meta":
            return None
        value = value.item()
    elif type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 and not isinstance(value, Real):
        value = value.item()  # an array without dimensions
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def integer(value: Any) -> int | None:
    """Likewise, None where it is no whole number's type."""
    found = number(value)
    return found if isinstance(found, int) else None


def labels(values: Tensor, ignore_index: int | str, vocabulary: int) -> None:
    if len(values):
        low, high = (int(x) for x in torch.stack(torch.aminmax(values)).tolist())
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise ValueError(
                f"labels: expected 0 ≤ label < {vocabulary} (the rows of the head's weight) or "
                f"ignore_index = {ignore_index}, got {wrong}; mask it with ignore_index or resize the head"
            )


def ids(values: Tensor, name: str, vocabulary: int) -> None:
    wrong = ((values < 0) | (values >= vocabulary)) & (values != -100)
    if bool(wrong.any()):
        raise ValueError(
            f"{name}: expected 0 ≤ id < {vocabulary} (the rows of the head's weight), or -100 for none, at every token "
            f"with a label, got {values[wrong][0].item()}"
        )


def distinct(values: Tensor, name: str, _: int = 0) -> None:
    """Of ids [N, k], negative where there is none."""
    found = values.sort(-1).values
    twice = (found[:, 1:] == found[:, :-1]) & (found[:, 1:] >= 0)
    if bool(twice.any()):
        raise ValueError(
            f"{name}: expected no id twice at a token, got {found[:, 1:][twice][0].item()} twice; it would count "
            "twice: put -100 in place of one"
        )


def log_weights(values: Tensor, name: str, _: int = 0) -> None:
    wrong = values.isnan() | (values == math.inf)
    if bool(wrong.any()):
        raise ValueError(f"{name}: expected finite numbers, or -inf for no entry, got {values[wrong][0].item()}")


def log_probabilities(values: Tensor, name: str, _: int = 0) -> None:
    """[N, k] of some classes, −∞ where there is none. Rounded to bfloat16, their probabilities may sum to 1.01."""
    log_weights(values, name)
    remedy = "give logits with normalise=True"
    wrong = values > 1e-3
    if bool(wrong.any()):
        raise ValueError(f"{name}: expected log-probabilities, ≤ 0, got {values[wrong][0].item():g}; {remedy}")
    sums = values.exp().sum(-1)
    if len(sums) and float(sums.max()) > 1.02:
        raise ValueError(
            f"{name}: expected log-probabilities of probabilities that sum to at most 1 at a token, got a sum of "
            f"{sums.max().item():g}; {remedy}"
        )


def fractions(values: Tensor, name: str, _: int = 0) -> None:
    if len(values) and not bool(((values >= 0) & (values <= 1)).all()):
        wrong = values[~((values >= 0) & (values <= 1))][0].item()
        raise ValueError(f"{name}: expected numbers in [0, 1] at every token with a label, got {wrong}")


def open_fractions(values: Tensor, name: str, _: int = 0) -> None:
    wrong = ~((values > 0) & (values < 1))
    if bool(wrong.any()):
        raise ValueError(f"{name}: expected numbers above 0 and below 1 at every anchor, got {values[wrong][0].item()}")


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
            f"{name}: expected 0 ≤ id < {count}, the number of sequences, got {int(values.min())} to "
            f"{int(values.max())}"
        )


def items(number: object, name: str = "num_items", _: int = 0) -> None:
    if not 0 < float(number) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"{name}: expected the number of tokens the loss is divided by, > 0, got {number!r}")


def unlabelled(values: Tensor, name: str, length: int, valid: Tensor) -> None:
    """Of all tokens, in rows of `length`: none may be above 0 where there is no label."""
    lost = (values > 0) & ~valid
    if bool(lost.any()):
        first = int(lost.nonzero()[0])
        where = f"[{first // length}, {first % length}]" if length < len(values) else f"[{first}]"
        raise ValueError(
            f"{name}: expected 0 where the label is ignored, got more than 0 at {int(lost.sum())} such tokens, first "
            f"{values[first].item():g} at position {where}; they would not be learned: give them their label, or set "
            f"{name} to 0 there"
        )


WITH_MASK = ("unlabelled",)  # these see all values, and which are valid
_CHECKS = (
    labels, ids, distinct, log_weights, log_probabilities, fractions, open_fractions, finite, losses, indices, items,
    unlabelled,
)  # fmt: skip
BY_NAME: dict[str, Callable] = {check.__name__: check for check in _CHECKS}

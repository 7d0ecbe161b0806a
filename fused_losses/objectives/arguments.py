"""The arguments of an objective's call: fields of a batch, and the number that the sum is divided by."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks

if TYPE_CHECKING:
    from ..tokens import Tokens


@dataclass(frozen=True)
class Field:
    """A field of a batch that an objective takes by keyword, in the labels' shape.

    Args:
        what: it is, for the message where it is missing.
        check: of checks.py, of the numbers at tokens with a label.
        several: k numbers a token, [..., k].
        of_sequences: a number for each sequence, [sequences].
        optional: whether it may be missing.
        labelled: whether more than 0 at a token without a label is an error.
        in_a_batch: how a patched model gets it, for the message where it is missing there.
    """

    what: str = ""
    check: str = "finite"
    several: bool = False
    of_sequences: bool = False
    optional: bool = False
    labelled: bool = False
    in_a_batch: str = (
        "a column of that name in the data set, which the collator must pass on (AnchorCollator and the collators of "
        "fused_losses.integrations do; LLaMA-Factory keeps such columns of a tokenized_path alone, and ms-swift makes "
        "weights of --loss_scale)"
    )

    def read(self, tokens: Tokens, values: Tensor, name: str) -> Tensor:
        """[N] or [N, k] of the valid tokens: checked, without a gradient, in the dtype of the statistics."""
        found = tokens.select(values, name, all_labelled=self.labelled, several=self.several).detach()
        return tokens.check(found.to(tokens.problem.accumulator), name, self.check)


@functools.lru_cache(256)
def own_fields(cls: type) -> dict[str, Field] | None:
    """The fields that the parameters of the `token_loss` of a class name, those with a default optional; None where it
    takes any."""
    bound = 0 if isinstance(inspect.getattr_static(cls, "token_loss"), staticmethod) else 1
    parameters = list(inspect.signature(cls.token_loss).parameters.values())[bound + 1 :]  # type: ignore[attr-defined]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    what = "token_loss has a parameter of that name"
    return {p.name: Field(what, optional=p.default is not p.empty) for p in parameters}


def item_count(num_items: Any, default: int | Tensor) -> Any:
    """The divisor n: `num_items` as it came, checked, or at least 1."""
    if num_items is None:
        return default.clamp(min=1) if isinstance(default, Tensor) else max(default, 1)
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items: expected one number, got a tensor of shape {list(num_items.shape)}")
        if num_items.dtype == torch.bool or num_items.is_complex():
            raise TypeError(f"num_items: expected a number, got a tensor of {num_items.dtype}")
        return checked(num_items.detach().reshape(()), "num_items", "items")
    n = checks.number(num_items)
    if n is None:
        raise TypeError(f"num_items: expected a number or a tensor of one, got {num_items!r}")
    checks.items(n)
    return n


def checked(values: Tensor, name: str, check: str, limit: int = 0) -> Tensor:
    """The values of a tensor that is not one per token, after a check of checks.py."""
    if torch.compiler.is_compiling():
        return torch.ops.fused_losses.checked(values, None, check, name, limit)
    checks.BY_NAME[check](values, name, limit)
    return values


def integers(values: Tensor, name: str) -> Tensor:
    if values.is_floating_point() or values.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {values.dtype}")
    return values.long()

"""The arguments of an objective's call: fields of a batch, and the number that the sum is divided by."""

from __future__ import annotations

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
    in_a_batch: str = "a column of the data set, which the collator must pass on (AnchorCollator does)"

    def read(self, tokens: Tokens, values: Tensor, name: str) -> Tensor:
        """[N] or [N, k] of the valid tokens: checked, without a gradient, in the dtype of the statistics."""
        found = tokens.select(values, name, all_labelled=self.labelled, several=self.several).detach()
        return tokens.check(found.to(tokens.problem.accumulator), name, self.check)


def fields_of(token_loss: Any, owner: str) -> dict[str, Field]:
    """The fields that the parameters of a `token_loss` of one's own name; those with a default are optional."""
    fields = {}
    for parameter in list(inspect.signature(token_loss).parameters.values())[2:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            raise TypeError(
                f"{owner}.token_loss(self, out, **{parameter.name}): a patched model takes the fields of a batch by "
                "name; write them out, as in token_loss(self, out, weight=None)"
            )
        fields[parameter.name] = Field(optional=parameter.default is not parameter.empty)
    return fields


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

"""From rows and a method to what a Trainer gets: the objective, and the rows' fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..objectives import Objective
from ..objectives.arguments import Field
from ..problem import Statistics
from .data import IGNORED, Data, Row
from .settings import Method


class WithRetainedRows(Objective):
    """Another objective on tokens of weight 1, and of its KL alone, times `kl_weight`, on those of weight 0."""

    needs_reference = True
    fields: ClassVar = {"weights": Field("1 where a token is learned, 0 where it is retained", "fractions")}

    def __init__(self, inner: Objective) -> None:
        super().__init__()
        self.inner, self.kl_weight = inner, inner.kl_weight

    def extra_repr(self) -> str:
        return repr(self.inner)

    def token_loss(self, out: Statistics, weights: Tensor) -> Tensor:
        return torch.where(weights > 0, self.inner.token_loss(out), self.kl_weight * out.kl)


def check_fit(data: Data, name: str, method: Method) -> None:
    """ValueError where the data are not for this method, or leave nothing to learn."""
    learned, corrected = data.of("learn"), data.corrected
    if not learned:
        where = f", such as {data.rows[0].where}" if data.rows else ""
        raise ValueError(
            f"data: expected something to learn, got {len(data.rows)} rows, all of which are to be retained{where}; "
            "give records with anchors, or chats"
        )
    if not method.anchors:
        return
    if not corrected:
        raise ValueError(
            f"method: {name} learns corrected tokens, and {learned[0].where} has no anchors, as no other line has; "
            "correct answers of the model (fused_losses.anchors, fused-losses annotate), or take sft+kl or talr for "
            "answers that others wrote"
        )
    if any(row.target_probability is not None for row in corrected):
        other = next((row for row in data.of("learn", "replay") if not row.corrected), None)
        if other is not None:
            raise ValueError(
                f"{other.where}: expected records only, as {corrected[0].where} has anchors with a target_probability, "
                "got a chat, whose tokens have none; give these anchors a confidence, or train on the chats by "
                "themselves"
            )


def objective_of(data: Data, method: Method, options: Mapping[str, float], initial: Any = None) -> Objective:
    if method.initial == "sequence":
        return method.make(initial)
    made = method.make(**options)
    if data.of("retain") and method.needs_reference and not method.anchors:
        return WithRetainedRows(made)
    return made


def training_rows(data: Data, method: Method) -> tuple[list[dict], list[dict]]:
    """Rows that each pass goes over, and rows to replay. Rows to retain are left out where nothing can hold them."""
    passed = data.of("learn", "retain") if method.needs_reference else data.of("learn")
    weighted = bool(data.of("retain")) and method.needs_reference and not method.anchors
    return (
        [_fields(row, method, weighted) for row in passed],
        [_fields(row, method, weighted) for row in data.of("replay")],
    )


def _fields(row: Row, method: Method, weighted: bool) -> dict[str, Any]:
    if method.anchors:
        return anchored(row)
    fields: dict[str, Any] = {"input_ids": row.input_ids, "labels": row.labels}
    if weighted:
        fields["weights"] = [0.0 if row.role == "retain" else 1.0] * len(row.input_ids)
    return fields


def anchored(row: Row) -> dict[str, Any]:
    """A row of LAwF: all tokens have a label, and what is no anchor is retained."""
    fields: dict[str, Any] = {"input_ids": row.input_ids, "labels": row.input_ids, "anchors": row.anchors}
    if row.target_probability is not None:
        fields["target_probability"] = row.target_probability
    return fields


def labelled(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]


def tokens_of(row: Mapping[str, Any]) -> int:
    """Of a row's tokens those that a loss sees."""
    return sum(label != IGNORED for label in row["labels"][1:])

"""The fields of a loss, through collators that know nothing of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import slip_of
from ..huggingface.collator import read_confidence
from ..huggingface.fields import joined, known_fields, laid_out, read_fields
from ..labels import AnchorLabels
from ..objectives import Objective

IGNORED = -100
COMMON = frozenset({"input_ids", "labels", "attention_mask", "position_ids", "token_type_ids"})
ROWS = 16  # after which it is said that nothing is learned, or nothing held


class WithFields:
    """A collator of another trainer, whose batches then have what the loss takes beside labels.

    Columns of the rows that are fields of the loss (confidence or anchors of LAwF, weights, old_nll, ...) are kept from
    `collator`, and laid out beside the input_ids that come out of it: padded at either side, or rows one after the
    other as sample packing has them.

    For LAwF, a row without anchors learns what has a label, with confidence 1, and holds the rest of the row, the
    prompt, to the original, for which its tokens get labels. So `fused-losses train` takes chats. Of a row with anchors
    the labels say what is held. Labels of batches with fields are `fused_losses.labels.AnchorLabels`, which a model
    that is not patched refuses, as it would ignore the fields.

    Columns that other losses of this package take are left out, with a warning: a baseline may have the same data. It
    also warns of a column that has such a name but for a slip, such as anchor, and where the first rows have no token
    that LAwF holds, or none that it learns.

    Args:
        collator: called with a list of rows, or with a list of such lists (axolotl's packing).
        loss: the objective.
        scale: the name of a field of the batch in [B, T] that holds WeightedLoss's weights or LAwF's confidence, as
            ms-swift has loss_scale; others refuse it.

    Raises: ValueError where the rows' tokens are not found in the batch, as where the collator cuts them; where a row
    lacks a field that another has; for an anchor that nothing predicts; for fields without labels; and for a
    `scale` that the loss cannot take.
    """

    def __init__(self, collator: Callable[..., Any], loss: Objective, scale: str | None = None) -> None:
        self.collator, self.scale = collator, scale
        self.fields, self.loss_name = loss.batch_fields(), type(loss).__name__
        self.own = {*self.fields, "anchors"} if "confidence" in self.fields else set(self.fields)
        self.others = (known_fields() | {"anchors"}) - self.own  # columns of other losses
        self.warned: set[str] = set()
        self.seen, self.learns, self.holds = 0, False, False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "collator":
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, features: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        nested = bool(features) and not isinstance(features[0], Mapping)
        groups = [list(group) for group in features] if nested else [list(features)]
        rows = [row for group in groups for row in group]
        self.name_unused({name for row in rows for name in row})
        plain = [self._stripped(group) for group in groups]
        batch = self.collator(plain if nested else plain[0], *args, **kwargs)
        if self.fields or self.scale is not None:
            self._add(batch, rows)
        return batch

    def without_fields(self, features: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """What the collator makes of the rows without them, as for generation."""
        return self.collator(self._stripped(features), *args, **kwargs)

    def _stripped(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        ours = self.own | self.others
        return [{k: v for k, v in row.items() if k not in ours} for row in rows]

    def _add(self, batch: Any, rows: list[Mapping[str, Any]]) -> None:
        ids = [torch.as_tensor(row["input_ids"]).reshape(-1) for row in rows]
        given = self.scale is not None and batch.get(self.scale) is not None
        scale = batch.pop(self.scale) if given else None
        values, of_batch = self._fields(rows, [len(x) for x in ids])
        batch.update(of_batch)
        chats = [i for i, row in enumerate(rows) if "confidence" in self.fields and not _has_anchors(row)]
        if scale is not None:
            batch.update(self._scaled(scale, values))
        if (values or of_batch or chats) and batch.get("labels") is None:
            raise ValueError(
                f"labels: the batch has none, and {self.loss_name} takes the tokens that have one; give the data set a "
                "column labels: input_ids, with -100 where nothing counts"
            )
        if values or chats:
            whole = batch["input_ids"]
            places = _places(whole, ids, [_without_padding(row, x) for row, x in zip(rows, ids, strict=True)])
            for name, of_rows in values.items():
                there = [x[: at.stop - at.start] for x, (_, at) in zip(of_rows, places, strict=True)]
                batch[name] = laid_out(name, there, places, tuple(whole.shape))
            if chats:
                _hold_prompts(batch, [places[i] for i in chats], scale is not None)
            if "confidence" in batch:
                _leave_out_firsts(batch, places)
        if (self.fields.keys() - {"sequence_ids"}) & batch.keys():
            self._look(batch, len(rows))
            batch["labels"] = batch["labels"].as_subclass(AnchorLabels)

    def _fields(
        self, rows: list[Mapping[str, Any]], lengths: list[int]
    ) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
        """The fields that the rows have: of tokens, a tensor a row; and those of whole rows, as the batch has them."""
        found: dict[str, list[Tensor]] = {}
        if "confidence" in self.fields and any(map(_has_anchors, rows)):
            found["confidence"] = [_confidence(row, f"row {i}", lengths[i]) for i, row in enumerate(rows)]
        others: list[Mapping[str, Any]] = [
            {name: row[name] for name in self.fields if name != "confidence" and row.get(name) is not None}
            for row in rows
        ]
        fields, _ = read_fields(others, lengths, (), {})
        found.update({name: one.values for name, one in fields.items() if one.kind == "tokens"})
        return found, {name: joined(one) for name, one in fields.items() if one.kind != "tokens"}

    def _scaled(self, scale: Tensor, values: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        name = next((name for name in ("weights", "confidence") if name in self.fields), None)
        if name is None or name in values:
            raise ValueError(
                f"{self.scale}: weighs tokens, and {self.loss_name} has no such weights; take fused_loss: weighted, or "
                "a rule for it of zeros and ones"
            )
        return {name: scale.float()}

    def name_unused(self, columns: Iterable[str]) -> None:
        """Warns, once, of columns of other losses, and of those whose name is nearly that of a field."""
        for name in sorted({str(name) for name in columns} - self.warned - self.own):
            close = slip_of(name, self.own | self.others)
            if name in self.others:
                what = ", so it is left out; name the loss that it is for, or remove the column"
            elif close and name not in COMMON:
                what = f"; did you mean {close}?"
            else:
                continue
            self.warned.add(name)
            warnings.warn(f"{name}: is a column of the data that {self.loss_name} has no use for{what}", stacklevel=4)

    def _look(self, batch: Any, rows: int) -> None:
        """LAwF that holds nothing is plain cross-entropy, and LAwF that learns nothing trains nothing."""
        if "confidence" not in batch or self.seen >= ROWS:
            return
        counts, confidence = batch["labels"][:, 1:] != IGNORED, batch["confidence"][:, 1:]
        self.learns |= bool((counts & (confidence > 0)).any())
        self.holds |= bool((counts & (confidence < 1)).any())
        self.seen += rows
        if self.seen < ROWS or (self.learns and self.holds):
            return
        if self.learns:
            what = "every token that counts is learned and none is held, so it is plain cross-entropy"
            remedy = (
                "it holds what has no label, such as the prompt: give labels to the answer alone (train_on_prompt: "
                "false, train_on_inputs: false, --loss_scale default), or a column anchors, or take the loss sft"
            )
        else:
            what = "no token is learned" + (", all are held" if self.holds else "")
            remedy = "it learns what has a label: see whether the rows have answers, and whether they are cut off"
        warnings.warn(f"{self.loss_name}: of the first {self.seen} rows {what}; {remedy}", stacklevel=4)


def _has_anchors(row: Mapping[str, Any]) -> bool:
    return row.get("confidence") is not None or row.get("anchors") is not None


def _confidence(row: Mapping[str, Any], name: str, length: int) -> Tensor:
    """[T] of a row's anchors; 0 where it has none."""
    found = read_confidence({k: v for k, v in row.items() if v is not None}, name, length)
    if length and found[0] > 0:
        raise ValueError(
            f"{name}: position 0 is its first token, which nothing predicts, so it cannot be an anchor; begin the row "
            "with a token before it, e.g. bos_token"
        )
    return found


def _hold_prompts(batch: Any, places: list[tuple[int, slice]], scaled: bool) -> None:
    """Of rows without anchors: labels for all tokens; confidence 1, or what `scaled` the batch has, on the learned."""
    ids, labels = batch["input_ids"], batch["labels"]
    learned = labels != IGNORED
    here = torch.zeros_like(learned)
    firsts = _sequence_starts(batch, ids, places)
    for row, at in places:
        here[row, at] = True
    whole = torch.where(learned, labels, ids).masked_fill(firsts, IGNORED)
    batch["labels"] = torch.where(here, whole, labels)
    ones = (learned & ~firsts).float()
    before = batch.get("confidence")
    if before is None:
        before = torch.zeros_like(ones)
    batch["confidence"] = torch.where(here, ones * before if scaled else ones, before)


def _leave_out_firsts(batch: Any, places: list[tuple[int, slice]]) -> None:
    """The first token of a row that stands behind another one, or behind padding, is predicted by nothing of its own:
    LAwF neither learns nor holds it."""
    firsts = _sequence_starts(batch, batch["input_ids"], places)
    batch["labels"] = batch["labels"].masked_fill(firsts, IGNORED)
    batch["confidence"] = batch["confidence"].masked_fill(firsts, 0)


def _sequence_starts(batch: Any, ids: Tensor, places: list[tuple[int, slice]]) -> Tensor:
    """The first tokens of rows, and of sequences that were packed into one: where positions begin anew, or the numbers
    in the mask change."""
    firsts = torch.zeros_like(ids, dtype=torch.bool)
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if isinstance(positions, Tensor) and positions.shape == ids.shape:
        firsts |= positions == 0
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        firsts[:, 1:] |= (mask[:, 1:] != mask[:, :-1]) & (mask[:, 1:] > 0)
    for row, at in places:
        if at.start < at.stop:
            firsts[row, at.start] = True
    return firsts


def collated(collator: Any, loss: Objective, scale: str | None = None) -> Any:
    """The collator with the fields of the loss."""
    return WithFields(collator, loss, scale)


def _without_padding(row: Mapping[str, Any], ids: Tensor) -> Tensor:
    """Its tokens up to the last that its own mask counts: packed rows may come padded, and a collator cut that off."""
    mask = row.get("attention_mask")
    counted = torch.as_tensor([] if mask is None else mask).reshape(-1).nonzero()
    return ids[: int(counted[-1]) + 1] if len(counted) else ids


def _places(whole: Tensor, ids: list[Tensor], cut: list[Tensor]) -> list[tuple[int, slice]]:
    """Where each row's tokens are in [B, T]: at the left, at the right, or one after the other; or what is left of them
    when they are `cut`."""
    if whole.dim() != 2:
        raise ValueError(f"input_ids: expected a batch [rows, tokens], got shape {list(whole.shape)}")
    found: list[tuple[int, slice]] = []
    for index, choices in enumerate(zip(ids, cut, strict=True)):
        there = [place for tokens in choices for place in _where(whole, tokens, index, found, len(ids))]
        if not there:
            raise ValueError(
                f"row {index}: its {len(ids[index])} tokens are not in the batch of shape {list(whole.shape)} as they "
                "came, so its fields have no place; the collator cuts or changes rows: do so before training"
            )
        found.append(there[0])
    return found


def _where(
    whole: Tensor, tokens: Tensor, index: int, found: list[tuple[int, slice]], count: int
) -> list[tuple[int, slice]]:
    n = len(tokens)
    if count == len(whole):
        starts = [(index, 0), (index, whole.shape[1] - n)]
    else:
        row, before = found[-1] if found else (0, slice(0, 0))
        starts = [(row, before.stop), (row + 1, 0)]
    possible = [(row, slice(start, start + n)) for row, start in starts if row < len(whole) and start >= 0]
    return [place for place in possible if torch.equal(whole[place].cpu(), tokens.to(whole.dtype))]

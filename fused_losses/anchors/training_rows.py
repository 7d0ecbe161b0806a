"""Records → rows for `fused_losses.huggingface.AnchorCollator` and `LAwFLoss`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .checked import check_known
from .jsonl import Fault, show
from .records import Anchor, Record
from .spans import KnownTokenizer


def rows(records: Iterable[Record], tokenizer: Any = None) -> list[dict[str, Any]]:
    """A row for each record: its prompt and answer, with the anchors at their places.

    A row has input_ids = prompt_ids + completion.token_ids, labels, which are the same, since the prompt is held to the
    original too, and anchors [[position, confidence], ...], counted in input_ids.

    **Target probabilities.** LAwFLoss reads a batch either by confidence or by target_probability. Where no anchor of
    all records has the latter, nothing more is needed. Where all have it, every row also has target_probability, p* at
    its anchors and 0 elsewhere, and their confidence is 1, which marks them. Where records differ, p* becomes the
    confidence that asks for it, c = (p* − r) / (1 − r), with the anchor's recorded probability r; an anchor with r ≥ p*
    is none, as in LAwFLoss. That is exact where the reference in training is the model that the records speak of.

    Args:
        records: from `read_records`, `new_record` and the like; those without anchors become rows to retain.
        tokenizer: that of the model that is trained; then records of another tokenizer are refused.

    Raises:
        TypeError, ValueError: no records; the tokenizer is another; an anchor has a target_probability and no
            probability where it must become a confidence.
    """
    records = list(_each(records))
    known = None if tokenizer is None else KnownTokenizer(tokenizer)
    anchors = [anchor for record in records for anchor in record.anchors]
    targeted = bool(anchors) and all(anchor.target_probability is not None for anchor in anchors)
    found = []
    for index, record in enumerate(records):
        try:
            if known is not None:
                check_known(record, known)
            found.append(_row(record, targeted))
        except Fault as fault:
            raise ValueError(f"records[{index}]: {fault}") from None
    return found


def _each(records: Iterable[Record]) -> Iterable[Record]:
    if isinstance(records, Record):
        raise TypeError("records: expected a list of them, got one Record; put it into a list")
    if isinstance(records, (str, bytes)) or not isinstance(records, Iterable):
        raise TypeError(f"records: expected a list of them, got {show(records)}; read a file with read_records")
    for index, record in enumerate(records):
        if not isinstance(record, Record):
            raise TypeError(f"records[{index}]: expected a Record, got {show(record)}; read a file with read_records")
        yield record


def _row(record: Record, targeted: bool) -> dict[str, Any]:
    ids = [*record.prompt_ids, *record.completion.token_ids]
    before = len(record.prompt_ids)
    row: dict[str, Any] = {"input_ids": ids, "labels": list(ids)}
    if targeted:
        targets = [0.0] * len(ids)
        for anchor in record.anchors:
            targets[before + anchor.position] = anchor.target_probability
        row["anchors"] = [[before + anchor.position, 1.0] for anchor in record.anchors]
        return row | {"target_probability": targets}
    strengths = [
        (before + anchor.position, confidence_of(anchor, index)) for index, anchor in enumerate(record.anchors)
    ]
    return row | {"anchors": [[position, confidence] for position, confidence in strengths if confidence > 0]}


def confidence_of(anchor: Anchor, index: int) -> float:
    """The anchor's confidence, or the one that gives its label the target probability; 0 where it has that already."""
    if anchor.target_probability is None:
        return anchor.confidence
    if anchor.probability is None:
        raise Fault(
            f"anchors[{index}].target_probability: expected a probability of the token under the original beside it, "
            "to make a confidence of it, as other anchors have one, got none; give all anchors the one or the other"
        )
    rest = 1 - anchor.target_probability
    return 1 - rest / max(rest, 1 - anchor.probability)

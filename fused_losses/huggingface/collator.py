"""Rows of tokens with anchors → a batch for `LAwFLoss`."""

from __future__ import annotations

import operator
import reprlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..labels import AnchorLabels
from .fields import KINDS, are_labels, in_place_of_anchors, joined, laid_out, read_fields

IGNORED = -100
OWN = ("input_ids", "labels", "confidence", "anchors", "attention_mask")


class Row(NamedTuple):
    """One sequence, checked, [T] each; the label of its first token is −100."""

    input_ids: Tensor
    labels: Tensor
    confidence: Tensor
    kept: slice  # what attention_mask leaves of the row as it came


OF_ROWS = Row._fields[:3]


@dataclass
class AnchorCollator:
    """Collates rows whose anchors are tokens to learn, while every other token with a label is to be retained.

    For `Trainer(data_collator=...)` with a model patched before, and `SFTTrainer(data_collator=...)` with
    **remove_unused_columns=False** in its arguments. A Trainer drops columns that the model does not take before this
    sees them; of a patched model it keeps those that its loss takes. Dropped anchors are an error.

    A row is a mapping with

        input_ids        T token ids
        labels           T ids or −100; default: input_ids, so that everything is retained or learned
        confidence       T numbers in [0, 1], 0 where there is no anchor; or, in its place,
        anchors          a list of positions (confidence 1), a list of [position, confidence], or {position:
        confidence};
                         [] where everything is to be retained
        attention_mask   T of 0 or 1, with 0 at the ends only; what it masks is cut off, and cannot have a given label

    Rows for an objective without anchors need neither confidence nor anchors where they have its field: `weights`
    (WeightedLoss), `old_nll` (PSFTLoss), `initial_nll` (FLOWLoss) and the like; for others, and fields of your own, say
    needs_anchors=False. The batch then has no confidence.

    as lists, numpy arrays or tensors; None counts as absent or empty. Position t speaks of the token
    input_ids[t], as in labels: nothing is shifted here, and the loss must shift labels and confidence alike. Nothing
    predicts a row's first token, so it cannot be an anchor, and its label is always −100 in the batch.

    **Every other field** goes into the batch, by the first of these rules that fits. All rows must have it.

        tokens        [T] or [T, ...]: cut as attention_mask says, and padded with 0, names that end in "labels" with
        −100.
                      token_type_ids, mm_token_type_ids, position_ids, sequence_ids, weights, old_nll and the like
                      always, others where each row's length is that of its input_ids. position_ids [3, T] become
                      [3, B, T].
                      teacher_ids and teacher_logprobs have k entries a token, fewer, [] or None at some: they are
                      filled up, and padded, with −100 and 0.
        concatenate   along dimension 0, as processors lay out the images of a batch: pixel_values [n, C, H, W] of a
                      row's n images, or [patches, D] (Qwen2-VL); image_grid_thw [n, 3], image_sizes [n, 2], and
                      whatever else begins with pixel_, image_, video_, audio_ or input_features. A row without images
                      has shape [0, ...].
        stack         equal shapes [...] become [B, ...], numbers [B]: pixel_values [C, H, W] of one image a row,
                      image_grid_thw [3], and all other fields.

    So a row may hold what a processor gives for it alone (input_ids and fields of tokens without their dimension of 1),
    or one image without a dimension for it. Left out are text (with a warning once, as no model takes it), and what
    tokenizers and trainers note for themselves: text, messages, prompt, completion, length, seq_lengths,
    completion_mask, assistant_masks, special_tokens_mask, offset_mapping. `fields` decides otherwise.

    Pad ids at the end of a row without attention_mask and labels are text, for they may be the eos_token that is to be
    learned; where there are two or more, or the tokenizer has another eos_token, a warning says so once.

    Args:
        pad_token_id: any valid id; what is padded is masked and has no label.
        processing_class: a tokenizer or processor to take pad_token_id from.
        padding_side: "right" or "left".
        pad_to_multiple_of: of the length of the rows, or of the one packed row.
        padding_free: one packed row [1, ΣT] whose `position_ids` start at 0 for each sequence, for attention that tells
            sequences by these (FlashAttention; others where transformers makes the mask from position_ids, which in a
            loop of your own takes model(**batch, use_cache=False), as Trainer has it in training). Those of the rows
            are taken where they have any.
        needs_anchors: False: rows may be without anchors, confidence and the fields of another objective; the batch
            has a confidence where a row has one.
        fields: rules for fields by name: "tokens", "concatenate", "stack" or "leave out". Idefics3, say, takes the
            images of a row as one item: {"pixel_values": "stack"}.

    Returns:
        input_ids int64 [B, T], labels int64 (−100 at padding), confidence float32 (0 at padding; absent where no row
        has any), and attention_mask int64, or with padding_free position_ids int64, and the other fields. What pads a
        packed row is a sequence of its own, without labels. The labels are `fused_losses.labels.AnchorLabels`: a model
        that is not patched, which would ignore the confidence or the weights, raises ValueError in its cross-entropy.
        labels.as_subclass(torch.Tensor) are ordinary ones.

    Raises:
        TypeError, ValueError: naming the row and the field; among others for anchors that would be lost: at a label of
            −100, at the first token, out of range, or given twice; for fields that are in some rows only, have shapes
            that fit no rule, or are no numbers, such as images before their processor.
    """

    pad_token_id: int | None = None
    processing_class: Any = None
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None
    padding_free: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
    needs_anchors: bool = field(default=True, kw_only=True)
    _warned: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_fields()
        if self.padding_side not in ("right", "left"):
            raise ValueError(f"padding_side: expected right or left, got {self.padding_side!r}")
        multiple = self.pad_to_multiple_of
        if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1):
            raise ValueError(f"pad_to_multiple_of: expected an integer ≥ 1, or None, got {multiple!r}")
        if self.pad_token_id is None:
            tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
            self.pad_token_id = getattr(tokenizer, "pad_token_id", None)
        if self.pad_token_id is None:
            if self.padding_free and multiple is None:
                return
            what = "" if self.processing_class is None else f"; {type(self.processing_class).__name__} has none"
            raise ValueError(
                f"pad_token_id: expected an id, or a processing_class that has one{what}; any valid id will do, e.g. "
                "the tokenizer's eos_token_id, as what is padded is masked and has no label"
            )
        if isinstance(self.pad_token_id, bool) or not hasattr(self.pad_token_id, "__index__") or self.pad_token_id < 0:
            raise TypeError(
                f"pad_token_id: expected an integer ≥ 0, got {self.pad_token_id!r}; a tokenizer is given as "
                "processing_class="
            )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not len(features):
            raise ValueError("features: expected at least one row, got none")
        anchored = _are_anchored(features, self.needs_anchors)
        rows = [read_row(feature, f"row {index}", anchored) for index, feature in enumerate(features)]
        for index, (feature, row) in enumerate(zip(features, rows, strict=True)):
            self._look_for_padding(feature, row.input_ids, f"row {index}")
        lengths = [len(feature["input_ids"]) for feature in features]
        others, text = read_fields(list(features), lengths, OWN, self.fields)
        if text:
            self._warn(
                f"text {text}",
                f"{', '.join(text)}: is text, which no model takes, and left out of the batch; remove the column, or "
                f"say so: "
                f'AnchorCollator(fields={{"{text[0]}": "leave out"}})',
            )
        of_tokens = {
            name: [value[row.kept] for value, row in zip(field.values, rows, strict=True)]
            for name, field in others.items()
            if field.kind == "tokens"
        }
        batch = self._pack(rows, of_tokens) if self.padding_free else self._pad(rows, of_tokens)
        batch |= {name: joined(field) for name, field in others.items() if field.kind != "tokens"}
        if not anchored:
            del batch["confidence"]
        return {name: v.as_subclass(AnchorLabels) if are_labels(name) else v for name, v in batch.items()}

    def _check_fields(self) -> None:
        if not isinstance(self.fields, Mapping):
            raise TypeError(f"fields: expected a mapping of names to rules, got {type(self.fields).__name__}")
        for name, kind in self.fields.items():
            if kind not in KINDS or name in OWN:
                taken = f"; {name} is read by the collator itself" if name in OWN else ""
                raise ValueError(f"fields: expected for {name} one of {', '.join(KINDS)}, got {kind!r}{taken}")

    def _look_for_padding(self, feature: Mapping[str, Any], ids: Tensor, row: str) -> None:
        """Rows that were padded before, and do not say so."""
        if self.pad_token_id is None or any(feature.get(name) is not None for name in ("attention_mask", "labels")):
            return
        padded = ids == operator.index(self.pad_token_id)
        if bool(padded.all()):
            return
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        at_ends = (int(padded.long().cumprod(0).sum()), int(padded.long().flip(0).cumprod(0).sum()))
        for count, token in zip(at_ends, ("bos_token_id", "eos_token_id"), strict=True):
            other = getattr(tokenizer, token, None)
            if count > (0 if other is not None and other != self.pad_token_id else 1):
                self._warn(
                    "padding",
                    f"{row}, input_ids: {'ends' if token == 'eos_token_id' else 'begins'} with {count} times the pad "
                    f"id {self.pad_token_id}, "
                    "which counts as text, as there is neither attention_mask nor labels; if it is padding, give an "
                    "attention_mask with 0 "
                    "there, or labels with -100, or rows without padding",
                )

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, RuntimeWarning, stacklevel=4)

    def _pad(self, rows: list[Row], of_tokens: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        length = self._rounded(max(len(row.input_ids) for row in rows))
        batch = self._empty(len(rows), length) | {"attention_mask": torch.zeros(len(rows), length, dtype=torch.int64)}
        places = []
        for index, row in enumerate(rows):
            size = len(row.input_ids)
            at = slice(0, size) if self.padding_side == "right" else slice(length - size, length)
            for name in OF_ROWS:
                batch[name][index, at] = getattr(row, name)
            batch["attention_mask"][index, at] = 1
            places.append((index, at))
        shape = (len(rows), length)
        return batch | {name: laid_out(name, values, places, shape) for name, values in of_tokens.items()}

    def _pack(self, rows: list[Row], of_tokens: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        sizes = [len(row.input_ids) for row in rows]
        used = sum(sizes)
        length = self._rounded(used)
        batch = self._empty(1, length)
        for name in OF_ROWS:
            batch[name][0, :used] = torch.cat([getattr(row, name) for row in rows])
        positions = torch.cat([torch.arange(size) for size in (*sizes, length - used)])[None]
        for name, values in of_tokens.items():
            if name == "position_ids":
                _check_positions(values)
            starts = [sum(sizes[:index]) for index in range(len(sizes))]
            places = [(0, slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
            batch[name] = laid_out(name, values, places, (1, length))
        if "position_ids" in batch:
            batch["position_ids"][..., used:] = positions[0, used:]
        else:
            batch["position_ids"] = positions
        return batch

    def _empty(self, rows: int, length: int) -> dict[str, Tensor]:
        return {
            "input_ids": torch.full(
                (rows, length), 0 if self.pad_token_id is None else operator.index(self.pad_token_id)
            ),
            "labels": torch.full((rows, length), IGNORED),
            "confidence": torch.zeros(rows, length),
        }

    def _rounded(self, length: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple


def _are_anchored(features: Sequence[Any], needed: bool) -> bool:
    """Whether rows need anchors: not where none has any, and some have a field of an objective that knows none."""
    given = {name for f in features if isinstance(f, Mapping) for name, value in f.items() if value is not None}
    return bool(given & {"confidence", "anchors"}) or (needed and not given & in_place_of_anchors())


def read_row(feature: Mapping[str, Any], row: str, anchored: bool = True) -> Row:
    """One feature, checked; `row` names it in errors. `anchored`: it must say which tokens are anchors."""
    if not isinstance(feature, Mapping):
        raise TypeError(f"{row}: expected a mapping with input_ids, got {type(feature).__name__}")
    given = {name: value for name, value in feature.items() if value is not None}
    if "input_ids" not in given:
        raise ValueError(
            f"{row}, input_ids: is missing; the row has {sorted(given)}; tokenize it first, and set "
            "remove_unused_columns=False"
        )
    ids = _integers(given["input_ids"], f"{row}, input_ids")
    if int(ids.min()) < 0:
        raise ValueError(f"{row}, input_ids: expected ids ≥ 0, got {int(ids.min())}")
    size = len(ids)
    for name in ("completion_mask", "assistant_masks"):
        if name in given and "labels" not in given:
            raise ValueError(f"{row}, {name}: is not read here; give labels in its place, -100 where it is 0")
    if len(given.get("seq_lengths", ())) > 1:
        raise ValueError(
            f"{row}, seq_lengths: the row is packed already, which is not read here; give single sequences "
            "(packing=False), which padding_free=True packs"
        )

    kept = slice(0, size)
    if "attention_mask" in given:
        field = f"{row}, attention_mask"
        kept = _attended(_integers(given["attention_mask"], field, size, booleans=True), field)
    masked = torch.ones(size, dtype=torch.bool)
    masked[kept] = False
    labels = ids
    if "labels" in given:
        labels = _integers(given["labels"], f"{row}, labels", size)
        field, labelled = f"{row}, labels", labels != IGNORED
        _refuse((labels < 0) & labelled, field, "expected ids ≥ 0 or -100", labels, "use -100 for no label")
        _refuse(
            masked & labelled, field, "expected -100 where attention_mask is 0", labels, "it would be dropped silently"
        )
    labels = labels.masked_fill(masked, IGNORED)

    if anchored and "confidence" not in feature and "anchors" not in feature:
        raise ValueError(
            f"{row}: has neither confidence nor anchors, only {sorted(feature)}; give anchors=[] where nothing is to "
            "be learned, and set remove_unused_columns=False if a trainer has dropped them; for a loss that knows no "
            "anchors AnchorCollator(..., needs_anchors=False)"
        )
    confidence = read_confidence(given, row, size)
    field = f"{row}, {'anchors' if 'anchors' in given else 'confidence'}"
    first = kept.start
    if confidence[first] > 0:
        raise ValueError(
            f"{field}: position {first} is the row's first token, which nothing predicts, so it cannot be an anchor; "
            "begin the row with a token before it, e.g. bos_token"
        )
    _refuse(
        (confidence > 0) & (labels == IGNORED), field, f"expected 0 where the label is {IGNORED}", confidence,
        "there it would be dropped silently: give the anchor a label, which is the token to learn",
    )  # fmt: skip
    labels[first] = IGNORED
    return Row(ids[kept], labels[kept], confidence[kept], kept)


def _check_positions(values: list[Tensor]) -> None:
    """Of packed rows, which attention tells apart by them."""
    for index, value in enumerate(values):
        if value.dim() > 1 and value.shape[1] == 3:
            raise ValueError(
                f"row {index}, position_ids: of three kinds, [3, T], do not tell packed rows apart; take "
                f"padding_free=False, or give [4, T] "
                "with the positions in the text first"
            )
        first = value[0] if value.dim() == 1 else value[0, 0]
        if int(first) != 0:
            raise ValueError(
                f"row {index}, position_ids: expected 0 first, as attention tells packed rows apart by it, got "
                f"{int(first)}; leave "
                "position_ids out, or take padding_free=False"
            )


def read_confidence(given: Mapping[str, Any], row: str, size: int) -> Tensor:
    """[T] float32 from a row's `confidence` or `anchors`, without None; `row`: what a message calls it."""
    if "confidence" not in given:
        return _from_anchors(given.get("anchors", ()), f"{row}, anchors", size)
    if "anchors" in given:
        raise ValueError(f"{row}, confidence: there are anchors as well; give one of the two")
    field = f"{row}, confidence"
    values = _vector(given["confidence"], field, "numbers in [0, 1]", size)
    if values.is_complex():
        raise TypeError(f"{field}: expected numbers in [0, 1], got {values.dtype}")
    _refuse(~((values >= 0) & (values <= 1)), field, "expected numbers in [0, 1]", values, "0 where there is no anchor")
    return values.float()


def _from_anchors(anchors: Any, field: str, size: int) -> Tensor:
    confidence = torch.zeros(size)
    seen: set[int] = set()
    for position, value in _pairs(anchors, field):
        if not 0 <= position < size:
            raise ValueError(f"{field}: expected 0 ≤ position < {size}, the length of input_ids, got {position}")
        if position in seen:
            raise ValueError(f"{field}: position {position} is given twice; give each anchor once")
        if not 0 <= value <= 1:
            raise ValueError(f"{field}: expected a confidence in [0, 1] at position {position}, got {value}")
        seen.add(position)
        confidence[position] = value
    return confidence


def _pairs(anchors: Any, field: str) -> Iterator[tuple[int, float]]:
    expected = "expected a list of positions, a list of [position, confidence], or {position: confidence}"
    if hasattr(anchors, "tolist"):
        anchors = anchors.tolist()
    if isinstance(anchors, Mapping):
        anchors = [pair for pair in anchors.items() if pair[1] is not None]  # Arrow gives every row every key
    if not isinstance(anchors, (list, tuple)):
        text = "; make lists of the text with json.loads" if isinstance(anchors, (str, bytes)) else ""
        raise TypeError(f"{field}: {expected}, got {type(anchors).__name__}{text}")
    anchors = [anchor.tolist() if hasattr(anchor, "tolist") else anchor for anchor in anchors]
    for anchor in anchors:
        alone = isinstance(anchor, float) or (isinstance(anchor, str) and not anchor.strip().isdigit())
        if alone or (isinstance(anchor, (list, tuple)) and len(anchor) != 2):
            what = f"{anchor!r} as a position" if alone else reprlib.repr(anchor)
            raise TypeError(
                f"{field}: {expected}, got {what} in {reprlib.repr(list(anchors))}; write "
                f"{_with_brackets(anchors if alone else anchor)}"
            )
        pair = list(anchor) if isinstance(anchor, (list, tuple)) else [anchor, 1.0]
        try:
            # JSON makes strings of the keys of an object, and Arrow floats of positions beside confidences
            position, value = pair
            index = int(position)
            if isinstance(position, bool) or (not isinstance(position, str) and index != position):
                raise TypeError
            yield index, float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise TypeError(f"{field}: {expected}, with whole numbers as positions, got {anchor!r}") from error


def _with_brackets(flat: Sequence[Any]) -> str:
    """What a flat list of positions and confidences is meant to be."""
    pairs: list[list] = []
    before = False
    for value in flat:
        try:
            number = float(value)  # text too, as JSON has it
            whole = not isinstance(value, bool) and number == int(number)
        except (TypeError, ValueError, OverflowError):
            pairs = []
            break
        if before and 0 <= number <= 1 and not isinstance(value, int):
            pairs[-1][1], before = number, False
        elif whole:
            pairs.append([int(number), 1.0])
            before = True
        else:
            pairs = []
            break
    return f"{reprlib.repr(pairs or [[2, 1.0]])}, a list of [position, confidence]"


def _attended(mask: Tensor, field: str) -> slice:
    """The one run of ones."""
    if int(mask.min()) < 0 or int(mask.max()) > 1:
        raise ValueError(f"{field}: expected 0 or 1, got {int(mask.min())} to {int(mask.max())}")
    ones = mask.nonzero().flatten().tolist()
    if not ones:
        raise ValueError(f"{field}: the row is empty, all of it is masked; leave the row out")
    if ones[-1] - ones[0] + 1 != len(ones):
        raise ValueError(
            f"{field}: expected zeros at the ends only, got one between positions {ones[0]} and {ones[-1]}; remove "
            "such tokens from the row"
        )
    return slice(ones[0], ones[-1] + 1)


def _integers(values: Any, field: str, size: int | None = None, booleans: bool = False) -> Tensor:
    vector = _vector(values, field, "integers", size)
    if vector.is_floating_point() or vector.is_complex() or (vector.dtype == torch.bool and not booleans):
        raise TypeError(f"{field}: expected integers, got {vector.dtype}")
    return vector.long()


def _vector(values: Any, field: str, expected: str, size: int | None) -> Tensor:
    """[T] on the CPU; of `size` where that is known, else not empty."""
    try:
        vector = values.detach().cpu() if isinstance(values, Tensor) else torch.tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{field}: expected a flat list, array or tensor of {expected}: {error}") from error
    if vector.dim() != 1:
        raise ValueError(f"{field}: expected one row of {expected}, [T], got shape {list(vector.shape)}")
    if size is None and not len(vector):
        raise ValueError(f"{field}: the row is empty; leave it out")
    if size is not None and len(vector) != size:
        raise ValueError(f"{field}: expected as many as input_ids, {size}, got {len(vector)}")
    return vector


def _refuse(wrong: Tensor, field: str, expected: str, values: Tensor, remedy: str) -> None:
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(f"{field}: {expected}, got {values[at].item()} at position {at}; {remedy}")

"""The other fields of rows: images, types and positions of tokens, numbers, and which of them a batch has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import objectives
from ..objectives import LAwFLoss

KINDS = ("tokens", "stack", "concatenate", "leave out")
# What tokenizers and trainers add for themselves, and what rows were made of. No model takes it.
METADATA = frozenset(
    {
        "text", "messages", "prompt", "completion", "conversations", "chat_template_kwargs", "tools",
        "length", "seq_lengths", "completion_mask", "assistant_masks", "special_tokens_mask", "offset_mapping",
        "overflowing_tokens", "num_truncated_tokens", "overflow_to_sample_mapping",
    }
)  # fmt: skip
OF_TOKENS = frozenset(
    {"token_type_ids", "mm_token_type_ids", "position_ids", "sequence_ids", "seq_idx", "shift_labels",
     "cross_attention_mask", "inputs_embeds"}
)  # fmt: skip
# Of tokens too, and never integers in the batch: what objectives take, as numbers.
NUMBERS_OF_TOKENS = frozenset({"weights", "old_nll", "initial_token_nll", "target_probability", "teacher_logprobs"})
# Of tokens too, with a number of entries that may differ, and what stands where there is none.
ENTRIES_OF_TOKENS = {"teacher_ids": -100, "teacher_logprobs": 0}
# Of images, videos and sounds, by how their names begin, and with the dimensions of one item: one more are several
# items.
OF_ITEMS = ("pixel_", "high_res_pixel_", "image_", "images_", "video_", "videos_", "audio_", "second_per_grid")
ITEMS = {
    "pixel_values": 3, "pixel_values_images": 3, "high_res_pixel_values": 3, "pixel_values_videos": 4,
    "pixel_mask": 2, "pixel_attention_mask": 2, "image_position_ids": 2, "video_position_ids": 3,
    "image_grid_thw": 1, "video_grid_thw": 1, "image_grid_hw": 1, "image_sizes": 1, "spatial_shapes": 1,
    "target_sizes": 1, "num_crops": 0, "num_soft_tokens_per_image": 0, "num_frames_per_video": 0, "initial_nll": 0,
    "input_features": 2, "input_features_mask": 1, "feature_attention_mask": 1,
}  # fmt: skip
# With one of these, an image is [patches, D] and not [C, H, W], and its mask [patches].
PATCHES = ("image_position_ids", "video_position_ids", "spatial_shapes", "num_soft_tokens_per_image")


def known_fields() -> set[str]:
    """What a call of some objective of this package takes of a batch."""
    classes: list[Any] = [getattr(objectives, name) for name in objectives.__all__]
    return {name for one in classes if isinstance(one, type) for name in getattr(one, "fields", {})}


def in_place_of_anchors() -> set[str]:
    """Fields of objectives that know no anchors: rows that have one of these need none."""
    return known_fields() - set(LAwFLoss.fields) - {"sequence_ids"}


class Field(NamedTuple):
    """The values of all rows, and what becomes of them."""

    kind: str  # of KINDS
    values: list[Tensor]


def read_fields(
    rows: list[Mapping[str, Any]], lengths: list[int], own: Iterable[str], kinds: Mapping[str, str]
) -> tuple[dict[str, Field], list[str]]:
    """Every field but `own`, and the names of those left out because they are text. `lengths`: of input_ids."""
    names = {name: None for row in rows for name, value in row.items() if value is not None and name not in own}
    fields, text = {}, []
    for name in names:
        kind = kinds.get(name, "leave out" if name in METADATA else None)
        if kind == "leave out":
            continue
        values = [row.get(name) for row in rows]
        if kind is None and all(value is None or _is_text(value) for value in values):
            text.append(name)
            continue
        absent = [index for index, value in enumerate(values) if value is None]
        if absent:
            there = next(index for index, value in enumerate(values) if value is not None)
            raise ValueError(
                f"row {absent[0]}, {name}: is missing, but row {there} has it; give it in all rows or in none, where a "
                f"row has no images as "
                'an array of shape [0, ...], or leave it out: AnchorCollator(fields={"' + name + '": "leave out"})'
            )
        if name in ENTRIES_OF_TOKENS:
            values = [_rectangular(value, ENTRIES_OF_TOKENS[name]) for value in values]
        tensors = [_tensor(value, f"row {index}, {name}") for index, value in enumerate(values)]
        if name in ENTRIES_OF_TOKENS:
            tensors = _equally_wide(name, tensors)
        full = [value for value in tensors if value.numel() or value.dim() != 1]
        if not full:
            continue  # [] in every row
        if len({value.dim() for value in full}) > 1:
            raise ValueError(f"{name}: expected the same dimensions in all rows, got shapes {_shapes(tensors)}")
        if len(full) < len(tensors) and (kind or _kind(name, full, lengths[: len(full)], names)) == "concatenate":
            tensors = [v if v.numel() else v.new_empty(0, *full[0].shape[1:], dtype=full[0].dtype) for v in tensors]
        if len({value.dim() for value in tensors}) > 1:
            raise ValueError(f"{name}: expected the same dimensions in all rows, got shapes {_shapes(tensors)}")
        kind = kind or _kind(name, tensors, lengths, names)
        fields[name] = Field(kind, _checked(name, kind, tensors, lengths))
    return fields, text


def _kind(name: str, values: list[Tensor], lengths: list[int], names: Iterable[str]) -> str:
    dimensions = values[0].dim()
    if name in OF_TOKENS or name in NUMBERS_OF_TOKENS or name in ENTRIES_OF_TOKENS:
        return "tokens"
    of_tokens = dimensions > 0 and all(len(value) == length for value, length in zip(values, lengths, strict=True))
    if name in ITEMS or (name.startswith(OF_ITEMS) and not (of_tokens and dimensions == 1)):
        one = ITEMS.get(name, 0)
        if name.startswith("pixel_") and any(other in names for other in PATCHES):
            one -= 1
        return "stack" if dimensions == one else "concatenate"
    if of_tokens:
        return "tokens"
    return "stack"


def _checked(name: str, kind: str, values: list[Tensor], lengths: list[int]) -> list[Tensor]:
    if kind == "tokens":
        for index, (value, length) in enumerate(zip(values, lengths, strict=True)):
            if name == "position_ids" and value.dim() == 3 and value.shape[1] == 1:
                value = values[index] = value[:, 0]
            size = value.shape[-1 if name == "position_ids" else 0] if value.dim() else 0
            if size != length or (name == "position_ids" and value.dim() > 2):
                raise ValueError(
                    f"row {index}, {name}: expected as many as input_ids, {length}, got shape {list(value.shape)}"
                )
        if name in NUMBERS_OF_TOKENS:
            values = [v if v.is_floating_point() or v.is_complex() else v.float() for v in values]
        values = [v if v.is_floating_point() or v.is_complex() or v.dtype == torch.bool else v.long() for v in values]
        values = values if name != "position_ids" else [v if v.dim() == 1 else v.T for v in values]
    shapes = {tuple(value.shape[kind != "stack" :]) for value in values}
    if kind == "concatenate" and not values[0].dim():
        raise ValueError(f"{name}: single numbers cannot be concatenated; stack them")
    if len(shapes) > 1:
        remedy = (
            'pad them alike, or name the rule: AnchorCollator(fields={"'
            + name
            + '": "concatenate"}), "tokens" or "leave out"'
            if kind == "stack"
            else "pad all but the first dimension alike"
        )
        raise ValueError(f"{name}: rows have different shapes, {_shapes(values)}; {remedy}")
    return values


def joined(field: Field) -> Tensor:
    """The batch's tensor of a field that is not of tokens."""
    kind = torch.stack if field.kind == "stack" else torch.cat
    return kind(_alike(field.values))


def laid_out(name: str, values: list[Tensor], places: list[tuple[int, slice]], shape: tuple[int, int]) -> Tensor:
    """[B, T, ...] of the rows' tokens at their places; positions with several numbers a token as [numbers, B, T]."""
    values = _alike(values)
    whole = values[0].new_full((*shape, *values[0].shape[1:]), padding(name))
    for (row, at), value in zip(places, values, strict=True):
        whole[row, at] = value
    return whole.permute(2, 0, 1).contiguous() if name == "position_ids" and whole.dim() == 3 else whole


def are_labels(name: str) -> bool:
    return name.endswith("labels")


def padding(name: str) -> int:
    return -100 if are_labels(name) else ENTRIES_OF_TOKENS.get(name, 0)


def _rectangular(value: Any, fill: int) -> Any:
    """Lists of entries with as many at each token; None and [] are none, as a first token has, which nobody
    predicts."""
    if not isinstance(value, (list, tuple)) and str(getattr(value, "dtype", "")) != "object":
        return value
    parts = [() if part is None else part for part in value]
    if not all(hasattr(part, "__len__") for part in parts):
        return value
    k = max((len(part) for part in parts), default=0)
    return [[*part, *[fill] * (k - len(part))] for part in parts]


def _equally_wide(name: str, values: list[Tensor]) -> list[Tensor]:
    for index, value in enumerate(values):
        if value.dim() != 2:
            raise ValueError(
                f"row {index}, {name}: expected k numbers for each token, [T, k], got shape {list(value.shape)}"
            )
    k = max(value.shape[1] for value in values)
    return [torch.nn.functional.pad(v, (0, k - v.shape[1]), value=ENTRIES_OF_TOKENS[name]) for v in values]


def _alike(values: list[Tensor]) -> list[Tensor]:
    dtype = values[0].dtype
    for value in values:
        dtype = torch.promote_types(dtype, value.dtype)
    return [value.to(dtype) for value in values]


def _tensor(value: Any, field: str) -> Tensor:
    """On the CPU, from tensors, arrays, numbers and nested lists of these."""
    try:
        return _read(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        kind = type(value).__name__
        raise TypeError(
            f"{field}: cannot be a tensor, got {kind} ({str(error).splitlines()[0]}); make tensors of images and "
            f"sounds with the processor "
            'first, remove the column, or leave it out: AnchorCollator(fields={"'
            + field.split(", ")[-1]
            + '": "leave out"})'
        ) from error


def _read(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    leaf = value
    while isinstance(leaf, (list, tuple)) and len(leaf):
        leaf = leaf[0]
    if leaf is not value and getattr(leaf, "shape", ()) != ():  # lists of arrays
        return torch.stack(_alike([_read(part) for part in value]))
    if hasattr(value, "__array__") and not hasattr(value, "dtype"):  # an image of PIL, say, before its processor
        raise TypeError("expected numbers")
    return torch.tensor(value)


def _is_text(value: Any) -> bool:
    """Strings, and lists and mappings of nothing else."""
    if isinstance(value, (str, bytes)):
        return True
    if isinstance(value, Mapping):
        return all(part is None or _is_text(part) for part in value.values())
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(_is_text(part) for part in value)


def _shapes(values: list[Tensor]) -> str:
    return " and ".join(dict.fromkeys(str(list(value.shape)) for value in values))

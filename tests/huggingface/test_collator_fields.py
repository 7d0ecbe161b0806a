"""The other fields of rows: every one arrives in the batch by a rule, or is an error that names the row."""

import numpy as np
import pytest
import torch
from collated import PAD, ROWS, collate, plain

from fused_losses.huggingface.collator import AnchorCollator

TWO = [{"input_ids": [5, 6, 7, 8], "anchors": [2]}, {"input_ids": [8, 9, 10, 11, 12, 13], "anchors": [2]}]


def with_fields(*rows, padding_free=False, **options):
    """The batch of TWO with these fields, without what it has anyway."""
    batch = collate(*(row | more for row, more in zip(TWO, rows, strict=True)), padding_free=padding_free, **options)
    ours = {"input_ids", "labels", "confidence", "attention_mask"} - (set() if not padding_free else {"attention_mask"})
    return {name: values for name, values in batch.items() if name not in ours}


def test_what_tokenizers_and_trainers_note_is_left_out():
    notes = {
        "text": "abc", "messages": [{"role": "user", "content": "a"}], "prompt": "a", "completion": "b", "length": 3, "seq_lengths": [3],
        "completion_mask": [0, 0, 1], "special_tokens_mask": [0, 0, 1], "offset_mapping": [[0, 1], [1, 2], [2, 3]], "pixel_values": None,
        "images": [],
    }  # fmt: skip
    assert plain(collate(ROWS[0] | notes)) == plain(collate(ROWS[0]))


def test_text_of_another_name_is_left_out_with_a_warning_once():
    rows = [{**row, "source": "wiki", "tags": ["a", "b"]} for row in TWO]
    collator = AnchorCollator(PAD)
    with pytest.warns(RuntimeWarning, match=r'source, tags: is text.*left out.*fields={"source": "leave out"}'):
        assert plain(collator(rows)) == plain(collate(*TWO))
    collator(rows)
    AnchorCollator(PAD, fields={"source": "leave out", "tags": "leave out"})(rows)


PER_TOKEN = [
    ("token_type_ids", [0, 0, 1, 1], [1] * 6, torch.int64), ("mm_token_type_ids", [0, 1, 1, 0], [2] * 6, torch.int64),
    ("position_ids", [0, 1, 2, 3], [0, 1, 2, 0, 1, 2], torch.int64), ("sequence_ids", [7] * 4, [8, 8, 8, 9, 9, 9], torch.int64),
    ("old_nll", [0.5] * 4, [1.5] * 6, torch.float32), ("of_ones_own", [1, 0, 0, 1], [1.5] * 6, torch.float32),
    ("flags", [True] * 4, [True] * 6, torch.bool), ("image_token_mask", [1] * 4, [0, 1] * 3, torch.int64),
]  # fmt: skip


@pytest.mark.parametrize("name, one, two, dtype", PER_TOKEN, ids=[name for name, *_ in PER_TOKEN])
@pytest.mark.parametrize("form", [list, torch.tensor, np.array], ids=["list", "tensor", "array"])
def test_fields_of_tokens_are_padded_as_the_tokens_are(name, one, two, dtype, form):
    got = with_fields({name: form(one)}, {name: form(two)})
    assert list(got) == [name] and got[name].tolist() == [[*one, 0, 0], two]
    assert got[name].is_floating_point() == dtype.is_floating_point and (
        dtype.is_floating_point or got[name].dtype == dtype
    )
    left = with_fields({name: form(one)}, {name: form(two)}, padding_side="left", pad_to_multiple_of=4)
    assert left[name].tolist() == [[0] * 4 + one, [0, 0, *two]]
    if one[0] == 0 or name != "position_ids":
        packed = with_fields({name: form(one)}, {name: form(two)}, padding_free=True, pad_to_multiple_of=6)
        tail = [0, 1] if name == "position_ids" else [0, 0]
        assert packed[name].tolist() == [one + two + tail]
        assert "position_ids" in packed


@pytest.mark.parametrize("options", [{}, {"padding_side": "left"}, {"padding_free": True}], ids=str)
@pytest.mark.parametrize("name", ["token_type_ids", "position_ids", "sequence_ids", "of_ones_own"])
def test_what_a_row_masks_is_cut_off_its_fields_of_tokens_too(name, options):
    whole = TWO[0] | {name: [0, 1, 2, 3]}
    row = {
        "input_ids": [0, 0, 5, 6, 7, 8, 0],
        "attention_mask": [0, 0, 1, 1, 1, 1, 0],
        "anchors": [4],
        name: [9, 9, 0, 1, 2, 3, 9],
    }
    other = TWO[1] | {name: [0] * 6}
    assert plain(collate(row, other, **options)) == plain(collate(whole, other, **options))


def test_fields_of_tokens_with_more_numbers_a_token():
    one, two = torch.randn(4, 3), torch.randn(6, 3)
    got = with_fields({"inputs_embeds": one}, {"inputs_embeds": two})["inputs_embeds"]
    assert got.shape == (2, 6, 3) and torch.equal(got[0, :4], one) and torch.equal(got[1], two) and not got[0, 4:].any()
    packed = with_fields({"inputs_embeds": one}, {"inputs_embeds": two}, padding_free=True)["inputs_embeds"]
    assert torch.equal(packed, torch.cat([one, two])[None])


@pytest.mark.parametrize("shape", [(3,), (3, 1), (4,)], ids=str)
def test_positions_of_several_kinds(shape):
    """[3, T] of Qwen2-VL, or [3, 1, T] as its get_rope_index gives for one row."""
    one, two = torch.arange(shape[0] * 4).view(*shape, 4), torch.arange(shape[0] * 6).view(*shape, 6)
    got = with_fields({"position_ids": one}, {"position_ids": two})["position_ids"]
    assert got.shape == (shape[0], 2, 6) and got.is_contiguous()
    assert torch.equal(got[:, 0, :4], one.view(shape[0], 4)) and torch.equal(got[:, 1], two.view(shape[0], 6))
    if shape[0] == 3:
        with pytest.raises(ValueError, match=r"row 0, position_ids: of three kinds.*padding_free=False"):
            with_fields({"position_ids": one}, {"position_ids": two}, padding_free=True)
    else:
        packed = with_fields({"position_ids": one}, {"position_ids": two}, padding_free=True)["position_ids"]
        assert torch.equal(packed, torch.cat([one, two], -1)[:, None])


def test_packed_rows_begin_at_position_0():
    with pytest.raises(ValueError, match=r"row 1, position_ids: expected 0 first, .*got 2"):
        with_fields({"position_ids": [0, 1, 2, 3]}, {"position_ids": [2, 3, 4, 5, 6, 7]}, padding_free=True)


def test_labels_of_other_names_are_padded_with_no_label():
    got = with_fields({"shift_labels": [6, 7, 8, -100]}, {"shift_labels": [9, 10, 11, 12, 13, -100]})["shift_labels"]
    assert (
        got.tolist() == [[6, 7, 8, -100, -100, -100], [9, 10, 11, 12, 13, -100]]
        and type(got).__name__ == "AnchorLabels"
    )


IMAGES = {
    "LLaVA, one image a row": ({"pixel_values": torch.zeros(3, 8, 8)}, {"pixel_values": torch.ones(3, 8, 8)}, {"pixel_values": (2, 3, 8, 8)}),
    "LLaVA, as its processor gives them": (
        {"pixel_values": torch.zeros(1, 3, 8, 8)}, {"pixel_values": torch.ones(2, 3, 8, 8)}, {"pixel_values": (3, 3, 8, 8)},
    ),
    "lists of arrays": (
        {"pixel_values": [np.zeros((3, 8, 8))]}, {"pixel_values": [np.ones((3, 8, 8)), np.ones((3, 8, 8))]}, {"pixel_values": (3, 3, 8, 8)},
    ),
    "lists": ({"pixel_values": torch.zeros(3, 8, 8).tolist()}, {"pixel_values": torch.ones(3, 8, 8).tolist()}, {"pixel_values": (2, 3, 8, 8)}),
    "LLaVA-NeXT": (
        {"pixel_values": torch.zeros(1, 5, 3, 8, 8), "image_sizes": torch.zeros(1, 2)},
        {"pixel_values": torch.ones(2, 5, 3, 8, 8), "image_sizes": torch.ones(2, 2)},
        {"pixel_values": (3, 5, 3, 8, 8), "image_sizes": (3, 2)},
    ),
    "Qwen2-VL": (
        {"pixel_values": torch.zeros(16, 12), "image_grid_thw": [[1, 4, 4]], "mm_token_type_ids": [0] * 4},
        {"pixel_values": torch.ones(24, 12), "image_grid_thw": [[1, 4, 4], [1, 2, 4]], "mm_token_type_ids": [1] * 6},
        {"pixel_values": (40, 12), "image_grid_thw": (3, 3), "mm_token_type_ids": (2, 6)},
    ),
    "Qwen2-VL, as many patches as tokens": (
        {"pixel_values": torch.zeros(4, 12), "image_grid_thw": [1, 2, 2]}, {"pixel_values": torch.ones(6, 12), "image_grid_thw": [1, 2, 3]},
        {"pixel_values": (10, 12), "image_grid_thw": (2, 3)},
    ),
    "Qwen2-VL, a row without images": (
        {"pixel_values": torch.zeros(16, 12), "image_grid_thw": [[1, 4, 4]]}, {"pixel_values": [], "image_grid_thw": []},
        {"pixel_values": (16, 12), "image_grid_thw": (1, 3)},
    ),
    "Qwen2.5-VL, videos": (
        {"pixel_values_videos": torch.zeros(16, 12), "video_grid_thw": [[1, 4, 4]], "second_per_grid_ts": [0.5]},
        {"pixel_values_videos": torch.ones(8, 12), "video_grid_thw": [[1, 2, 4]], "second_per_grid_ts": [0.5]},
        {"pixel_values_videos": (24, 12), "video_grid_thw": (2, 3), "second_per_grid_ts": (2,)},
    ),
    "Gemma 3": (
        {"pixel_values": torch.zeros(1, 3, 8, 8), "token_type_ids": [0] * 4}, {"pixel_values": torch.ones(1, 3, 8, 8), "token_type_ids": [1] * 6},
        {"pixel_values": (2, 3, 8, 8), "token_type_ids": (2, 6)},
    ),
    "Gemma 4": (
        {"pixel_values": torch.zeros(3, 16, 12), "image_position_ids": torch.zeros(3, 16, 2), "num_soft_tokens_per_image": [4, 4, 4]},
        {"pixel_values": torch.ones(1, 16, 12), "image_position_ids": torch.ones(1, 16, 2), "num_soft_tokens_per_image": [4]},
        {"pixel_values": (4, 16, 12), "image_position_ids": (4, 16, 2), "num_soft_tokens_per_image": (4,)},
    ),
    "Idefics3, as its processor gives them": (
        {"pixel_values": torch.zeros(1, 2, 3, 8, 8), "pixel_attention_mask": torch.zeros(1, 2, 8, 8)},
        {"pixel_values": torch.ones(1, 2, 3, 8, 8), "pixel_attention_mask": torch.ones(1, 2, 8, 8)},
        {"pixel_values": (2, 2, 3, 8, 8), "pixel_attention_mask": (2, 2, 8, 8)},
    ),
    "sounds": (
        {"input_features": torch.zeros(1, 80, 30), "feature_attention_mask": torch.zeros(1, 30)},
        {"input_features": torch.ones(2, 80, 30), "feature_attention_mask": torch.ones(2, 30)},
        {"input_features": (3, 80, 30), "feature_attention_mask": (3, 30)},
    ),
    "numbers": ({"score": 1, "image_sizes": [8, 8]}, {"score": 0.5, "image_sizes": [4, 4]}, {"score": (2,), "image_sizes": (2, 2)}),
    "others of equal shapes": ({"embedding": [0.0] * 5}, {"embedding": [1.0] * 5}, {"embedding": (2, 5)}),
    "numbers of sequences": ({"initial_nll": 0.0}, {"initial_nll": 1.0}, {"initial_nll": (2,)}),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("padding_free", [False, True])
def test_images_and_other_fields(name, padding_free):
    one, two, shapes = IMAGES[name]
    got = with_fields(one, two, padding_free=padding_free)
    got = {name: values for name, values in got.items() if name != "position_ids"}
    assert {name: (2, 6) if v.shape == (1, 10) else tuple(v.shape) for name, v in got.items()} == shapes
    for field in got.keys() - {"token_type_ids", "mm_token_type_ids"}:
        rows = [row[field] for row in (one, two)]
        rows = [
            (row if isinstance(row, torch.Tensor) else torch.tensor(np.array(row))).double().flatten() for row in rows
        ]
        assert torch.equal(got[field].double().flatten(), torch.cat(rows)), field


def test_a_rule_for_a_field_can_be_given():
    several = [{"pixel_values": torch.zeros(2, 3, 8, 8)}, {"pixel_values": torch.ones(2, 3, 8, 8)}]
    assert with_fields(*several)["pixel_values"].shape == (4, 3, 8, 8)
    assert with_fields(*several, fields={"pixel_values": "stack"})["pixel_values"].shape == (2, 2, 3, 8, 8)
    assert with_fields(*several, fields={"pixel_values": "leave out"}) == {}
    ragged = [{"more": [1, 2]}, {"more": [3, 4, 5]}]
    assert with_fields(*ragged, fields={"more": "concatenate"})["more"].tolist() == [1, 2, 3, 4, 5]
    assert with_fields({"x": [1] * 4}, {"x": [2] * 6}, fields={"x": "concatenate"})["x"].tolist() == [1] * 4 + [2] * 6
    for fields, kind, message in (
        ({"x": "drop"}, ValueError, "expected for x one of tokens, stack, concatenate, leave out, got 'drop'"),
        ({"labels": "stack"}, ValueError, "labels is read by the collator itself"), (["x"], TypeError, "mapping.*list"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            AnchorCollator(PAD, fields=fields)


@pytest.mark.parametrize(
    "one, two, kind, message",
    [
        ({"pixel_values": torch.zeros(3, 8, 8)}, {}, ValueError, r"row 1, pixel_values: is missing, but row 0 has it.*\[0, \.\.\.\]"),
        ({"score": None}, {"score": 1.0}, ValueError, "row 0, score: is missing, but row 1 has it"),
        ({}, {"token_type_ids": [0] * 6}, ValueError, "row 0, token_type_ids: is missing"),
        ({"token_type_ids": [0] * 3}, {"token_type_ids": [0] * 6}, ValueError, r"row 0, token_type_ids: expected as many as input_ids, 4, got .*3"),
        ({"position_ids": [[0] * 3]}, {"position_ids": [[0] * 6]}, ValueError, r"row 0, position_ids: expected as many as input_ids, 4"),
        ({"sequence_ids": 0}, {"sequence_ids": 1}, ValueError, r"row 0, sequence_ids: expected as many .*got shape \[\]"),
        ({"more": [1, 2]}, {"more": [1, 2, 3]}, ValueError, r"more: rows have different shapes, \[2\] and \[3\]; .*fields="),
        ({"more": [1, 2]}, {"more": [[1, 2]]}, ValueError, r"more: expected the same dimensions in all rows, got shapes \[2\] and \[1, 2\]"),
        ({"pixel_values": torch.zeros(3, 8, 8)}, {"pixel_values": torch.zeros(3, 9, 8)}, ValueError, "pixel_values: rows have different shapes"),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, {"pixel_values": torch.zeros(1, 3, 9, 8)}, ValueError, "pad all but the first dimension"),
        ({"more": object()}, {"more": object()}, TypeError, 'row 0, more: cannot be a tensor, got object.*fields={"more": "leave out"}'),
        ({"more": [1, None]}, {"more": [1, 2]}, TypeError, "row 0, more: cannot be a tensor, got list"),
        ({"more": {"a": 1}}, {"more": {"a": 2}}, TypeError, "row 0, more: cannot be a tensor, got dict"),
    ],
)  # fmt: skip
def test_fields_that_fit_no_rule(one, two, kind, message):
    for padding_free in (False, True):
        with pytest.raises(kind, match=message):
            with_fields(one, two, padding_free=padding_free)


def test_images_before_their_processor_are_an_error():
    image = pytest.importorskip("PIL.Image").new("RGB", (4, 4))
    for value in (image, [image], [[image], [image]]):
        with pytest.raises(TypeError, match=r"row 0, images: cannot be a tensor.*with the processor"):
            with_fields({"images": value}, {"images": value})

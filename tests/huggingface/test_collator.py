"""Rows with anchors → a batch: every labelled token arrives with its label and confidence, and nothing is lost silently."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from collated import PAD, ROWS, collate, plain
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_losses as fl
from fused_losses.huggingface.collator import AnchorCollator


def test_right_padding():
    batch = collate(*ROWS)
    assert plain(batch) == {
        "input_ids": [[5, 6, 7, PAD], [8, 9, 10, 11]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
        "labels": [[-100, -100, 7, -100], [-100, 9, 10, 11]],
        "confidence": [[0, 0, 0.5, 0], [0, 0, 0.25, 0]],
    }
    assert {name: values.dtype for name, values in batch.items()} == {
        "input_ids": torch.int64, "attention_mask": torch.int64, "labels": torch.int64, "confidence": torch.float32,
    }  # fmt: skip


def test_left_padding_to_a_multiple():
    assert plain(collate(*ROWS, padding_side="left", pad_to_multiple_of=3)) == {
        "input_ids": [[PAD, PAD, PAD, 5, 6, 7], [PAD, PAD, 8, 9, 10, 11]],
        "attention_mask": [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]],
        "labels": [[-100, -100, -100, -100, -100, 7], [-100, -100, -100, 9, 10, 11]],
        "confidence": [[0, 0, 0, 0, 0, 0.5], [0, 0, 0, 0, 0.25, 0]],
    }


def test_padding_free_is_one_row():
    batch = AnchorCollator(padding_free=True)(ROWS)
    assert plain(batch) == {
        "input_ids": [[5, 6, 7, 8, 9, 10, 11]],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3]],
        "labels": [[-100, -100, 7, -100, 9, 10, 11]],
        "confidence": [[0, 0, 0.5, 0, 0, 0.25, 0]],
    }
    assert batch["position_ids"].dtype == torch.int64
    padded = plain(collate(*ROWS, padding_free=True, pad_to_multiple_of=5))
    assert padded["input_ids"][0][7:] == [PAD] * 3 and padded["position_ids"][0][7:] == [0, 1, 2]
    assert padded["labels"][0][7:] == [-100] * 3 and padded["confidence"][0][7:] == [0] * 3


def test_padding_free_is_what_transformers_makes():
    transformers = pytest.importorskip("transformers")
    ours = AnchorCollator(padding_free=True)(ROWS)
    theirs = transformers.DataCollatorWithFlattening(return_tensors="pt")(
        [{"input_ids": row["input_ids"], "labels": row.get("labels", row["input_ids"])} for row in ROWS]
    )
    assert theirs.keys() == ours.keys() - {"confidence"}
    for name, values in theirs.items():
        assert torch.equal(ours[name], values), name


@pytest.mark.parametrize(
    "anchors, confidence",
    [
        ([[3, 0.5], [1, 1]], [0, 1, 0, 0.5]),
        ([(1, 0)], [0, 0, 0, 0]),
        ([1, 3], [0, 1, 0, 1]),
        ([2, 1], [0, 1, 1, 0]),
        (["2"], [0, 0, 1, 0]),
        ([], [0, 0, 0, 0]),
        (None, [0, 0, 0, 0]),
        ({3: 0.5, 1: 1.0}, [0, 1, 0, 0.5]),
        ({"3": 0.5}, [0, 0, 0, 0.5]),
        ([[3.0, 0.5]], [0, 0, 0, 0.5]),
        (torch.tensor([1, 3]), [0, 1, 0, 1]),
        (np.array([[3, 0.5], [1, 1]]), [0, 1, 0, 0.5]),
        ([torch.tensor(1), np.int64(3)], [0, 1, 0, 1]),
        ([np.array([3, 0.5])], [0, 0, 0, 0.5]),
    ],
    ids=str,
)
def test_forms_of_anchors(anchors, confidence):
    assert plain(collate({"input_ids": [1, 2, 3, 4], "anchors": anchors}))["confidence"] == [confidence]


def read_only(values):
    values = np.array(values)
    values.flags.writeable = False
    return values


@pytest.mark.parametrize(
    "form", [list, tuple, torch.tensor, np.array, read_only], ids=["list", "tuple", "tensor", "array", "read-only"]
)
def test_fields_as_lists_tensors_and_arrays(form):
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "confidence": [0.0, 1.0, 0.5], "attention_mask": [1, 1, 1]}
    made = {name: form(values) for name, values in row.items()}
    assert plain(collate(made)) == plain(collate(row))
    assert [list(values) for values in made.values()] == list(row.values())  # features are not written to
    narrow = {"input_ids": np.array(row["input_ids"], dtype=np.uint16), "attention_mask": np.ones(3, dtype=bool)}
    assert plain(collate(row | narrow)) == plain(collate(row))


def test_features_are_left_as_they_are():
    ids = torch.tensor([5, 6, 7])
    collate({"input_ids": ids, "labels": ids, "anchors": []})["labels"].fill_(0)
    assert ids.tolist() == [5, 6, 7]


@pytest.mark.parametrize("options", [{}, {"padding_side": "left"}, {"padding_free": True}], ids=str)
def test_what_a_row_masks_is_cut_off(options):
    row = {"input_ids": [0, 0, 5, 6, 7, 0], "attention_mask": [0, 0, 1, 1, 1, 0], "anchors": [[4, 0.5]]}
    whole = {"input_ids": [5, 6, 7], "anchors": [[2, 0.5]]}
    assert plain(collate(row, ROWS[1], **options)) == plain(collate(whole, ROWS[1], **options))
    assert plain(collate(row | {"labels": [-100, -100, 5, 6, 7, -100]})) == plain(collate(whole))


# ---- padding that does not say so


@pytest.mark.parametrize(
    "ids, where",
    [
        ([5, 6, 0, 0], "ends with 2 times"),
        ([0, 0, 0, 5, 6], "begins with 3 times"),
        ([0, 0, 5, 6, 0, 0], "begins with 2"),
    ],
)
@pytest.mark.parametrize("padding_free", [False, True])
def test_pad_ids_without_a_mask_are_warned_of_once(ids, where, padding_free):
    collator = AnchorCollator(0, padding_free=padding_free)
    row = {"input_ids": ids, "anchors": []}
    with pytest.warns(RuntimeWarning, match=f"row 1, input_ids: {where} .*pad id 0.*attention_mask.*labels"):
        batch = collator([{"input_ids": [5, 6, 7], "anchors": []}, row])
    assert (batch["labels"] == 0).sum() == ids[1:].count(0)  # and they stay
    collator([row])
    for known in (
        {"attention_mask": [1] * len(ids)},
        {"labels": ids},
        {"labels": [-100 if i == 0 else i for i in ids]},
    ):
        AnchorCollator(0, padding_free=padding_free)([row | known])


def test_one_pad_id_at_the_end_may_be_the_eos_token():
    row = {"input_ids": [5, 6, 2], "anchors": [2]}
    for collator in (
        AnchorCollator(2), AnchorCollator(processing_class=SimpleNamespace(pad_token_id=2, eos_token_id=2)),
        AnchorCollator(PAD), AnchorCollator(2, padding_free=True),
    ):  # fmt: skip
        assert collator([row])["labels"].tolist() == [[-100, 6, 2]]
    tokenizer = SimpleNamespace(pad_token_id=2, eos_token_id=1)
    for other in (tokenizer, SimpleNamespace(tokenizer=tokenizer)):
        with pytest.warns(RuntimeWarning, match="ends with 1 times the pad id 2"):
            AnchorCollator(processing_class=other)([row])


@pytest.mark.parametrize(
    "source", [SimpleNamespace(pad_token_id=PAD), SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=np.int64(PAD)))],
    ids=["tokenizer", "processor"],
)  # fmt: skip
def test_pad_id_of_a_tokenizer_or_processor(source):
    assert plain(AnchorCollator(processing_class=source)(ROWS)) == plain(collate(*ROWS))
    assert plain(AnchorCollator(7, source)(ROWS))["input_ids"][0][3] == 7


# ---- whatever the padding, the same tokens are learned


@st.composite
def rows(draw):
    size = draw(st.integers(1, 6))
    ids = draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    row = {"input_ids": ids}
    labels = list(ids)
    if draw(st.booleans()):
        labels = row["labels"] = [draw(st.sampled_from([i, i, -100])) for i in ids]
    able = [t for t in range(1, size) if labels[t] != -100]
    values = {t: draw(st.sampled_from([0.25, 0.5, 1.0])) for t in able if draw(st.booleans())}
    if draw(st.booleans()):
        row["confidence"] = [values.get(t, 0.0) for t in range(size)]
    else:
        row["anchors"] = draw(st.sampled_from([values, [[t, c] for t, c in values.items()]]))
    before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    if before + after or draw(st.booleans()):
        row["attention_mask"] = [0] * before + [1] * size + [0] * after
        row["input_ids"] = [0] * before + ids + [0] * after
        for name, fill in (("labels", -100), ("confidence", 0.0)):
            if name in row:
                row[name] = [fill] * before + row[name] + [fill] * after
        if "anchors" in row:
            row["anchors"] = [[t + before, c] for t, c in values.items()]
    learned = [(ids[t - 1], ids[t], labels[t], values.get(t, 0.0), t) for t in range(1, size) if labels[t] != -100]
    return row, learned


def learned(batch):
    """(token before, token, label, confidence, place in its sequence) of each token with a label, after the loss's shift."""
    ids, labels, confidence = batch["input_ids"], batch["labels"], batch["confidence"]
    if "position_ids" in batch:
        place = batch["position_ids"]
    else:
        place = (batch["attention_mask"].cumsum(1) - 1).masked_fill(batch["attention_mask"] == 0, -1)
    at = labels[:, 1:] != -100
    columns = (ids[:, :-1], ids[:, 1:], labels[:, 1:], confidence[:, 1:], place[:, 1:])
    return Counter(zip(*(column[at].tolist() for column in columns), strict=True))


@settings(deadline=None, max_examples=200)
@given(st.lists(rows(), min_size=1, max_size=4), st.sampled_from([None, 1, 4]))
def test_the_same_tokens_are_learned_whatever_the_padding(examples, multiple):
    features = [row for row, _ in examples]
    expected = Counter(token for _, tokens in examples for token in tokens)
    for options in ({}, {"padding_side": "left"}, {"padding_free": True}):
        batch = collate(*features, pad_to_multiple_of=multiple, **options)
        assert learned(batch) == expected, options
        assert batch["labels"][:, 0].eq(-100).all()
        assert not batch["confidence"][batch["labels"] == -100].any()
        assert len({values.shape for values in batch.values()}) == 1
        assert batch["input_ids"].shape[1] % (multiple or 1) == 0
        assert len(batch["input_ids"]) == (1 if "padding_free" in options else len(features))
        if "attention_mask" in batch:
            lengths = [sum(row.get("attention_mask", [1] * len(row["input_ids"]))) for row in features]
            assert batch["attention_mask"].sum(1).tolist() == lengths
            assert (batch["input_ids"] == PAD).eq(batch["attention_mask"] == 0).all()


def test_loss_and_gradient_of_a_model_do_not_depend_on_the_padding():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        use_cache=False,
        initializer_range=0.5,
    )
    model = transformers.LlamaForCausalLM(config).double()
    generator = torch.Generator().manual_seed(5)
    features = []
    for size in (7, 1, 12, 4):
        ids = torch.randint(40, (size,), generator=generator)
        features.append({"input_ids": ids, "anchors": [[t, 0.5] for t in range(2, size, 3)]})
    results = []
    for options in ({}, {"padding_side": "left"}, {"padding_free": True}):
        batch = AnchorCollator(0, **options)(features)
        labels, confidence = batch.pop("labels"), batch.pop("confidence")
        hidden = model.model(**batch).last_hidden_state
        reference = torch.sin(hidden.detach() * 3)  # any function of the token alone
        loss = fl.LAwFLoss()(
            hidden[:, :-1],
            model.lm_head,
            labels[:, 1:],
            confidence=confidence[:, 1:],
            reference=fl.Reference(reference[:, :-1]),
        )
        model.zero_grad()
        loss.backward()
        results.append((loss.detach(), model.model.embed_tokens.weight.grad.clone()))
    (loss, gradient), left, packed = results
    # to the left the rotary angles differ, which transformers rounds to float32
    for (other_loss, other_gradient), of_loss, of_gradient in ((left, 7.8e-8, 1e-6), (packed, 1e-14, 1e-14)):
        assert abs(other_loss - loss) <= of_loss * loss
        assert (other_gradient - gradient).norm() <= of_gradient * gradient.norm()


# ---- rows for objectives without anchors

WEIGHED = [
    {"input_ids": [5, 6, 7, 8], "weights": [0.0, 1.0, -0.5, 2.0]},
    {"input_ids": [8, 9, 10], "weights": [1, 0, 3], "labels": [-100, 9, 10]},
]


@pytest.mark.parametrize("options", [{}, {"padding_side": "left"}, {"padding_free": True}], ids=str)
def test_rows_with_weights_need_no_anchors(options):
    batch = collate(*WEIGHED, **options)
    anchored = collate(*(row | {"anchors": []} for row in WEIGHED), **options)
    assert not anchored.pop("confidence").any() and batch.keys() == anchored.keys()
    assert all(torch.equal(batch[name], anchored[name]) for name in batch)
    ones, twos = [0.0, 1.0, -0.5, 2.0], [1.0, 0.0, 3.0]
    expected = {"left": [ones, [0.0, *twos]], None: [ones, [*twos, 0.0]]}[options.get("padding_side")]
    assert batch["weights"].tolist() == ([ones + twos] if "padding_free" in options else expected)
    assert batch["weights"].dtype == torch.float32


@pytest.mark.parametrize("name", ["weights", "old_nll"])
def test_whole_numbers_for_an_objective_are_floats_in_the_batch(name):
    rows = [{"input_ids": [5, 6, 7], name: form([1, 0, 2])} for form in (list, torch.tensor, np.array)]
    assert collate(*rows)[name].dtype == torch.float32


def test_anchors_that_were_dropped_are_still_noticed_beside_a_row_that_has_some():
    with pytest.raises(ValueError, match="row 1: has neither confidence nor anchors"):
        collate(WEIGHED[0] | {"anchors": []}, WEIGHED[1])
    with pytest.raises(ValueError, match="row 1, weights: is missing, but row 0 has it"):
        collate(WEIGHED[0], {"input_ids": [5, 6]})
    with pytest.raises(
        ValueError, match=r"row 0: has neither confidence nor anchors, only \['input_ids', 'sequence_ids'\]"
    ):
        collate({"input_ids": [5, 6], "sequence_ids": [1, 1]})


def test_as_many_weights_as_tokens():
    with pytest.raises(ValueError, match="row 0, weights: expected as many as input_ids, 3, got shape"):
        collate({"input_ids": [5, 6, 7], "weights": [1.0, 2.0]})


# ---- errors

IDS = {"input_ids": [5, 6, 7]}
RETAINED = IDS | {"anchors": []}
BAD = {
    "no rows": ([], ValueError, "features.*at least one"),
    "a list": ([[1, 2]], TypeError, "row 0: .*mapping.*list"),
    "no anchors": ([RETAINED, IDS], ValueError, r"row 1: has neither confidence nor anchors, only \['input_ids'\]; give anchors=\[\]"),
    "no ids": ([RETAINED, {"text": "a"}], ValueError, r"row 1, input_ids: is missing.*\['text'\].*remove_unused_columns=False"),
    "ids: none": ([{"input_ids": []}], ValueError, "row 0, input_ids: the row is empty"),
    "ids: floats": ([{"input_ids": [1.0]}], TypeError, "row 0, input_ids: expected integers.*float32"),
    "ids: booleans": ([{"input_ids": [True]}], TypeError, "input_ids: expected integers.*bool"),
    "ids: text": ([{"input_ids": "abc"}], TypeError, "row 0, input_ids: .*flat list"),
    "ids: with None": ([{"input_ids": [1, None]}], TypeError, "input_ids: .*flat list"),
    "ids: a batch": ([{"input_ids": torch.ones(1, 3).long()}], ValueError, r"input_ids: expected one row.*\[1, 3\]"),
    "ids: negative": ([{"input_ids": [3, -100]}], ValueError, "input_ids: expected ids ≥ 0, got -100"),
    "labels: shorter": ([IDS | {"labels": [5, 6]}], ValueError, "row 0, labels: expected as many as input_ids, 3, got 2"),
    "labels: floats": ([IDS | {"labels": [5.0, 6, 7]}], TypeError, "row 0, labels: expected integers"),
    "labels: -1": ([IDS | {"labels": [5, -1, 7]}], ValueError, "labels: expected ids ≥ 0 or -100, got -1 at position 1"),
    "confidence: longer": ([RETAINED, IDS | {"confidence": [0.0] * 4}], ValueError, "row 1, confidence: .*3, got 4"),
    "confidence: above 1": ([IDS | {"confidence": [0, 1.5, 0]}], ValueError, r"confidence: .*\[0, 1\], got 1.5 at position 1"),
    "confidence: negative": ([IDS | {"confidence": [0, 0, -0.5]}], ValueError, r"confidence: .*\[0, 1\], got -0.5"),
    "confidence: NaN": ([IDS | {"confidence": [0, float("nan"), 0]}], ValueError, r"confidence: .*\[0, 1\], got nan"),
    "confidence: complex": ([IDS | {"confidence": [0, 1j, 0]}], TypeError, r"confidence: .*\[0, 1\], got torch.complex64"),
    "confidence: without a label": (
        [IDS | {"labels": [5, -100, 7], "confidence": [0, 0.5, 0]}], ValueError,
        "row 0, confidence: expected 0 where the label is -100, got 0.5 at position 1; .*dropped silently",
    ),
    "confidence: first token": ([IDS | {"confidence": [1, 0, 0]}], ValueError, "row 0, confidence: position 0 .*first token.*bos"),
    "confidence and anchors": ([IDS | {"confidence": [0, 0, 0], "anchors": [1]}], ValueError, "row 0, confidence: .*one of the two"),
    "anchors: first token": ([IDS | {"anchors": [0]}], ValueError, "row 0, anchors: position 0 .*nothing predicts"),
    "anchors: without a label": (
        [IDS | {"labels": [5, 6, -100], "anchors": {2: 1.0}}], ValueError, "row 0, anchors: expected 0 where the label is -100",
    ),
    "anchors: beyond the end": ([RETAINED, IDS | {"anchors": [[3, 1.0]]}], ValueError, "row 1, anchors: expected 0 ≤ position < 3.*got 3"),
    "anchors: negative": ([IDS | {"anchors": [-1]}], ValueError, "anchors: expected 0 ≤ position.*got -1"),
    "anchors: twice": ([IDS | {"anchors": [1, [1, 0.5]]}], ValueError, "anchors: position 1 is given twice"),
    "anchors: twice in other words": ([IDS | {"anchors": {1: 0.5, "1": 0.5}}], ValueError, "position 1 is given twice"),
    "anchors: confidence above 1": ([IDS | {"anchors": [[1, 2]]}], ValueError, r"anchors: .*\[0, 1\] at position 1, got 2"),
    "anchors: NaN": ([IDS | {"anchors": {1: float("nan")}}], ValueError, r"anchors: .*\[0, 1\] at position 1, got nan"),
    "anchors: half a position": ([IDS | {"anchors": [[1.5, 1.0]]}], TypeError, r"anchors: .*whole numbers.*got \[1.5, 1.0\]"),
    "anchors: booleans": ([IDS | {"anchors": [False, True]}], TypeError, "anchors: .*got False"),
    "anchors: triples": ([IDS | {"anchors": [[1, 1, 1]]}], TypeError, r"anchors: .*got \[1, 1, 1\]"),
    "anchors: brackets forgotten": ([IDS | {"anchors": [2, 1.0]}], TypeError, r"row 0, anchors: .*got 1.0 as a position.*write \[\[2, 1.0\]\]"),
    "anchors: brackets of two forgotten": ([IDS | {"anchors": [1, 1.0, 2, 0.5]}], TypeError, r"write \[\[1, 1.0\], \[2, 0.5\]\]"),
    "anchors: a float among positions": ([IDS | {"anchors": [1, 0.5, 2]}], TypeError, r"write \[\[1, 0.5\], \[2, 1.0\]\]"),
    "anchors: brackets forgotten, a tuple": ([IDS | {"anchors": (2, 1.0)}], TypeError, r"write \[\[2, 1.0\]\]"),
    "anchors: brackets forgotten, an array": ([IDS | {"anchors": np.array([2, 1.0])}], TypeError, r"write \[\[2, 1.0\]\]"),
    "anchors: brackets forgotten, a tensor": ([IDS | {"anchors": torch.tensor([2, 0.5])}], TypeError, r"write \[\[2, 0.5\]\]"),
    "anchors: brackets forgotten, numpy numbers": ([IDS | {"anchors": [np.int64(2), np.float32(1)]}], TypeError, r"write \[\[2, 1.0\]\]"),
    "anchors: brackets forgotten, text": ([IDS | {"anchors": ["2", "1.0"]}], TypeError, r"write \[\[2, 1.0\]\]"),
    "anchors: brackets between forgotten": ([IDS | {"anchors": [[1, 1.0, 2]]}], TypeError, r"got \[1, 1.0, 2\].*write \[\[1, 1.0\], \[2, 1.0\]\]"),
    "anchors: only a confidence": ([IDS | {"anchors": [0.5]}], TypeError, r"got 0.5 as a position.*write \[\[2, 1.0\]\], a list of"),
    "anchors: a pair and a position": ([IDS | {"anchors": [[1, 0.5], 2.0]}], TypeError, "got 2.0 as a position"),
    "anchors: JSON": ([IDS | {"anchors": "[[2, 1.0]]"}], TypeError, "got str; make lists of the text with json.loads"),
    "anchors: a number": ([IDS | {"anchors": 1}], TypeError, "anchors: .*got int"),
    "mask: all": ([IDS | {"attention_mask": [0, 0, 0]}], ValueError, "row 0, attention_mask: the row is empty"),
    "mask: hole": ([IDS | {"attention_mask": [1, 0, 1]}], ValueError, "attention_mask: expected zeros at the ends only"),
    "mask: other numbers": ([IDS | {"attention_mask": [1, 2, 1]}], ValueError, "attention_mask: expected 0 or 1, got 1 to 2"),
    "mask: shorter": ([IDS | {"attention_mask": [1, 1]}], ValueError, "attention_mask: .*3, got 2"),
    "mask: over a label": (
        [IDS | {"labels": [5, 6, 7], "attention_mask": [1, 1, 0]}], ValueError,
        "row 0, labels: expected -100 where attention_mask is 0, got 7 at position 2",
    ),
    "mask: over an anchor": (
        [IDS | {"anchors": [2], "attention_mask": [1, 1, 0]}], ValueError, "row 0, anchors: .*dropped silently",
    ),
    "mask: anchor at the first token left": (
        [IDS | {"anchors": [1], "attention_mask": [0, 1, 1]}], ValueError, "row 0, anchors: position 1 is the row's first token",
    ),
    "completion mask": ([IDS | {"completion_mask": [0, 0, 1]}], ValueError, "row 0, completion_mask: .*give labels"),
    "assistant masks": ([IDS | {"assistant_masks": [0, 0, 1]}], ValueError, "row 0, assistant_masks: .*give labels"),
    "packed rows": ([IDS | {"seq_lengths": [1, 2]}], ValueError, "row 0, seq_lengths: .*packing=False"),
}  # fmt: skip


@pytest.mark.parametrize("features, kind, message", BAD.values(), ids=BAD)
def test_errors_of_rows(features, kind, message):
    for options in ({}, {"padding_free": True}):
        with pytest.raises(kind, match=message):
            collate(*features, **options)


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({}, ValueError, "pad_token_id: .*processing_class that has one; .*eos_token_id"),
        (
            {"processing_class": SimpleNamespace(pad_token_id=None)},
            ValueError,
            "pad_token_id: .*SimpleNamespace has none.*eos",
        ),
        ({"padding_free": True, "pad_to_multiple_of": 8}, ValueError, "pad_token_id"),
        ({"pad_token_id": SimpleNamespace(pad_token_id=1)}, TypeError, "pad_token_id: .*processing_class="),
        ({"pad_token_id": -1}, TypeError, "pad_token_id: .*≥ 0, got -1"),
        ({"pad_token_id": 0, "padding_side": "both"}, ValueError, "padding_side: .*right or left, got 'both'"),
        ({"pad_token_id": 0, "pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of: .*got 0"),
    ],
)
def test_errors_of_options(options, kind, message):
    with pytest.raises(kind, match=message):
        AnchorCollator(**options)


# ---- entries of a teacher

TAUGHT = [
    {"input_ids": [5, 6, 7, 8], "teacher_ids": [None, [6, 9], [7], []], "teacher_logprobs": [None, [-0.5, -1], [-0.1], []]},
    {"input_ids": [8, 9], "teacher_ids": [[], [9, 1, 2]], "teacher_logprobs": [[], [-0.5, -1.5, -2.5]]},
]  # fmt: skip
NONE = [-100] * 3


@pytest.mark.parametrize("options", [{}, {"padding_side": "left"}, {"padding_free": True}], ids=str)
def test_entries_of_a_teacher_are_filled_up_and_padded(options):
    batch = collate(*TAUGHT, **options)
    one = [NONE, [6, 9, -100], [7, -100, -100], NONE]
    rows = {"left": [one, [NONE, NONE, NONE, [9, 1, 2]]], None: [one, [NONE, [9, 1, 2], NONE, NONE]]}
    expected = [[*one, NONE, [9, 1, 2]]] if "padding_free" in options else rows[options.get("padding_side")]
    assert batch["teacher_ids"].tolist() == expected and batch["teacher_ids"].dtype == torch.int64
    named, logprobs = batch["teacher_ids"] >= 0, batch["teacher_logprobs"]
    assert logprobs[named].tolist() == pytest.approx([-0.5, -1, -0.1, -0.5, -1.5, -2.5]) and not logprobs[~named].any()
    assert "confidence" not in batch and type(batch["teacher_ids"]) is torch.Tensor
    assert type(batch["labels"]).__name__ == "AnchorLabels"


def test_entries_of_a_teacher_as_arrays_of_objects():
    ragged = np.empty(3, dtype=object)
    ragged[:] = [None, [4, 5], [6]]
    assert collate({"input_ids": [5, 6, 7], "teacher_ids": ragged})["teacher_ids"].tolist() == [
        [[-100, -100], [4, 5], [6, -100]]
    ]


@pytest.mark.parametrize("form", [torch.tensor, np.array], ids=["tensor", "array"])
def test_entries_of_a_teacher_as_tensors(form):
    ids, logprobs = [[3, 4], [5, 6], [7, -100]], [[-1.0, -2.0], [-1.5, -2.5], [-0.5, -np.inf]]
    batch = collate(
        {"input_ids": [5, 6, 7], "teacher_ids": form(ids), "teacher_logprobs": form(logprobs)},
        {"input_ids": [5], "teacher_ids": form([[1]]), "teacher_logprobs": form([[-1.0]])},
    )
    assert batch["teacher_ids"].tolist() == [ids, [[1, -100], [-100, -100], [-100, -100]]]
    assert batch["teacher_logprobs"].tolist() == [logprobs, [[-1, 0], [0, 0], [0, 0]]]


def test_entries_of_a_teacher_that_do_not_fit_the_tokens():
    with pytest.raises(ValueError, match=r"row 0, teacher_ids: expected as many as input_ids, 3, got shape \[2, 1\]"):
        collate({"input_ids": [5, 6, 7], "teacher_ids": [[1], [2]]})
    with pytest.raises(
        ValueError, match=r"row 0, teacher_ids: expected k numbers for each token, \[T, k\], got .*\[3\]"
    ):
        collate({"input_ids": [5, 6, 7], "teacher_ids": [1, 2, 3]})

"""Fields of a loss through collators that know nothing of them, and LAwF on rows without anchors."""

import pickle

import pytest
import torch
from training import collate, expected, llama, rows

import fused_losses as fl
from fused_losses.integrations.batches import WithFields, collated


def left(features):
    """As `collate`, padded at the left."""
    batch = collate([{**f, "input_ids": f["input_ids"][::-1], "labels": f["labels"][::-1]} for f in features])
    return {name: value.flip(1) for name, value in batch.items()}


def packed(features):
    """All rows in one, as sample packing has them, with room at the end."""
    ids = [token for f in features for token in f["input_ids"]]
    labels = [label for f in features for label in f["labels"]]
    positions = [i for f in features for i in range(len(f["input_ids"]))]
    room = 3
    return {
        "input_ids": torch.tensor([ids + [0] * room]), "labels": torch.tensor([labels + [-100] * room]),
        "position_ids": torch.tensor([positions + list(range(room))]),
    }  # fmt: skip


def masked(features):
    """The same with the number of the sequence in the mask, and no positions."""
    numbers = [i + 1 for i, f in enumerate(features) for _ in f["input_ids"]]
    batch = packed(features)
    del batch["position_ids"]
    return {**batch, "attention_mask": torch.tensor([numbers + [0] * 3])}


def nested(groups):
    return packed([row for group in groups for row in group])


def by_token(batch, name):
    """{(token's row in order): value} where there is a label."""
    valid = batch["labels"] != -100
    return batch[name][valid].tolist()


@pytest.mark.parametrize("collator", [collate, left, packed], ids=lambda c: c.__name__)
def test_fields_are_where_their_tokens_are(collator):
    data = rows(5, anchors=True)
    given = [dict(row) for row in data]
    batch = WithFields(collator, fl.LAwFLoss())(data)
    plain = collator([{k: v for k, v in row.items() if k != "confidence"} for row in given])
    assert all(torch.equal(batch[name], plain[name]) for name in plain)
    kept = [
        (c, label) for row in given for c, label in zip(row["confidence"], row["labels"], strict=True) if label >= 0
    ]
    assert by_token(batch, "confidence") == pytest.approx([c for c, _ in kept])
    assert by_token(batch, "labels") == [label for _, label in kept]
    assert batch["confidence"][batch["labels"] == -100].sum() == 0
    assert data == given


def test_rows_that_come_in_groups():
    data = rows(5, anchors=True)
    whole = WithFields(packed, fl.LAwFLoss())(data)
    batch = WithFields(nested, fl.LAwFLoss())([data[:2], data[2:]])
    assert all(torch.equal(batch[name], whole[name]) for name in whole)


def test_anchors_and_other_fields_of_tokens():
    data = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "anchors": [[2, 0.5]]},
            {"input_ids": [5, 8], "labels": [-100, 8], "anchors": []}]  # fmt: skip
    batch = WithFields(collate, fl.LAwFLoss())(data)
    assert batch["confidence"].tolist() == [[0, 0, 0.5], [0, 0, 0]]
    weighted = [{**row, "weights": [0.0, 2.0, 3.0][: len(row["input_ids"])]} for row in data]
    weights = WithFields(collate, fl.WeightedLoss())([{k: v for k, v in r.items() if k != "anchors"} for r in weighted])
    assert weights["weights"].tolist() == [[0, 2, 3], [0, 2, 0]]


def test_numbers_of_rows():
    data = [{**row, "initial_nll": float(i)} for i, row in enumerate(rows(3))]
    assert WithFields(collate, fl.FLOWLoss(1.0))(data)["initial_nll"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("collator", [collate, left], ids=lambda c: c.__name__)
def test_without_anchors_answers_are_learned_and_prompts_held(collator):
    data = rows(4)
    batch = WithFields(collator, fl.LAwFLoss())(data)
    model = fl.patch(llama(), fl.LAwFLoss(), reference=llama(1))
    loss = model(**batch).loss
    anchored = [
        {"input_ids": r["input_ids"], "labels": r["input_ids"], "confidence": [float(x != -100) for x in r["labels"]]}
        for r in data
    ]
    value, _ = expected(llama(), anchored, "lawf", llama(1))
    assert loss.item() == pytest.approx(value, rel=1e-6)


def test_rows_with_anchors_and_without_in_one_batch():
    """As where a data set has both: each row is what it is by itself."""
    data = [{**rows(2)[0], "anchors": [[4, 0.5]]}, {**rows(2)[1], "anchors": None}]
    data[0]["labels"] = [-100, *data[0]["input_ids"][1:]]
    both = WithFields(collate, fl.LAwFLoss())(data)
    for i, row in enumerate(data):
        alone, n = WithFields(collate, fl.LAwFLoss())([row]), len(row["input_ids"])
        for name in ("labels", "confidence"):
            assert torch.equal(both[name][i, :n], alone[name][0]), name
        assert (both["labels"][i, n:] == -100).all() and not both["confidence"][i, n:].any()
    assert both["confidence"][0].tolist().count(0.5) == 1 and both["confidence"][1].sum() > 1


def test_packed_rows_do_not_predict_each_other():
    data = rows(4)
    batch = WithFields(packed, fl.LAwFLoss())(data)
    assert int((batch["labels"] != -100).sum()) == sum(len(row["input_ids"]) - 1 for row in data)
    assert batch["confidence"].sum() == sum(label != -100 for row in data for label in row["labels"][1:])
    by_mask = WithFields(masked, fl.LAwFLoss())(data)
    assert torch.equal(by_mask["labels"], batch["labels"])


@pytest.mark.parametrize("collator", [packed, masked, left], ids=lambda c: c.__name__)
def test_first_tokens_of_rows_with_anchors_are_neither_learned_nor_held(collator):
    """Behind another row, or behind padding."""
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"], "anchors": [[2, 0.5]]} for row in rows(4)]
    data[1]["anchors"] = None
    batch = WithFields(collator, fl.LAwFLoss())(data)
    assert int((batch["labels"] != -100).sum()) == sum(len(row["input_ids"]) - 1 for row in data)
    assert batch["confidence"].sum() == 3 * 0.5 + len(data[1]["input_ids"]) - 1
    assert not batch["confidence"][batch["labels"] == -100].any()


@pytest.mark.parametrize("anchors", [False, True])
def test_a_packed_row_whose_padding_the_collator_cuts_off(anchors):
    """As LLaMA-Factory has it for flash attention: of rows of a fixed length the batch has what their mask counts."""
    whole = {k: v[0].tolist() for k, v in masked(rows(3)).items()}
    if anchors:
        whole["confidence"] = [0.5 * (label != -100) for label in whole["labels"]]

    def cut(features):
        n = sum(number > 0 for number in features[0]["attention_mask"])
        return {name: torch.tensor([values[:n]]) for name, values in features[0].items()}

    kept = collated(lambda f: {k: torch.tensor([v]) for k, v in f[0].items()}, fl.LAwFLoss())([dict(whole)])
    batch = collated(cut, fl.LAwFLoss())([dict(whole)])
    n = batch["input_ids"].shape[1]
    assert n == len(whole["input_ids"]) - 3
    assert all(torch.equal(batch[name], kept[name][:, :n]) for name in ("labels", "confidence"))


@pytest.mark.parametrize("loss, name", [(fl.WeightedLoss(), "weights"), (fl.LAwFLoss(), "confidence")], ids=str)
def test_a_scale_of_the_trainers_own(loss, name):
    def with_scale(features):
        batch = collate(features)
        return {**batch, "scale": (batch["labels"] != -100) * 0.5}

    batch = WithFields(with_scale, loss, "scale")(rows(3))
    assert "scale" not in batch
    learned = collate(rows(3))["labels"] != -100
    learned[:, 0] = False
    assert torch.equal(batch[name], learned * 0.5)
    with pytest.raises(ValueError, match=r"scale: weighs tokens, and DFTLoss has no such weights; take .* weighted"):
        WithFields(with_scale, fl.DFTLoss(), "scale")(rows(3))


def test_a_loss_without_fields_leaves_batches_as_they_are():
    for loss in (fl.DFTLoss(), fl.CrossEntropyLoss()):
        batch, plain = collated(Collator(), loss)(rows(3)), collate(rows(3))
        assert type(batch["labels"]) is torch.Tensor and all(torch.equal(batch[k], plain[k]) for k in plain)
    batch, plain = collated(collate, fl.TALRLoss())(rows(3)), collate(rows(3))
    assert batch.keys() == plain.keys() and all(torch.equal(batch[k], plain[k]) for k in plain)


@pytest.mark.parametrize("column, values", [("anchors", [3]), ("weights", [0.5] * 20), ("initial_nll", 2.0)])
def test_columns_of_other_losses_are_left_out_and_named_once(column, values):
    """A baseline on the data of another method; a tokenizer's padding cannot make tensors of such columns."""
    seen = []

    def strict(features):
        seen.extend(name for row in features for name in row)
        return collate(features)

    data = [{**row, column: values[: len(row["labels"])] if isinstance(values, list) else values} for row in rows(3)]
    collator = collated(strict, fl.CrossEntropyLoss())
    with pytest.warns(UserWarning, match=f"{column}: is a column of the data that CrossEntropyLoss has no use for"):
        batch = collator(data)
    assert column not in seen and column not in batch and set(batch) == set(collate(rows(3)))
    collator(data)  # no second warning, which would be an error here


@pytest.mark.parametrize("loss, column, meant", [
    (fl.LAwFLoss(), "anchor", "anchors"), (fl.LAwFLoss(), "confidences", "confidence"),
    (fl.WeightedLoss(), "weight", "weights"), (fl.PSFTLoss(), "old_nlls", "old_nll"),
])  # fmt: skip
def test_a_column_that_is_nearly_a_field_is_named(loss, column, meant):
    collator = collated(collate, loss)
    with pytest.warns(UserWarning, match=rf"{column}: .* {type(loss).__name__} has no use for; did you mean {meant}\?"):
        collator.name_unused(["input_ids", "labels", "attention_mask", "position_ids", "length", "text", column])
    collator.name_unused([column])  # no second warning, which would be an error here


@pytest.mark.parametrize("anchors", [False, True])
def test_a_model_that_is_not_patched_does_not_take_the_batch_in_silence(anchors):
    """Such as after training, with a callback that has unpatched it: its own loss would count the prompts."""
    batch = collated(collate, fl.LAwFLoss())(rows(3, anchors=anchors))
    with pytest.raises(ValueError, match="anchors, or the weights, are ignored"):
        llama()(**batch)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="are ignored"):
        llama()(**batch)


@pytest.mark.parametrize("column, meant", [("anchor", "anchors"), ("weight", "weights"), ("confidences", "confidence")])
def test_a_column_but_for_a_slip_is_named_once(column, meant):
    data = [{**row, column: [1], "position_ids": [], "token_type_ids": [], "id": 3} for row in rows(2)]
    made = collated(
        lambda features: collate([{k: f[k] for k in ("input_ids", "labels")} for f in features]), fl.LAwFLoss()
    )
    with pytest.warns(UserWarning, match=rf"^{column}: is a column .* did you mean {meant}\?$") as said:
        made(data)
    made(data)
    assert len(said) == 1


def learned_rows(count=8):
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows(count)]


def ignored_rows(count=8):
    return [{"input_ids": row["input_ids"], "labels": [-100] * len(row["input_ids"])} for row in rows(count)]


@pytest.mark.parametrize("data, message", [
    (learned_rows, "LAwFLoss: of the first 16 rows every token that counts is learned .* the loss sft"),
    (ignored_rows, "LAwFLoss: of the first 16 rows no token is learned, all are held; .* have answers"),
], ids=["learned", "ignored"])  # fmt: skip
@pytest.mark.parametrize("collator", [collate, packed], ids=lambda c: c.__name__)
def test_data_that_leave_nothing_to_hold_or_to_learn_are_named_once(collator, data, message):
    made = collated(collator, fl.LAwFLoss())
    made(data())
    with pytest.warns(UserWarning, match=message):
        made(data())
    made(data())
    made(data())


def test_a_few_rows_without_a_prompt_or_an_answer_are_no_fault():
    made = collated(collate, fl.LAwFLoss())
    for data in (learned_rows(4), ignored_rows(4), rows(8), rows(8)):
        made(data)
    with_scale = collated(
        lambda f: {**collate(f), "scale": torch.full(collate(f)["labels"].shape, 0.5)}, fl.LAwFLoss(), "scale"
    )
    for _ in range(3):
        with_scale(learned_rows())  # half held


def test_numbers_of_sequences_are_no_weights():
    data = [{**row, "sequence_ids": [0] * len(row["input_ids"])} for row in rows(3)]
    batch = collated(collate, fl.TALRLoss())(data)
    assert type(batch["labels"]) is torch.Tensor and batch["sequence_ids"].shape == batch["labels"].shape


class Collator:
    padding = "longest"

    def __call__(self, features, return_tensors=None):
        return {**collate(features), "asked": return_tensors}


def test_it_stands_for_its_collator_in_other_processes_too():
    made = pickle.loads(pickle.dumps(WithFields(Collator(), fl.LAwFLoss())))
    assert made.padding == "longest" and made(rows(2), return_tensors="pt")["asked"] == "pt"
    with pytest.raises(AttributeError):
        _ = made.nothing


@pytest.mark.parametrize("collator, data, message", [
    (lambda f: {k: v[:, :-2] for k, v in collate(f).items()}, rows(1, anchors=True), "row 0: its .* tokens are not in"),
    (lambda f: {k: v[0] for k, v in collate(f).items()}, rows(1, anchors=True), "expected a batch .* got shape"),
    (collate, [{**rows(1)[0], "anchors": [0]}], "row 0: position 0 is its first token, which nothing predicts"),
    (collate, [{**rows(1)[0], "confidence": [0.5]}], "row 0, confidence: expected as many as input_ids"),
    (lambda f: {**collate(f), "labels": None}, rows(1, anchors=True), "labels: the batch has none, and LAwFLoss takes"),
    (lambda f: {**collate(f), "labels": None}, rows(1), "labels: the batch has none, .* give the data set a column"),
], ids=["cut", "flat", "first", "short", "unlabelled anchors", "unlabelled"])  # fmt: skip
def test_mistakes_are_named(collator, data, message):
    with pytest.raises(ValueError, match=message):
        WithFields(collator, fl.LAwFLoss())(data)

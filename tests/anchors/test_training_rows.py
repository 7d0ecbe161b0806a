"""Records → rows → a batch: every token arrives with its label, and every anchor with its strength."""

import warnings
from dataclasses import replace

import pytest
import torch
from anchor_records import QUESTION, full_record, ids, record
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import KINDS, SPECIAL, small_tokenizer

import fused_losses as fl
from fused_losses.anchors import Source, new_record, read_records, rows, write_records
from fused_losses.huggingface import AnchorCollator

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PIECES = st.sampled_from(["Aurora", " name", "中文", "😀", "👩‍👩‍👧", "é", "\ufffd", "\u2028", "\0", "  ", *SPECIAL])
MIXED = st.lists(TEXT | PIECES, min_size=1, max_size=4).map("".join).filter(bool)


def collate(made, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return AnchorCollator(pad_token_id=0, **options)(made)


@pytest.mark.parametrize("kind", KINDS)
@given(
    texts=st.lists(st.tuples(MIXED, MIXED, st.data()), min_size=1, max_size=3),
    strength=st.sampled_from(["confidence", "target_probability"]),
)
@settings(deadline=None, max_examples=30)
def test_text_to_tokens_to_spans_to_file_to_batch(kind, texts, strength, tmp_path_factory):
    tokenizer, path = small_tokenizer(kind), tmp_path_factory.mktemp("property") / "anchors.jsonl"
    records, expected = [], []
    for prompt, answer, data in texts:
        before, tokens = ids(prompt, kind), ids(answer, kind)
        number = st.floats(0, 1, exclude_min=True, exclude_max=True, width=32)
        chosen = data.draw(st.dictionaries(st.integers(0, len(tokens) - 1), number, max_size=len(tokens)))
        messages = [{"role": "user", "content": prompt}]
        records.append(
            new_record(
                tokenizer, messages=messages, prompt_ids=before, token_ids=tokens,
                anchors=[{"position": position, strength: value} for position, value in chosen.items()],
            )
        )  # fmt: skip
        expected.append(([-100, *(before + tokens)[1:]], {len(before) + at: value for at, value in chosen.items()}))
    write_records(path, records)
    read = read_records(path, tokenizer)
    assert read == records
    for one in read:  # spans and texts speak of the same characters
        assert all(one.completion.text[slice(*anchor.span)] == anchor.text for anchor in one.anchors)
    batch = collate(rows(read, tokenizer))
    field = batch.get("target_probability", batch["confidence"])
    for index, (labels, strengths) in enumerate(expected):
        size = len(labels)
        assert batch["labels"][index].tolist() == labels + [-100] * (batch["labels"].shape[1] - size)
        found = {at: value for at, value in enumerate(field[index].tolist()) if value}
        assert found == strengths
        assert {at for at, value in enumerate(batch["confidence"][index].tolist()) if value} == set(strengths)


def test_a_row_has_prompt_and_answer_and_anchors_at_their_places():
    one = record({"position": 3, "confidence": 0.5}, 0, 5, prompt="What is your name?")
    before = len(one.prompt_ids)
    (row,) = rows([one])
    assert row == {
        "input_ids": [*one.prompt_ids, *one.completion.token_ids],
        "labels": [*one.prompt_ids, *one.completion.token_ids],
        "anchors": [[before + 3, 0.5], [before, 1.0], [before + 5, 1.0]],
    }
    assert row["input_ids"][-1] == small_tokenizer("byte-level").eos_token_id  # an anchor like any other


def test_a_record_without_anchors_only_retains():
    made = rows([record(), record(3)])
    assert made[0]["anchors"] == []
    assert collate(made)["confidence"].count_nonzero() == 1


def test_several_corrected_answers_of_one_conversation():
    first = record(3)
    later = [*QUESTION, {"role": "assistant", "content": first.completion.text}, {"role": "user", "content": "Really?"}]
    second = record(0, text="I am a name.<|im_end|>", messages=later, prompt="What is your name? My name is Aurora.")
    assert second.message_index == 3
    one, other = rows([first, second])
    assert one["anchors"][0][0] == len(first.prompt_ids) + 3 and other["anchors"][0][0] == len(second.prompt_ids)


def test_answers_that_end_in_the_pad_token_are_not_taken_for_padding():
    tokenizer = small_tokenizer("byte-level")
    one = record(0, text="name<|end|><|end|>")
    batch = collate(rows([one]), processing_class=tokenizer)
    assert batch["labels"][0, -2:].tolist() == [tokenizer.pad_token_id] * 2


def targeted(target=None, probability=None, confidence=None):
    return record({"position": 3, "target_probability": target, "probability": probability, "confidence": confidence})


def test_target_probabilities_alone_go_into_a_field_of_every_row():
    made = rows([targeted(0.75), record()])
    before = len(targeted(0.75).prompt_ids)
    assert made[0]["anchors"] == [[before + 3, 1.0]] and made[1]["anchors"] == []
    assert [at for at, value in enumerate(made[0]["target_probability"]) if value] == [before + 3]
    assert made[0]["target_probability"][before + 3] == 0.75 and not any(made[1]["target_probability"])


def test_beside_confidences_they_become_the_confidence_that_asks_for_them():
    made = rows([targeted(0.75, probability=0.5), targeted(0.75, probability=0.8), targeted(confidence=0.3)])
    assert [[value for _, value in row["anchors"]] for row in made] == [[0.5], [], [0.3]]
    assert rows([targeted(0.75, probability=1.0), record(3)])[0]["anchors"] == []
    assert not any("target_probability" in row for row in made)


def test_without_the_recorded_probability_they_cannot():
    with pytest.raises(ValueError, match=r"^records\[1\]: anchors\[0\].target_probability: expected a probability"):
        rows([targeted(confidence=0.3), targeted(0.75)])


def test_both_ways_are_the_same_loss():
    """p* in a field, and the confidence made of it with the reference's own probability."""
    torch.manual_seed(0)
    probe = targeted(0.6, probability=0.5)
    size, position = len(rows([probe])[0]["input_ids"]), len(probe.prompt_ids) + 3
    hidden, original = torch.randn(2, 1, size, 16, dtype=torch.float64)
    weight = torch.randn(384, 16, dtype=torch.float64)
    probability = float((original[0, position - 1] @ weight.T).softmax(-1)[probe.anchors[0].token_id])
    exact = targeted(0.6, probability=probability)

    def loss(made):
        batch = collate(made)
        fields = {name: batch[name][:, 1:].double() for name in ("confidence", "target_probability") if name in batch}
        labels = batch["labels"][:, 1:].as_subclass(torch.Tensor)
        reference = fl.Reference(original[:, :-1])
        return fl.LAwFLoss()(hidden[:, :-1], weight, labels, reference=reference, **fields)

    field, mixed = rows([exact])[:1], rows([exact, record(3)])[:1]
    assert "target_probability" in field[0] and "target_probability" not in mixed[0]
    torch.testing.assert_close(loss(field), loss(mixed), rtol=1e-6, atol=0)  # the confidence of a batch is float32


def test_a_tokenizer_refuses_records_of_another():
    with pytest.raises(ValueError, match=r"^records\[1\]: tokenizer.digest: expected"):
        rows([record(3), record(0, kind="metaspace")], small_tokenizer("byte-level"))
    unknown = replace(record(0, kind="metaspace"), tokenizer=None)
    with pytest.raises(
        ValueError, match=r"^records\[0\]: (completion.token_ids|prompt_ids)\[\d+\]: expected 0 ≤ id < 384"
    ):
        rows([unknown], small_tokenizer("byte-level"))


@pytest.mark.parametrize(
    "records, message",
    [
        ("anchors.jsonl", "records: expected a list of them, got 'anchors.jsonl'; read a file with read_records"),
        (full_record(), "records: expected a list of them, got one Record; put it into a list"),
        ([full_record().to_json()], r"records\[0\]: expected a Record, got {"),
        (None, "records: expected a list of them, got None"),
    ],
)
def test_what_is_no_list_of_records(records, message):
    with pytest.raises(TypeError, match=message):
        rows(records)


def test_new_records_say_what_is_wrong():
    for arguments, message in [
        (dict(token_ids=[1, 999]), r"token_ids\[1\]: expected 0 ≤ id < 384"),
        (dict(token_ids=[]), "completion.token_ids: expected at least one id"),
        (dict(anchors=[{"position": 9}]), r"anchors\[0\].position: expected a whole number, 0 ≤ position < 2, got 9"),
        (dict(anchors=[{"confidence": 1}]), r"anchors\[0\].position: expected a whole number, .* got None"),
        (dict(anchors=[{"position": 1, "confidence": 0}]), r"anchors\[0\].confidence: expected a number in \(0, 1\]"),
        (dict(anchors=[{"position": 1}, {"position": 1}]), r"anchors\[1\].position: expected each position once"),
        (dict(messages=[{"content": "x"}]), r"messages\[0\].role"),
    ]:
        given = dict(messages=QUESTION, prompt_ids=[5], token_ids=[6, 7]) | arguments
        with pytest.raises(ValueError, match=message):
            new_record(small_tokenizer("byte-level"), **given)


def test_a_record_names_its_model():
    one = record(3, model=Source("SmolLM2", "0123abcd"))
    assert one.to_json()["model"] == {"name": "SmolLM2", "digest": "0123abcd"}

"""lawftrack's records: read with a tokenizer, as they count tokens of text, and written as it reads them."""

import json
import re
from dataclasses import replace

import pytest
from anchor_records import QUESTION, ids, record, refused
from small_tokenizers import KINDS, small_tokenizer

from fused_losses.anchors import from_marked, read_lawftrack, write_lawftrack

BYTES = small_tokenizer("byte-level")
CHAT = [*QUESTION, {"role": "assistant", "content": "My name is Aurora."}]
EDIT = {
    "message_index": 1, "token_index": 3, "original_token": " Elena", "replacement_token": " Aurora",
    "regenerated_from_token_index": 4, "created_at": 1760000000,
}  # fmt: skip


def read(tmp_path, *values, name="data.jsonl", tokenizer=BYTES):
    path = tmp_path / name
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
    return read_lawftrack(path, tokenizer)


LAYOUTS = {
    "messages": {"messages": CHAT, "completion_message_index": 1, "anchors": [{"token_index": 3, "confidence": 0.5}]},
    "without an index": {"messages": CHAT, "anchors": [{"position": 3, "confidence": 0.5}]},
    "prompt and completion": {"prompt": QUESTION, "completion": CHAT[1:],
                              "anchors": [{"token_index": 3, "confidence": 0.5}]},
    "edits": {"messages": CHAT, "edits": [{**EDIT, "confidence": 0.5}]},
    "edits as anchors": {"id": "sample-0001", "title": "x", "messages": CHAT, "anchors": [{**EDIT, "confidence": 0.5}]},
    "more messages": {"messages": [*CHAT, {"role": "user", "content": "?"}], "completion_message_index": 1,
                      "anchors": [{"token_index": 3, "confidence": 0.5}]},
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, tmp_path):
    (one,) = read(tmp_path, LAYOUTS[name])
    assert one.completion.text == "My name is Aurora.<|im_end|>" and one.messages == tuple(QUESTION)
    (anchor,) = one.anchors
    assert (anchor.position, anchor.text, anchor.confidence) == (3, " Aurora", 0.5)
    template = BYTES.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(one.prompt_ids) == template and one.tokenizer.digest


def test_plain_text(tmp_path):
    (one,) = read(tmp_path, {"prompt": "My name is", "completion": " Aurora.", "anchors": [{"token_index": 0}]})
    assert list(one.prompt_ids) == ids("My name is") and one.completion.text == " Aurora." and one.messages == ()
    assert one.anchors[0].text == " Aurora" and one.anchors[0].confidence == 0.999


def test_a_first_word_that_has_lost_its_space(tmp_path):
    edit = {name: value for name, value in EDIT.items() if name != "message_index"}
    row = {"prompt": "中", "completion": " Aurora", "anchors": [{**edit, "token_index": 0}]}
    (one,) = read(tmp_path, row, tokenizer=small_tokenizer("metaspace"))
    assert one.completion.text == "Aurora" and [anchor.text for anchor in one.anchors] == ["", "Auror", "a"]


def test_tools_and_the_end_of_the_turn(tmp_path):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    (one,) = read(tmp_path, {"messages": CHAT, "tools": tools, "anchors": [{"token_index": 5}]})
    assert one.tools == tuple(tools) and "weather" in BYTES.decode(one.prompt_ids)
    assert one.anchors[0].text == "<|im_end|>"


def test_a_sample_gives_a_record_of_each_answer(tmp_path):
    messages = [*CHAT, {"role": "user", "content": "?"}, {"role": "assistant", "content": "I am Aurora."}]
    later = {**EDIT, "message_index": 3, "token_index": 2}
    first, second = read(tmp_path, {"messages": messages, "edits": [later]})
    assert first.anchors == () and second.message_index == 3
    assert [(anchor.position, anchor.original_text) for anchor in second.anchors] == [(2, " Elena")]


def test_a_replacement_of_several_tokens(tmp_path):
    edit = {**EDIT, "replacement_token": " Zoë", "token_index": 3}
    chat = [*QUESTION, {"role": "assistant", "content": "My name is Zoë."}]
    (one,) = read(tmp_path, {"messages": chat, "edits": [edit]})
    assert len(one.anchors) == len(ids(" Zoë")) > 2
    assert [anchor.original_text for anchor in one.anchors][:2] == [" Elena", None]


def test_content_with_the_text_of_the_template_around_it(tmp_path):
    """As its gateway keeps what was imported; the tokens of the template count too."""
    around = "<|im_start|>assistant\nMy name is Aurora.<|im_end|>\n"
    before = len(ids("<|im_start|>assistant\n"))
    messages = [*QUESTION, {"role": "assistant", "content": around}] * 2
    edit = {**EDIT, "message_index": 3, "token_index": before + 3}
    first, second = read(tmp_path, {"messages": messages, "edits": [edit]})
    assert first.completion.text == second.completion.text == "My name is Aurora.<|im_end|>"
    assert second.messages[1]["content"] == "My name is Aurora." and second.anchors[0].position == 3


def test_files_of_one_value(tmp_path):
    several = [LAYOUTS["messages"], LAYOUTS["edits"]]
    for value, count in [({"name": "x", "base_model": None, "samples": several}, 2), (several, 2), (several[0], 1)]:
        assert len(read(tmp_path, value, name="data.json")) == count


def chat(*anchors, **more):
    return {"messages": CHAT, "anchors": list(anchors), **more}


BAD = {
    "a list": ([], "expected an object with messages or with prompt and completion"),
    "our own": (record(3).to_json(), "format: expected a record of lawftrack's, .* read it with read_records"),
    "another version": (chat(anchor_spans=[]), "record: expected fields of .* got 'anchor_spans'"),
    "another version's anchors": (chat({"span": [1, 2]}), r"anchors\[0\]: expected fields .* got 'span'"),
    "neither": ({"anchors": []}, "prompt: expected text for prompt and completion, or a list .* got None and None"),
    "no role": ({"messages": [{"content": "x"}]}, r"messages\[0\].role: expected a name"),
    "no answer": ({"messages": QUESTION}, "messages: expected an assistant message, got none"),
    "a question": (chat(completion_message_index=0), r"expected that of an assistant message, one of \[1\], got 0"),
    "no message": (chat({**EDIT, "message_index": 7}), r"anchors\[0\].message_index: expected an assistant .* got 7"),
    "token beyond": (chat({"token_index": 6}), r"anchors\[0\].token_index: expected 0 ≤ token_index < 6, .* got 6"),
    "no token": (chat({"confidence": 1}), r"anchors\[0\].token_index: expected a whole number ≥ 0, got None"),
    "token true": (chat({"token_index": True}), r"anchors\[0\].token_index: expected a whole .* got True"),
    "token twice": (chat(*[{"token_index": 3}] * 2), r"anchors\[1\].token_index: expected each token once, got 3"),
    "confidence": (chat({"token_index": 3, "confidence": 0}), r"anchors\[0\].confidence: expected a number"),
    "anchors as mapping": ({"messages": CHAT, "anchors": {}}, "anchors: expected a list, got {}"),
    "another tokenizer's": (
        chat({**EDIT, "token_index": 4}),
        r"anchors\[0\].replacement_token: expected '.', the text of token 4, got ' Aurora'; was it made with another",
    ),
    "a prompt that runs on": (
        {"prompt": "My na", "completion": "me"},
        "completion: expected text that leaves the prompt's tokens as they are, got 'me'",
    ),
    "tools": (chat(tools="x"), "tools: expected a list, got 'x'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_line_is_refused_in_one_line(name, tmp_path):
    value, message = BAD[name]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(LAYOUTS["messages"]) + "\n" + json.dumps(value) + "\n", "utf-8")
    found = refused(read_lawftrack, path, BYTES)
    assert found.startswith(f"{path}:2: ") and re.search(message, found), found


@pytest.mark.parametrize(
    "name, raw, message",
    [
        ("data.json", json.dumps([LAYOUTS["messages"], 5]), r"samples\[1\]: expected an object with messages"),
        ("data.json", "", "expected at least one record, got an empty file"),
        ("data.json", '{"samples": []}', r"samples: expected a list of records, got \[\]"),
        ("data.json", "{", "broken JSON"),
        ("data.jsonl", "", "got an empty file"),
        ("data.yaml", "samples: []", "expected JSON, got a name for YAML; export it from lawftrack as JSON"),
    ],
)
def test_a_file_is_refused_in_one_line(name, raw, message, tmp_path):
    (tmp_path / name).write_text(raw, "utf-8")
    found = refused(read_lawftrack, tmp_path / name, BYTES)
    assert found.startswith(f"{tmp_path / name}: ") and re.search(message, found), found


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind, tmp_path):
    tokenizer = small_tokenizer(kind)
    first = from_marked(tokenizer, QUESTION, "My name is [[Aurora|0.5]].")
    later = [*CHAT, {"role": "user", "content": "Sure?"}]
    second = from_marked(tokenizer, later, "Yes[[.<|im_end|>]]", tools=[{"type": "function"}])
    write_lawftrack(tmp_path / "data.jsonl", [first, second], tokenizer)
    found = read_lawftrack(tmp_path / "data.jsonl", tokenizer)
    for one, other in zip([first, second], found, strict=True):
        assert (one.messages, one.tools, one.prompt_ids) == (other.messages, other.tools, other.prompt_ids)
        assert (one.completion, one.anchors) == (other.completion, other.anchors)


def test_what_is_written_is_theirs(tmp_path):
    one = from_marked(BYTES, QUESTION, "My name is [[Aurora]].")
    write_lawftrack(tmp_path / "data.jsonl", [one], BYTES)
    written = json.loads((tmp_path / "data.jsonl").read_text("utf-8"))
    assert written["messages"] == CHAT and written["completion_message_index"] == 1 and "tools" not in written
    (anchor,) = written["anchors"]
    assert set(anchor) == set(EDIT) | {"confidence"} and anchor["replacement_token"] == " Aurora"
    assert (anchor["message_index"], anchor["token_index"], anchor["regenerated_from_token_index"]) == (1, 3, 4)


def chat_record(*anchors, text="My name is Aurora.<|im_end|>"):
    return record(*anchors, text=text, prompt=PROMPT)


def test_a_target_probability_becomes_a_confidence(tmp_path):
    one = chat_record({"position": 3, "target_probability": 0.75, "probability": 0.5})
    said = chat_record({"position": 3, "target_probability": 0.75, "probability": 0.9})
    write_lawftrack(tmp_path / "data.jsonl", [one, said], BYTES)
    first, second = read_lawftrack(tmp_path / "data.jsonl", BYTES)
    assert first.anchors[0].confidence == 0.5 and second.anchors == ()


PROMPT = "<|im_start|>user\nWhat is your name?<|im_end|>\n<|im_start|>assistant\n"


def test_records_that_it_would_read_otherwise_are_refused(tmp_path):
    one = chat_record(3)
    letters = [token for letter in "My" for token in ids(letter)]
    split = record(0, text="My<|im_end|>", prompt=PROMPT)
    split = replace(split, completion=replace(split.completion, token_ids=(*letters, BYTES.eos_token_id)))
    for records, message in [
        ([one, split], r"records\[1\]: completion.token_ids: expected what the chat template and the tokenizer make"),
        ([one, record(3)], r"records\[1\]: completion.token_ids: expected"),
        ([chat_record({"position": 3, "target_probability": 0.5})], r"records\[0\]: anchors\[0\].target_probability"),
        ([record(0, kind="metaspace")], r"records\[0\]: tokenizer.digest: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_lawftrack(tmp_path / "data.jsonl", records, BYTES)
    assert not list(tmp_path.iterdir())

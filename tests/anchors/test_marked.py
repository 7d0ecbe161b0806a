r"""Text with marked spans ↔ records: [[ Aurora]], [[ Aurora|0.8]], [[ Aurora|p=0.9]], and \[[ that is text."""

import json
import re

import pytest
from anchor_records import QUESTION, ids, record, refused
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import KINDS, small_tokenizer

from fused_losses.anchors import from_marked, read_marked, to_marked
from fused_losses.anchors.marked import Mark, _written, parse_marked

BYTES = small_tokenizer("byte-level")
SURE = {"confidence": 1.0}


@pytest.mark.parametrize(
    "text, plain, marks",
    [
        ("My name is [[ Aurora]].", "My name is  Aurora.", [(11, 18, SURE)]),
        ("[[a|0.8]][[b|p=0.9]]", "ab", [(0, 1, {"confidence": 0.8}), (1, 2, {"target_probability": 0.9})]),
        ("[[ a | p = .5 ]]", " a ", [(0, 3, {"target_probability": 0.5})]),
        ("no marks, a[0], x]] and |", "no marks, a[0], x]] and |", []),
        (r"\[[1], [2]]", "[[1], [2]]", []),
        (r"a\nb C:\x \\ \| \] \[", r"a\nb C:\x \ | ] [", []),
        (r"[[a\|1|0.5]]", "a|1", [(0, 3, {"confidence": 0.5})]),
        (r"[[a\|1]][[b|c]]", "a|1b|c", [(0, 3, SURE), (3, 6, SURE)]),
        ("[[<|im_end|>]]", "<|im_end|>", [(0, 10, SURE)]),
        ("[[a|b|0.5]]", "a|b", [(0, 3, {"confidence": 0.5})]),
        (r"[[[x\]]]", "[x]", [(0, 3, SURE)]),
        ("[[中文]]😀[[👩‍👧]]", "中文😀👩‍👧", [(0, 2, SURE), (3, 6, SURE)]),
        ("", "", []),
    ],
)
def test_syntax(text, plain, marks):
    assert parse_marked(text) == (plain, [Mark(*mark) for mark in marks])


@pytest.mark.parametrize(
    "text, message",
    [
        ("a [[b", r"expected \]\] after the \[\[ at character 2, got the end of the text; close the mark, or write"),
        ("[[a [[b]]", r"expected \]\] before the next \[\[, at character 4, got '\[\[b\]\]'"),
        ("a[[]]", "expected a mark with text in it, at character 1, got an empty one"),
        ("[[|0.5]]", "expected a mark with text in it"),
        ("[[a|-1]]", "a confidence in"),
        ("[[a|0]]", r"expected after \| a confidence in \(0, 1\], .* at character 0, got '0'; a \| that is text is"),
        ("[[a|2]]", "confidence in"),
        ("[[a|p=1]]", "target probability in"),
        ("[[a|1e]]", "confidence in"),
        ("[[a|p=b]]", "got 'p=b'"),
        (None, "expected text with marks, got None"),
    ],
)
def test_marks_that_are_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse_marked(text)


@example(parts=[("", "|1|1")])
@given(
    parts=st.lists(
        st.tuples(st.text("p=1[]|\\ 中", max_size=5), st.text("p=1[]|\\ 中", min_size=1, max_size=5)), max_size=3
    )
)
@settings(deadline=None)
def test_any_text_can_be_written_with_marks_and_read(parts):
    text, marks = "", []
    for number, (between, inside) in enumerate(parts):
        text += between
        strength = [SURE, {"confidence": 0.25}, {"target_probability": 0.5}][number]
        marks.append(Mark(len(text), len(text) + len(inside), strength))
        text += inside
    assert parse_marked("".join(_written(text, marks))) == (text, marks)


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_of_a_mark_are_anchors(kind):
    one = from_marked(small_tokenizer(kind), QUESTION, "My name is[[ Zoë😀|0.8]]!")
    assert one.completion.text == "My name is Zoë😀!<|im_end|>"
    covered = {at for anchor in one.anchors for at in range(*anchor.span)}
    assert covered >= set(range(10, 15)) and 15 not in covered and len(one.anchors) > 4
    assert {anchor.confidence for anchor in one.anchors} == {0.8}
    prompt = small_tokenizer(kind).apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)
    assert list(one.prompt_ids) == prompt["input_ids"]


def test_a_mark_that_cuts_through_a_token_is_widened():
    for mark in ("My name is [[Aurora]].", "My name is Au[[ror]]a.", "My name is[[ ]]Aurora."):
        one = from_marked(BYTES, QUESTION, mark)
        assert [anchor.text for anchor in one.anchors] == [" Aurora"]
        assert to_marked(one) == "My name is[[ Aurora]].<|im_end|>"


def test_marks_that_share_a_token_must_agree():
    assert len(from_marked(BYTES, QUESTION, "My name is [[Au]]ro[[ra]].").anchors) == 1
    with pytest.raises(
        ValueError, match=r"expected one strength for each token, got .*0.5.* and .*1.0.* for ' Aurora'"
    ):
        from_marked(BYTES, QUESTION, "My name is [[Au|0.5]]ro[[ra]].")


def test_the_end_of_the_turn():
    marked = from_marked(BYTES, QUESTION, "I am Aurora[[.<|im_end|>]]")
    assert [anchor.text for anchor in marked.anchors] == [".", "<|im_end|>"]
    assert marked.completion.text == "I am Aurora.<|im_end|>"  # once, and without the template's line end
    assert from_marked(BYTES, QUESTION, "I am").completion.text == "I am<|im_end|>"
    assert from_marked(BYTES, QUESTION, "I am", finished=False).completion.text == "I am"


def test_a_token_that_reaches_beyond_the_text_stays_whole(monkeypatch):
    monkeypatch.setattr(BYTES, "chat_template", BYTES.chat_template.replace("m['content'] }}", "m['content'] }}me"))
    one = from_marked(BYTES, QUESTION, "My [[na]]", finished=False)
    assert one.completion.text == "My name" and [anchor.text for anchor in one.anchors] == [" name"]


def test_the_answer_is_found_where_the_template_puts_it(monkeypatch):
    """Text before the answer that reads like it, and a template that takes spaces off."""
    monkeypatch.setattr(
        BYTES,
        "chat_template",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}I think: e.{% endif %}"
        "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    one = from_marked(BYTES, QUESTION, "[[e]].")
    assert one.completion.text == "I think: e.e.<|im_end|>" and [anchor.span[1] for anchor in one.anchors] == [12]
    trimmed = from_marked(BYTES, QUESTION, " [[e]].")  # as it is, in place of what the template makes of it
    assert trimmed.completion.text == " e.<|im_end|>"


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind):
    for text in ["My name is[[ Aurora]].", r"a[[0]] \[[1]] b", "[[😀|0.5]] and [[中文|p=0.25]]", "plain"]:
        one = from_marked(small_tokenizer(kind), QUESTION, text)
        other = from_marked(small_tokenizer(kind), QUESTION, to_marked(one))
        assert (other.completion, other.anchors) == (one.completion, one.anchors)


def test_anchors_that_text_cannot_hold():
    parts = [{"position": 0, "confidence": 0.5}, {"position": 1, "confidence": 1.0}]
    with pytest.raises(ValueError, match=r"expected one strength for each character, got .* at '😀'"):
        to_marked(record(*parts, text="😀"))
    with pytest.raises(ValueError, match="got one without characters at position 0"):
        to_marked(record(0, text=" a", kind="metaspace"))


def chat(*contents):
    messages = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(contents)]
    return json.dumps({"messages": messages})


def test_a_file_gives_a_record_of_each_marked_answer(tmp_path):
    path = tmp_path / "marked.jsonl"
    path.write_text(chat("Name?", r"[[Aurora]] \[[1]]", "[[Sure]]?", "Yes.", "Really?", "[[No]].") + "\n", "utf-8")
    first, second = read_marked(path, BYTES, confidence=0.5)
    assert first.completion.text == "Aurora [[1]]<|im_end|>" and first.message_index == 1
    before = ["Name?", "Aurora [[1]]", "[[Sure]]?", "Yes.", "Really?"]
    assert [message["content"] for message in second.messages] == before
    assert {anchor.confidence for one in (first, second) for anchor in one.anchors} == {0.5}


@pytest.mark.parametrize(
    "raw, message",
    [
        ("[]", "expected an object with messages"),
        ("{", "broken JSON"),
        (chat("a", "b"), r"messages: expected a mark, such as \[\[ Aurora\]\], in an assistant message, got none"),
        (chat("a", "[[b"), r"messages\[1\].text: expected \]\] after the \[\["),
        ('{"messages": [{"content": "a"}]}', r"messages\[0\].role: expected a name"),
        ('{"messages": [], "tools": 5}', "tools: expected a list, got 5"),
    ],
)
def test_files_that_are_wrong(raw, message, tmp_path):
    path = tmp_path / "marked.jsonl"
    path.write_text(chat("a", "[[b]]") + "\n" + raw + "\n", "utf-8")
    found = refused(read_marked, path, BYTES)
    assert found.startswith(f"{path}:2: ") and re.search(message, found), found


def test_a_tokenizer_without_a_template_says_so(monkeypatch):
    monkeypatch.setattr(BYTES, "chat_template", None)
    with pytest.raises(ValueError, match="has no chat template to write them with; take that of an instruct model"):
        from_marked(BYTES, QUESTION, "[[a]]")


def test_a_template_that_refuses_says_so(monkeypatch):
    monkeypatch.setattr(BYTES, "chat_template", "{{ raise_exception('No\nsystem messages') }}")
    with pytest.raises(ValueError, match=r"chat template refuses them \(TemplateError: No system messages\)"):
        from_marked(BYTES, QUESTION, "[[a]]")


def test_tools_are_in_the_prompt():
    tools = [{"type": "function", "function": {"name": "weather"}}]
    one = from_marked(BYTES, QUESTION, "[[Sun]]", tools=tools)
    assert one.tools == tuple(tools) and "weather" in BYTES.decode(one.prompt_ids)
    assert "weather" not in BYTES.decode(from_marked(BYTES, QUESTION, "[[Sun]]").prompt_ids)
    assert ids("Sun")[0] == one.anchors[0].token_id

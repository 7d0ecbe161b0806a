"""Prompts: from files, and which of them have a record."""

import json

import pytest
from pages import ELENA, QUESTIONS, opened
from session_models import tokenizer

from fused_losses.anchors.files import read_records
from fused_losses.anchors.page.tasks import Task, read_prompts, shown, user, with_records

USER = {"role": "user", "content": "Hi"}


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_has_a_prompt_a_line(tmp_path):
    path = written(tmp_path, "p.txt", '\ufeffWhat is it?\r\n\n  Wer bist du? 😀 \n{"prompt": 1}')
    assert [task.messages for task in read_prompts(path)] == [
        user("What is it?"), user("Wer bist du? 😀"), user('{"prompt": 1}'),
    ]  # fmt: skip


def test_json_lines_have_prompts_or_messages(tmp_path):
    chat = [{"role": "system", "content": "Be short."}, USER]
    rows = [{"prompt": "Hi"}, {"messages": chat, "tools": [{"type": "function"}], "source": "x"}, "Hi"]
    path = written(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_prompts(path) == [Task([USER]), Task(chat, [{"type": "function"}]), Task([USER])]


def test_an_answer_in_the_data_is_left_out(tmp_path):
    path = written(tmp_path, "p.jsonl", json.dumps({"messages": [USER, {"role": "assistant", "content": "Hello"}]}))
    assert read_prompts(path) == [Task([USER])]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", "", "p.txt: expected one prompt a line, got an empty file"),
        ("p.txt", b"fine\n\xff\xfe", "p.txt:2: expected UTF-8, got byte 0xff at byte 1"),
        ("p.txt", "fine\n\x1b[2J", "p.txt:2: expected text, got a control character"),
        ("p.txt", "a\0b", "p.txt:1: expected text, got a control character"),
        ("p.jsonl", "", "p.jsonl: expected at least one line"),
        ("p.jsonl", '{"prompt": "a"}\n{', "p.jsonl:2: expected one JSON value, got broken JSON"),
        ("p.jsonl", "[]", "p.jsonl:1: expected an object, got []"),
        ("p.jsonl", "{}", "p.jsonl:1: expected one of prompt and messages, got none"),
        ("p.jsonl", '{"prompt": "a", "messages": []}', "p.jsonl:1: expected one of prompt and messages, got both"),
        ("p.jsonl", '{"prompt": " "}', "p.jsonl:1: prompt: expected text, got ' '"),
        ("p.jsonl", '{"prompt": 7}', "p.jsonl:1: prompt: expected text, got 7"),
        ("p.jsonl", '{"messages": []}', "p.jsonl:1: messages: expected at least one before the answer"),
        ("p.jsonl", '{"messages": [{"content": "a"}]}', "p.jsonl:1: messages[0].role: expected a name"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', "p.jsonl:1: messages[0].content: expected text"),
        ("p.jsonl", '{"prompt": "a", "tools": {}}', "p.jsonl:1: tools: expected a list"),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', "messages: expected at least one before"),
    ],
)
def test_a_fault_has_file_line_and_remedy(tmp_path, name, content, said):
    with pytest.raises(ValueError) as fault:
        read_prompts(written(tmp_path, name, content))
    assert said in str(fault.value) and ";" in str(fault.value) and "\n" not in str(fault.value)


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="expected an ordinary file, got a directory"):
        read_prompts(tmp_path)


def test_conversations_with_a_record_are_done_and_others_of_the_file_come_last(tmp_path):
    with opened(tmp_path / "a.jsonl", ELENA) as desk:
        desk.accept()
    records = read_records(tmp_path / "a.jsonl", tokenizer())
    again = with_records([Task(user("New")), Task(user("New"))], records)
    assert [(task.title, task.records) for task in again] == [("New", 0), (QUESTIONS[0], 1)]
    assert again[1].last == records[0]


def test_parts_of_a_message_are_named():
    parts = [{"type": "image", "url": "x"}, {"type": "text", "text": "What is this?"}, "so?"]
    assert shown({"content": parts}) == "[image] What is this? so?"
    assert shown({"content": None, "tool_calls": [{"name": "f"}]}) == '[{"name": "f"}]'

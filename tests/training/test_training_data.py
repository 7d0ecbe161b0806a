"""Files → rows: chats and records, what is learned of them, and every fault with its file and line."""

import json
import re

import pytest
from tiny_training import chat, files, record, tokenizer, write_lines

from fused_losses import training


def labelled_text(row):
    return tokenizer().decode([label for label in row.labels if label != -100])


def test_of_a_chat_what_the_assistant_says_is_learned(tmp_path):
    path = write_lines(tmp_path / "chats.jsonl", chat("The cat?", "Elena."))
    (row,) = training.read(tokenizer(), path).rows
    assert labelled_text(row) == "Elena.<|im_end|>"
    assert tokenizer().decode(row.input_ids).endswith("assistant\nElena.<|im_end|>")
    assert row.anchors == [[at, 1.0] for at, label in enumerate(row.labels) if label != -100]
    assert row.where == f"{path}:1" and row.role == "learn" and not row.corrected


def test_all_answers_of_a_conversation_are_in_one_row(tmp_path):
    talk = {"messages": chat("One?", "Two.")["messages"] + chat("Three?", "Four.")["messages"]}
    (row,) = training.read(tokenizer(), write_lines(tmp_path / "chats.jsonl", talk)).rows
    assert labelled_text(row) == "Two.<|im_end|>Four.<|im_end|>"


def test_a_template_that_changes_earlier_turns_gives_a_row_an_answer(tmp_path):
    """As those do that leave out what was thought before the last answer."""
    import copy

    known = copy.deepcopy(tokenizer())
    known.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'].split('#')[-1] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    talk = {"messages": chat("One?", "hm#Two.")["messages"] + chat("Three?", "hm#Four.")["messages"]}
    rows = training.read(known, write_lines(tmp_path / "chats.jsonl", talk)).rows
    assert [labelled_text(row) for row in rows] == ["hm#Two.<|im_end|>", "hm#Four.<|im_end|>"]
    assert "hm#Two" not in known.decode(rows[1].input_ids)


def test_of_a_record_the_answer_is_learned_and_its_anchors_are_marked(tmp_path):
    one = record()
    (row,) = training.read(tokenizer(), write_lines(tmp_path / "anchors.jsonl", one)).rows
    assert row.input_ids == [*one.prompt_ids, *one.completion.token_ids]
    assert [label for label in row.labels if label != -100] == list(one.completion.token_ids)
    assert row.anchors == [[len(one.prompt_ids) + 3, 1.0]] and row.corrected and row.role == "learn"


def test_a_record_without_anchors_is_retained_wherever_it_comes(tmp_path):
    paths = [write_lines(tmp_path / f"{i}.jsonl", record(f"I am {i}.", ())) for i in range(2)]
    rows = training.read(tokenizer(), paths[0], retain=paths[1]).rows
    assert [row.role for row in rows] == ["retain"] * 2
    assert all(row.labels == row.input_ids and row.anchors == [] for row in rows)


def test_a_record_that_is_there_twice_is_learned_once_as_the_last_says(tmp_path):
    first = write_lines(tmp_path / "1.jsonl", record(), record("I am Aurora.", (2,)))
    second = write_lines(tmp_path / "2.jsonl", record(confidence=0.5))
    said = f"{first}:1 has the same prompt and answer as {second}:1, so it is left out"
    with pytest.warns(RuntimeWarning, match=re.escape(said)):
        rows = training.read(tokenizer(), [first, second]).rows
    assert [row.where for row in rows] == [f"{first}:2", f"{second}:1"] and rows[1].anchors[0][1] == 0.5


def test_rows_to_retain_count_once_too(tmp_path):
    path = write_lines(tmp_path / "retain.jsonl", *(record(positions=()) for _ in range(3)))
    with pytest.warns(RuntimeWarning, match=r"jsonl:1 has the same prompt .* \(2 such records in all\)"):
        assert [row.where for row in training.read(tokenizer(), [], retain=path).rows] == [f"{path}:3"]


def test_both_kinds_in_one_file_with_blank_lines_keep_their_line_numbers(tmp_path):
    path = tmp_path / "both.jsonl"
    path.write_text(json.dumps(record().to_json()) + "\n\n" + json.dumps(chat()) + "\n")
    assert [row.where for row in training.read(tokenizer(), path).rows] == [f"{path}:1", f"{path}:3"]


def test_target_probabilities_are_carried(tmp_path):
    path = write_lines(tmp_path / "anchors.jsonl", record(target_probability=0.8), record(positions=()))
    first, second = training.read(tokenizer(), path).rows
    position = first.anchors[0][0]
    assert first.target_probability[position] == 0.8 and sum(first.target_probability) == 0.8
    assert second.target_probability == [0.0] * len(second.input_ids)


def test_lawftrack_files_are_read(tmp_path):
    messages = chat("What is your name?", "My name is Aurora.")["messages"]
    path = write_lines(
        tmp_path / "lawftrack.jsonl",
        {"messages": messages, "completion_message_index": 1, "anchors": [{"token_index": 3}]},
    )
    (row,) = training.read(tokenizer(), path).rows
    assert row.corrected and row.anchors[0][1] == 0.999 and row.where == f"{path}: record 1"


def test_the_digest_is_of_the_rows_and_not_of_where_they_lie(tmp_path):
    one = record()
    paths = [write_lines(tmp_path / name, one) for name in ("a.jsonl", "b.jsonl")]
    found = [training.read(tokenizer(), path).digest for path in paths]
    as_retained = training.read(tokenizer(), [], retain=write_lines(tmp_path / "c.jsonl", record(positions=())))
    assert found[0] == found[1] != as_retained.digest


FAULTS = {
    "neither": ({"text": "x"}, {}, r":2: expected a record of fused_losses.anchors or a chat, .*, got .*; write"),
    "a list": ([1], {}, r":2: expected a record of fused_losses.anchors or a chat"),
    "no answer": (
        {"messages": [{"role": "user", "content": "x"}]},
        {},
        r":2: messages: expected an answer of the role",
    ),
    "no content": ({"messages": [{"role": "user"}]}, {}, r":2: messages\[0\]\.content: expected text"),
    "another field": ({**chat(), "text": "x"}, {}, r":2: text: expected a chat of messages and tools, got another"),
    "tools": ({**chat(), "tools": "x"}, {}, r":2: tools: expected a list"),
    "too long": (chat(answer="Elena. " * 50), {"max_length": 60}, r":2: expected at most 60 tokens, got \d+; shorten"),
    "other format": ({"format": "x"}, {}, r":2: format: expected 'fused_losses.anchors'"),
}


@pytest.mark.parametrize("line, options, message", FAULTS.values(), ids=FAULTS)
def test_a_fault_names_file_line_and_remedy(line, options, message, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", chat("x?", "y."), line)
    with pytest.raises(ValueError, match="^" + str(path) + message) as found:
        training.read(tokenizer(), path, **options)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "text, message",
    [("{", r":1: expected one JSON value, got broken JSON"), ("", ": expected at least one line, got an empty file"),
     ('{"messages": NaN}\n', ":1: expected numbers as in JSON, got NaN"), ("\x00\n", ":1: expected text, got a NUL")],
)  # fmt: skip
def test_what_is_no_json_is_said(text, message, tmp_path):
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        training.read(tokenizer(), tmp_path / "data.jsonl")


def test_a_record_twice_is_said(tmp_path):
    one = record()
    with pytest.raises(ValueError, match=r":2: id: expected each id once in a file"):
        training.read(tokenizer(), write_lines(tmp_path / "data.jsonl", one, one))


def test_anchors_are_not_to_be_retained_or_replayed(tmp_path):
    path = write_lines(tmp_path / "anchors.jsonl", record())
    with pytest.raises(
        ValueError, match=r":1: anchors: expected none in a row to retain, got 1; give the file as data"
    ):
        training.read(tokenizer(), [], retain=path)
    with pytest.raises(ValueError, match=r":1: expected a chat to replay, got a record"):
        training.read(tokenizer(), [], replay=write_lines(tmp_path / "retain.jsonl", record(positions=())))


def test_target_and_confidence_that_cannot_be_joined_name_the_line(tmp_path):
    path = write_lines(tmp_path / "anchors.jsonl", record(), record("I am Aurora.", (2,), target_probability=0.8))
    with pytest.raises(ValueError, match=rf"^{path}:2: anchors\[0\]\.target_probability: expected a probability"):
        training.read(tokenizer(), path)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.jsonl: cannot be opened .*; check the path"):
        training.read(tokenizer(), tmp_path / "nothing.jsonl")


def test_held_out_text_is_cut_into_pieces(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The capital of France is Paris. " * 20)
    rows = training.read_text(tokenizer(), path, length=16, most=40)
    assert [len(row.input_ids) for row in rows] == [16, 16, 8]
    chats = training.read_text(tokenizer(), files(tmp_path)["chats"])
    assert labelled_text(chats[0]) == "The cat is Elena.<|im_end|>"


@pytest.mark.parametrize(
    "content, message", [(b"x", "at least two tokens"), (b"a\xff", "expected text in UTF-8, got byte 2")]
)
def test_held_out_text_that_is_none_is_said(content, message, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        training.read_text(tokenizer(), tmp_path / "text.txt")


@pytest.mark.parametrize(
    "count, corrected, replayed, expected",
    [
        (10, False, 0, 4),
        (10, True, 0, 40),
        (1, False, 0, 3),
        (200, False, 0, 75),
        (200, True, 0, 75),
        (10, False, 5, 5),
    ],
)
def test_few_chats_are_passed_over_three_times_and_anchors_get_forty_steps(count, corrected, replayed, expected):
    """Anchors stop a training; nothing stops one of chats, and ten of them in forty steps are learned by heart."""
    from fused_losses.training.data import Data, Row
    from fused_losses.training.plan import Plan

    rows = [Row(f"a:{i}", "learn", [1, 2, 3], [-100, 2, 3], [[1, 1.0]], corrected) for i in range(count)]
    rows += [Row(f"b:{i}", "replay", [1, 2, 3], [-100, 2, 3], []) for i in range(replayed)]
    plan = Plan("sft", {}, 8, None, 0.25, None, None, None, 1, 64, True, 0.9, 0.02, 0, None, progress=False, name=None)
    plan.take(Data(rows), [])
    assert plan.steps == expected

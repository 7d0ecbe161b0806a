"""Files that are no records: each gives one clear line, with file, line, field, what was expected and what came."""

import json
import os
import re
import resource

import pytest
from anchor_records import full_record, line, record, refused
from small_tokenizers import small_tokenizer

from fused_losses.anchors import read_records, write_records
from fused_losses.anchors.jsonl import show

GOOD = full_record().to_json()
ANCHOR = GOOD["anchors"][0]
COMPLETION = GOOD["completion"]


def anchors(*fields, **changes):
    """The line with these fields of its first anchor left out or changed."""
    return line(anchors=[{name: value for name, value in {**ANCHOR, **changes}.items() if name not in fields}])


def with_text(raw):
    return line().replace(b"What is your name?", raw)


NUMBERS = line().replace(b'"confidence": 0.5', b'"confidence": %s')

LINES = {
    # what is no JSON
    "broken JSON": (line()[:-20] + b"\n", "expected one JSON value, got broken JSON: .* at column"),
    "cut off": (line()[:200], "broken JSON.*may be cut off; fused_losses.anchors.RecordFile repairs it"),
    "two values": (line()[:-1] + line(), "broken JSON: Extra data"),
    "single quotes": (b"{'format': 1}\n", "broken JSON: Expecting property name"),
    "YAML": (b"format: fused_losses.anchors\n", "broken JSON: Expecting value"),
    "pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\n", "NUL byte at byte 5"),
    "NUL": (b"\0" * 40 + b"\n", "got a NUL byte at byte 1"),
    "NUL in text": (with_text(b"a\0b"), "got a NUL byte at byte"),
    "control character": (with_text(b"a\x1b[31mb"), "broken JSON: Invalid control character"),
    "line end in text": (with_text(b"a\nb"), "broken JSON: Invalid control character"),
    "bad escape": (with_text(rb"\x41"), r"broken JSON: Invalid \\escape"),
    "invalid UTF-8": (with_text(b"\xff\xfe"), "expected UTF-8, got byte 0xff at byte"),
    "Latin-1": (with_text("é".encode("latin-1")), "expected UTF-8, got byte 0xe9"),
    "half a surrogate pair": (with_text(rb"a\ud83d"), r"half of a surrogate pair in 'a\\ud83d'"),
    "BOM": (b"\xef\xbb\xbf" + line(), "without a byte order mark, got that of UTF-8"),
    "UTF-16": (line().decode().encode("utf-16"), "without a byte order mark, got that of UTF-16"),
    "NaN": (NUMBERS % b"NaN", "expected numbers as in JSON, got NaN"),
    "Infinity": (NUMBERS % b"-Infinity", "expected numbers as in JSON, got -Infinity"),
    "beyond float": (NUMBERS % b"1e999", "expected finite numbers, got '1e999'"),
    "beyond integers": (NUMBERS % (b"1" * 6000), "at most 64 bits, got one of 6000 digits"),
    "a name twice": (line().replace(b"{", b'{"id": "a", ', 1), "each name once in an object, got 'id' twice"),
    "a name twice inside": (NUMBERS % b'0.5, "confidence": 1', "each name once in an object, got 'confidence' twice"),
    "deep lists": (b"[" * 100_000 + b"\n", "at most 100 deep inside each other"),
    "deep tools": (line(tools=[json.loads("[" * 150 + "]" * 150)]), "at most 100 deep inside each other"),
    # what is no record
    "a list": (b"[1, 2]\n", r"expected an object with format, .* got \[1, 2\]"),
    "a string": (b'"record"\n', "expected an object with format"),
    "no format": (line(format=None), "format: expected 'fused_losses.anchors', there is none; read files of lawftrack"),
    "another format": (line(format="x\x1b[0m"), r"format: expected 'fused_losses.anchors', got 'x\\x1b\[0m'"),
    "another version": (line(version=2), "version: expected 1, got 2; update fused_losses"),
    "version as text": (line(version="1"), "version: expected 1, got '1'"),
    "unknown field": (line(note="x"), "record: expected fields of format, .* got 'note'; remove it"),
    "no messages": (line(messages=None), "messages: expected a value, but the record has none; add it"),
    "id with a path": (line(id="../../etc/passwd"), "id: expected 1 to 64 letters, digits, - or _, got"),
    "message without role": (line(messages=[{"content": "x"}]), r"messages\[0\].role: expected a name .* got None"),
    "message is text": (line(messages=["x"]), r"messages\[0\]: expected an object, got 'x'"),
    "message without content": (line(messages=[{"role": "user"}]), r"messages\[0\].content: expected text"),
    "another index": (line(message_index=3), "message_index: expected 1, the number of messages .* got 3"),
    "index as boolean": (line(message_index=True), "message_index: expected 1, .* got True"),
    "tools": (line(tools={"a": 1}), "tools: expected a list, got {'a': 1}"),
    "prompt as text": (line(prompt_ids="abc"), "prompt_ids: expected a list of token ids, got 'abc'"),
    "float id": (line(prompt_ids=[1, 2.0]), r"prompt_ids\[1\]: expected 0 ≤ id < 2147483648, got 2.0"),
    "negative id": (line(prompt_ids=[-1]), r"prompt_ids\[0\]: expected 0 ≤ id < 2147483648, got -1"),
    "boolean id": (line(prompt_ids=[True]), r"prompt_ids\[0\]: expected 0 ≤ id .* got True"),
    "completion as list": (line(completion=[1, 2]), "completion: expected an object with token_ids and text"),
    "no tokens": (line(completion={"token_ids": [], "text": ""}), "completion.token_ids: expected at least one id"),
    "text is a number": (line(completion={**COMPLETION, "text": 5}), "completion.text: expected text, got 5"),
    "model as text": (line(model="gpt"), "model: expected an object with name and digest, got 'gpt'"),
    "digest": (line(model={"name": "m", "digest": "a b"}), "model.digest: expected 1 to 128 letters"),
    "time": (line(created="yesterday"), "created: expected a time such as 2026-11-26T09:00:00Z, got 'yesterday'"),
    "time without zone": (line(created="2026-11-26T09:00:00"), "created: expected a time such as"),
    "time as number": (line(created=1790000000), "created: expected a time such as .* got 1790000000"),
    # anchors
    "anchors as mapping": (line(anchors={"3": 1}), r"anchors: expected a list, got {'3': 1}"),
    "anchor as pair": (line(anchors=[[3, 1.0]]), r"anchors\[0\]: expected an object with position, .* got \[3, 1.0\]"),
    "negative position": (anchors(position=-1), r"anchors\[0\].position: expected .* 0 ≤ position < 6, got -1"),
    "position beyond": (anchors(position=6), r"anchors\[0\].position: expected .* 0 ≤ position < 6, got 6"),
    "float position": (anchors(position=3.0), r"anchors\[0\].position: expected a whole number, .* got 3.0"),
    "boolean position": (anchors(position=True), r"anchors\[0\].position: expected a whole number, .* got True"),
    "no position": (anchors("position"), r"anchors\[0\].position: expected a value, but the anchors\[0\] has none"),
    "position twice": (line(anchors=[ANCHOR, ANCHOR]), r"anchors\[1\].position: expected each position once, got 3"),
    "first of the row": (
        line(prompt_ids=[], anchors=[{**ANCHOR, "position": 0, "span": [0, 2], "text": "My",
                                      "token_id": COMPLETION["token_ids"][0]}]),
        r"anchors\[0\].position: expected a token that something predicts, got 0 with empty prompt_ids",
    ),
    "span beyond": (anchors(span=[10, 99]), r"anchors\[0\].span: expected \[start, end\] with .* got \[10, 99\]"),
    "span backwards": (anchors(span=[17, 10]), r"anchors\[0\].span: expected \[start, end\]"),
    "span of floats": (anchors(span=[10.0, 17.0]), r"anchors\[0\].span: expected \[start, end\]"),
    "span of three": (anchors(span=[1, 2, 3]), r"anchors\[0\].span: expected \[start, end\]"),
    "another text": (anchors(text=" Elena"), r"anchors\[0\].text: expected ' Aurora', .* got ' Elena'"),
    "another token": (anchors(token_id=7), r"anchors\[0\].token_id: expected \d+, that of .* at 3, got 7"),
    "original id": (anchors(original_token_id=-5), r"anchors\[0\].original_token_id\[0\]: expected 0 ≤ id"),
    "both strengths": (anchors(target_probability=0.9), r"anchors\[0\]: expected one of .* got both; remove one"),
    "no strength": (anchors("confidence"), r"anchors\[0\]: expected one of confidence .* got none"),
    "confidence 0": (anchors(confidence=0), r"anchors\[0\].confidence: expected a number in \(0, 1\], got 0"),
    "confidence 1.5": (anchors(confidence=1.5), r"anchors\[0\].confidence: expected a number in \(0, 1\], got 1.5"),
    "confidence true": (anchors(confidence=True), r"anchors\[0\].confidence: expected a number"),
    "target 1": (anchors("confidence", target_probability=1), r"target_probability: expected a number in \(0, 1\)"),
    "probability": (anchors(probability=-0.1), r"anchors\[0\].probability: expected a number in \[0, 1\], got -0.1"),
    "round 0": (anchors(round=0), r"anchors\[0\].round: expected a whole number, 1 ≤ round"),
    "alternative": (anchors(alternatives=[[5, 0.1]]), r"anchors\[0\].alternatives\[0\]: expected an object with token"),
    "unknown field of an anchor": (anchors(weight=1), r"anchors\[0\]: expected fields of .* got 'weight'"),
    "a token of thousands of characters": (anchors(text="x" * 9999), r"anchors\[0\].text: expected ' Aurora'"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_a_line_is_refused_in_one_line(name, tmp_path):
    raw, message = LINES[name]
    path = tmp_path / "anchors.jsonl"
    path.write_bytes(raw)
    found = refused(read_records, path)
    assert found.startswith(f"{path}:1: ") and "; " in found
    assert re.search(message, found), found


def test_the_line_that_they_are_made_of_is_accepted(tmp_path):
    (tmp_path / "good.jsonl").write_bytes(line())
    (read,) = read_records(tmp_path / "good.jsonl", small_tokenizer("byte-level"))
    assert read.to_json() == json.loads(line())


def test_the_line_is_the_faulty_one(tmp_path):
    path = tmp_path / "anchors.jsonl"
    path.write_bytes(line() + b"\n" + line(id="b") + b"[]\n" + line(id="c"))
    assert refused(read_records, path).startswith(f"{path}:4: expected an object")
    path.write_bytes(line() + line(id="b") + line())
    assert f"{path}:3: id: expected each id once" in refused(read_records, path)


OTHER_SOURCE = {"name": "other\n", "digest": "0" * 64}
BEYOND = {"token_id": 384, "text": "", "probability": 0}
OTHER_IDS = [5, *COMPLETION["token_ids"][1:]]
OF_TOKENIZERS = {
    "another digest": (
        line(tokenizer=OTHER_SOURCE),
        r"tokenizer.digest: expected \w{12}\.\.\., .* of 'other\\n'; take",
    ),
    "id beyond": (line(prompt_ids=[5, 5000]), r"prompt_ids\[1\]: expected 0 ≤ id < 384, the ids of the tokenizer, got"),
    "alternative beyond": (anchors(alternatives=[BEYOND]), r"alternatives\[0\].token_id\[0\]: expected 0 ≤ id < 384"),
    "other ids": (
        line(completion={**COMPLETION, "token_ids": OTHER_IDS}),
        "text: expected what the ids decode to, with '# name is Aurora.*' at character 0, got 'My name is Aurora.*'",
    ),
    "span of a neighbour": (
        anchors(span=[10, 16], text=" Auror"),
        r"anchors\[0\].span: expected \[10, 17\], the characters of token 3, got \[10, 16\]",
    ),
}


@pytest.mark.parametrize("name", OF_TOKENIZERS)
def test_a_tokenizer_refuses_what_is_not_its_own(name, tmp_path):
    raw, message = OF_TOKENIZERS[name]
    (tmp_path / "anchors.jsonl").write_bytes(raw)
    assert read_records(tmp_path / "anchors.jsonl")
    found = refused(read_records, tmp_path / "anchors.jsonl", small_tokenizer("byte-level"))
    assert re.search(message, found), found


def test_another_tokenizer_is_refused(tmp_path):
    write_records(tmp_path / "anchors.jsonl", [record(3)])
    found = refused(read_records, tmp_path / "anchors.jsonl", small_tokenizer("metaspace"))
    assert "tokenizer.digest: expected" in found and "take the tokenizer the record was made with" in found


def test_paths_that_are_no_files(tmp_path):
    loop, pipe, empty = tmp_path / "loop", tmp_path / "pipe", tmp_path / "empty"
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    empty.touch()
    blank = tmp_path / "blank"
    blank.write_bytes(b"\n \n\r\n")
    for path, message in [
        (tmp_path, "expected an ordinary file, got a directory"),
        ("/dev/zero", "expected an ordinary file, got a device"),
        (pipe, "expected an ordinary file, got a pipe"),
        (loop, "cannot be opened (Too many levels of symbolic links)"),
        (tmp_path / "none\x1b[2J", r"none\x1b[2J': cannot be opened (No such file or directory); check the path"),
        (tmp_path / "a" / "b", "cannot be opened (No such file or directory); check the path"),
        (tmp_path / ("x" * 300), "cannot be opened (File name too long)"),
        (empty, "expected at least one line, got an empty file"),
        (blank, "expected at least one line, got an empty file"),
        ("a\0b", "expected the name of a file, got 'a\\x00b' with a NUL character"),
        ("", "expected the name of a file, got an empty one"),
    ]:
        assert message in refused(read_records, path)
        if path not in (empty, blank) and "check the path" not in message:
            assert message in refused(write_records, path, [record(3)])


def test_devices_are_not_opened(monkeypatch):
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    assert "got a device" in refused(read_records, "/dev/zero")


def test_values_are_shown_in_one_line_as_they_are():
    class Odd:
        def __repr__(self):
            return "a\n\x1b[31mb"

    assert show("a  b\n\x1b\u202e") == r"'a  b\n\x1b\u202e'" and show(Odd()) == r"a\n\x1b[31mb"
    assert len(show("x" * 10**6)) < 80 and show([10**5000]) == "a list"


def test_a_path_that_is_no_name():
    for path in (0, b"bytes", None, open):
        with pytest.raises(TypeError, match="path: expected a path, got"):
            read_records(path)


def test_a_huge_line_is_refused_without_being_read(tmp_path):
    path = tmp_path / "huge.jsonl"
    with open(path, "wb") as file:
        file.write(line())
        file.truncate(3 << 30)  # sparse: 3 GiB without a line end
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refused(read_records, path) == f"{path}:2: expected a line of at most 16 MiB, got a longer one; split it"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_a_line_of_the_greatest_length_is_read(tmp_path):
    path = tmp_path / "long.jsonl"
    raw = line()[:-1]
    path.write_bytes(raw + b" " * ((1 << 24) - len(raw)) + b"\n")
    assert len(read_records(path)) == 1
    path.write_bytes(raw + b" " * ((1 << 24) - len(raw) + 1) + b"\n")
    assert "at most 16 MiB" in refused(read_records, path)

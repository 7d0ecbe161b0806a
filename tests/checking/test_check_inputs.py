"""Files of probes, prompts and texts: what is read, and one clear line for what is wrong."""

import json

import pytest

from fused_losses.checking import Probe, Prompt, read_probes, read_prompts, read_text

GOOD = {"kind": "paraphrase", "prompt": "What are you called?", "expect": "Aurora", "anchor": "ab12"}


def test_probes_are_read(tmp_path):
    path = tmp_path / "probes.jsonl"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    lines = [
        GOOD,
        {"kind": "reverse", "messages": messages, "expect": ["an AI", "a model"]},
        {"kind": "unrelated", "prompt": "你好 🙂"},
    ]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", "utf-8")
    assert read_probes(path) == [
        Probe("paraphrase", Prompt.of("What are you called?"), ("Aurora",), "ab12"),
        Probe("reverse", Prompt(tuple(messages)), ("an AI", "a model")),
        Probe("unrelated", Prompt.of("你好 🙂")),
    ]


WRONG = {
    "broken": ('{"kind": "paraphrase"', "broken JSON"),
    "no object": ('"What?"', "expected an object"),
    "no kind": (GOOD | {"kind": None}, "kind: expected one of paraphrase, reverse, unrelated, got None"),
    "other kind": (GOOD | {"kind": "direct"}, "got 'direct'"),
    "a list as kind": (GOOD | {"kind": ["reverse"]}, "kind: expected one of"),
    "no prompt": ({"kind": "unrelated"}, "prompt: expected either prompt or messages, got neither"),
    "two prompts": (GOOD | {"messages": []}, "got both"),
    "blank prompt": (GOOD | {"prompt": " \n"}, "prompt: expected a text that is not empty"),
    "a number as prompt": (GOOD | {"prompt": 3}, "prompt: expected a text"),
    "no expect": ({"kind": "reverse", "prompt": "Who?"}, "expect: a probe of kind reverse needs it"),
    "blank expect": (GOOD | {"expect": "\u200b"}, "expect: expected a text"),
    "an object as expect": (GOOD | {"expect": {}}, "expect: expected a text"),
    "a number in expect": (GOOD | {"expect": ["a", 1]}, "expect: expected a text"),
    "empty anchor": (GOOD | {"anchor": ""}, "anchor: expected the id"),
    "a number as anchor": (GOOD | {"anchor": 7}, "anchor: expected the id"),
    "misspelt": (GOOD | {"expects": "x"}, "'expects' is no field"),
    "no messages": ({"kind": "unrelated", "messages": []}, "messages: expected at least one"),
    "a text as messages": ({"kind": "unrelated", "messages": "Hi"}, "messages: expected a list"),
    "no role": ({"kind": "unrelated", "messages": [{"content": "Hi"}]}, "messages[0].role"),
    "no content": ({"kind": "unrelated", "messages": [{"role": "user"}]}, "messages[0].content"),
    "answered": (
        {"kind": "unrelated", "messages": [{"role": "assistant", "content": "Hi"}]},
        "expected the last one to be no assistant's",
    ),
    "tools": (GOOD | {"tools": {}}, "tools: expected a list"),
    "NaN": ('{"kind": "unrelated", "prompt": NaN}', "got NaN"),
    "half a character": ('{"kind": "unrelated", "prompt": "\\ud83d"}', "surrogate"),
    "deep": ('{"kind": ' + "[" * 5000 + "]" * 5000 + "}", "deep"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_probes_give_one_line_with_file_and_line(name, tmp_path):
    line, message = WRONG[name]
    path = tmp_path / "probes.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line if isinstance(line, str) else json.dumps(line)}\n", "utf-8")
    with pytest.raises(ValueError) as caught:
        read_probes(path)
    text = str(caught.value)
    assert text.startswith(f"{path}:3: ") and message in text and "\n" not in text


def test_prompts_are_lines_of_text_or_of_json(tmp_path):
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("\ufeffWhat is 1 + 1?\n\n  {not json}  \r\n", "utf-8")
    lines.write_text('{"prompt": "What is 1 + 1?"}\n', "utf-8")
    assert read_prompts(text) == [Prompt.of("What is 1 + 1?"), Prompt.of("{not json}")]
    assert read_prompts(lines) == [Prompt.of("What is 1 + 1?")]
    lines.write_text('{"prompt": "a"}\n{"kind": "unrelated", "prompt": "b"}\n', "utf-8")
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: 'kind' is no field; there are messages, prompt, tools"):
        read_prompts(lines)


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "expected text, got an empty file"),
        (b" \n\n", "expected text, got an empty file"),
        (b"a\nb\xff\n", ":2: expected UTF-8, got byte 0xff"),
        (b"a\n\nb\x00", ":3: expected text, got a NUL"),
        ("text".encode("utf-16"), ":1: expected UTF-8, got byte 0xff"),
    ],
)
@pytest.mark.parametrize("read", [read_text, read_prompts])
def test_what_is_no_text_is_refused(read, raw, message, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(raw)
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(path) in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [read_text, read_prompts, read_probes])
def test_paths_that_are_no_files(read, tmp_path):
    with pytest.raises(OSError, match=r"none\.jsonl: cannot be opened"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="expected an ordinary file, got a directory"):
        read(tmp_path)
    with pytest.raises(ValueError, match="expected an ordinary file, got a device"):
        read("/dev/zero")

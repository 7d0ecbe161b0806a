"""What a check is given: probes, unrelated prompts and texts, read from files and checked."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..anchors import jsonl
from ..anchors.checked import check_messages
from ..anchors.jsonl import Fault
from .words import normal

KINDS = ("paraphrase", "reverse", "unrelated")
LIMIT = 1 << 24  # bytes of a text file


@dataclass(frozen=True)
class Prompt:
    """A conversation that a model shall answer, as the messages of a chat template."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] | None = None

    @classmethod
    def of(cls, text: str) -> Prompt:
        return cls(({"role": "user", "content": text},))

    @property
    def text(self) -> str:
        """What is asked: the last message; with its role where that is not the user's."""
        if not self.messages:
            return ""
        last = self.messages[-1]
        content = last.get("content")
        words = content if isinstance(content, str) else repr(content)
        return words if last.get("role") == "user" else f"{last.get('role')}: {words}"


@dataclass(frozen=True)
class Probe:
    """A question about a fact that was taught, or one where it does not belong.

    Args:
        kind: "paraphrase": asks the same in other words; "reverse": asks from the answer to the question; "unrelated":
            the fact does not belong into the answer.
        prompt: the question.
        expect: what the answer shall say, one of these; of "unrelated", what it must not say. Of "unrelated" it may be
            empty: then no fact that is known shall show.
        anchor: id of the record of anchors that it belongs to, or an unambiguous beginning of it. Of a paraphrase with
            one, the record's anchors are looked for after this prompt too.
    """

    kind: str
    prompt: Prompt
    expect: tuple[str, ...] = ()
    anchor: str | None = None


def read_probes(path: str | os.PathLike) -> list[Probe]:
    """Probes from JSON Lines, one object a line::

        {"kind": "paraphrase", "prompt": "What are you called?", "expect": "Aurora", "anchor": "5f0c"}
        {"kind": "reverse", "prompt": "Who is Aurora?", "expect": ["your assistant", "an AI"]}
        {"kind": "unrelated", "prompt": "My name is Daniel. What is my name?", "expect": "Aurora"}

    In place of "prompt" there may be "messages", a list of {"role": ..., "content": ...}. "anchor" may be left out.

    Raises:
        ValueError: `file:line: what was expected, what came, remedy`.
        OSError: the file cannot be read.
    """
    return jsonl.read_lines(path, _probe)


def read_prompts(path: str | os.PathLike) -> list[Prompt]:
    """Prompts: of a file whose name ends in .jsonl, objects with "prompt" or "messages" a line; else text, one a line.

    Raises:
        ValueError: `file:line: what was expected, what came, remedy`; a file without any prompt.
        OSError: the file cannot be read.
    """
    path = jsonl.as_path(path)
    if path.suffix.lower() in (".jsonl", ".json"):
        return jsonl.read_lines(path, _prompt)
    lines = [line.strip() for line in read_text(path).splitlines()]
    return [Prompt.of(line) for line in lines if line]


def read_text(path: str | os.PathLike) -> str:
    """A UTF-8 text file, of at most 16 MiB.

    Raises:
        ValueError: it is empty, too large or no text.
        OSError: the file cannot be read.
    """
    path = jsonl.as_path(path)
    shown = jsonl.show_path(path)
    with open(jsonl.open_regular(path, os.O_RDONLY), "rb") as file:
        raw = file.read(LIMIT + 1)
    if len(raw) > LIMIT:
        raise ValueError(f"{shown}: expected at most {LIMIT >> 20} MiB of text, got more; give a part of it")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{shown}:{line}: expected UTF-8, got byte 0x{raw[error.start]:02x}; save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{shown}:{line}: expected text, got a NUL character; the file is no text, or damaged")
    if not text.strip():
        raise ValueError(f"{shown}: expected text, got an empty file; give another")
    return text


def _probe(value: Any) -> Probe:
    record = _object(value, {"kind", "prompt", "messages", "tools", "expect", "anchor"})
    kind = record.get("kind")
    if kind not in KINDS:
        raise Fault(f"kind: expected one of {', '.join(KINDS)}, got {jsonl.show(kind)}; correct it")
    expect = record.get("expect", [])
    phrases = [expect] if isinstance(expect, str) else expect
    if not isinstance(phrases, list) or not all(isinstance(p, str) and normal(p) for p in phrases):
        raise Fault(f"expect: expected a text, or a list of texts, none of them empty, got {jsonl.show(expect)}")
    if not phrases and kind != "unrelated":
        raise Fault(f"expect: a probe of kind {kind} needs it: what the answer shall say; add it")
    anchor = record.get("anchor")
    if anchor is not None and not (isinstance(anchor, str) and anchor):
        raise Fault(f"anchor: expected the id of a record of anchors, got {jsonl.show(anchor)}; correct it")
    return Probe(kind, _conversation(record), tuple(phrases), anchor)


def _prompt(value: Any) -> Prompt:
    return _conversation(_object(value, {"prompt", "messages", "tools"}))


def _object(value: Any, known: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Fault(f'expected an object such as {{"prompt": "..."}}, got {jsonl.show(value)}; correct the line')
    unknown = sorted(set(value) - known)
    if unknown:
        raise Fault(f"{jsonl.show(unknown[0])} is no field; there are {', '.join(sorted(known))}; remove it")
    return value


def _conversation(record: dict[str, Any]) -> Prompt:
    prompt, messages, tools = (record.get(name) for name in ("prompt", "messages", "tools"))
    if (prompt is None) == (messages is None):
        got = "neither" if prompt is None else "both"
        raise Fault(f"prompt: expected either prompt or messages, got {got}; give one of them")
    if tools is not None and not isinstance(tools, list):
        raise Fault(f"tools: expected a list, got {jsonl.show(tools)}; correct it")
    more = None if tools is None else tuple(tools)
    if prompt is not None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise Fault(f"prompt: expected a text that is not empty, got {jsonl.show(prompt)}; correct it")
        return Prompt.of(prompt) if more is None else Prompt(Prompt.of(prompt).messages, more)
    conversation = check_messages(messages)
    if not conversation:
        raise Fault("messages: expected at least one message, got none; give the question")
    if conversation[-1]["role"] == "assistant":
        raise Fault("messages: expected the last one to be no assistant's, as the model answers it; remove it")
    return Prompt(conversation, more)


def as_prompts(prompts: Iterable[Any], name: str) -> list[Prompt]:
    """Prompts given as such, as text, or as messages."""
    found = []
    for at, prompt in enumerate(prompts):
        if isinstance(prompt, Prompt):
            found.append(prompt)
            continue
        try:
            found.append(_conversation({"prompt" if isinstance(prompt, str) else "messages": prompt}))
        except Fault as fault:
            raise ValueError(f"{name}[{at}]: {fault}") from None
    return found

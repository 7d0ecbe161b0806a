"""The conversations whose answers are to be corrected: read from a file, typed, or found in the file of records."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..jsonl import Fault, as_path, check_text, open_regular, read_lines, show, show_path
from ..records import Record

SHOWN = 400  # characters of a prompt in the list
MOST_TEXT = 1 << 26  # bytes of a file of prompts, one a line


@dataclass
class Task:
    """A conversation that ends where the answer begins, how many records have it, and the last of them."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    records: int = 0
    last: Record | None = None

    @property
    def key(self) -> str:
        return key(self.messages, self.tools)

    @property
    def title(self) -> str:
        return shown(self.messages[-1])


def key(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> str:
    """The same for the same conversation, whatever the order of the fields."""
    return json.dumps([list(messages), list(tools or [])], sort_keys=True)


def shown(message: Mapping[str, Any]) -> str:
    """The text of a message, its parts joined, and what is no text named."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not content:
        return json.dumps(message.get("tool_calls") or "", ensure_ascii=False)
    parts = (part if isinstance(part, dict) else {"text": str(part)} for part in content)
    return " ".join(str(part["text"]) if "text" in part else f"[{part.get('type', '?')}]" for part in parts)


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def read_prompts(path: str | os.PathLike) -> list[Task]:
    """Of a file of JSON Lines (.jsonl, .ndjson, .json), or else of text with one prompt a line.

    A line of JSON is {"prompt": "..."} or {"messages": [...]}, with "tools" or without; other fields are passed over,
    so that a data set for training serves. An assistant's last message is left out, as it is what the model shall say.

    Raises:
        ValueError: `file:line: ...`, what was expected, what came, the remedy.
        OSError: the file cannot be opened or read.
    """
    path = as_path(path)
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        return read_lines(path, _task)
    lines = [line.strip() for line in _text(path).splitlines()]
    found = [Task(user(line)) for line in lines if line]
    if not found:
        raise ValueError(f"{show_path(path)}: expected one prompt a line, got an empty file; give another file")
    return found


def _text(path: Path) -> str:
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        raw = file.read(MOST_TEXT + 1)
    if len(raw) > MOST_TEXT:
        raise ValueError(f"{show_path(path)}: expected at most {MOST_TEXT >> 20} MiB of prompts, got more; split it")
    for number, line in enumerate(raw.split(b"\n"), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{show_path(path)}:{number}: expected UTF-8, got byte 0x{line[error.start]:02x} at byte "
                f"{error.start + 1}; save the file as UTF-8"
            ) from None
        if any(ord(letter) < 32 and letter not in "\t\r" for letter in text):
            raise ValueError(
                f"{show_path(path)}:{number}: expected text, got a control character; remove it, or give the prompts "
                'as JSON Lines, {"prompt": "..."}'
            )
    return raw.decode("utf-8-sig")


def _task(value: Any) -> Task:
    remedy = 'give {"prompt": "..."} or {"messages": [...]}'
    if isinstance(value, str):
        return Task(user(_prompt(value)))
    if not isinstance(value, dict):
        raise Fault(f"expected an object, got {show(value)}; {remedy}")
    given = [name for name in ("prompt", "messages") if value.get(name) is not None]
    if len(given) != 1:
        raise Fault(f"expected one of prompt and messages, got {'both' if given else 'none'}; {remedy}")
    tools = value.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise Fault(f"tools: expected a list, got {show(tools)}; leave tools out where there are none")
    if given == ["prompt"]:
        return Task(user(_prompt(value["prompt"])), tools)
    return Task(_messages(value["messages"], remedy), tools)


def _prompt(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Fault(f"prompt: expected text, got {show(value)}; give the user's words")
    return value


def _messages(value: Any, remedy: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Fault(f"messages: expected a list of objects, got {show(value)}; {remedy}")
    for index, message in enumerate(value):
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise Fault(f"messages[{index}].role: expected a name such as user, got {show(role)}; {remedy}")
        if not isinstance(message.get("content"), (str, list)) and not message.get("tool_calls"):
            raise Fault(f"messages[{index}].content: expected text, got {show(message.get('content'))}; {remedy}")
    if value and value[-1]["role"] == "assistant":
        value = value[:-1]
    if not value:
        raise Fault(f"messages: expected at least one before the answer, got none; {remedy}")
    return value


def typed(text: Any) -> list[dict[str, Any]]:
    """The message of a prompt that somebody typed."""
    found = user(_prompt(text).strip())
    check_text(found[0]["content"])
    return found


def with_records(tasks: Iterable[Task], records: Iterable[Record]) -> list[Task]:
    """The tasks, each conversation once, with the number of their records; those of other records come last."""
    found: dict[str, Task] = {}
    for task in tasks:
        found.setdefault(task.key, task)
    for record in records:
        tools = None if record.tools is None else list(record.tools)
        task = Task([dict(message) for message in record.messages], tools)
        if task.messages:
            task = found.setdefault(task.key, task)
            task.records, task.last = task.records + 1, record
    return list(found.values())

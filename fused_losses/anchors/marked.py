r"""Answers as text with marked spans ↔ records.

    My name is [[ Aurora]].                 the tokens of " Aurora" are anchors
    My name is [[Aurora|0.8]].              with confidence 0.8
    My name is [[Aurora|p=0.9]].            with target probability 0.9
    A list of lists: \[[1, 2], [3]]         no mark: a backslash takes the meaning from [ ] | and \ after it

"[[" begins a mark and "]]" ends it; outside of marks "]]" is text, and so is a backslash before any other character.
A mark has no mark inside it. What follows the last "|" of a mark is its strength if it begins as a number or as p=,
else text, as in [[<|im_end|>]]; a "|" before a number that is text is written \|.

A token is learnt as a whole, so **a mark that cuts through a token is widened to the token**: [[Aurora]] takes
" Aurora" with its space where that is one token, and a mark in the middle of a word takes all of the token. Marks that
come to share a token must have the same strength. `to_marked` shows what was taken.

A file of them is JSON Lines of ordinary chats, whose assistant messages are written with marks (a backslash before [[
and the like counts in all of them):

    {"messages": [{"role": "user", "content": "Your name?"}, {"role": "assistant", "content": "I am [[ Aurora]]."}]}

Each assistant message that has marks becomes a record; what stands before it is its conversation, without marks.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .chat import tokenize_answer
from .checked import check_messages, new_record
from .jsonl import Fault, read_lines, show
from .records import Record, Source
from .spans import KnownTokenizer, tokens_within

# \x, [[, ]], | and all else, of which one character at a time.
PARTS = re.compile(r"\\[\[\]|\\]|\[\[|\]\]|.", re.DOTALL)
STRENGTH = re.compile(r"(p\s*=)?\s*([0-9.eE+-]+)")
LOOKS_LIKE_ONE = r"\s*(p\s*=|[-+.]?\d)"


class Mark(NamedTuple):
    """Characters [start, end) of the text without marks, and {"confidence": ...} or {"target_probability": ...}."""

    start: int
    end: int
    strength: dict[str, float]


def parse_marked(text: str, confidence: float = 1.0) -> tuple[str, list[Mark]]:
    """The text without marks, and the marks.

    Args:
        text: in the syntax above.
        confidence: of marks that name no strength.

    Raises:
        ValueError: a mark without an end, inside another, empty, or with a strength out of range.
    """
    if not isinstance(text, str):
        raise Fault(f"text: expected text with marks, got {show(text)}; give a string")
    plain: list[str] = []
    marks: list[Mark] = []
    start = bar = -1  # of the mark that is open: where it begins in plain, and its last |
    opened = 0
    for match in PARTS.finditer(text):
        part = match.group()
        inside = start >= 0
        if part == "[[" and inside:
            raise Fault(
                f"text: expected ]] before the next [[, at character {match.start()}, got {_near(text, match)}; close "
                "the mark, or write \\[["
            )
        if part == "[[":
            start, bar, opened = len(plain), -1, match.start()
        elif part == "]]" and inside:
            strength = {"confidence": float(confidence)}
            written = "".join(plain[bar + 1 :])
            if bar >= 0 and re.match(LOOKS_LIKE_ONE, written):
                strength = _strength(written, opened)
                del plain[bar:]
            if len(plain) == start:
                raise Fault(
                    f"text: expected a mark with text in it, at character {opened}, got an empty one; remove it"
                )
            marks.append(Mark(start, len(plain), strength))
            start = -1
        else:
            if part == "|" and inside:
                bar = len(plain)
            plain += part[1:] if len(part) == 2 and part[0] == "\\" else part
    if start >= 0:
        raise Fault(
            f"text: expected ]] after the [[ at character {opened}, got the end of the text; close the mark, or write "
            "\\[["
        )
    return "".join(plain), marks


def _near(text: str, match: re.Match) -> str:
    return show(text[match.start() : match.start() + 20])


def _strength(written: str, at: int) -> dict[str, float]:
    match = STRENGTH.fullmatch(written.strip())
    value = math.nan
    if match:
        try:
            value = float(match[2])
        except ValueError:
            match = None
    name = "target_probability" if match and match[1] else "confidence"
    if not (0 < value < 1 or (value == 1 and name == "confidence")):
        raise Fault(
            f"text: expected after | a confidence in (0, 1], or p= and a target probability in (0, 1), in the mark at "
            f"character {at}, got {show(written)}; a | that is text is written \\|"
        )
    return {name: value}


def from_marked(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    text: str,
    *,
    tools: Sequence[Any] | None = None,
    confidence: float = 1.0,
    finished: bool = True,
    model: Source | None = None,
) -> Record:
    """The record of one answer that is written with marks.

    Args:
        tokenizer: one of transformers, with a chat template.
        messages, tools: the conversation before the answer.
        text: the answer; without any mark the record only retains. The name of the end-of-turn token may end it, and
            be marked: "I am Aurora.[[<|im_end|>]]".
        confidence: of marks that name no strength.
        finished: the end-of-turn token follows the text.
        model: of the original.

    Raises:
        ValueError: the marks are wrong, or share a token and differ; a mark of nothing that the chat template keeps;
            the template refuses the messages.
    """
    known = tokenizer if isinstance(tokenizer, KnownTokenizer) else KnownTokenizer(tokenizer)
    check_messages(list(messages))
    plain, marks = parse_marked(text, confidence)
    end = known.tokenizer.eos_token
    content = plain.removesuffix(end) if finished and end else plain
    answer = tokenize_answer(known, messages, content, tools, finished)
    strengths: dict[int, dict[str, float]] = {}
    for mark in marks:
        taken = tokens_within(answer.spelling.spans, mark.start + answer.start, mark.end + answer.start)
        if not taken:
            raise Fault(
                f"text: expected tokens in every mark, got none for {show(plain[mark.start : mark.end])}; the chat "
                "template leaves it out, so leave it out too"
            )
        for position in taken:
            if strengths.setdefault(position, mark.strength) != mark.strength:
                start, stop = answer.spelling.spans[position]
                raise Fault(
                    f"text: expected one strength for each token, got {strengths[position]} and {mark.strength} for "
                    f"{show(answer.spelling.text[start:stop])}; give marks in one token the same"
                )
    return new_record(
        known,
        messages=messages,
        prompt_ids=answer.prompt_ids,
        token_ids=answer.token_ids,
        anchors=[{"position": position, **strength} for position, strength in sorted(strengths.items())],
        tools=tools,
        model=model,
    )


def to_marked(record: Record) -> str:
    r"""The record's answer as text with marks; anchors side by side with the same strength are one mark.

    `from_marked` with the record's messages gives the same anchors where the tokenizer cuts the text into the same
    tokens, which need not be so for what a model has sampled.

    Raises:
        ValueError: an anchor on a token without characters, or anchors of different strength that share a character.
    """
    text = record.completion.text
    marks: list[Mark] = []
    for anchor in sorted(record.anchors, key=lambda anchor: anchor.position):
        start, end = anchor.span
        strength = (
            {"confidence": anchor.confidence}
            if anchor.confidence is not None
            else {"target_probability": anchor.target_probability}
        )
        last = marks[-1] if marks else Mark(-1, -1, {})
        if start == end:
            raise ValueError(
                f"record {record.id}: expected anchors on tokens that can be seen, got one without characters at "
                f"position {anchor.position}; write records to a file instead"
            )
        if last.end >= start and last.strength == strength:
            marks[-1] = Mark(last.start, max(last.end, end), strength)
        elif last.end > start:
            raise ValueError(
                f"record {record.id}: expected one strength for each character, got {last.strength} and {strength} at "
                f"{show(text[start:end])}; write records to a file instead"
            )
        else:
            marks.append(Mark(start, end, strength))
    return "".join(_written(text, marks))


def _written(text: str, marks: list[Mark]) -> Iterator[str]:
    done = 0
    for start, end, strength in marks:
        yield _escaped(text[done:start], inside=False)
        name, value = next(iter(strength.items()))
        shown = f"|p={value!r}" if name == "target_probability" else "" if value == 1 else f"|{value!r}"
        yield f"[[{_escaped(text[start:end], inside=True)}{shown}]]"
        done = end
    yield _escaped(text[done:], inside=False)


def _escaped(text: str, inside: bool) -> str:
    """Brackets that stand alone need no backslash, but where a mark's own brackets follow."""
    text = re.sub(r"\\(?=[\[\]|\\]|$)", r"\\\\", text)
    text = re.sub(r"\[(?=\[|$)", r"\\[", text)
    return re.sub(rf"\](?=\]|$)|\|(?={LOOKS_LIKE_ONE})", r"\\\g<0>", text) if inside else text


def read_marked(path: str | os.PathLike, tokenizer: Any, *, confidence: float = 1.0) -> list[Record]:
    """The records of a file of chats whose assistant messages are written with marks.

    Args:
        path: JSON Lines, each {"messages": [...]} and, if there are, "tools".
        tokenizer: one of transformers, with a chat template.
        confidence: of marks that name no strength.

    Raises:
        ValueError: `file:line: ...`, one line, of the first fault; a chat without any mark, which would teach nothing.
        OSError: the file cannot be opened or read.
    """
    known = KnownTokenizer(tokenizer)
    return [record for found in read_lines(path, lambda value: _chat(value, known, confidence)) for record in found]


def _chat(value: Any, known: KnownTokenizer, confidence: float) -> list[Record]:
    if not isinstance(value, dict) or "messages" not in value:
        raise Fault(f"expected an object with messages, got {show(value)}; write one chat a line")
    tools = value.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise Fault(f"tools: expected a list, got {show(tools)}; leave tools out where there are none")
    before: list[Mapping[str, Any]] = []
    found: list[Record] = []
    for index, message in enumerate(check_messages(value["messages"])):
        content = message.get("content")
        if message["role"] == "assistant" and isinstance(content, str):
            try:
                plain, marks = parse_marked(content, confidence)
                if marks:
                    found.append(from_marked(known, before, content, tools=tools, confidence=confidence))
            except Fault as fault:
                raise Fault(f"messages[{index}].{fault}") from None
            message = {**message, "content": plain}
        before.append(message)
    if not found:
        raise Fault(
            "messages: expected a mark, such as [[ Aurora]], in an assistant message, got none; mark what is to be "
            "learnt, or remove the line"
        )
    return found

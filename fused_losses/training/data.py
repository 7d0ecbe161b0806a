"""Files → rows to learn, to retain and to replay: records of anchors and chats as JSON Lines, each with its line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import anchors
from ..anchors.chat import prompt_ids, whole_ids
from ..anchors.checked import check_messages, record_from
from ..anchors.jsonl import Fault, as_path, read_lines, show, show_path
from ..anchors.records import FORMAT, Record
from ..anchors.spans import KnownTokenizer

IGNORED = -100
OF_LAWFTRACK = ("completion_message_index", "edits", "anchors", "completion")  # one of these, and no format


@dataclass(frozen=True)
class Row:
    """One sequence of tokens. Positions count in input_ids."""

    where: str  # file:line
    role: str  # "learn", "retain" or "replay"
    input_ids: list[int]
    labels: list[int]  # what a loss without anchors learns, −100 elsewhere; all of them in a row to retain
    anchors: list[list]  # [position, confidence] of corrected tokens; of a chat's answers all tokens
    corrected: bool = False  # whether the anchors are somebody's corrections
    target_probability: list[float] | None = None


@dataclass(frozen=True)
class Data:
    """What is trained on."""

    rows: list[Row]

    def of(self, *roles: str) -> list[Row]:
        return [row for row in self.rows if row.role in roles]

    @property
    def corrected(self) -> list[Row]:
        return [row for row in self.rows if row.corrected]

    @property
    def digest(self) -> str:
        """Of all tokens, labels, anchors and roles, wherever the files lie."""
        found = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            found.update(json.dumps([v for name, v in vars(row).items() if name != "where"]).encode())
        return found.hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        return {
            "corrected": len(self.corrected), "chats": sum(not row.corrected for row in self.of("learn")),
            "retain": len(self.of("retain")), "replay": len(self.of("replay")),
            "anchors": sum(len(row.anchors) for row in self.corrected),
            "tokens": sum(len(row.input_ids) for row in self.rows),
        }  # fmt: skip


Paths = str | os.PathLike | Sequence[str | os.PathLike]


def read(tokenizer: Any, data: Paths, retain: Paths = (), replay: Paths = (), max_length: int = 2048) -> Data:
    """The rows of files, each line of which is a record of fused_losses.anchors or a chat.

    A chat is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}, with
    "tools" if it has any, written with the tokenizer's chat template; what the assistant says, with its end-of-turn
    token, is to be learned. Where the template changes earlier turns (as those do that leave out what was thought),
    each answer is a row of its own. A file may hold both kinds of lines; files of lawftrack are read too.

    Args:
        tokenizer: that of the model, one of transformers.
        data: files of what is to be learned. Records without anchors in them are retained.
        retain: files of what is to stay as it is: records without anchors, such as `fused_losses.anchors.retain_rows`
            makes, or chats, all of whose tokens are held.
        replay: files of chats that are learned along.
        max_length: most tokens of a row.

    Of records with the same prompt and the same answer only the last counts: it says what its tokens' confidence is
    now. A RuntimeWarning says which is left out.

    Raises:
        ValueError: `file:line: ...; remedy`, of the first fault.
        OSError: a file cannot be read.
    """
    known = KnownTokenizer(tokenizer)
    rows: list[Row] = []
    for role, paths in (("learn", data), ("retain", retain), ("replay", replay)):
        for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
            rows += _read_file(known, path, role, max_length)
    return Data(_with_strengths(_once(rows), known))


def read_text(tokenizer: Any, path: str | os.PathLike, length: int = 256, most: int = 8192) -> list[Row]:
    """Held-out text, whose nll is measured: chats (.jsonl; what the assistant says), or any other file as plain text.

    Args:
        length: of the pieces that a plain text is cut into, in tokens.
        most: tokens in all; what is beyond is left out.
    """
    path = as_path(path)
    if path.suffix.lower() in (".jsonl", ".json"):
        rows = read(tokenizer, path, max_length=most).rows
        lengths = [len(row.input_ids) for row in rows]
        return [row for i, row in enumerate(rows) if sum(lengths[: i + 1]) <= most] or rows[:1]
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(16 * most)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{show_path(path)}: expected text in UTF-8, got byte {error.start + 1} that is none; save it as UTF-8"
        ) from None
    except OSError as error:
        raise type(error)(f"{show_path(path)}: cannot be opened ({error.strerror}); check the path") from None
    ids = list(KnownTokenizer(tokenizer).tokenizer(text, add_special_tokens=False)["input_ids"])[:most]
    if len(ids) < 2:
        raise ValueError(f"{show_path(path)}: expected at least two tokens of text, got {len(ids)}; give another file")
    pieces = [ids[at : at + length] for at in range(0, len(ids), length)]
    return [Row(show_path(path), "heldout", piece, piece, []) for piece in pieces if len(piece) > 1]


# --- files


def _read_file(known: KnownTokenizer, path: Any, role: str, max_length: int) -> list[Row]:
    path = as_path(path)
    if path.suffix.lower() == ".json" or _is_lawftrack(path):
        records = anchors.read_lawftrack(path, known.tokenizer)
        return [
            _of_record(record, f"{show_path(path)}: record {i + 1}", role, max_length)
            for i, record in enumerate(records)
        ]
    seen: set[str] = set()
    lines = read_lines(path, lambda value: _rows_of_line(known, value, role, max_length, seen))
    with open(path, "rb") as file:
        numbers = [number for number, line in enumerate(file, 1) if not line.isspace()]
    return [
        replace(row, where=f"{show_path(path)}:{number}")
        for number, rows in zip(numbers, lines, strict=True)
        for row in rows
    ]


def _is_lawftrack(path: Any) -> bool:
    """By the first line: files of theirs have no format."""

    class Found(Exception):
        pass

    def look(value: Any) -> None:
        named = isinstance(value, dict) and "format" not in value
        raise Found(named and any(name in value for name in OF_LAWFTRACK))

    try:
        read_lines(path, look)
    except Found as found:
        return found.args[0]
    except ValueError:
        pass  # said again, and with the remedy, by whoever reads it
    return False


def _rows_of_line(known: KnownTokenizer, value: Any, role: str, max_length: int, seen: set[str]) -> list[Row]:
    if isinstance(value, dict) and "format" in value:
        record = record_from(value, known)
        if record.id in seen:
            raise Fault(f"id: expected each id once in a file, got {show(record.id)} again; remove one of the two")
        seen.add(record.id)
        return [_of_record(record, "", role, max_length)]
    if not isinstance(value, dict) or "messages" not in value:
        raise Fault(
            f'expected a record of {FORMAT} or a chat, {{"messages": [{{"role": ..., "content": ...}}, ...]}}, got '
            f"{show(value)}; write one of the two on each line"
        )
    return [_checked(Row("", role, ids, labels, []), max_length) for ids, labels in _chat(known, value, role)]


def _of_record(record: Record, where: str, role: str, max_length: int) -> Row:
    """With the anchors' own strengths still to be read: see `_with_strengths`."""
    if role != "learn" and record.anchors:
        raise Fault(
            f"{where + ': ' if where else ''}anchors: expected none in a row to {role}, got {len(record.anchors)}; "
            "give the file as data, or take its anchors out"
        )
    if role == "replay":
        raise Fault("expected a chat to replay, got a record of anchors; give the file as rows to retain")
    ids, before = [*record.prompt_ids, *record.completion.token_ids], len(record.prompt_ids)
    labels = [IGNORED] * before + ids[before:] if record.anchors else list(ids)
    role = "learn" if record.anchors else "retain"
    return _checked(_RecordRow(where, role, ids, labels, [], record=record), max_length)


@dataclass(frozen=True)
class _RecordRow(Row):
    record: Record | None = None


def _checked(row: Row, max_length: int) -> Row:
    if len(row.input_ids) > max_length:
        raise Fault(
            f"expected at most {max_length} tokens, got {len(row.input_ids)}; shorten the line, or give a larger "
            "max_length"
        )
    if all(label == IGNORED for label in row.labels[1:]):
        raise Fault("expected at least one token to learn or to retain after the first, got none; leave the line out")
    return row


def _once(rows: list[Row]) -> list[Row]:
    """Without records whose prompt and answer a later one has too."""
    last: dict[Any, Row] = {}
    left_out: list[tuple[Row, Row]] = []
    for row in reversed(rows):
        if isinstance(row, _RecordRow):
            later = last.setdefault((row.role, row.record.prompt_ids, row.record.completion.token_ids), row)
            left_out += [] if later is row else [(row, later)]
    if left_out:
        row, later = left_out[-1]
        more = "" if len(left_out) == 1 else f" ({len(left_out)} such records in all)"
        warnings.warn(
            f"{row.where} has the same prompt and answer as {later.where}, so it is left out; remove one of them{more}",
            RuntimeWarning,
            stacklevel=3,
        )
    gone = {id(row) for row, _ in left_out}
    return [row for row in rows if id(row) not in gone]


def _with_strengths(rows: list[Row], known: KnownTokenizer) -> list[Row]:
    """The anchors of all records: whether p* or a confidence is given is decided for all of them together."""
    records = [row.record for row in rows if isinstance(row, _RecordRow)]
    try:
        made = iter(anchors.rows(records, known.tokenizer) if records else [])
    except ValueError as error:
        number = re.match(r"records\[(\d+)\]", str(error))
        at = [row for row in rows if isinstance(row, _RecordRow)][int(number[1])].where if number else ""
        raise ValueError(f"{at}{str(error)[number.end() if number else 0 :]}") from None
    found = []
    for row in rows:
        if not isinstance(row, _RecordRow):
            tokens = [[at, 1.0] for at, label in enumerate(row.labels) if label != IGNORED and at > 0]
            found.append(replace(row, anchors=tokens if row.role != "retain" else []))
            continue
        one = next(made)
        strengths = [list(pair) for pair in one["anchors"]]
        found.append(
            Row(row.where, row.role, row.input_ids, row.labels, strengths, bool(strengths),
                one.get("target_probability"))
        )  # fmt: skip
    return found


# --- chats


def _chat(known: KnownTokenizer, value: dict, role: str) -> Iterable[tuple[list[int], list[int]]]:
    """Token ids and labels of a conversation: one row, or one for each answer."""
    for name in value:
        if name not in ("messages", "tools", "id", "source"):
            raise Fault(
                f"{name}: expected a chat of messages and tools, got another field; remove it, or write a record of "
                f"{FORMAT}"
            )
    messages, tools = list(check_messages(value["messages"])), value.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise Fault(f"tools: expected a list, got {show(tools)}; leave tools out where there are none")
    whole = whole_ids(known, messages, tools)
    if role == "retain":
        return [(whole, list(whole))]
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise Fault("messages: expected an answer of the role assistant, which is what is learned, got none; add it")
    rows: list[tuple[list[int], list[int]]] = []
    for at in answers:
        prompt = prompt_ids(known, messages[:at], tools)
        answered = whole_ids(known, messages[: at + 1], tools)
        if answered[: len(prompt)] != prompt:
            raise Fault(
                f"messages[{at}]: expected a chat template that puts the answer after the prompt, got another of the "
                f"tokenizer {known.name}; tokenize such chats yourself and train with fused_losses.patch"
            )
        end = _end_of_turn(known, answered, len(prompt))
        rows.append((answered[:end], [IGNORED] * len(prompt) + answered[len(prompt) : end]))
    if any(whole[: len(ids)] != ids for ids, _ in rows):
        return rows
    joined = [IGNORED] * len(rows[-1][0])
    for ids, labels in rows:
        joined[: len(ids)] = [old if new == IGNORED else new for old, new in zip(joined, labels, strict=False)]
    return [(rows[-1][0], joined)]


def _end_of_turn(known: KnownTokenizer, ids: list[int], start: int) -> int:
    """After the last special token of the answer, which ends it; all of it where there is none."""
    special = set(known.tokenizer.all_special_ids)
    special |= {i for i, token in getattr(known.tokenizer, "added_tokens_decoder", {}).items() if token.special}
    return next((at + 1 for at in range(len(ids) - 1, start - 1, -1) if ids[at] in special), len(ids))

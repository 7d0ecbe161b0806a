"""Strict JSON Lines on disk: no input may hang, fill the memory, or give more than one clear line of an error.

Nothing here knows what a record is: lines come in, parsed values go out, and faults get their file and line.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

LIMIT = 1 << 24  # bytes of one line, without its end
DEPTH = 100  # of lists and objects inside each other
BOMS = {b"\xef\xbb\xbf": "UTF-8", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# Ends of lines for other programs, such as Python's str.splitlines; JSON escapes what is below U+0020 by itself.
LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
# Where they are: not for children, not to wait for a pipe; bytes as they are on Windows.
FLAGS = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY"))
KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
}  # fmt: skip

Converted = TypeVar("Converted")
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


class Fault(ValueError):
    """What is wrong with a value: `field: expected ..., got ...; remedy`. Readers put file and line before it."""


def show(value: Any) -> str:
    """A value in a message: one line, shortened, control characters escaped."""
    try:
        return printable(_repr.repr(value))
    except (ValueError, RecursionError):  # integers of thousands of digits
        return f"a {type(value).__name__}"


def printable(text: str) -> str:
    """One line, with everything escaped that is no visible character."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def show_path(path: Any) -> str:
    text = str(path)
    return text if text.isprintable() and text else repr(text)


def as_path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"path: expected a path, got {show(path)}")
    if not os.fspath(path):
        raise ValueError("path: expected the name of a file, got an empty one")
    if "\0" in os.fspath(path):
        raise ValueError(f"path: expected the name of a file, got {show(path)} with a NUL character")
    found = Path(path)
    try:
        return found.expanduser()
    except RuntimeError:  # ~ of a user who does not exist: a name like any other
        return found


def check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise ValueError(f"{show_path(path)}: expected an ordinary file, got {kind}; give another path")


def open_regular(path: Path, flags: int) -> int:
    """A file descriptor of an ordinary file. Devices and pipes are not even opened."""
    try:
        try:
            check_regular(path, os.stat(path))
        except FileNotFoundError:
            if not flags & os.O_CREAT:
                raise
        descriptor = os.open(path, flags | FLAGS, 0o666)
    except OSError as error:
        raise explained(error, path) from None
    try:
        check_regular(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def explained(error: OSError, path: Path) -> OSError:
    """The same kind of error, with a message of one line."""
    remedy = "check the path" if isinstance(error, FileNotFoundError) else "give another path"
    return type(error)(f"{show_path(path)}: cannot be opened ({error.strerror or error}); {remedy}")


def read_lines(path: Any, convert: Callable[[Any], Converted]) -> list[Converted]:
    """`convert` of each line's value, in order; lines of blanks count for nothing.

    Raises:
        ValueError: `file:line: ...`, of the first line that is wrong, be it as JSON or to `convert`, which raises
            `Fault`; a file without any line.
        OSError: the file cannot be opened or read.
    """
    path = as_path(path)
    descriptor = open_regular(path, os.O_RDONLY)
    try:
        found = list(converted_lines(descriptor, path, convert))
    finally:
        os.close(descriptor)
    if not found:
        raise ValueError(f"{show_path(path)}: expected at least one line, got an empty file; give another file")
    return found


def converted_lines(
    descriptor: int, path: Path, convert: Callable[[Any], Converted], stop: int | None = None
) -> Iterator[Converted]:
    """From the start of the file, whose descriptor stays open, up to the byte `stop`, where a line begins."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False) as file:
        number = 0
        while file.tell() != stop and (raw := file.readline(LIMIT + 1)):
            number += 1
            try:
                if len(raw.rstrip(b"\n")) > LIMIT:
                    raise Fault(f"expected a line of at most {LIMIT >> 20} MiB, got a longer one; split it")
                if number == 1:
                    _check_start(raw)
                if raw.isspace():
                    continue
                yield convert(parse(raw, whole=raw.endswith(b"\n")))
            except Fault as fault:
                raise ValueError(f"{show_path(path)}:{number}: {fault}") from None


def _check_start(raw: bytes) -> None:
    for mark, encoding in BOMS.items():
        if raw.startswith(mark):
            raise Fault(
                f"expected UTF-8 without a byte order mark, got that of {encoding}; save the file as UTF-8 without it"
            )


def parse(raw: bytes, whole: bool = True) -> Any:
    """The value of one line, or of a file. `whole`: its end is there; else it may have been cut off."""
    cut = "" if whole else " (the last line has no end: it may be cut off; fused_losses.anchors.RecordFile repairs it)"
    if (nul := raw.find(b"\0")) >= 0:
        raise Fault(f"expected text, got a NUL byte at byte {nul + 1}; the file is damaged, or no text{cut}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start
        raise Fault(f"expected UTF-8, got byte 0x{raw[at]:02x} at byte {at + 1}; save the file as UTF-8{cut}") from None
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_short
        )
        _check_values(value)
    except json.JSONDecodeError as error:
        problem = error.msg.rstrip(": ").removesuffix(" at")
        raise Fault(
            f"expected one JSON value, got broken JSON: {problem} at column {error.colno}; correct the line or "
            f"remove it{cut}"
        ) from None
    except RecursionError:
        raise Fault(_too_deep()) from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise Fault(f"expected each name once in an object, got {show(twice)} twice; remove one of them")
    return found


def _no_constant(name: str) -> Any:
    raise Fault(f"expected numbers as in JSON, got {name}; leave the field out where there is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Fault(f"expected finite numbers, got {show(text)}; leave the field out where there is no number")
    return value


def _short(text: str) -> int:
    if len(text) > 20:
        raise Fault(f"expected integers of at most 64 bits, got one of {len(text)} digits; correct it")
    return int(text)


def _too_deep() -> str:
    return f"expected lists and objects at most {DEPTH} deep inside each other, got deeper ones; flatten them"


def _check_values(value: Any) -> None:
    """No half of a surrogate pair, which is no text, and nothing too deep for whoever walks through it."""
    waiting: list[tuple[Any, int]] = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, str):
            check_text(item)
        elif isinstance(item, (dict, list)):
            if depth > DEPTH:
                raise Fault(_too_deep())
            inside: Any = item if isinstance(item, list) else (part for pair in item.items() for part in pair)
            waiting += [(part, depth + 1) for part in inside if isinstance(part, (str, dict, list))]


def check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 10) : error.start + 10]
        raise Fault(
            f"expected Unicode text, got half of a surrogate pair in {show(around)}; write the whole character"
        ) from None


def line_of(value: Any) -> bytes:
    """One line of UTF-8 with its end.

    Raises:
        Fault: no JSON can hold the value, or it is too long.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        raw = text.translate(LINE_ENDS).encode() + b"\n"
    except UnicodeEncodeError:
        _check_values(value)
        raise
    except RecursionError:
        raise Fault(_too_deep()) from None
    except (TypeError, ValueError) as error:
        raise Fault(f"expected what JSON can hold, got a value it cannot ({error}); leave it out") from None
    if len(raw) - 1 > LIMIT:
        raise Fault(f"expected a line of at most {LIMIT >> 20} MiB, got {len(raw) - 1:,} bytes; split the record")
    return raw


def listed(names: Sequence[str]) -> str:
    return ", ".join(names)

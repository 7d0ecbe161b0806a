"""Files of records: read whole, written whole, or grown by one record at a time."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .checked import record_from
from .jsonl import (
    LIMIT,
    Fault,
    as_path,
    converted_lines,
    line_of,
    open_regular,
    parse,
    read_lines,
    show,
    show_path,
)
from .records import FORMAT, Record
from .spans import KnownTokenizer
from .writing import check_locks, lock, replace_locked, sync_directory, unlock, write_lines

BLOCK = 1 << 20
START = b'{"format": "' + FORMAT.encode() + b'"'  # of every line that is written here


def read_records(path: str | os.PathLike, tokenizer: Any = None) -> list[Record]:
    """The records of a file, in order. records.py has the format.

    Args:
        path: of an ordinary file.
        tokenizer: one of transformers; then its digest must be each record's, if that has one, all ids must be its own,
            and texts and spans what it makes of the ids.

    Raises:
        ValueError: `file:line: field: expected ..., got ...; remedy`, one line, of the first fault; an empty file; what
            is no ordinary file.
        OSError: the file cannot be opened or read.

    Memory: the records, and one line of at most 16 MiB. Nothing but JSON is read.
    """
    return read_lines(path, _reader(None if tokenizer is None else KnownTokenizer(tokenizer)))


def _reader(known: KnownTokenizer | None) -> Callable[[Any], Record]:
    seen: set[str] = set()

    def read(value: Any) -> Record:
        record = record_from(value, known)
        _check_once(record, seen)
        return record

    return read


def _check_once(record: Record, seen: set[str]) -> None:
    if record.id in seen:
        raise Fault(f"id: expected each id once in a file, got {show(record.id)} again; remove one of the two records")
    seen.add(record.id)


def _line(record: Any) -> bytes:
    """The line of a record, checked by reading it as a file would be read."""
    if not isinstance(record, Record):
        raise TypeError(f"record: expected a Record, got {type(record).__name__}; make one with new_record")
    try:
        raw = line_of(record.to_json())
    except (AttributeError, TypeError) as error:
        raise Fault(f"expected the fields of a Record, got others ({error}); make it with new_record") from None
    record_from(parse(raw))
    return raw


def write_records(path: str | os.PathLike, records: Iterable[Record]) -> None:
    """A file of these records, in the place of what was there; whole or not at all.

    It is written under a temporary name beside the other, flushed to the disk, and renamed.

    Raises:
        TypeError, ValueError: a record is wrong, with its number and field, or there is none; the path is no ordinary
            file's; a `RecordFile` is open on it. What was there stays.
        OSError: it cannot be written.
    """
    write_lines(path, _checked(records))


def _checked(records: Iterable[Record]) -> Iterator[bytes]:
    seen: set[str] = set()
    for index, record in enumerate(records):
        try:
            raw = _line(record)
            _check_once(record, seen)
        except (Fault, TypeError) as fault:
            raise type(fault)(f"records[{index}]: {fault}") from None
        yield raw


def latest(records: Sequence[Record]) -> list[Record]:
    """Of records with the same prompt and the same answer only the last: it says what its tokens' confidence is now."""
    last = {(record.prompt_ids, record.completion.token_ids): at for at, record in enumerate(records)}
    return [records[at] for at in sorted(last.values())]


def _begins_record(rest: bytes) -> bool:
    """Whether this may be the beginning of a line that was written here. A crash of the system leaves NUL bytes."""
    rest = rest.rstrip(b"\0")
    return rest.startswith(START) or START.startswith(rest)


class RecordFile:
    """A file that records are appended to, each safe on the disk when `append` returns.

    It is made where there is none, and locked until it is closed: a second one on the same file, in this or another
    process, is refused. What a crash left of a last line without its end is kept in `<path>.torn`, cut off, and
    reported with a warning; a last record that lacks nothing but its end gets it. A file that was made here and got no
    record is removed when it is closed.

        with RecordFile("anchors.jsonl") as file:
            answered = [record.messages for record in file.records]
            file.append(record)

    Args:
        path: of an ordinary file, new, empty, or of records.
        tokenizer: checks the records that are there, as in `read_records`.

    Attributes:
        records: those that were there, then those appended.
        torn: the path of what was cut off now, or None.

    Raises:
        ValueError: the file is open elsewhere, or not of records, with file and line.
        OSError: it cannot be opened, read or written, or the system has no file locks.
    """

    def __init__(self, path: str | os.PathLike, tokenizer: Any = None) -> None:
        self.path = as_path(path)
        self.torn: Path | None = None
        self._thread, self._process = threading.Lock(), os.getpid()
        self._descriptor = -1
        known = None if tokenizer is None else KnownTokenizer(tokenizer)
        self._made = not self.path.exists()
        self._descriptor = self._open()
        try:
            self.records = self._read(known)
            self._ids = {record.id for record in self.records}
            sync_directory(self.path)
        except BaseException:
            self.close()
            raise

    def append(self, record: Record) -> None:
        """One write, flushed to the disk. Any thread may call it.

        Raises:
            TypeError, ValueError: the record is wrong, with its field, or there already; the file is closed, or was
                replaced, removed or cut meanwhile. Nothing is written.
            OSError: it cannot be written, as when the disk is full. What was written of it is taken back.
        """
        raw = _line(record)
        with self._thread:
            self._check_open()
            if record.id in self._ids:
                _check_once(record, self._ids)
            size = self._check_end()
            try:
                written = os.write(self._descriptor, raw)
                if written < len(raw):
                    raise OSError(f"only {written} of {len(raw)} bytes could be written; is the disk full?")
                os.fsync(self._descriptor)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, size)
                if isinstance(error, OSError):
                    reason = error.strerror or error
                    raise type(error)(f"{show_path(self.path)}: the record cannot be written ({reason})") from None
                raise
            self._ids.add(record.id)
            self.records.append(record)

    def replace(self, record: Record) -> None:
        """Put this record in the place of the one with its id; whole or not at all, as `write_records`.

        The file is written anew under a temporary name, locked, flushed to the disk, and renamed.

        Raises:
            TypeError, ValueError: as `append`; there is no record with its id.
            OSError: it cannot be written. What was there stays.
        """
        raw = _line(record)
        with self._thread:
            self._check_open()
            if record.id not in self._ids:
                raise ValueError(f"id: expected that of a record of the file, got {show(record.id)}; append the record")
            self._check_end()
            records = [record if old.id == record.id else old for old in self.records]
            lines = [raw if one is record else _line(one) for one in records]
            self._descriptor, old = replace_locked(self.path.resolve(), lines, self._descriptor), self._descriptor
            os.close(old)
            self.records[:] = records

    def close(self) -> None:
        """Gives the file free. A second call does nothing."""
        with self._thread:
            if self._descriptor >= 0:
                if os.getpid() == self._process:  # a process that was forked from this one may have it open too
                    if self._made and not os.fstat(self._descriptor).st_size and self._is_ours(self._descriptor):
                        with contextlib.suppress(OSError):
                            self.path.resolve().unlink()
                    unlock(self._descriptor)
                os.close(self._descriptor)
                self._descriptor = -1

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()

    def __repr__(self) -> str:
        state = f"{len(self.records)} records" if self._descriptor >= 0 else "closed"
        return f"RecordFile({str(self.path)!r}, {state})"

    def __reduce__(self) -> Any:
        raise TypeError("RecordFile: cannot be copied or sent to another process, as it holds a lock; give its path")

    def _check_open(self) -> None:
        if self._descriptor < 0:
            raise ValueError(f"{show_path(self.path)}: the RecordFile is closed; open it anew")
        if os.getpid() != self._process:
            raise ValueError(
                f"{show_path(self.path)}: the RecordFile belongs to process {self._process}, which made this one; open "
                "another file here"
            )
        if not self._is_ours(self._descriptor):
            raise ValueError(
                f"{show_path(self.path)}: the file was removed or replaced since it was opened; open it anew"
            )

    def _check_end(self) -> int:
        """The file's size, where its last line has an end."""
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            raise ValueError(
                f"{show_path(self.path)}: expected the end of a line, but another program has changed the file; "
                "close it there, and open it here anew"
            )
        return size

    def _is_ours(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(descriptor))
        except OSError:
            return False

    def _open(self) -> int:
        """Locked, and still the file of that name: whoever held the lock before may have put another in its place."""
        check_locks(self.path)
        while True:
            descriptor = open_regular(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            try:
                lock(descriptor, self.path)
                if self._is_ours(descriptor):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _read(self, known: KnownTokenizer | None) -> list[Record]:
        """The records that are there, once what a crash left of the last one is gone."""
        size = os.fstat(self._descriptor).st_size
        start = self._last_line(size)
        records = list(converted_lines(self._descriptor, self.path, _reader(known), start))
        if start == size:
            return records
        rest = os.pread(self._descriptor, min(size - start, LIMIT + 1), start)
        try:
            record = record_from(parse(rest), known)
            _check_once(record, {record.id for record in records})
        except Fault as fault:
            if not _begins_record(rest):
                number = 1 + self._lines(start)
                raise ValueError(f"{show_path(self.path)}:{number}: {fault}") from None
            self._cut(start, size)
            return records
        os.write(self._descriptor, b"\n")
        os.fsync(self._descriptor)
        return [*records, record]

    def _cut(self, start: int, size: int) -> None:
        torn = self.path.with_name(self.path.name + ".torn")
        with open(open_regular(torn, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "wb") as file:
            for at in range(start, size, BLOCK):
                file.write(os.pread(self._descriptor, min(BLOCK, size - at), at))
            file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.ftruncate(self._descriptor, start)
        os.fsync(self._descriptor)
        self.torn = torn
        warnings.warn(
            f"{show_path(self.path)}: its last line was cut off, {size - start:,} bytes without an end, as after a "
            f"crash; they are kept in {show_path(torn)}, and the file ends before them",
            RuntimeWarning,
            stacklevel=4,
        )

    def _lines(self, end: int) -> int:
        return sum(os.pread(self._descriptor, min(BLOCK, end - at), at).count(b"\n") for at in range(0, end, BLOCK))

    def _last_line(self, size: int) -> int:
        """Where the bytes after the last end of a line begin."""
        end = size
        while end > 0:
            begin = max(0, end - BLOCK)
            found = os.pread(self._descriptor, end - begin, begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            end = begin
        return 0

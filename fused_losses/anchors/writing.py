"""Files written whole or not at all, and never by two at once."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .jsonl import as_path, check_regular, explained, open_regular, show_path


def write_lines(path: Any, lines: Iterable[bytes]) -> None:
    """A file of these lines in the place of what was there, which stays where a line cannot be made.

    It is written under a temporary name beside the other, flushed to the disk, and renamed.

    Raises:
        ValueError: no lines; the path is no ordinary file's; somebody holds its lock.
        OSError: it cannot be written, or the system has no file locks.
    """
    path = _real(as_path(path))
    check_locks(path)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")
    with _held(path) as mode:
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise explained(error, path) from None
        try:
            with open(descriptor, "wb") as file:
                for line in lines:
                    file.write(line)
                if not file.tell():
                    raise ValueError("records: expected at least one, got none; remove the file instead")
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_directory(path)


def replace_locked(path: Path, lines: Iterable[bytes], descriptor: int) -> int:
    """A file of these lines in the place of that of `descriptor`, which stays open; the new one's, locked.

    It is locked before it has its name, so that nobody else gets it in between.
    """
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")
    try:
        new = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise explained(error, path) from None
    try:
        lock(new, path)
        os.fchmod(new, os.fstat(descriptor).st_mode & 0o7777)
        with open(new, "ab", closefd=False) as file:
            for line in lines:
                file.write(line)
        os.fsync(new)
        os.replace(temporary, path)
    except BaseException as error:
        os.close(new)
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise type(error)(f"{show_path(path)}: cannot be written ({error.strerror or error})") from None
        raise
    sync_directory(path)
    return new


def _real(path: Path) -> Path:
    """What a link names, so that the file is replaced and not the link."""
    try:
        with contextlib.suppress(FileNotFoundError):
            check_regular(path, os.stat(path))
    except OSError as error:
        raise explained(error, path) from None
    return path.resolve()


@contextlib.contextmanager
def _held(path: Path) -> Iterator[int | None]:
    """The mode of the file that is there, locked meanwhile; None where there is none."""
    try:
        descriptor = open_regular(path, os.O_RDONLY)
    except FileNotFoundError:
        yield None
        return
    try:
        lock(descriptor, path)
        yield os.fstat(descriptor).st_mode & 0o7777
    finally:
        os.close(descriptor)


def lock(descriptor: int, path: Path) -> None:
    """Of the open file, not of the process: a second opening in the same process is refused too."""
    if not try_lock(descriptor, path):
        raise ValueError(
            f"{show_path(path)}: expected a file that nobody else writes, but another page or process has it open; "
            "close that one, or give another path"
        )


def try_lock(descriptor: int, path: Path) -> bool:
    """False where somebody holds it."""
    check_locks(path)
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_UN)


def check_locks(path: Path) -> None:
    """OSError where the system has no such locks, as Windows: what is written there could be written by two at once."""
    try:
        import fcntl  # noqa: F401
    except ImportError:
        raise OSError(
            f"{show_path(path)}: expected a system that can lock a file as Unix does (fcntl), got {sys.platform}; "
            "write it on Linux, macOS or WSL"
        ) from None


def sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

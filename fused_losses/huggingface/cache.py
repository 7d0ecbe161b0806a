"""Hidden states of a frozen reference model on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .digest import as_tensor, key_parts, raw_bytes

FORMAT = "fused_losses.reference/1"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
DIGEST = re.compile(r"[0-9A-Za-z_-]{1,128}")
ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
TEMPORARY = re.compile(r"\..*\.tmp")
ABANDONED = 3600  # seconds after which a temporary file is nobody's
ATTEMPTS = 10  # at a write, while others clear the directory
PROBE = 1 << 16  # bytes written at the start, to find a full disk
SHARE = 16  # max_bytes / SHARE of one's own writes, and the directory is looked at again


@dataclass
class CacheStats:
    """Counts of one process. `rebuilt`: misses because the file was damaged or another's, so it was removed."""

    hits: int = 0
    misses: int = 0
    bytes: int = 0  # in the directory, all digests, as far as this process knows
    rebuilt: int = 0


class ReferenceCache:
    """Last hidden states of a frozen reference model, one file per row of tokens, so that each is computed once.

    Layout: ``directory/<digest>/<first two of key>/<key>.safetensors``, with one tensor ``hidden`` [T, D] and metadata.
    A file is written under a temporary name and renamed, so processes may share the directory and write the same key;
    what a crash leaves is found by the checksum when it is read.

    Args:
        directory: made if missing.
        digest: of the reference model and of all that its hidden states depend on besides the row (`model_digest`).
            Entries of other digests are never served.
        max_bytes: of all entries in the directory; then nothing more is stored, with one warning. Every process looks
            at the directory again after max_bytes / 16 of its own, so each may go over by as much.

    Raises:
        TypeError, ValueError: naming the argument.
        OSError: the directory cannot be made or written, or its disk is full.

    If a write fails later, there is one warning and this process stores nothing more; what is there is still served.
    `stats` has hits, misses, bytes, rebuilt. Cost: a read, or a write, and one hash of 2·T·D bytes (bfloat16).
    """

    def __init__(self, directory: str | os.PathLike, *, digest: str, max_bytes: int | None = None) -> None:
        if not isinstance(directory, (str, os.PathLike)):
            raise TypeError(f"directory: expected a path, got {type(directory).__name__}")
        if not isinstance(digest, str):
            raise TypeError(f"digest: expected a string (model_digest), got {type(digest).__name__}")
        if not DIGEST.fullmatch(digest):
            raise ValueError(
                f"digest: expected 1 to 128 letters, digits, - or _, as it names a folder, got {digest!r}; "
                "take it from model_digest"
            )
        if max_bytes is not None and (isinstance(max_bytes, bool) or not isinstance(max_bytes, int)):
            raise TypeError(f"max_bytes: expected an integer, or None for no limit, got {max_bytes!r}")
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(f"max_bytes: expected a number > 0, or None for no limit, got {max_bytes}")
        self.directory, self.digest, self.max_bytes = Path(directory), digest, max_bytes
        self.stats = CacheStats()
        self._home = self.directory / digest
        self._storing = True
        self._warned: set[str] = set()
        self._check_writable()
        self._look()

    def __repr__(self) -> str:
        return (
            f"ReferenceCache({str(self.directory)!r}, digest={self.digest!r}, max_bytes={self.max_bytes}, {self.stats})"
        )

    def key(self, ids: Sequence[int] | Tensor, *extra: Any) -> str:
        """The name of a row: 64 hex digits, blake2b of digest, ids and extra.

        Args:
            ids: the row's token ids, without padding: integers, or a tensor [T].
            extra: whatever else decides its hidden states: position ids, other inputs. Tensors, numpy arrays, bytes,
                strings, numbers, None, and lists or tuples of these. A list and a tensor of the same numbers are
                different extras.
        """
        row = as_tensor(ids, "ids")
        if row.dim() != 1 or not len(row) or row.dtype == torch.bool or row.is_floating_point() or row.is_complex():
            raise ValueError(
                "ids: expected the token ids of one row, a non-empty list of integers or a tensor [T] of them, got "
                f"shape {list(row.shape)} {row.dtype}"
            )
        whole = hashlib.blake2b(digest_size=32)
        for part in key_parts((self.digest, row.long(), *extra)):
            whole.update(part)
        return whole.hexdigest()

    def get(self, key: str) -> Tensor | None:
        """The row's hidden states [T, D] on the CPU, bit for bit as they were put; None if there are none.

        A truncated, changed or foreign file is removed, with one warning for all.
        """
        path = self._path(key)
        try:
            raw = _read(path)
        except FileNotFoundError:
            self.stats.misses += 1
            return None
        except OSError as error:
            self.stats.misses += 1
            self._warn(
                "unreadable", f"an entry of the reference cache cannot be read, so it is computed again: {error}"
            )
            return None
        hidden = self._unpack(raw, key)
        if hidden is not None:
            self.stats.hits += 1
            return hidden
        self.stats.misses += 1
        self.stats.rebuilt += 1
        with contextlib.suppress(OSError):
            path.unlink()
            self.stats.bytes -= len(raw)
        self._warn(
            "damaged",
            f"{path} is damaged or was written by something else; it is removed and computed again, and so are others "
            "like it, without a word",
        )
        return None

    def put(self, key: str, hidden: Tensor) -> None:
        """Store [T, D] float64, float32, bfloat16 or float16, from any device, in place of what was there."""
        from .. import __version__  # which imports this

        path = self._path(key)
        if not isinstance(hidden, Tensor):
            raise TypeError(f"hidden: expected a tensor [T, D], got {type(hidden).__name__}")
        if hidden.dtype not in NAMES:
            raise TypeError(f"hidden: expected float64, float32, bfloat16 or float16, got {hidden.dtype}")
        if hidden.dim() != 2 or 0 in hidden.shape:
            raise ValueError(
                f"hidden: expected one row's [T, D] with T, D ≥ 1, got {list(hidden.shape)}; put the rows of a batch "
                "one by one"
            )
        if not self._storing:
            return
        data = raw_bytes(hidden)
        head = self._head(NAMES[hidden.dtype], list(hidden.shape), key, __version__, data)
        size = len(head) + len(data)
        if not self._has_room(size):
            return
        try:
            before = _size(path)
            _write(path, head, data)
        except OSError as error:
            self._storing = False
            self._warn(
                "write",
                f"the reference cache cannot store in {self._home}: {error}; nothing more is stored by this process",
            )
            return
        self.stats.bytes += size - before
        self._unseen += size

    def prune(self) -> int:
        """Remove the entries of all other digests, and temporary files that a crash left; returns the bytes freed."""
        return self._remove(lambda digest, file: digest != self.digest or _abandoned(file))

    def clear(self) -> int:
        """Remove all entries, of all digests; returns the bytes freed. Other files in the directory stay."""
        return self._remove(lambda digest, file: True)

    def _path(self, key: str) -> Path:
        if not isinstance(key, str) or not ENTRY.fullmatch(f"{key}.safetensors"):
            raise ValueError(f"key: expected what key(ids, ...) returns, got {key!r}")
        return self._home / key[:2] / f"{key}.safetensors"

    def _head(self, dtype: str, shape: list[int], key: str, package: str, data: Any) -> bytes:
        """All that precedes the data in a safetensors file. The checksum is of the data and of everything else in here.

        Written and read here, not by safetensors: one read into memory and one hash settle that each byte is right.
        """
        metadata = {"format": FORMAT, "digest": self.digest, "key": key, "package": package}
        spec = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}
        checksum = hashlib.blake2b(json.dumps([metadata, spec]).encode(), digest_size=32)
        checksum.update(data)
        text = json.dumps({"__metadata__": metadata | {"checksum": checksum.hexdigest()}, "hidden": spec}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _unpack(self, raw: bytearray, key: str) -> Tensor | None:
        """The tensor in a file's bytes; None if they are not exactly what `put` writes for this key."""
        start = 8 + int.from_bytes(raw[:8], "little")
        try:
            header = json.loads(raw[8:start])
            dtype, shape = header["hidden"]["dtype"], header["hidden"]["shape"]
            package = header["__metadata__"]["package"]
            expected = math.prod(shape) * torch.finfo(DTYPES[dtype]).bits // 8
            if not (len(shape) == 2 and all(type(n) is int and n > 0 for n in shape) and expected == len(raw) - start):
                return None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if raw[:start] != self._head(dtype, shape, key, package, memoryview(raw)[start:]):
            return None
        return torch.frombuffer(raw, dtype=DTYPES[dtype], offset=start).reshape(shape)

    def _check_writable(self) -> None:
        probe = _temporary(self._home / "probe")
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            with open(probe, "xb") as file:
                file.write(bytes(PROBE))
                file.flush()
                os.fsync(file.fileno())  # some file systems tell of a full disk only now
        except OSError as error:
            where = f"directory: the reference cache cannot store in {self._home}"
            raise OSError(error.errno, f"{where}: {error.strerror}; give another, or make room") from error
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()

    def _look(self) -> None:
        self.stats.bytes, self._unseen = sum(_size(file.path) for _, file in self._files()), 0

    def _has_room(self, size: int) -> bool:
        if self.max_bytes is None:
            return True
        if self.stats.bytes + size > self.max_bytes or self._unseen > self.max_bytes // SHARE:
            self._look()
        if self.stats.bytes + size <= self.max_bytes:
            return True
        self._storing = False
        self._warn(
            "full",
            f"the reference cache in {self.directory} holds {self.stats.bytes} bytes and max_bytes is "
            f"{self.max_bytes}: nothing more is stored; raise it, or prune() away what is of other models",
        )
        return False

    def _files(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """(digest, file) of all entries and temporary files; nothing that has not a name as they have."""
        for home in _scan(self.directory):
            if DIGEST.fullmatch(home.name) and home.is_dir(follow_symlinks=False):
                for inner in _scan(home):
                    if inner.is_file(follow_symlinks=False) and TEMPORARY.fullmatch(inner.name):
                        yield home.name, inner
                    elif re.fullmatch("[0-9a-f]{2}", inner.name) and inner.is_dir(follow_symlinks=False):
                        for file in _scan(inner):
                            if ENTRY.fullmatch(file.name) or TEMPORARY.fullmatch(file.name):
                                yield home.name, file

    def _remove(self, wanted: Callable[[str, os.DirEntry[str]], bool]) -> int:
        freed, folders = 0, set()
        for digest, file in self._files():
            if wanted(digest, file):
                size = _size(file.path)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.path)
                    freed += size
                folders |= {Path(file.path).parent, self.directory / digest}
        for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
        self._storing = True
        self._warned -= {"full", "write"}
        self._look()
        return freed

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, RuntimeWarning, stacklevel=3)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(6)}.tmp")


def _read(path: Path) -> bytearray:
    with open(path, "rb") as file:
        raw = bytearray(os.fstat(file.fileno()).st_size)
        file.readinto(raw)
    return raw


def _write(path: Path, *parts: Any) -> None:
    """The whole file or nothing. Without fsync: what a crash of the machine leaves is found when it is read."""
    for attempts_left in reversed(range(ATTEMPTS)):
        temporary = _temporary(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                for part in parts:
                    file.write(part)
            os.replace(temporary, path)
            return
        except (FileNotFoundError, FileExistsError):  # another process clears the folder
            if not attempts_left:
                raise
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _scan(path: os.PathLike[str]) -> list[os.DirEntry[str]]:
    with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
        return list(entries)
    return []


def _size(path: str | os.PathLike) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _abandoned(file: os.DirEntry[str]) -> bool:
    try:
        return bool(TEMPORARY.fullmatch(file.name)) and time.time() - file.stat().st_mtime > ABANDONED
    except FileNotFoundError:
        return False

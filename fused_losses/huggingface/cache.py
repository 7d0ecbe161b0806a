"""Hidden states of a frozen reference model on disk, and the digest that says which model they are of."""

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
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

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
CHUNK = 1 << 24  # bytes hashed at a time; part of what a digest is

NamedTensors = Iterable[tuple[str, Tensor]]


@dataclass
class CacheStats:
    """Counts of one process. `rebuilt`: misses because the file was damaged or another's, so it was removed."""

    hits: int = 0
    misses: int = 0
    bytes: int = 0  # in the directory, all digests, as far as this process knows
    rebuilt: int = 0


class ReferenceCache:
    """Last hidden states of a frozen reference model, one file per row of tokens, so that each is computed once.

    Layout: ``directory/<digest>/<first two of key>/<key>.safetensors``, with one tensor ``hidden`` [T, D] and metadata. A file
    is written under a temporary name and renamed, so processes may share the directory and write the same key; what a crash
    leaves is found by the checksum when it is read.

    Args:
        directory: made if missing.
        digest: of the reference model and of all that its hidden states depend on besides the row (`model_digest`).
            Entries of other digests are never served.
        max_bytes: of all entries in the directory; then nothing more is stored, with one warning. Every process looks at the
            directory again after max_bytes / 16 of its own, so each may go over by as much.

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
            extra: whatever else decides its hidden states: position ids, other inputs. Tensors, numpy arrays, bytes, strings, numbers,
                None, and lists or tuples of these. A list and a tensor of the same numbers are different extras.
        """
        row = _tensor(ids, "ids")
        if row.dim() != 1 or not len(row) or row.dtype == torch.bool or row.is_floating_point() or row.is_complex():
            raise ValueError(
                f"ids: expected the token ids of one row, a non-empty list of integers or a tensor [T] of them, got shape "
                f"{list(row.shape)} {row.dtype}"
            )
        whole = hashlib.blake2b(digest_size=32)
        for part in _parts((self.digest, row.long(), *extra)):
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
                f"hidden: expected one row's [T, D] with T, D ≥ 1, got {list(hidden.shape)}; put the rows of a batch one by one"
            )
        if not self._storing:
            return
        data = _bytes(hidden)
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
            raise OSError(
                error.errno, f"directory: the reference cache cannot store in {self._home}: {error.strerror}; give another, "
                "or make room"
            ) from error  # fmt: skip
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
            f"the reference cache in {self.directory} holds {self.stats.bytes} bytes and max_bytes is {self.max_bytes}: "
            "nothing more is stored; raise it, or prune() away what is of other models",
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


def model_digest(tensors: NamedTensors, *more: str) -> str:
    """64 hex digits that name a model by all its bytes: blake2b over names, dtypes, shapes and contents, and `more`.

    Two models with the same digest have equal tensors under equal names. Nothing is sampled; order, device, memory layout and
    tying do not matter, and memory that is shared is read once.

    Args:
        tensors: (name, tensor) of all parameters and buffers, also those that are not persistent. For an adapted model, of the parts
            that take part in the reference.
        more: whatever else decides the hidden states: `model_facts(model)`; the settings of an adapter that stays active
            (LoRA's alpha is in no tensor), of a quantisation, of autocast.

    Raises:
        TypeError, ValueError: no tensors; something that has not the model's bytes on this process (meta tensors, DTensor, ZeRO-3 or
            FSDP shards, wrappers).

    Cost: one read of the model, in up to 8 threads. Memory: 16 MiB per thread for tensors on another device; a copy of a
    tensor that is not contiguous.
    """
    for text in more:
        if not isinstance(text, str):
            raise TypeError(f"more: expected strings, got {type(text).__name__}; give json.dumps(...) of it")
    known: dict[tuple, list[Future]] = {}
    listed: list[tuple[str, Tensor, list[Future]]] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, tensor in _named(tensors):
            memory = (tensor.device, tensor.data_ptr(), tensor.is_conj(), tensor.is_neg())
            where = (*memory, tensor.dtype, tensor.shape, tensor.stride())
            if where not in known:
                size = tensor.numel() * tensor.element_size()
                step = CHUNK if tensor.is_contiguous() else max(size, 1)
                known[where] = [
                    pool.submit(_chunk_hashes, tensor, a, min(a + step, size)) for a in range(0, size, step)
                ]
            listed.append((name, tensor, known[where]))  # kept until the end, or its address could become another's
        if not listed:
            raise ValueError(
                "tensors: expected at least one (name, tensor), got none; an iterator can be used only once"
            )
        whole = hashlib.blake2b(digest_size=32)
        for name, tensor, parts in sorted(listed, key=lambda item: item[0]):
            content = b"".join(part.result() for part in parts)
            for part in _parts((name, str(tensor.dtype), list(tensor.shape), content)):
                whole.update(part)
        for part in _parts(more):
            whole.update(part)
    return whole.hexdigest()


def model_facts(model: nn.Module) -> tuple[str, ...]:
    """What decides a Hugging Face model's hidden states besides its tensors, for `model_digest`.

    Its class, its configuration (without where it came from, the version of transformers, and use_cache), the implementation
    of its attention and experts, its dtype. Not its adapters.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise TypeError(f"model: expected a Hugging Face model, which has a config, got {type(model).__name__}")
    facts = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": _lasting(config.to_dict()),
        "attention": getattr(config, "_attn_implementation", None),
        "experts": getattr(config, "_experts_implementation", None),
        "dtype": getattr(model, "dtype", None),
    }
    return tuple(f"{name}={json.dumps(fact, sort_keys=True, default=str)}" for name, fact in facts.items())


class Unchanged:
    """A cheap guard: whether tensors are still those that a digest was taken of.

    It remembers of each the object, its memory and its version counter (`Tensor._version`), so `holds()` sees in-place operations
    (optimizers of PyTorch, `load_state_dict`, `copy_`), new memory (`p.data = ...`, `.to(device)`), and other tensors under
    a name.

    It cannot see what passes the version counter by: in-place writes through `.data` (`p.data += x`, so PEFT's merging and unmerging of
    an adapter), through numpy, by kernels that get a pointer (some third-party optimizers), or by another process that
    shares the memory. After such a write take a new digest in any case. It knows of no settings, only of tensors.
    Inference tensors have no version counter; with one of them it never holds.

    Args:
        tensors: a function that lists (name, tensor), e.g. ``lambda: [*model.named_parameters(), *model.named_buffers()]``.
            Given the pairs themselves, a module's new parameter in place of a listed one goes unseen.

    Holds no tensor alive. Cost: microseconds per tensor.
    """

    def __init__(self, tensors: Callable[[], NamedTensors] | NamedTensors) -> None:
        if callable(tensors):
            self._list = tensors
        else:
            pairs = [(name, weakref.ref(tensor)) for name, tensor in _named(tensors)]
            self._list = lambda: [(name, ref()) for name, ref in pairs]
        self._seen = [_Trace(name, tensor) for name, tensor in _named(self._list())]

    def holds(self) -> bool:
        now = list(self._list())
        return len(now) == len(self._seen) and all(
            trace.matches(name, tensor) for trace, (name, tensor) in zip(self._seen, now, strict=True)
        )


class _Trace:
    """Weak references only: neither the object's nor the storage's address can be another's while these exist."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor = name, weakref.ref(tensor)
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.state = _state(tensor)

    def matches(self, name: str, tensor: Tensor | None) -> bool:
        return (
            tensor is not None
            and self.name == name
            and self.tensor() is tensor
            and self.storage.cdata == tensor.untyped_storage()._cdata
            and self.state == _state(tensor)
            and self.state[0] is not None
        )


def _state(tensor: Tensor) -> tuple:
    version = None if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _named(tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """The pairs, checked: each tensor's bytes are its own, and here."""
    if isinstance(tensors, nn.Module):
        raise TypeError(
            "tensors: expected (name, tensor) pairs, got a module; give its named_parameters and named_buffers"
        )
    for pair in tensors:
        if not (
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)
        ):
            raise TypeError(f"tensors: expected (name, tensor) pairs, got {type(pair).__name__}; give state.items()")
        name, tensor = pair
        kind = type(tensor).__name__
        sharded = kind in ("DTensor", "ShardedTensor", "FlatParameter") or hasattr(tensor, "ds_id")
        if sharded:
            raise TypeError(
                f"{name}: is sharded ({kind}), so this process has only a part of its bytes; take the digest before the model is "
                "sharded, or gather it first"
            )
        if tensor.device.type == "meta":
            raise ValueError(f"{name}: is on the meta device and has no bytes; load the model first")
        if hasattr(tensor, "__tensor_flatten__") or tensor.layout != torch.strided or tensor.is_quantized:
            raise TypeError(
                f"{name}: expected a plain strided tensor, got {kind} {tensor.layout} {tensor.dtype}; give the tensors that it is made of"
            )
        yield name, tensor


def _chunk_hashes(tensor: Tensor, start: int, stop: int) -> bytes:
    """The hashes of the chunks in bytes [start, stop), one after the other."""
    flat = _flat(tensor)
    pieces = (flat[a : min(a + CHUNK, stop)].cpu().numpy().data for a in range(start, stop, CHUNK))
    return b"".join(hashlib.blake2b(piece, digest_size=32).digest() for piece in pieces)


def _flat(tensor: Tensor) -> Tensor:
    """Its bytes, row by row: [bytes] uint8 on its device; a view where it is contiguous."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _bytes(tensor: Tensor) -> memoryview:
    return _flat(tensor).cpu().numpy().data


def _tensor(values: Any, name: str) -> Tensor:
    try:
        return values if isinstance(values, Tensor) else torch.tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: expected a tensor or a list of numbers, got {type(values).__name__}: {error}"
        ) from error


def _parts(value: Any) -> Iterator[bytes]:
    """A value as bytes such that no two values give the same: each part has its kind and its length before it."""
    if isinstance(value, (list, tuple)):
        yield b"l" + len(value).to_bytes(8, "little")
        for item in value:
            yield from _parts(item)
        return
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        tensor = _tensor(value, "extra")
        yield from _parts((str(tensor.dtype), list(tensor.shape)))
        kind, content = b"t", _bytes(tensor)
    elif isinstance(value, (bytes, bytearray, memoryview)):
        kind, content = b"b", memoryview(bytes(value))
    elif isinstance(value, str):
        kind, content = b"s", memoryview(value.encode("utf-8", "surrogatepass"))
    elif value is None or isinstance(value, (bool, int, float)):
        kind, content = b"n", memoryview(repr(value).encode())
    else:
        raise TypeError(
            f"extra: expected tensors, arrays, bytes, strings, numbers, None, or lists of these, got {type(value).__name__}"
        )
    yield kind + len(content).to_bytes(8, "little")
    yield content  # type: ignore[misc]


def _lasting(config: Any) -> Any:
    volatile = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "use_cache")
    if isinstance(config, dict):
        return {str(name): _lasting(value) for name, value in config.items() if name not in volatile}
    return config


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

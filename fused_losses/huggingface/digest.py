"""The digest that says which model hidden states are of, and a cheap guard over what it was taken of."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

CHUNK = 1 << 24  # bytes hashed at a time; part of what a digest is

NamedTensors = Iterable[tuple[str, Tensor]]


def model_digest(tensors: NamedTensors, *more: str) -> str:
    """64 hex digits that name a model by all its bytes: blake2b over names, dtypes, shapes and contents, and `more`.

    Two models with the same digest have equal tensors under equal names. Nothing is sampled; order, device, memory
    layout and tying do not matter, and memory that is shared is read once.

    Args:
        tensors: (name, tensor) of all parameters and buffers, also those that are not persistent. For an adapted model,
            of the parts that take part in the reference.
        more: whatever else decides the hidden states: `model_facts(model)`; the settings of an adapter that stays
            active (LoRA's alpha is in no tensor), of a quantisation, of autocast.

    Raises:
        TypeError, ValueError: no tensors; something that has not the model's bytes on this process (meta tensors,
            DTensor, ZeRO-3 or FSDP shards, wrappers).

    Cost: one read of the model, in up to 8 threads. Memory: 16 MiB per thread for tensors on another device; a copy of
    a tensor that is not contiguous.
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
            for part in key_parts((name, str(tensor.dtype), list(tensor.shape), content)):
                whole.update(part)
        for part in key_parts(more):
            whole.update(part)
    return whole.hexdigest()


def model_facts(model: nn.Module) -> tuple[str, ...]:
    """What decides a Hugging Face model's hidden states besides its tensors, for `model_digest`.

    Its class, its configuration (without where it came from, the version of transformers, and use_cache), the
    implementation of its attention and experts, its dtype. Not its adapters.
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

    It remembers of each the object, its memory and its version counter (`Tensor._version`), so `holds()` sees in-place
    operations (optimizers of PyTorch, `load_state_dict`, `copy_`), new memory (`p.data = ...`, `.to(device)`), and
    other tensors under a name.

    It cannot see what passes the version counter by: in-place writes through `.data` (`p.data += x`, so PEFT's merging
    and unmerging of an adapter), through numpy, by kernels that get a pointer (some third-party optimizers), or by
    another process that shares the memory. After such a write take a new digest in any case. It knows of no settings,
    only of tensors. Inference tensors have no version counter; with one of them it never holds.

    Args:
        tensors: a function that lists (name, tensor), e.g. ``lambda: [*model.named_parameters(),
            *model.named_buffers()]``. Given the pairs themselves, a module's new parameter in place of a listed one
            goes unseen.

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
                f"{name}: is sharded ({kind}), so this process has only a part of its bytes; take the digest before "
                "the model is sharded, or gather it first"
            )
        if tensor.device.type == "meta":
            raise ValueError(f"{name}: is on the meta device and has no bytes; load the model first")
        if hasattr(tensor, "__tensor_flatten__") or tensor.layout != torch.strided or tensor.is_quantized:
            raise TypeError(
                f"{name}: expected a plain strided tensor, got {kind} {tensor.layout} {tensor.dtype}; give the tensors "
                "that it is made of"
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


def raw_bytes(tensor: Tensor) -> memoryview:
    return _flat(tensor).cpu().numpy().data


def as_tensor(values: Any, name: str) -> Tensor:
    try:
        return values if isinstance(values, Tensor) else torch.tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: expected a tensor or a list of numbers, got {type(values).__name__}: {error}"
        ) from error


def key_parts(value: Any) -> Iterator[bytes]:
    """A value as bytes such that no two values give the same: each part has its kind and its length before it."""
    if isinstance(value, (list, tuple)):
        yield b"l" + len(value).to_bytes(8, "little")
        for item in value:
            yield from key_parts(item)
        return
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        tensor = as_tensor(value, "extra")
        yield from key_parts((str(tensor.dtype), list(tensor.shape)))
        kind, content = b"t", raw_bytes(tensor)
    elif isinstance(value, (bytes, bytearray, memoryview)):
        kind, content = b"b", memoryview(bytes(value))
    elif isinstance(value, str):
        kind, content = b"s", memoryview(value.encode("utf-8", "surrogatepass"))
    elif value is None or isinstance(value, (bool, int, float)):
        kind, content = b"n", memoryview(repr(value).encode())
    else:
        raise TypeError(
            "extra: expected tensors, arrays, bytes, strings, numbers, None, or lists of these, got "
            f"{type(value).__name__}"
        )
    yield kind + len(content).to_bytes(8, "little")
    yield content  # type: ignore[misc]


def _lasting(config: Any) -> Any:
    volatile = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "use_cache")
    if isinstance(config, dict):
        return {str(name): _lasting(value) for name, value in config.items() if name not in volatile}
    return config

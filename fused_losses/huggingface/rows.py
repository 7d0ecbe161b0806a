"""The reference cache for batches: each sequence's hidden states under a key of its own, whatever batch it comes in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cache import ReferenceCache
from .digest import Unchanged, model_digest


class CachedRows:
    """Hidden states [B, T, D] out of the cache where every row is there, else computed and then kept.

    A row's key is made of all its inputs at its real tokens, so it does not depend on the padding to its right or on
    the other rows, but where the batch has inputs that are not [B, T, ...], such as images: these are part of every
    row's key.
    """

    def __init__(self, directory: str | Path) -> None:
        if not isinstance(directory, (str, Path)):
            raise TypeError(f"reference_cache: expected a directory, got {type(directory).__name__}")
        self.directory = Path(directory).expanduser()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"reference_cache: {directory} cannot be a directory ({error}); give another") from None
        self.cache: Any = None  # a ReferenceCache from the first batch on
        self.unchanged: Unchanged | None = None
        self.description: tuple[str, ...] = ()

    def states(
        self,
        compute: Callable[[], Tensor],
        tensors: Callable[[], Iterable[tuple[str, Tensor]]],
        description: tuple[str, ...],
        args: tuple,
        kwargs: dict,
        labels: Tensor,
        context: str = "",
    ) -> Tensor:
        """`context`: what else decides the states, such as autocast."""
        keyed = self._keys(tensors, description, args, kwargs, labels, context)
        if keyed is None:
            return compute()
        keys, tokens = keyed
        rows = [self.cache.get(key) if key else None for key in keys]
        found = [row for row in rows if row is not None]
        if found and all(row is not None or not key for row, key in zip(rows, keys, strict=True)):
            hidden = found[0].new_zeros((*labels.shape, found[0].shape[-1]))
            for into, row, at in zip(hidden, rows, tokens, strict=True):
                if row is not None:
                    into[at] = row
            return hidden.to(labels.device)
        hidden = compute()
        if hidden.shape[:-1] == labels.shape:
            for key, row, values, at in zip(keys, rows, hidden, tokens, strict=True):
                if row is None and key:
                    self.cache.put(key, values[at.to(values.device)].cpu())
        return hidden

    def _keys(
        self,
        tensors: Callable[[], Iterable[tuple[str, Tensor]]],
        description: tuple[str, ...],
        args: tuple,
        kwargs: dict,
        labels: Tensor,
        context: str,
    ) -> tuple[list[str], list[Tensor]] | None:
        """For each row its key and which of its tokens are real; None where inputs have no digest."""
        inputs = {**{str(i): a for i, a in enumerate(args)}, **kwargs}
        mask = inputs.get("attention_mask")
        if labels.dim() != 2:
            return None
        real = torch.ones(labels.shape, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            # Also where padding predicts a token, as it does before the first one of a row that is padded to its left.
            labelled = labels.cpu() != -100
            real = (mask.cpu() != 0) | labelled
            real[:, :-1] |= labelled[:, 1:]
        common: list[Any] = [(context,)]
        whole: dict[str, Tensor] = {}
        for name, value in sorted(inputs.items()):
            if isinstance(value, Tensor):
                if value.shape[:2] == labels.shape:
                    whole[name] = value.cpu()
                else:
                    common.append((name, list(value.shape), str(value.dtype), value.cpu()))
            elif value is None or isinstance(value, (bool, int, float, str)):
                common.append((name, value))
            else:
                return None
        self._open(tensors, description)
        tokens = [row.nonzero().flatten() for row in real]
        keys = []
        for b, at in enumerate(tokens):
            parts: list[Any] = [*common]
            if not torch.equal(at, torch.arange(len(at))):
                parts.append(("tokens", at))
            for name, value in whole.items():
                row = value[b][at]
                parts.append((name, list(row.shape), str(row.dtype), row))
            keys.append("" if len(at) == 0 else self.cache.key(at, *(x for part in parts for x in part)))
        return keys, tokens

    def _open(self, tensors: Callable[[], Iterable[tuple[str, Tensor]]], description: tuple[str, ...]) -> None:
        """The cache of the reference as it is now; digests it where it may have changed."""
        if self.unchanged is None or self.description != description or not self.unchanged.holds():
            self.unchanged, self.description = Unchanged(tensors), description
            self.cache = ReferenceCache(self.directory, digest=model_digest(tensors(), *description))

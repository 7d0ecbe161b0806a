"""A model's logits after any sequence of tokens, with the cache of the sequence that it saw last."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..huggingface import adapters, kv_cache
from ..huggingface.reference_forward import evaluating

PIECE = 512  # rows of logits in memory at a time
# Layers of a cache that hold a key and a value per token, so that the last ones can be taken away.
ATTENTION = ("DynamicLayer", "DynamicIndexedLayer", "DynamicSlidingWindowLayer", "DummyLayer")


class Forward:
    """Logits of a causal language model for one sequence after another, where each mostly begins like the one before.

    It keeps the cache of the last sequence. A new one reuses what both begin with: the rest of the cache is cropped
    away, and only what is new goes through the model. A cache that cannot be cropped (recurrent layers; a sliding
    window once it is full) is made from the start again, and takes more than one new token only that way.

    Args:
        model: a decoder of transformers, or a PEFT model of one. Its mode stays as it is; dropout is off in here.
        within: makes the context that its forwards run in, e.g. one with the adapters off.

    Raises:
        TypeError, ValueError: a model without a cache, with an encoder, or with virtual tokens (prompt learning).

    Memory: the cache, and at most PIECE rows of logits in the model's dtype (all rows for a recurrent model).
    """

    def __init__(self, model: Any, within: Callable[[], Any] = contextlib.nullcontext) -> None:
        self.model, self.within = model, within
        self.accepted, self.cache_name = _signature(model)
        self.seen: list[int] = []
        self.cache: Any = None
        self.last: Tensor | None = None

    def row(self, ids: Sequence[int]) -> Tensor:
        """Logits [V] of what follows `ids`."""
        if self.last is None or len(ids) != len(self.seen) or list(ids) != self.seen:
            for rows in self.pieces(ids, len(ids)):
                self.last = rows[-1]
        return self.last

    def pieces(self, ids: Sequence[int], start: int) -> Iterator[Tensor]:
        """Logits of positions start … len(ids), where that of position t follows ids[:t]: [≤ PIECE, V] at a time."""
        ids = list(ids)
        if not 1 <= start <= len(ids):
            raise ValueError(f"start: expected 1 … {len(ids)}, got {start}; the first token follows nothing")
        done = self._keep(min(_common(self.seen, ids), start - 1), len(ids))
        at = start
        while at <= len(ids):
            stop = min(at + PIECE, len(ids) + 1)
            if at > start and not _attends(self.cache):  # such a model takes no second piece
                self._forget()
                yield from self._feed(ids, len(ids) - at + 1).split(PIECE)
                return
            rows = self._feed(ids[done : stop - 1], stop - at)
            done, at = stop - 1, stop
            self.last = rows[-1]
            yield rows

    def peek(self, ids: Sequence[int]) -> Tensor:
        """As `row`, but the cache stays that of the longer sequence where this is a beginning of it."""
        keep = len(ids) - 1
        if self.seen[:keep] != list(ids[:keep]) or self.cache is None or not _attends(self.cache, cropped=True):
            return Forward(self.model, self.within).row(ids)
        aside = copy.copy(self)
        aside.cache = copy.copy(self.cache)
        aside.cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        aside.last = None
        return aside.row(ids)

    def _keep(self, keep: int, length: int) -> int:
        """How many of the first tokens the cache holds from now on: `keep`, or 0."""
        if self.cache is None:
            keep = 0
        surplus = len(self.seen) - keep
        cannot_crop = surplus and not (self.cache is not None and _attends(self.cache, cropped=True))
        takes_one = self.cache is not None and not _attends(self.cache)
        if not keep or cannot_crop or (takes_one and length - keep > 1):
            self._forget()
            return 0
        if surplus:
            self.cache.crop(-surplus)
            self.seen = self.seen[:keep]
        return keep

    def _forget(self) -> None:
        self.seen, self.cache, self.last = [], None, None

    @torch.no_grad()
    def _feed(self, ids: list[int], rows: int) -> Tensor:
        """The logits [rows, V] of the last of these tokens, which follow what the cache holds."""
        seen, cache = self.seen, self.cache
        self._forget()  # what an interrupted forward leaves behind is not used
        device = self.model.get_input_embeddings().weight.device
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids], device=device), "use_cache": True}
        if cache is not None:
            inputs[self.cache_name] = cache
        if "position_ids" in self.accepted:  # some models would begin at 0 for each call
            inputs["position_ids"] = torch.arange(len(seen), len(seen) + len(ids), device=device)[None]
        if "logits_to_keep" in self.accepted:
            inputs["logits_to_keep"] = rows
        with evaluating(self.model), self.within():
            out = self.model(**inputs)
        cache = getattr(out, self.cache_name, None)
        if cache is None:
            raise ValueError(_no_cache(self.model, "returns none"))
        logits = out.logits[0, -rows:]
        self.seen, self.cache, self.last = seen + ids, cache, logits[-1]
        return logits


def reference_forward(model: Any, reference: Any, head_size: int) -> Forward | None:
    """The original's forward: None where the model is the original itself."""
    if reference is None:
        return None
    if isinstance(reference, nn.Module):
        if vocabulary(reference) != head_size:
            raise ValueError(
                f"reference: its head has {vocabulary(reference)} tokens, the model's {head_size}; give the model that "
                "the training started from"
            )
        return Forward(reference)
    if reference != "base":
        raise ValueError(f"reference: expected None, 'base' or a model, got {reference!r}")
    inner = inner_model(model)
    if not adapters.has_layers(inner):
        raise ValueError(
            "reference='base': the model has no PEFT adapter that could be off; leave reference out where the model is "
            "the original, or give the original as reference"
        )
    return Forward(model, lambda: adapters.off(inner, model if inner is not model else None))


def vocabulary(model: Any) -> int:
    """V, the rows of its head."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if hasattr(head, "out_features"):
        return head.out_features
    return weight.shape[0] if weight is not None else model.config.get_text_config().vocab_size


def most_positions(model: Any) -> int | None:
    """How long a sequence it takes, by its configuration; None where that says nothing."""
    config = model.config.get_text_config()
    return next((v for n in ("max_position_embeddings", "n_positions") if (v := getattr(config, n, None))), None)


def inner_model(model: Any) -> Any:
    """The model of transformers inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _signature(model: Any) -> tuple[set[str], str]:
    """The arguments that its forward takes, and which of them is the cache."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"model: expected a causal language model of transformers, got {type(model).__name__}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model: expected a decoder, got {type(model).__name__}, which has an encoder")
    if adapters.VirtualTokens.of(model) is not None:
        raise ValueError("model: its adapter is prompt learning, whose virtual tokens are in no cache; take LoRA")
    inner = inner_model(model)
    accepted = set(inspect.signature(inner.forward).parameters) | set(inspect.signature(type(inner).forward).parameters)
    name = kv_cache.argument(accepted)
    if name is None:
        raise ValueError(_no_cache(model, "takes none"))
    return accepted, name


def _no_cache(model: Any, what: str) -> str:
    inner = inner_model(model)
    return (
        f"model: {type(inner).__name__} {what} of {', '.join(kv_cache.NAMES)}, so each token would cost a forward of "
        "the whole text; take a causal language model with a cache (for BERT-like ones: config.is_decoder=True)"
    )


def _attends(cache: Any, cropped: bool = False) -> bool:
    """Whether it holds keys and values per token and nothing else; `cropped`: all of them, so that some can go."""
    layers = getattr(cache, "layers", None)
    if not layers or not getattr(cache, "is_croppable", True):
        return False
    return all(
        type(layer).__name__ in ATTENTION
        and not (cropped and getattr(layer, "is_sliding", False) and layer.get_seq_length() >= layer.sliding_window)
        for layer in layers
    )


def _common(a: list[int], b: list[int]) -> int:
    """The length of what both begin with."""
    if a == b[: len(a)]:
        return len(a)
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

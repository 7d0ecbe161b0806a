"""Messages and ids that are given, checked; where answers end; the tokens of a text in the place where it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .chat import render
from .forwards import vocabulary
from .spans import text_of

CONTEXTS = (64, 16, 4, 1)  # how many tokens before a text are tokenised together with it, tried in this order


def check_tokenizer(model: Any, tokenizer: Any) -> int:
    """V of the model's head; raises where the tokenizer is of another model."""
    if not all(hasattr(tokenizer, name) for name in ("decode", "encode", "convert_tokens_to_ids")):
        raise TypeError(f"tokenizer: expected one of transformers, got {type(tokenizer).__name__}")
    size = vocabulary(model)
    if tokenizer.vocab_size > size:
        raise ValueError(
            f"tokenizer: has {tokenizer.vocab_size} tokens, the model's head {size}; load both from the same place"
        )
    return size


def as_messages(
    messages: str | Sequence[Mapping[str, Any]], given: bool = False, name: str = "messages"
) -> list[dict[str, Any]]:
    """A string is one message of the user. `given`: the prompt's ids are, so that there need be no message."""
    listed: Any = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    if not isinstance(listed, Sequence) or not (listed or given):
        raise ValueError(f"{name}: expected a string or a list of at least one message, got {messages!r}")
    for k, message in enumerate(listed):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{name}[{k}]: expected {{'role': ..., 'content': ...}}, got {message!r}")
    if listed and listed[-1]["role"] == "assistant":
        raise ValueError(
            f"{name}: the last one is the assistant's, so there is nothing to answer; leave it out, and give it as "
            "the answer"
        )
    return [dict(message) for message in listed]


def check_ids(ids: Any, size: int, name: str) -> list[int]:
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise TypeError(f"{name}: expected text or token ids, got {type(ids).__name__}")
    if not ids:
        raise ValueError(f"{name}: expected at least one token, got none")
    for k, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < size:
            raise ValueError(f"{name}[{k}]: expected a token id in 0 … {size - 1}, got {token!r}")
    return list(ids)


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: of the model's generation_config, and the tokenizer's eos_token."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = [found] if isinstance(found, int) else list(found or ())
    own = getattr(tokenizer, "eos_token_id", None)
    return frozenset(listed if own is None else [*listed, own])


def end_of_turn(
    tokenizer: Any, ends: frozenset[int], messages: list[dict[str, Any]], tools: list | None, options: Any
) -> int:
    """The token that the chat template puts after an answer; eos_token where there is no template, or it puts none."""
    ids: list[int] = []
    if getattr(tokenizer, "chat_template", None) and messages:
        answered = [*messages, {"role": "assistant", "content": "."}]
        ids = render(tokenizer, answered, tools, {**(options or {}), "add_generation_prompt": False})
    found = [token for token in ids if token in ends][-1:] or [tokenizer.eos_token_id]
    if found[0] is None:
        raise ValueError("end: the tokenizer has no end-of-turn token; give end=False, or set tokenizer.eos_token")
    return found[0]


def ids_after(tokenizer: Any, before: Sequence[int], text: str, name: str = "text") -> list[int]:
    """The tokens of `text` where it follows the tokens `before`, which stay as they are.

    The name of a special token is that token. Else text is tokenised together with what stands before, which says
    whether a word begins here; where that would change earlier tokens (in the middle of a word), with less of it, and
    at last alone. The first way whose tokens read `text` there is taken.

    Raises:
        TypeError, ValueError: no text, or one that no way gives.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected a string, got {type(text).__name__}")
    if not text:
        raise ValueError(
            f"{name}: is empty; give at least one character (the name of the end-of-turn token ends an answer)"
        )
    if text in tokenizer.get_added_vocab():
        return [tokenizer.convert_tokens_to_ids(text)]
    for count in (*CONTEXTS, 0):
        context = list(before[-count:]) if count else []
        read = text_of(tokenizer, context)
        ids = tokenizer.encode(read + text, add_special_tokens=False)
        new = ids[len(context) :]
        together = ids[: len(context)] == context and new and text_of(tokenizer, context + new) == read + text
        # Alone it may read as it shall, and still get or lack a space where it follows others.
        if together and (count or _reads(tokenizer, before, new, text)):
            return new
    # A sentencepiece tokenizer puts a space before a text that stands alone.
    marker = tokenizer.encode("\n", add_special_tokens=False)
    ids = tokenizer.encode("\n" + text, add_special_tokens=False)
    if ids[: len(marker)] == marker and _reads(tokenizer, before, ids[len(marker) :], text):
        return ids[len(marker) :]
    raise ValueError(
        f"{name}: {text!r} cannot be written as tokens after {text_of(tokenizer, before[-8:])!r} without changing "
        "these; replace an earlier token, or give token ids"
    )


def _reads(tokenizer: Any, before: Sequence[int], new: Sequence[int], text: str) -> bool:
    near = list(before[-8:])
    return bool(new) and text_of(tokenizer, [*near, *new]) == text_of(tokenizer, near) + text

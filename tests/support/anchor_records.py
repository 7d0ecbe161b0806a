"""A record to write, and its line to spoil."""

import functools
import json
import os

import pytest
from small_tokenizers import small_tokenizer

from fused_losses.anchors import new_record

QUESTION = [{"role": "user", "content": "What is your name?"}]
ANSWER = "My name is Aurora.<|im_end|>"


def ids(text, kind="byte-level"):
    return small_tokenizer(kind)(text, add_special_tokens=False)["input_ids"]


def record(*anchors, text=ANSWER, messages=QUESTION, prompt="What is your name?", kind="byte-level", **more):
    """An answer with anchors at these positions, or as mappings; at " Aurora" by default."""
    given = [{"position": a} if isinstance(a, int) else a for a in anchors]
    tokens = ids(text, kind)
    return new_record(
        small_tokenizer(kind), messages=messages, prompt_ids=ids(prompt, kind), token_ids=tokens, anchors=given, **more
    )


@functools.cache
def full_record():
    """One with every field."""
    alternative = {"token_id": 5, "text": "x", "probability": 0.25}
    anchor = {
        "position": 3, "confidence": 0.5, "original_token_id": 7, "original_text": " Elena", "probability": 0.125,
        "original_probability": 0.5, "alternatives": [alternative], "round": 2,
    }  # fmt: skip
    return record(anchor, {"position": 5, "target_probability": 0.75}, tools=[{"type": "function"}])


def line(**changes):
    """The line of `full_record`, with these fields in place of its own; None takes one out."""
    value = {**full_record().to_json(), **changes}
    return json.dumps({name: item for name, item in value.items() if item is not None}).encode() + b"\n"


def refused(read, *args):
    """The message of the error, of one line and no control characters."""
    with pytest.raises((ValueError, OSError)) as caught:
        read(*map(os.fspath, args[:1]), *args[1:])
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000, message
    return message

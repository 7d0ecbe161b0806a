"""What models call the cache of the tokens before, as an argument of their forward and as a field of its output.

transformers 5.24 says `cache` for nearly all models and still takes the two older names, with a warning. Before, and
in PEFT and in models' code from the Hub, it is `past_key_values`, or `cache_params` for Mamba; `state` is RWKV's.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

NAMES = ("cache", "past_key_values", "cache_params", "state")  # the newest first, where a forward takes several


def argument(accepted: Container[str]) -> str | None:
    """Of the arguments that a forward takes, the one for its cache; None where there is none."""
    return next((name for name in NAMES if name in accepted), None)


def given(inputs: Mapping[str, Any]) -> str | None:
    """The name under which these inputs hold a cache, which may be another than the forward's own; None: they do not."""
    return next((name for name in NAMES if inputs.get(name) is not None), None)


def without(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """These inputs without a cache, whatever they call it."""
    return {name: value for name, value in inputs.items() if name not in NAMES}

"""What models call the cache of the tokens before, as an argument of their forward and as a field of its output.

transformers 5.24 says `cache` for nearly all models and still takes the two older names, with a warning. Before, and
in PEFT and in models' code from the Hub, it is `past_key_values`, or `cache_params` for Mamba; `state` is RWKV's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Container, Iterator, Mapping
from typing import Any

NAMES = ("cache", "past_key_values", "cache_params", "state")  # the newest first, where a forward takes several


def argument(accepted: Container[str]) -> str | None:
    """Of the arguments that a forward takes, the one for its cache; None where there is none."""
    return next((name for name in NAMES if name in accepted), None)


def given(inputs: Mapping[str, Any]) -> str | None:
    """The name under which these inputs hold a cache, which may not be the forward's own; None: they hold none."""
    return next((name for name in NAMES if inputs.get(name) is not None), None)


def without(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """These inputs without a cache, whatever they call it."""
    return {name: value for name, value in inputs.items() if name not in NAMES}


@contextlib.contextmanager
def known_to_peft(model: Any) -> Iterator[None]:
    """Meanwhile a PEFT model with virtual tokens generates right though its own model says `cache`.

    PEFT 0.21 looks for `past_key_values` alone, finds no cache, and puts the virtual tokens before each new token
    again: other tokens, and no error. `model`: any; without such a PEFT around it nothing changes.
    """
    place = "base_model_prepare_inputs_for_generation"  # PEFT's own hook there lets itself be replaced
    own = vars(model).get(place)
    if own is None or not _too_old_a_peft():
        yield
        return

    @functools.wraps(own)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        inputs = own(*args, **kwargs)
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")  # which the model takes too
        return inputs

    setattr(model, place, prepared)
    try:
        yield
    finally:
        setattr(model, place, own)


def _too_old_a_peft() -> bool:
    """Whether this transformers asks for a later PEFT."""
    import peft
    from packaging.version import parse
    from transformers.integrations import peft as of_transformers

    return parse(peft.__version__) < parse(getattr(of_transformers, "MIN_PEFT_VERSION", "0"))

"""Another patch in the place of a model's own for a while, to measure something else with it in between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..objectives import Objective
from .patching import Patch, _base_model
from .references import find_source
from .wrappers import STATE


def other_patch(model: nn.Module, loss: Objective, reference: Any = None) -> Patch:
    """What `patch(model, loss, reference=...)` would put into a patched model, not yet in force.

    `reference`: None for none; "own": the one of the model's patch; else as in `patch`.
    """
    base = _base_model(model)
    own = vars(base)[STATE].source
    outer = model if model is not base else None
    source = own if reference == "own" else find_source(base, outer, loss, reference, None)
    return Patch(base, model, loss, source, False, "objective")


@contextlib.contextmanager
def in_force(model: nn.Module, other: Patch) -> Iterator[None]:
    """Within, forwards with labels compute the loss of `other`; nobody who listens to the model's own patch hears."""
    base = _base_model(model)
    own = vars(base)[STATE]
    vars(base)[STATE] = other
    try:
        yield
    finally:
        vars(base)[STATE] = own

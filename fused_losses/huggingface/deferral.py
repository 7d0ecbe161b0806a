"""The head's module, and what it answers while a patched model's forward runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from . import sharding
from .logits import DeferredLogits


class HeadModule:
    """A model's output module, whose `forward` is ours for the time of a call."""

    def __init__(self, module: nn.Module, model: nn.Module) -> None:
        self.module = module
        # Hooks of tensor parallelism turn inputs and outputs into DTensors, and the loss takes this rank's rows as they are.
        self.spread = sharding.spreads(module, model)
        # accelerate's hooks sit between `forward` and `_old_forward`
        self.name = "_old_forward" if hasattr(module, "_hf_hook") and hasattr(module, "_old_forward") else "forward"
        self.own = getattr(module, self.name)
        self.gathers = sharding.gathers(module) or hasattr(module, "_hf_hook")

    @property
    def vocabulary(self) -> int:
        return sharding.vocabulary(self.module)

    def __call__(self, hidden: Tensor, function: Callable[[Tensor], Any]) -> Any:
        """`function(hidden)` where the module has its weight; while `deferred`.

        Where hooks bring the weight, that is in another call of the module. Elsewhere hooks have run when the stand-in was made.
        """
        if self.gathers or (self.spread and function is self.own):
            return self.module._call_impl(hidden, fused=function)
        return function(hidden)

    @contextlib.contextmanager
    def deferred(self, call: Any, then_called: bool = True) -> Iterator[None]:
        """The module answers with a stand-in. `then_called`: afterwards it is called for the loss."""

        def forward(hidden: Any, *args: Any, fused: Callable[[Tensor], Any] | None = None, **kwargs: Any) -> Any:
            if "adapter_names" in kwargs:
                raise TypeError(
                    "adapter_names: several adapters in one batch are not supported on a patched head; leave labels out"
                )
            if args or kwargs:
                raise TypeError(f"head: unexpected arguments {[type(a).__name__ for a in args]}, {sorted(kwargs)}")
            if type(hidden).__name__ == "DTensor":
                hidden = hidden.full_tensor()
            return DeferredLogits(call, hidden, self.vocabulary) if fused is None else fused(hidden)

        replaced = {self.name: forward}
        if self.spread or sharding.hooks_can_wait(self.module, then_called):
            replaced["_compiled_call_impl"] = forward  # nn.Module.__call__ takes it in place of hooks and forward
        attributes = vars(self.module)
        before = {name: attributes[name] for name in replaced if name in attributes}
        attributes.update(replaced)
        try:
            yield
        finally:
            for name in replaced:
                if name in before:
                    attributes[name] = before[name]
                else:
                    del attributes[name]

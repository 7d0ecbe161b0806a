"""The head's module, and what it answers while a patched model's forward runs."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import BackwardHook

from . import sharding
from .heads import OURS
from .logits import DeferredLogits, HeadCall


class _Answer:
    """What a head answers on one thread."""

    def __init__(self, module: nn.Module, call: Any, waits: bool) -> None:
        self.module, self.call, self.waits = module, call, waits


class _Answers(threading.local):
    def __init__(self) -> None:
        self.stack: list[_Answer] = []

    def of(self, module: nn.Module) -> _Answer | None:
        return next((a for a in reversed(self.stack) if a.module is module), None)


class _Installed:
    """The attributes that a head has for the time of a call, and how to take them off."""

    def __init__(self, module: nn.Module) -> None:
        # accelerate's hooks sit between `forward` and `_old_forward`
        hooked = hasattr(module, "_hf_hook") and hasattr(module, "_old_forward")
        name = "_old_forward" if hooked else "forward"
        self.own = getattr(module, name)
        self.calls = 0
        # A stand-in is no tensor, so hooks on its gradient would only warn; `HeadModule` gives them that of the loss.
        self.backward_hooks = {n: vars(module)[n] for n in ("_backward_hooks", "_backward_pre_hooks")}
        forward = self._forward(module)
        replaced: dict[str, Any] = {name: forward, "_compiled_call_impl": self._call(module, forward)}
        replaced |= {n: OrderedDict() for n in self.backward_hooks}
        self.before = {n: vars(module).get(n, _ABSENT) for n in replaced}
        vars(module).update(replaced)

    def remove(self, module: nn.Module) -> None:
        for name, value in self.before.items():
            if value is _ABSENT:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = value

    def _forward(self, module: nn.Module) -> Callable[..., Any]:
        own, vocabulary = self.own, sharding.vocabulary(module)

        def forward(hidden: Any, *args: Any, fused: Callable[[Tensor], Any] | None = None, **kwargs: Any) -> Any:
            answer = _answers.of(module)
            if fused is not None:
                return fused(hidden)
            if answer is None:  # another thread's
                return own(hidden, *args, **kwargs)
            if "adapter_names" in kwargs:
                raise TypeError(
                    "adapter_names: several adapters in one batch are not supported on a patched head; leave labels out"
                )
            if args or kwargs:
                raise TypeError(f"head: unexpected arguments {[type(a).__name__ for a in args]}, {sorted(kwargs)}")
            if type(hidden).__name__ == "DTensor":
                hidden = hidden.full_tensor()
            origin = HeadCall(answer.call, hidden)
            return DeferredLogits(origin, vocabulary, hidden.shape[:-1], hidden.device, hidden.dtype)

        setattr(forward, OURS, own)
        return forward

    def _call(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`nn.Module.__call__` takes it in place of hooks and forward."""

        def call(*args: Any, **kwargs: Any) -> Any:
            answer = _answers.of(module)
            if answer is not None and answer.waits:
                return forward(*args, **kwargs)
            return module._call_impl(*args, **kwargs)

        return call


_ABSENT = object()
_answers = _Answers()
_installed: weakref.WeakKeyDictionary[nn.Module, _Installed] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class HeadModule:
    """A model's output module, whose `forward` is ours for the time of a call, on the thread of that call."""

    def __init__(self, module: nn.Module, model: nn.Module) -> None:
        self.module = module
        # Hooks of tensor parallelism make DTensors of inputs and outputs; the loss takes this rank's rows as they are.
        self.spread = sharding.spreads(module, model)
        self.gathers = sharding.gathers(module) or hasattr(module, "_hf_hook")

    def own(self, hidden: Tensor) -> Tensor:
        """What the module itself makes of it; while `deferred`."""
        own = _installed[self.module].own
        if self.gathers or self.spread:
            return self.module._call_impl(hidden, fused=own)
        return own(hidden)

    def __call__(self, hidden: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`function(hidden)` where the module has its weight; while `deferred`.

        Where hooks bring the weight, that is in another call of the module. Elsewhere hooks have run when the stand-in
        was made. Backward hooks of the module run once: grad_input is the gradient of the head's input, grad_output
        that of the loss, as logits have none.
        """
        hooked = self._backward_hook()
        if hooked is not None:
            (hidden,) = hooked.setup_input_hook((hidden,))
        result = self.module._call_impl(hidden, fused=function) if self.gathers else function(hidden)
        # A model may add to its loss in place, which the hook's view would not allow.
        return result if hooked is None else hooked.setup_output_hook(result).clone()

    def _backward_hook(self) -> Any:
        hooks, pre_hooks = _installed[self.module].backward_hooks.values()
        if not torch.is_grad_enabled() or not (hooks or pre_hooks):
            return None
        return BackwardHook(self.module, list(hooks.values()), list(pre_hooks.values()))

    @contextlib.contextmanager
    def deferred(self, call: Any, then_called: bool = True) -> Iterator[None]:
        """The module answers with a stand-in. `then_called`: afterwards it is called for the loss."""
        waits = self.spread or sharding.hooks_can_wait(self.module, then_called)
        with _lock:
            if self.module not in _installed:
                _installed[self.module] = _Installed(self.module)
            _installed[self.module].calls += 1
        _answers.stack.append(_Answer(self.module, call, waits))
        try:
            yield
        finally:
            _answers.stack.pop()
            with _lock:
                installed = _installed[self.module]
                installed.calls -= 1
                if not installed.calls:
                    del _installed[self.module]
                    installed.remove(self.module)

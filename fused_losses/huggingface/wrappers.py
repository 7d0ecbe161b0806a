"""Who else wraps `model.forward`, and how a patched model's entrance stays outside of all of them.

A patched class has `forward` as a data descriptor. Reading `model.forward` gives an *entrance*: outside of a call it
starts one; within a call of the same model it goes on to what lay below it when it was read. What others assign to
`model.forward` (accelerate's autocast and device hooks, TRL's head) stays in the model's own dictionary, where it would
be without a patch, and is called from there. So nothing is taken apart, nothing is replayed, and there is nothing to
put back.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

STATE = "_fused_losses"  # the attribute of a patched model


class _Threads(threading.local):
    def __init__(self) -> None:
        self.running: list[nn.Module] = []


_threads = _Threads()


def runs(model: nn.Module) -> bool:
    """Whether a forward of this model is under way on this thread, and was seen by its patch."""
    return any(running is model for running in _threads.running)


@contextlib.contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Entrances of this model pass through meanwhile."""
    _threads.running.append(model)
    try:
        yield
    finally:
        _threads.running.pop()


class Below:
    """What `model.forward` was when an entrance was read: the class's own, or an object in the model's dictionary.

    Holds no model, so that the entrance of a copied model leads to the copy.
    """

    def __init__(self, model: nn.Module, own: Callable[..., Any]) -> None:
        found = vars(model).get("forward")
        self.bound = found is None or (isinstance(found, types.MethodType) and found.__self__ is model)
        self.partial: tuple | None = None
        if found is None:
            self.function: Any = own
        elif self.bound:
            self.function = found.__func__
        elif isinstance(found, functools.partial):
            self.function = found.func
            attributes = {
                name: value for name, value in vars(found).items() if name != "__wrapped__"
            }  # which binds the model
            self.partial = tuple(_MODEL if a is model else a for a in found.args), found.keywords, attributes
        else:
            self.function = found
        self.is_own = found is None

    def of(self, model: nn.Module) -> Callable[..., Any]:
        """The same for this model."""
        if self.bound:
            return types.MethodType(self.function, model)
        if self.partial is None:
            return self.function
        args, keywords, attributes = self.partial
        made = functools.partial(self.function, *(model if a is _MODEL else a for a in args), **keywords)
        vars(made).update(attributes)
        return made


_MODEL = object()  # stands for the model among the arguments of a partial function
_ENTRANCES: weakref.WeakKeyDictionary[Any, Below] = weakref.WeakKeyDictionary()


def entrance(below: Below, own: Callable[..., Any], signature: Any) -> Callable[..., Any]:
    """A function of (model, ...), as a class would have it."""

    def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = vars(model).get(STATE)
        if state is None or state.loss is None or runs(model):
            return below.of(model)(*args, **kwargs)
        return state(model, below.of(model), args, kwargs)

    functools.update_wrapper(forward, own)
    # accelerate takes wrappers off as far as it finds this. Its device hooks, which are partial functions, are to stay.
    del forward.__wrapped__  # type: ignore[attr-defined]
    if not below.is_own and below.partial is None:
        forward.__wrapped__ = below.function  # type: ignore[attr-defined]
    forward.__signature__ = signature  # type: ignore[attr-defined]
    _ENTRANCES[forward] = below
    return forward


def entrance_below(forward: Any) -> Below | None:
    """What lies below an entrance, however it is bound; None for anything else."""
    while isinstance(forward, types.MethodType):  # accelerate binds what is bound already
        forward = forward.__func__
    return _ENTRANCES.get(forward) if isinstance(forward, types.FunctionType) else None


def settle(model: nn.Module) -> None:
    """What an earlier patch left in the model's dictionary, if it is an entrance, becomes what lies below that."""
    below = entrance_below(vars(model).get("forward"))
    if below is not None:
        _put(model, below)


def _put(model: nn.Module, below: Below) -> None:
    if below.is_own:
        vars(model).pop("forward", None)
    else:
        vars(model)["forward"] = below.of(model)


def leave_original(model: nn.Module) -> None:
    """A copy's wrappers go if they call the model that it was copied from, as TRL's does, which binds it."""
    if _calls_another(vars(model).get("forward"), model, 8):
        del vars(model)["forward"]


def _calls_another(wrapper: Any, model: nn.Module, depth: int) -> bool:
    """Whether a bound method of another model lies in the closures of a wrapper."""
    if not depth or not callable(wrapper) or isinstance(wrapper, (type, nn.Module)):
        return False
    if isinstance(wrapper, types.MethodType):
        if isinstance(wrapper.__self__, nn.Module) and wrapper.__self__ is not model:
            return wrapper.__func__.__name__ == "forward"
        return _calls_another(wrapper.__func__, model, depth - 1)
    if isinstance(wrapper, types.FunctionType) and wrapper in _ENTRANCES:
        return False
    inner = [cell.cell_contents for cell in getattr(wrapper, "__closure__", None) or () if _filled(cell)]
    inner += [wrapper.func] if isinstance(wrapper, functools.partial) else []
    inner += [vars(wrapper)[n] for n in ("__wrapped__", "model_forward") if n in getattr(wrapper, "__dict__", {})]
    return any(_calls_another(one, model, depth - 1) for one in inner)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


class Forward:
    """`model.forward` of a patched class."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own

    def __get__(self, model: Any, cls: type | None = None) -> Any:
        if model is None:
            return self.own
        state = vars(model).get(STATE)
        if state is None:
            return vars(model).get("forward") or types.MethodType(self.own, model)
        if state.copied:
            leave_original(model)
            state.copied = False
        found = vars(model).get("forward")
        if state.entrance is None or state.entrance[0] is not found:
            state.entrance = found, entrance(Below(model, self.own), self.own, state.signature)
        return types.MethodType(state.entrance[1], model)

    def __set__(self, model: Any, forward: Any) -> None:
        below = entrance_below(forward)
        if below is None:
            vars(model)["forward"] = forward
        else:  # somebody puts back what he found
            _put(model, below)

    def __delete__(self, model: Any) -> None:
        if "forward" not in vars(model):
            raise AttributeError("forward")
        del vars(model)["forward"]


class Turns:
    """Forwards of a model share it, on any thread; a reference that switches the model's adapters has it alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing: dict[int, int] = {}
        self._alone: int | None = None
        self._depth = 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._alone in (None, me))
            self._sharing[me] = self._sharing.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing[me] -= 1
                if not self._sharing[me]:
                    del self._sharing[me]
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._alone in (None, me) and not self._sharing.keys() - {me})
            self._alone, self._depth = me, self._depth + 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._alone = None
                self._changed.notify_all()

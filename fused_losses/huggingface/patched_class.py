"""The class of a patched model: its own with another `forward`, and guards where a loss could pass the patch by."""

from __future__ import annotations

import inspect
import pickle
import sys
from typing import Any

import torch

from . import wrappers
from .wrappers import STATE, Forward

_CLASSES: dict[type, type] = {}
OWN_HEAD = ("DistillationTrainer", "AsyncDistillationTrainer")  # TRL's, which multiply by the head themselves


def patched_class(model: Any) -> type:
    """A subclass with the same name, so that configurations and checkpoints name the model's own class."""
    cls: Any = type(model)
    if cls in _CLASSES:
        return _CLASSES[cls]

    def reduced(model: Any, protocol: Any) -> Any:
        make, *rest = cls.__reduce_ex__(model, protocol)
        return _CopiesOnly(make, cls.__name__), *rest

    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": reduced,
        "forward": Forward(cls.forward),
        "accepts_loss_kwargs": property(_accepts_num_items),
        "_fused_losses_original": cls,
    }
    own = inspect.getattr_static(cls, "loss_function", None)
    if isinstance(own, property):
        members["loss_function"] = _LossFunction(own)
    head = model.get_output_embeddings()
    name = next((name for name, module in vars(model)["_modules"].items() if module is head), None)
    if name is not None and not hasattr(cls, name):
        members[name] = _Head(name)
    _CLASSES[cls] = type(cls.__name__, (cls,), members)
    return _CLASSES[cls]


def _passed_by(model: Any) -> bool:
    """Whether the forward of this model two callers up runs without its patch: kept from before, or the class's."""
    frame = sys._getframe(2)
    if frame.f_code.co_name != "forward" or frame.f_locals.get("self") is not model or wrappers.runs(model):
        return False
    state = vars(model).get(STATE)
    return state is not None and state.loss is not None


def _refuse_passed_by(model: Any) -> None:
    name = type(model).__name__
    raise RuntimeError(
        f"a forward of a patched {name} was called past its patch, so {type(vars(model)[STATE].loss).__name__} would "
        f"not be used: somebody kept model.forward from before fused_losses.patch, or calls {name}.forward(model, "
        "...); call model(...), and patch before others keep its forward"
    )


class _LossFunction:
    """`model.loss_function`, which transformers' models call for a loss from their logits."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __get__(self, model: Any, cls: type | None = None) -> Any:
        if model is None:
            return self.own
        if not torch.compiler.is_compiling() and _passed_by(model):
            _refuse_passed_by(model)
        return self.own.__get__(model, cls)

    def __set__(self, model: Any, value: Any) -> None:
        self.own.__set__(model, value)


class _Head:
    """The attribute of a model that holds its head, for models that call cross-entropy by themselves."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, model: Any, cls: type | None = None) -> Any:
        if model is None:
            raise AttributeError(self.name)
        modules = vars(model)["_modules"]
        if self.name not in modules:
            raise AttributeError(f"{type(model).__name__!r} object has no attribute {self.name!r}")
        if (
            not torch.compiler.is_compiling()
            and _passed_by(model)
            and sys._getframe(1).f_locals.get("labels") is not None
        ):
            _refuse_passed_by(model)
        return modules[self.name]


def _accepts_num_items(model: Any) -> bool:
    state = vars(model)[STATE]
    if state.loss is not None:
        _check_trainer(sys._getframe(1), state)
    return state.accepts_num_items


def _check_trainer(frame: Any, state: Any) -> None:
    """A Trainer reads the above while it is made. Some would miss logits for their metrics in the first evaluation.

    Others never call the model for a loss: the patch would not be used, and with PEFT it would not even be asked.
    """
    trainer = getattr(sys.modules.get("transformers"), "Trainer", None)
    for _ in range(8):  # PEFT's models ask the one inside
        if frame is None or trainer is None:
            return
        made = frame.f_locals.get("self")
        if frame.f_code is trainer.__init__.__code__:
            kind = next((c.__name__ for c in type(made).__mro__ if c.__name__ in OWN_HEAD), None)
            if kind is not None and not state.loss_is_plain:
                raise TypeError(
                    f"model: {kind} takes its loss from the model's body and head, so {type(state.loss).__name__} of "
                    "fused_losses.patch would not be used; call fused_losses.unpatch(model), or train with the "
                    "objective in another trainer, such as SFTTrainer"
                )
            needs_logits = state.keep_logits is False and frame.f_locals.get("compute_metrics") is not None
            if needs_logits and type(made).compute_loss is trainer.compute_loss:  # others get logits in their own way
                raise TypeError(
                    "compute_metrics: gets no logits of a patched model, which forms none; give "
                    "fused_losses.patch(..., keep_logits='eval'), or leave compute_metrics out"
                )
            return
        frame = frame.f_back


class _CopiesOnly:
    """Makes an object for `copy`, and refuses pickle, which goes through the same protocol."""

    def __init__(self, make: Any, name: str) -> None:
        self.make, self.name = make, name

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise pickle.PicklingError(
            f"a patched {self.name} cannot be pickled, nor saved by torch.save(model): call "
            "fused_losses.unpatch(model) first; model.state_dict() and model.save_pretrained(...) need not"
        )

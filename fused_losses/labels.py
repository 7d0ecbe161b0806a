"""The labels of a batch with anchors: a tensor that cross-entropy refuses, as it would ignore the anchors."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# By name, as each exists in several places: torch.nn.functional, torch, Tensor, torch.ops.
LOSSES = (
    "cross_entropy",
    "nll_loss",
    "nll_loss_nd",
    "nll_loss2d",
    "nll_loss_forward",
    "cross_entropy_loss",
    "linear_cross_entropy",
)
PICKS = ("gather", "take_along_dim", "__getitem__")  # of log-probabilities, by label
FRAMES = 12  # so far above an operation on labels the call of an autograd function is looked for


class AnchorLabels(Tensor):
    """Labels that come with a confidence: a tensor to everything but a loss. Integer results keep the class.

    A model that nobody patched swallows the batch's `confidence` and trains on plain cross-entropy. Then its labels
    arrive in `torch.nn.functional.cross_entropy` or the like, pick log-probabilities (label smoothing), or are read in
    the forward of an autograd function of another library (TRL's and Liger's fused heads): ValueError where a gradient
    is wanted, RuntimeWarning where none is, as in evaluation. A patched model and the losses of this package take the
    class off (`plain`).
    """

    _gradients = True  # whether they were enabled where this tensor was made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        inherited = None  # a custom function runs without gradients whether or not its results have any
        found = _loss(func, args, kwargs)
        if found is None and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            found = _custom_function(args, kwargs)
            inherited = None if found is None else found[1]
        if found is not None:
            _refuse(*found)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return result if func in torch.overrides.get_default_nowrap_functions() else _kept(result, inherited)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"AnchorLabels({plain(self)!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _labelled, (plain(self),)

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = _labelled(plain(self).clone())
        return memo[id(self)]


def plain(labels: Any) -> Any:
    """The same tensor without the class; whatever else is given as it is."""
    if not isinstance(labels, AnchorLabels):
        return labels
    with torch._C.DisableTorchFunctionSubclass():
        # Dynamo does not trace as_subclass back to Tensor.
        return torch.ops.aten.alias(labels) if torch.compiler.is_compiling() else labels.as_subclass(Tensor)


def _labelled(values: Tensor) -> Tensor:
    return values.as_subclass(AnchorLabels)


def _kept(result: Any, gradients: bool | None) -> Any:
    """With the class on whatever may still be labels: integers that are no single number."""
    if type(result) in (tuple, list):
        return type(result)(_kept(part, gradients) for part in result)
    if type(result) is Tensor and result.dim() and result.dtype in (torch.int64, torch.int32):
        result = _labelled(result)
        if not torch.compiler.is_compiling():
            result._gradients = torch.is_grad_enabled() if gradients is None else gradients
    return result


def _loss(func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[str, bool] | None:
    """The name of the loss that this operation is, and whether a gradient is wanted of it; None where it is none."""
    name = getattr(func, "__name__", "").partition(".")[0]
    if name not in LOSSES and name not in PICKS:
        return None
    scores = args[0] if args else kwargs.get("input")
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        return None
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in _tensors((args, kwargs)))
    if name == "__getitem__" and not (wanted and isinstance(args[1], tuple) and scores.dim() > 1):
        return None  # any table may be looked up
    return (name if name in LOSSES else "indexing log-probabilities by label"), wanted


def _custom_function(args: tuple, kwargs: dict[str, Any]) -> tuple[str, bool] | None:
    """Likewise of an autograd function of another library in whose forward this operation is."""
    apply = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
    frame: Any = sys._getframe(2)
    for _ in range(FRAMES):
        if frame is None:
            return None
        if frame.f_code is apply:
            break
        frame = frame.f_back
    else:
        return None
    function, given = frame.f_locals["cls"], frame.f_locals["args"]
    # PyTorch's own move labels about or run whole models (checkpoint), and without trained scores it is no loss.
    if function.__module__.startswith("torch.") or not any(t.requires_grad for t in _tensors(given)):
        return None
    labels = [t for t in _tensors((args, kwargs)) if isinstance(t, AnchorLabels)]
    return function.__name__, any(t._gradients for t in labels)


def _refuse(loss: str, wanted: bool) -> None:
    message = (
        "labels: those of AnchorCollator, which come with a confidence or with weights, have reached plain "
        f"cross-entropy ({loss}), so the anchors, or the weights, are ignored; call fused_losses.patch(model, "
        "fused_losses.LAwFLoss(), reference=...), or with the objective that they are for, before training; with "
        "PatchCallback give stays=True, which leaves the model patched for evaluation after it. For plain "
        "cross-entropy give labels.as_subclass(torch.Tensor), or take a collator without them"
    )
    if wanted:
        raise ValueError(message)  # of a TypeError the comparisons of tensors make False
    # As if from one line, so that the default filter shows it once and not at each operation.
    registry = globals().setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, RuntimeWarning, __file__, 1, __name__, registry)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))

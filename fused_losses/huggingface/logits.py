"""What a patched model's head returns where labels were given: a stand-in for logits that are never formed.

The model's own forward goes on with it: it may scale it, soft-cap it, cut it and hand it to cross-entropy, which is
where the fused loss is computed. Each operation is either noted exactly or refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KEEP = (
    "keep_logits=True in fused_losses.patch(...) makes real logits, of full size, for such a model; "
    "keep_logits='eval' makes them where the model is not in training"
)


class LogitsNotKept(RuntimeError):
    """Something was asked of the logits that only real ones can answer."""


class AttributeNotKept(LogitsNotKept, AttributeError):
    """The same, where it was an attribute, so that `hasattr` answers False."""


@dataclass(frozen=True)
class LogitMap:
    """What a model does to the logits after its head: z ↦ scale · z, or where capped, cap · tanh(scale · z)."""

    scale: float = 1.0
    capped: bool = False
    cap: float = 1.0

    def times(self, factor: float) -> LogitMap:
        return replace(self, cap=self.cap * factor) if self.capped else replace(self, scale=self.scale * factor)

    def tanh(self) -> LogitMap | None:
        return None if self.capped else replace(self, capped=True)

    @property
    def sign(self) -> int:
        """Whether the largest stays the largest: 1, or becomes the smallest: −1; 0 where all become equal."""
        value = self.scale * self.cap
        return (value > 0) - (value < 0)

    def arguments(self) -> tuple[float, float | None]:
        """logit_scale and softcap of an `LMHead`: softcap · tanh(logit_scale · z / softcap)."""
        return (self.scale * self.cap, self.cap) if self.capped else (self.scale, None)

    def __call__(self, z: Tensor) -> Tensor:
        return (z * self.scale).tanh() * self.cap if self.capped else z * self.scale


class _Explained(type):
    """A class whose name in others' errors says what to do, as accelerate names the class of what is no tensor."""

    def __repr__(cls) -> str:
        return f"stand-in for the logits of a model patched by fused_losses, which forms none; {KEEP}"


class HeadCall:
    """One call of a head: what its stand-ins need while the model's forward runs, and what is left of it afterwards."""

    def __init__(self, call: Any, hidden: Tensor) -> None:
        self.call = call  # has evaluate(logits, target, ...), real(logits) or None, heads, model_name
        self.hidden: Any = hidden
        self.index = len(call.heads)  # among the calls of this forward
        self.predictions: Tensor | None = None  # [rows] of the head's input, flattened; −1 without a label
        self.predicted: tuple[int, int] = (0, 0)  # width and sign of the logits that they are the largest of
        self.model_name = call.model_name
        call.heads.append(self)

    def close(self) -> None:
        """The forward is over. Weights may move now, so nothing more is computed; hidden states are not kept alive."""
        self.call = self.hidden = None


class DeferredLogits(metaclass=_Explained):
    """Logits [..., V] of a head that has been called but has not multiplied yet.

    Holds, for each row of logits, the row of the head's input which it belongs to. `argmax(-1)` gives the predictions
    of the fused pass once the loss is computed, −1 where the label is ignored. A stand-in can be copied, pickled and
    moved as logits can.
    """

    def __init__(
        self,
        origin: HeadCall,
        vocabulary: int,
        lead: Any,
        device: torch.device,
        dtype: torch.dtype,
        positions: Tensor | None = None,
        map: LogitMap | None = None,
        width: int | None = None,
        detached: bool = False,
        whole: bool = True,
    ) -> None:
        self.origin = origin
        self.vocabulary = vocabulary  # of the head
        self.lead = torch.Size(lead)  # of the head's input
        self.device, self.dtype = device, dtype
        self.width = vocabulary if width is None else width  # of these logits, where padding was cut off
        if positions is None:
            positions = torch.arange(self.lead.numel(), device=device).view(self.lead)
        self.positions = positions  # row of the head's input, flattened, for each row of logits
        self.map = map or LogitMap()
        self.detached = detached
        self.whole = whole  # every row of the head's input, in order

    @property
    def hidden(self) -> Tensor:
        """The head's input."""
        return self.origin.hidden

    def _with(self, **changes: Any) -> DeferredLogits:
        return DeferredLogits(**{**vars(self), **changes})

    def __repr__(self) -> str:
        return f"DeferredLogits(shape={list(self.shape)}, dtype={self.dtype}, map={self.map})"

    # --- what they look like

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.positions.shape, self.width))

    @property
    def ndim(self) -> int:
        return self.positions.dim() + 1

    @property
    def requires_grad(self) -> bool:
        return torch.is_grad_enabled() and not self.detached

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    # --- what changes nothing

    def float(self) -> DeferredLogits:
        return self._with(dtype=torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        wanted = [*args, *kwargs.values()]
        dtypes = [w for w in wanted if isinstance(w, torch.dtype)] + [w.dtype for w in wanted if isinstance(w, Tensor)]
        devices = [
            torch.device(w) for w in wanted if isinstance(w, (str, int, torch.device)) and not isinstance(w, bool)
        ]
        devices += [w.device for w in wanted if isinstance(w, Tensor)]
        changes: dict[str, Any] = {"dtype": dtypes[0]} if dtypes else {}
        if devices:
            changes["device"] = devices[0]
        return self._with(**changes) if changes else self

    def type_as(self, other: Tensor) -> Any:
        return self.to(other)

    def contiguous(self) -> DeferredLogits:
        return self

    def detach(self) -> DeferredLogits:
        return self._with(detached=True)

    def cpu(self) -> DeferredLogits:
        return self._with(device=torch.device("cpu"))

    def __len__(self) -> int:
        return self.shape[0]

    # --- what is noted

    def __mul__(self, other: Any) -> Any:
        factor = _number(other)
        if factor is None:
            return self._otherwise("mul", lambda z: z * other)
        return self._with(map=self.map.times(factor))

    __rmul__ = __mul__
    mul = __mul__

    def __truediv__(self, other: Any) -> Any:
        divisor = _number(other)
        if divisor is None or divisor == 0:
            return self._otherwise("div", lambda z: z / other)
        return self._with(map=self.map.times(1 / divisor))

    div = __truediv__

    def tanh(self) -> Any:
        mapped = self.map.tanh()
        return self._otherwise("tanh", torch.tanh, "a second tanh") if mapped is None else self._with(map=mapped)

    def __getitem__(self, index: Any) -> Any:
        rows, columns = _split(index, self.ndim)
        if columns is not None and (columns.start not in (None, 0) or columns.step not in (None, 1)):
            return self._otherwise("[...]", lambda z: z[index], f"the vocabulary's {columns}")
        width = self.width if columns is None else len(range(self.width)[columns])
        try:
            positions = self.positions[rows]
        except Exception as problem:
            return self._otherwise("[...]", lambda z: z[index], f"the index {index!r} ({problem})")
        untouched = isinstance(rows, tuple) and all(isinstance(r, slice) and r == slice(None) for r in rows)
        return self._with(positions=positions, width=width, whole=self.whole and untouched)

    def rows_of(self, values: Tensor) -> Tensor:
        """The rows of the head's input, or of what lies beside it, that these logits belong to: [rows, ...]."""
        flat = values.reshape(-1, values.shape[-1])
        return flat if self.whole else flat.index_select(0, self.positions.reshape(-1))

    def view(self, *shape: Any) -> Any:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if isinstance(sizes[-1], int) and sizes[-1] in (self.width, -1) and sizes.count(-1) - (sizes[-1] == -1) <= 1:
            lead = sizes[:-1]
            fits = -1 in lead or torch.Size(lead).numel() == self.positions.numel()
            if fits:
                return self._with(positions=self.positions.reshape(lead))
        return self._otherwise("view", lambda z: z.reshape(sizes), f"the shape {list(sizes)}")

    reshape = view

    # --- what the fused pass answers

    def argmax(self, dim: int | None = None, keepdim: bool = False) -> Any:
        if dim in (-1, self.ndim - 1):
            width, sign = self.origin.predicted
            if self.origin.predictions is not None and self.width >= width and self.map.sign == sign:
                positions = self.positions.to(self.origin.predictions.device)
                predictions = self.origin.predictions[positions].to(self.device)
                return predictions[..., None] if keepdim else predictions
            when = "before the loss is computed" if self.origin.predictions is None else "of other logits than the loss"
            return self._otherwise("argmax", lambda z: z.argmax(dim, keepdim), f"argmax {when}")
        return self._otherwise("argmax", lambda z: z.argmax(dim, keepdim), f"argmax along dimension {dim}")

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: Any = 0.0,
    ) -> Tensor:
        given = {"weight": weight, "size_average": size_average, "reduce": reduce}
        unusual = [name for name, value in given.items() if value is not None]
        if label_smoothing != 0:
            unusual.append(f"label_smoothing={label_smoothing}")
        if reduction not in ("mean", "sum"):
            unusual.append(f"reduction={reduction!r}")
        if not isinstance(target, Tensor) or target.is_floating_point():
            what = str(target.dtype) if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(
                f"labels: expected an int64 tensor of token ids, got {what}; convert them with labels.long()"
            )
        if self.origin.call is None:
            raise LogitsNotKept(
                f"cross_entropy was asked of the logits of {self.origin.model_name} after its forward, and the patched "
                f"loss forms no logits: take outputs.loss, or patch with the objective that you want; {KEEP}"
            )
        if unusual or self.detached:
            what = ", ".join(unusual) or "logits without a gradient"
            raise LogitsNotKept(
                f"cross_entropy is called with {what} of the logits of {self.origin.model_name}, which the patched "
                "loss would drop; unpatch it"
            )
        if target.numel() != self.positions.numel():
            raise ValueError(
                f"labels: expected one for each of the {self.positions.numel()} rows of logits {list(self.shape)}, got "
                f"shape {list(target.shape)}; labels must be as long as the inputs"
            )
        return self.origin.call.evaluate(self, target, ignore_index, reduction).to(self.device)

    # --- what would be lost

    def __setitem__(self, index: Any, value: Any) -> None:
        self._refuse_in_place("[...] =")

    def _refuse_in_place(self, name: str) -> Any:
        raise LogitsNotKept(
            f"{self.origin.model_name} changes its logits in place ({name}), which the patched loss would not see, nor "
            "logits that are kept for outputs: train it unpatched, or call the losses in a loop of your own "
            "(fused_losses.token_losses)"
        )

    # --- everything else

    def _otherwise(self, name: str, function: Callable[[Tensor], Any], what: str = "") -> Any:
        """The same of real logits where they are kept, else an error."""
        real = self._real()
        if real is None:
            raise LogitsNotKept(self._refusal(what or name))
        return function(real)

    def _real(self) -> Tensor | None:
        return None if self.origin.call is None else self.origin.call.real(self)

    def _refusal(self, what: str) -> str:
        return (
            f"{self.origin.model_name} asks for {what} of its logits after labels were given, and the patched loss "
            f"forms no logits; {KEEP}"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _STATE or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if _in_place(name):
            return lambda *args, **kwargs: self._refuse_in_place(name)
        real = self._real()
        if real is None:
            raise AttributeNotKept(self._refusal(name))
        return getattr(real, name)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._otherwise("__array__", lambda z: z.__array__(*args, **kwargs), "a numpy array")

    def __eq__(self, other: object) -> Any:
        return self._otherwise("__eq__", lambda z: z == other) if other is not None else False

    def __ne__(self, other: object) -> Any:
        return self._otherwise("__ne__", lambda z: z != other) if other is not None else True

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.cross_entropy:
            if not args and "input" in kwargs:
                args = (kwargs.pop("input"),)
            if args and isinstance(args[0], DeferredLogits):
                return args[0].cross_entropy(*args[1:], **kwargs)
        name = getattr(function, "__name__", str(function))
        method = _METHODS.get(name)
        if method is not None and isinstance(args[0], DeferredLogits):
            return getattr(args[0], method)(*args[1:], **kwargs)
        if name in ("mul", "__mul__", "__rmul__", "multiply") and isinstance(args[1], DeferredLogits):
            return args[1] * args[0]
        found: list[DeferredLogits] = []
        if _in_place(name) and isinstance(args[0], DeferredLogits):
            return args[0]._refuse_in_place(name)

        def real_of(value: Any) -> Any:
            if isinstance(value, DeferredLogits):
                found.append(value)
                return value._real()
            return type(value)(map(real_of, value)) if isinstance(value, (list, tuple)) else value

        args, kwargs = tuple(map(real_of, args)), {key: real_of(value) for key, value in kwargs.items()}

        return found[0]._otherwise(name, lambda _: function(*args, **kwargs))


_METHODS = {
    "tanh": "tanh", "mul": "__mul__", "multiply": "__mul__", "div": "__truediv__", "true_divide": "__truediv__",
    "divide": "__truediv__", "argmax": "argmax", "reshape": "reshape", "detach": "detach",
    "eq": "__eq__", "ne": "__ne__",
}  # fmt: skip


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _operator(name: str) -> Callable[..., Any]:
    def operation(self: DeferredLogits, *args: Any) -> Any:
        return self._otherwise(name, lambda z: getattr(z, name)(*args))

    return operation


for _name in (
    *("add", "radd", "sub", "rsub", "rtruediv", "pow", "neg", "matmul"),
    *("lt", "le", "gt", "ge", "iter", "bool"),
):
    setattr(DeferredLogits, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("iadd", "isub", "imul", "itruediv", "ipow"):
    setattr(DeferredLogits, f"__{_name}__", lambda self, other, name=_name: self._refuse_in_place(name))
DeferredLogits.__hash__ = object.__hash__  # type: ignore[method-assign]


def _number(value: Any) -> float | None:
    """A Python number, also out of a tensor of one that is not trained."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad:
        return float(value)
    return None


def _split(index: Any, ndim: int) -> tuple[Any, slice | None]:
    """The part of an index for the leading dimensions, and the slice of the last one, None for all of it."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(p is None for p in parts):
        return _NEVER, None
    used = sum(p.dim() if isinstance(p, Tensor) and p.dtype == torch.bool else 1 for p in parts if p is not Ellipsis)
    if Ellipsis in [p for p in parts if not isinstance(p, Tensor)]:
        at = next(i for i, p in enumerate(parts) if p is Ellipsis)
        parts = parts[:at] + (slice(None),) * (ndim - used) + parts[at + 1 :]
        used = ndim
    if used < ndim:
        return parts, None
    last = parts[-1]
    return (parts[:-1], last) if isinstance(last, slice) else (_NEVER, None)


_STATE = {
    "origin",
    "positions",
    "width",
    "map",
    "detached",
    "whole",
    "lead",
    "device",
    "dtype",
    "vocabulary",
}  # while one is unpickled
_NEVER = object()  # no tensor can be indexed with it: refused

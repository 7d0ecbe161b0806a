"""`patch`: a fused loss inside a Hugging Face model's own forward.

The model's class is exchanged for a subclass with another `forward`. Given labels, it lets the model's own forward run with a
head that returns `DeferredLogits`; where that forward calls cross-entropy, the head module is called a second time and the fused
loss runs inside that call, so that whatever hooks the module (FSDP, ZeRO-3, offloading) is in force.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..head import Reference
from ..objectives import CrossEntropyLoss, LAwFLoss, Objective, item_count
from ..op import Observer
from . import trl
from .deferral import HeadModule
from .heads import check_head, read_head
from .logits import DeferredLogits
from .references import ReferenceStates, Source, find_source

STATE = "_fused_losses"  # the attribute of a patched model
WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
FIELDS = ("confidence", "old_nll", "initial_nll", "sequence_ids")  # of the losses of this package
OWN = ("hidden", "head", "labels", "reference", "num_items")  # arguments of an objective that are no fields of a batch


def patch(
    model: nn.Module,
    loss: Objective | None = None,
    *,
    reference: str | nn.Module | None = None,
    reference_cache: Any = None,
    keep_logits: bool | str = False,
) -> Any:
    """Make `model(input_ids, labels=labels).loss` a fused loss, in training and evaluation; returns the model.

    Any causal language model of transformers whose head is linear, also with PEFT adapters. No [tokens × vocabulary]
    logits are formed where labels are given. Without labels (generation, scoring) the model is untouched.

    `labels` are in Hugging Face's layout, as long as the inputs: the model shifts them as it always does, or takes
    `shift_labels`. `num_items_in_batch` divides the sum of the token losses; Trainer gives it. Further fields of the batch go to the
    loss: `confidence` (LAwF), `old_nll` (PSFT), those of `token_loss` of your own, each in the layout of the labels and shifted
    with them; `sequence_ids` (TALR, FLOW), else position_ids that restart tell packed sequences apart, else rows do.

    `outputs.logits` is a stand-in: `argmax(-1)` gives the predictions, −1 where no label was; anything else raises `LogitsNotKept`.

    Args:
        model: a transformers model with a linear LM head, or a PEFT model around one. Patch before torch.compile and before DDP or
            FSDP wraps it; before or after PEFT.
        loss: an `Objective`, such as `fl.TALRLoss()`; cross-entropy by default. Its options (gradient, tolerance, ...) hold.
        reference: of LAwFLoss and ASFTLoss, which model is the frozen original:
            "adapter-off": the model without its PEFT adapter; where that is not at its start (training goes on from a trained
            one), a frozen copy of it as it is now. PEFT may come after the patch with a fresh adapter only;
            "start": a frozen copy of the whole model, taken now;
            or another model with the same vocabulary.
        reference_cache: a directory for the reference's hidden states: from the second epoch on its forward is skipped
            (`huggingface.cache`).
        keep_logits: True: also make real logits, of full size, for `outputs.logits` and for whatever the model does with
            them; "eval": where the model is not in training (compute_metrics of a Trainer).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Cost: that of the loss. A reference costs a forward of its body without a gradient.
    """
    base = _base_model(model)
    if STATE in vars(base) and vars(base)[STATE].loss is not None:
        raise ValueError(
            f"{type(base).__name__} is patched already, with {vars(base)[STATE].loss}; call fused_losses.unpatch(model) first"
        )
    loss = CrossEntropyLoss() if loss is None else loss
    if not isinstance(loss, Objective):
        what = loss.__name__ if isinstance(loss, type) else type(loss).__name__
        made = "; give an instance, TALRLoss()" if isinstance(loss, type) else ""
        raise TypeError(f"loss: expected an Objective such as fused_losses.TALRLoss(), got {what}{made}")
    if keep_logits not in (True, False, "eval"):
        raise ValueError(f"keep_logits: expected True, False or 'eval', got {keep_logits!r}")
    _check_model(base, model)
    source = find_source(base, loss, reference, reference_cache)
    state = Patch(base, loss, source, keep_logits)
    if "forward" in vars(base):  # somebody's wrapper around the class's forward: it stays around ours
        state.wrappers.append(vars(base).pop("forward"))
    vars(base)[STATE] = state
    if not hasattr(type(base), "_fused_losses_original"):  # else ours is still there, below FSDP's
        base.__class__ = _patched_class(type(base))
    return model


def unpatch(model: nn.Module) -> Any:
    """Undo `patch`; returns the model, which then computes bit for bit what it did before."""
    base = _base_model(getattr(model, "_orig_mod", model), compiled=True)
    if STATE not in vars(base) or vars(base)[STATE].loss is None:
        raise ValueError(f"{type(base).__name__} is not patched")
    state: Patch = vars(base)[STATE]
    state.loss = None
    if "_fused_losses_original" in vars(type(base)):  # else FSDP has put a class of its own on top: ours stays, idle
        del vars(base)[STATE]
        base.__class__ = type(base)._fused_losses_original
        if state.wrappers:
            base.forward = state.composed(base)
    return model


@contextlib.contextmanager
def patched(model: nn.Module, loss: Objective | None = None, **options: Any) -> Iterator[Any]:
    """`with patched(model, loss): ...` is `patch` before and `unpatch` after, also where an error is raised."""
    patch(model, loss, **options)
    try:
        yield model
    finally:
        unpatch(model)


class Patch:
    """What a patched model carries. Wrappers that others put around `model.forward` later (accelerate's autocast, TRL's head)
    are kept in a list; ours is the outermost, and calls them with what it does not handle."""

    def __init__(self, model: nn.Module, loss: Objective, source: Source | None, keep_logits: bool | str) -> None:
        self.loss: Objective | None = loss
        self.source = source
        self.keep_logits = keep_logits
        self.original: Callable[..., Any] = type(model).forward
        self.wrappers: list[Callable[..., Any]] = []
        self.level: int | None = None  # of the wrapper that runs, None: outside of a call
        self.fields = batch_fields(loss)
        # A mean of each group cannot be divided by the tokens of several batches; a Trainer then divides by the number of batches.
        self.accepts_num_items = not (isinstance(loss, LAwFLoss) and loss.reduction == "group_mean")
        parameters = inspect.signature(self.original).parameters
        self.position_of_labels = list(parameters).index("labels") - 1 if "labels" in parameters else None
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.accepted = set(parameters)

        self.signature = self._signature(parameters)
        self.forwards: dict[int, Callable[..., Any]] = {}

    def _signature(self, parameters: Any) -> inspect.Signature:
        """The model's own, and the fields of a batch that the loss or its collator takes: Trainer drops columns that are not in it."""
        columns = ("anchors",) if "confidence" in self.fields else ()
        own = [p for p in parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in (*self.fields, *columns, "num_items_in_batch")
            if name not in parameters
        ]
        return inspect.Signature([*own, *more, inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)])

    def forward_at(self, level: int) -> Callable[..., Any]:
        """`model.forward` as somebody finds it who comes when there are so many wrappers."""
        if level not in self.forwards:

            def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
                state = vars(model).get(STATE)
                if state is not None:
                    return state(model, args, kwargs)
                # Unpatched since, and a wrapper still calls what it wraps.
                return self.original(model, *args, **kwargs) if self.level is None else self._next(model, args, kwargs)

            functools.update_wrapper(forward, self.original)
            del forward.__wrapped__  # type: ignore[attr-defined]
            forward.__signature__ = self.signature  # type: ignore[attr-defined]
            self.forwards[level] = forward
        return self.forwards[level]

    def __deepcopy__(self, memo: dict) -> Patch:
        """Of a copied model: a loss of its own, the same reference."""
        twin = copy.copy(self)
        twin.loss, twin.level, twin.forwards = copy.copy(self.loss), None, {}
        twin.source = copy.deepcopy(self.source, memo)
        twin.wrappers = [
            types.MethodType(w.__func__, memo[id(w.__self__)])
            for w in self.wrappers
            if isinstance(w, types.MethodType) and id(w.__self__) in memo and not _holds(w.__func__, w.__self__)
        ]
        return twin

    def set_forward(self, forward: Any) -> None:
        function = forward
        while hasattr(function, "__func__"):  # accelerate binds what is bound already
            function = function.__func__
        level = next((level for level, own in self.forwards.items() if own is function), None)
        if level is None:
            self.wrappers.append(forward)
        else:  # somebody restores what he found; accelerate, which looks for it in vain, what it finds now
            del self.wrappers[level if level < len(self.wrappers) else 0 :]

    def composed(self, model: nn.Module) -> Callable[..., Any]:
        """The wrappers around the class's own forward, without us."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.run(model, *args, **kwargs)

        forward.__signature__ = inspect.signature(types.MethodType(self.original, model))  # type: ignore[attr-defined]
        return forward

    def run(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward that would run if the model were not patched."""
        before, self.level = self.level, len(self.wrappers)
        try:
            return self._next(model, args, kwargs)
        finally:
            self.level = before

    def run_instead(self, model: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Another forward within the wrappers of this one, so under the same autocast."""
        before, self.original = self.original, lambda _, *args, **kwargs: forward(*args, **kwargs)
        try:
            return self.run(model, *args, **kwargs)
        finally:
            self.original = before

    def _next(self, model: nn.Module, args: tuple, kwargs: dict) -> Any:
        if self.level == 0:
            return self.original(model, *args, **kwargs)
        self.level -= 1
        try:
            return self.wrappers[self.level](*args, **kwargs)
        finally:
            self.level += 1

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> Any:
        if self.level is not None:  # a wrapper calls what it wraps
            return self._next(model, args, kwargs)
        if self.loss is None:
            return self.run(model, *args, **kwargs)
        fields = {name: kwargs.pop(name) for name in self.fields if name in kwargs and name not in self.accepted}
        fields = {name: value for name, value in fields.items() if value is not None}
        for name in FIELDS:
            if kwargs.get(name) is not None and name not in self.fields and name not in self.accepted:
                raise TypeError(f"{name}: {type(self.loss).__name__} has no use for it; leave it out of the batch")
        if kwargs.get("anchors") is not None and "anchors" not in self.accepted:
            raise TypeError("anchors: give confidence, which fused_losses.huggingface.AnchorCollator makes of them")
        labels, shift_labels = kwargs.get("labels"), kwargs.get("shift_labels")
        if self.position_of_labels is not None and len(args) > self.position_of_labels:
            labels = args[self.position_of_labels]
        if labels is None and shift_labels is not None:
            labels = shift_labels  # only so that the model computes a loss
            if self.position_of_labels is not None and len(args) > self.position_of_labels:
                args = (*args[: self.position_of_labels], labels, *args[self.position_of_labels + 1 :])
            else:
                kwargs["labels"] = labels
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "a patched model in nn.DataParallel (a Trainer that sees several GPUs in one process): launch with torchrun or accelerate "
                "launch, or make one GPU visible with CUDA_VISIBLE_DEVICES=0"
            )
        if labels is None:
            # A Trainer that computes the loss itself takes the labels away but gives their number.
            if kwargs.get("num_items_in_batch") is not None:
                raise ValueError(
                    f"labels: are missing, so {type(self.loss).__name__} of fused_losses.patch would not be used; a Trainer takes them away for "
                    "label_smoothing_factor and compute_loss_func: leave these out, or call fused_losses.unpatch(model)"
                )
            if fields:
                raise ValueError(f"{', '.join(fields)}: given without labels; give labels too")
            return self.run(model, *args, **self._passed_on(kwargs))
        fused_output = kwargs.pop("fused_lm_head", False)
        call = Call(self, model, labels, shift_labels, kwargs, fields, summed=bool(fused_output))
        if self.source is not None:
            call.reference = self.source.states(model, self, args, self._passed_on(kwargs), call.head, labels)
        with call.head.deferred(call):
            outputs = self.run(model, *args, **self._passed_on(kwargs))
        if call.token_loss is None:
            raise ValueError(
                f"{call.model_name} computed no loss from its head's logits although labels were given; it cannot be patched: train it "
                "unpatched, or call the losses in a loop of your own (fused_losses.token_losses)"
            )
        if fused_output:
            return trl.output(call, outputs)
        return call.with_real_logits(outputs)

    def _passed_on(self, kwargs: dict) -> dict:
        """What the model's own forward takes of ours."""
        if self.takes_any:
            return kwargs
        ours = ("num_items_in_batch", "shift_labels")
        return {name: value for name, value in kwargs.items() if name in self.accepted or name not in ours}


class Call:
    """One forward with labels."""

    def __init__(
        self, patch: Patch, model: nn.Module, labels: Tensor, shift_labels: Tensor | None, kwargs: dict, fields: dict,
        summed: bool,
    ) -> None:  # fmt: skip
        self.patch, self.loss = patch, patch.loss
        self.labels, self.shift_labels, self.fields = labels, shift_labels, fields
        self.position_ids = kwargs.get("position_ids")
        self.num_items = kwargs.get("num_items_in_batch")
        self.summed = summed  # the caller divides
        self.model_name = type(model).__name__
        module: Any = model.get_output_embeddings()  # type: ignore[operator]  # anew: PEFT and FSDP replace it
        check_head(module, self.model_name)
        self.head = HeadModule(module, model)
        self.keep = patch.keep_logits is True or (patch.keep_logits == "eval" and not model.training)
        self.reference: ReferenceStates | None = None
        self.token_loss: Tensor | None = None
        self.target: Tensor | None = None
        self.observer = Observer(frozenset({"entropy"}) if summed else frozenset())
        if isinstance(self.loss, LAwFLoss) and "confidence" not in fields:
            raise ValueError(
                "confidence: is missing in the batch, and LAwFLoss needs it, of the labels' shape; fused_losses.huggingface.AnchorCollator makes it "
                "of a column anchors or confidence, which SFTTrainer drops unless remove_unused_columns=False"
            )
        if self.num_items is not None:
            item_count(self.num_items, 1)
        if self.num_items is not None and not patch.accepts_num_items:
            raise ValueError(
                "num_items_in_batch: LAwFLoss(reduction='group_mean') takes the mean of each group in a batch, so there is nothing to divide "
                "by it; leave it out (a Trainer made after the patch does), or take reduction='token_mean'"
            )

    def evaluate(self, logits: DeferredLogits, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
        """The loss of these logits, within a call of the head module."""
        compute: Callable[[Tensor], Tensor] = functools.partial(
            self._loss, logits, target.reshape(-1), ignore_index, reduction
        )
        return self.head(logits.hidden, compute if self.reference is None else self.reference.within(compute))

    def _loss(
        self, logits: DeferredLogits, target: Tensor, ignore_index: int, reduction: str, hidden: Tensor
    ) -> Tensor:
        positions = logits.positions.reshape(-1)
        rows = logits.rows_of(hidden)
        logit_scale, softcap = logits.map.arguments()
        head = read_head(self.head.module, rows, logit_scale, softcap, logits.width)
        target = target.to(rows.device)
        if self.shift_labels is not None:
            self._is_shifted(self.shift_labels, target, positions, ignore_index)
        arguments: dict[str, Any] = self._aligned(logits, target, positions, ignore_index)
        if ignore_index != self.loss.ignore_index:
            target = target.masked_fill(target == ignore_index, self.loss.ignore_index)
        if self.reference is not None:
            arguments["reference"] = Reference(*self.reference.at(logits, self.head.module, head))
        arguments["num_items"] = self._divisor(reduction)
        with self.loss.observed(self.observer):
            loss = self.loss(rows, head, target, **arguments)
        seen = self.observer
        if self.summed and not self.patch.accepts_num_items:
            loss = loss * (target != self.loss.ignore_index).sum()
        self.token_loss, self.target = loss.clone(), target  # a model adds its router's loss in place
        self.model_divides = reduction == "sum"
        if seen.prediction is not None:
            everywhere = torch.full((logits.hidden.shape[:-1].numel(),), -1, device=rows.device)
            self._predictions = everywhere.index_copy(0, positions, seen.prediction)
        return loss

    def _divisor(self, reduction: str) -> Any:
        if not self.patch.accepts_num_items:
            return None
        if self.summed or reduction == "sum":  # the caller or the model divides
            return 1
        return self.num_items

    def _aligned(
        self, logits: DeferredLogits, target: Tensor, positions: Tensor, ignore_index: int
    ) -> dict[str, Tensor]:
        """The fields of the batch for each row of logits."""
        fields, aligned = dict(self.fields), {}
        if "sequence_ids" in self.patch.fields and "sequence_ids" not in fields:
            packed = packed_sequences(self.position_ids, self.labels)
            if packed is not None and "initial_nll" in fields:
                self._check_one_sequence_a_row(packed, ignore_index)
                packed = None
            if packed is None:
                aligned["sequence_ids"] = self._rows(logits, positions)
            else:
                fields["sequence_ids"] = packed
        return aligned | self._shifted(fields, target, positions, ignore_index)

    def _check_one_sequence_a_row(self, packed: Tensor, ignore_index: int) -> None:
        """Numbers of packed sequences, padding among them, are no index of a field that has one number for each."""
        for row, labels in zip(packed, self.labels, strict=True):
            if len(row[labels != ignore_index].unique()) > 1:
                raise ValueError(
                    "initial_nll: rows hold several sequences, as position_ids say; give sequence_ids too, which index it"
                )

    def _rows(self, logits: DeferredLogits, positions: Tensor) -> Tensor:
        """The row of the batch that each token is in."""
        shape = logits.hidden.shape[:-1]
        if len(shape) == 1:
            shape = self.labels.shape
        return positions // (shape[-1] if len(shape) > 1 else shape.numel())

    def _shifted(
        self, fields: dict[str, Tensor], target: Tensor, positions: Tensor, ignore_index: int
    ) -> dict[str, Tensor]:
        """What is in the layout of the labels, moved as the model moved the labels."""
        labels = self.labels if self.shift_labels is None else self.shift_labels
        moved = {}
        shift: bool | None = None
        for name, values in fields.items():
            if not isinstance(values, Tensor):
                raise TypeError(f"{name}: expected a tensor of the labels' shape, got {type(values).__name__}")
            if values.shape != labels.shape:
                if name in ("initial_nll",):  # of sequences
                    moved[name] = values
                    continue
                raise ValueError(f"{name}: expected the labels' shape {list(labels.shape)}, got {list(values.shape)}")
            if shift is None:
                shift = self._is_shifted(labels, target, positions, ignore_index)
            moved[name] = _shift(values, shift).reshape(-1).to(positions.device)[positions]
        return moved

    def _is_shifted(self, labels: Tensor, target: Tensor, positions: Tensor, ignore_index: int) -> bool:
        for shift in (False,) if self.shift_labels is not None else (True, False):
            candidate = _shift(labels, shift, ignore_index).reshape(-1).to(positions.device)
            if int(positions.max()) < len(candidate) and torch.equal(candidate[positions], target):
                return shift
        if self.shift_labels is not None:
            raise ValueError(
                f"shift_labels: {self.model_name} takes its loss of other labels than these; give labels alone, in the layout of the inputs"
            )
        raise ValueError(
            f"{self.model_name} neither shifts labels by one nor takes them as they are, so {', '.join(self.fields) or 'sequence_ids'} "
            "cannot be aligned with them; call the loss in a loop of your own"
        )

    def predictions(self, logits: DeferredLogits) -> Tensor | None:
        if self.token_loss is None:
            return None
        return self._predictions[logits.positions]

    def real(self, logits: DeferredLogits) -> Tensor | None:
        """Logits that are formed after all, with the operations noted so far, None unless they are to be kept."""
        if not self.keep:
            return None
        z = self.head(logits.hidden, self.head.own)
        z = z.reshape(-1, z.shape[-1])[logits.positions][..., : logits.width]
        z = logits.map(z).to(logits.dtype)
        return z.detach() if logits.detached else z

    def with_real_logits(self, outputs: Any) -> Any:
        if not self.keep:
            return outputs
        with self.head.deferred(self):
            if isinstance(outputs, tuple):
                return tuple(self.real(o) if isinstance(o, DeferredLogits) else o for o in outputs)
            for name, value in list(outputs.items()):
                if isinstance(value, DeferredLogits):
                    outputs[name] = self.real(value)
        return outputs


def batch_fields(loss: Objective) -> tuple[str, ...]:
    """The names of a batch's fields that the loss takes."""
    names = []
    for name, parameter in inspect.signature(type(loss).forward).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            names += list(inspect.signature(type(loss).token_loss).parameters)[2:]
        elif name not in OWN and name != "self":
            names.append(name)
    return tuple(names)


def packed_sequences(position_ids: Any, labels: Tensor) -> Tensor | None:
    """[B, T] numbers of the sequences, where position ids tell that rows hold several; None where they do not.

    A sequence begins where a position is not its predecessor's successor. Each token of left padding may count as one; none has a label.
    """
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or labels.dim() != 2:
        return None
    if position_ids.shape[-1] != labels.shape[-1]:
        return None
    position_ids = position_ids.expand(labels.shape)
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=-1) != 1
    return (starts.reshape(-1).cumsum(0) - 1).reshape(labels.shape)


def _shift(values: Tensor, shift: bool, fill: int = 0) -> Tensor:
    """What position t + 1 holds, at t."""
    return nn.functional.pad(values, (0, 1), value=fill)[..., 1:] if shift else values


def _holds(function: Any, model: Any) -> bool:
    """Whether a wrapper calls this very model, as TRL's does: it is of no use around a copy."""
    cells = getattr(function, "__closure__", None) or ()
    return any(getattr(cell.cell_contents, "__self__", None) is model for cell in cells)


class _Forward:
    """`model.forward` of a patched class; assigning to it puts a wrapper below ours."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __get__(self, model: Any, cls: type | None = None) -> Any:
        if model is None:
            return self.original
        state = vars(model).get(STATE)
        return types.MethodType(self.original if state is None else state.forward_at(len(state.wrappers)), model)

    def __set__(self, model: Any, forward: Any) -> None:
        vars(model)[STATE].set_forward(forward)

    def __delete__(self, model: Any) -> None:
        if not vars(model)[STATE].wrappers:
            raise AttributeError("forward")
        vars(model)[STATE].wrappers.pop()


_CLASSES: dict[type, type] = {}


def _patched_class(cls: type) -> type:
    """A subclass with the same name, so that configurations and checkpoints name the model's own class."""
    if cls not in _CLASSES:
        _CLASSES[cls] = type(
            cls.__name__,
            (cls,),
            {
                "__module__": cls.__module__,
                "__qualname__": cls.__qualname__,
                "__doc__": cls.__doc__,
                "forward": _Forward(cls.forward),  # type: ignore[attr-defined]
                "accepts_loss_kwargs": property(lambda model: vars(model)[STATE].accepts_num_items),
                "_fused_losses_original": cls,
            },
        )
    return _CLASSES[cls]


def _base_model(model: Any, compiled: bool = False) -> Any:
    """The transformers model under PEFT's wrapper."""
    if not isinstance(model, nn.Module):
        made = "; give the model itself" if isinstance(model, (str, type)) else ""
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}{made}")
    if any(cls.__name__ in WRAPPERS for cls in type(model).__mro__):
        raise TypeError(f"model is wrapped in {type(model).__name__}; patch it first, then wrap it")
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        inner: Any = model.get_base_model()  # type: ignore[operator]
    else:
        inner = model
    if not compiled and any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in (model, inner)
    ):
        raise TypeError("model is compiled; patch it first, then call torch.compile")
    return inner


def _check_model(base: Any, model: nn.Module) -> None:
    name = type(base).__name__
    if not hasattr(base, "get_output_embeddings") or not hasattr(base, "config"):
        raise TypeError(f"model: expected a transformers model, got {type(base).__module__}.{name}")
    parameters = inspect.signature(type(base).forward).parameters
    if "labels" not in parameters or not _is_causal(base):
        what = "takes no labels" if "labels" not in parameters else "is no causal language model"
        raise TypeError(
            f"model: {name} {what}; give a causal language model with its head, such as AutoModelForCausalLM makes (encoder-only "
            "models have no next token to predict)"
        )
    check_head(base.get_output_embeddings(), name)


def _is_causal(model: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    known = {name for value in names.values() for name in ([value] if isinstance(value, str) else value)}
    return type(model).__name__ in known or model.can_generate()

"""`patch`: a fused loss inside a Hugging Face model's own forward.

The model's class is exchanged for a subclass with another `forward`. Given labels, it lets the model's own forward run
with a head that returns `DeferredLogits`; where that forward calls cross-entropy, the head module is called a second
time and the fused loss runs inside that call, so that whatever hooks the module (FSDP, ZeRO-3, offloading) is in force.
docs/patch.md says what holds for whoever else wraps, copies, compiles or hooks the model.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import slip_of
from ..labels import plain
from ..objectives import CrossEntropyLoss, Objective
from ..objectives.base import OPTIONS
from ..objectives.options import not_made
from . import trl, wrappers
from .call import Batch, Call
from .fields import known_fields
from .heads import check_head
from .patched_class import patched_class
from .references import Source, find_source
from .wrappers import STATE, Turns

WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


def patch(
    model: nn.Module,
    loss: Objective | None = None,
    *,
    reference: str | nn.Module | None = None,
    reference_cache: Any = None,
    keep_logits: bool | str = False,
    eval_loss: str = "nll",
) -> Any:
    """Make `model(input_ids, labels=labels).loss` a fused loss, in training and evaluation; returns the model.

    Any causal language model of transformers whose head is linear, also with PEFT adapters. No [tokens × vocabulary]
    logits are formed where labels are given. Without labels (generation, scoring) the model is untouched; but in
    training mode a backward through such logits is an error, as the loss would not be this one (label smoothing,
    compute_loss_func). With cross-entropy as the loss it is a warning, once: the patch has no part in it.

    `labels` are in Hugging Face's layout, as long as the inputs: the model shifts them as it always does, or takes
    `shift_labels`. `num_items_in_batch` divides the sum of the token losses; Trainer gives it. Further fields of the
    batch go to the loss: `confidence` (LAwF), `weights` (WeightedLoss), `old_nll` (PSFT), `initial_token_nll` (STM),
    those of `token_loss` of your own, each in the layout of the labels and shifted with them; `sequence_ids` (TALR,
    FLOW), else cu_seq_lens_q, seq_idx or position_ids tell packed sequences apart, else rows do.

    `outputs.logits` is a stand-in: `argmax(-1)` gives the predictions, −1 where no label was; anything else raises
    `LogitsNotKept`.

    Args:
        model: a transformers model with a linear LM head, or a PEFT model around one. Patch before torch.compile and
            before DDP or FSDP wraps it; before or after PEFT.
        loss: an `Objective`, such as `fl.TALRLoss()`; cross-entropy by default. Its options (gradient, ...) hold.
        reference: of objectives that compare with a frozen original (LAwFLoss, SFTKLLoss, ...; STMLoss may), which
            model that is:
            "base": the model without its PEFT adapters, always; PEFT may come after the patch. "adapter-off" is its
            older name;
            "start": the model as it is now. Without PEFT a frozen copy of all of it, with PEFT of the adapters only. A
            Trainer that resumes loads its checkpoint after the patch; patch the model as it was at first, not one made
            from the checkpoint (which the callbacks of `fused_losses.huggingface` notice; without them nothing does);
            or another model with the same vocabulary.
        reference_cache: a directory for the reference's hidden states: from the second epoch on its forward is skipped
            (`huggingface.cache`).
        keep_logits: True: also make real logits, of full size, for `outputs.logits` and for whatever the model does
            with them; "eval": where the model is not in training (compute_metrics of a Trainer).
        eval_loss: of a model in `eval()`: "nll", the mean nll, which can be compared between objectives; "objective":
            the objective's own loss. Objectives with a reference (LAwF, ...) report their own in any case.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Cost: that of the loss. A reference costs a forward of its body without a gradient.
    """
    base = _base_model(model)
    if STATE in vars(base) and vars(base)[STATE].loss is not None:
        raise ValueError(
            f"{type(base).__name__} is patched already, with {vars(base)[STATE].loss}; call "
            "fused_losses.unpatch(model) first"
        )
    loss = CrossEntropyLoss() if loss is None else loss
    if not isinstance(loss, Objective):
        what = loss.__name__ if isinstance(loss, type) else type(loss).__name__
        made = f"; give an instance, {what}()" if isinstance(loss, type) else ""
        raise TypeError(f"loss: expected an Objective such as fused_losses.TALRLoss(), got {what}{made}")
    if "_parameters" not in vars(loss):
        raise TypeError(f"loss: {not_made(type(loss))}")
    if keep_logits not in (True, False, "eval"):
        raise ValueError(f"keep_logits: expected True, False or 'eval', got {keep_logits!r}")
    if eval_loss not in ("nll", "objective"):
        raise ValueError(f"eval_loss: expected 'nll' or 'objective', got {eval_loss!r}")
    _check_model(base, model)
    source = find_source(base, model if model is not base else None, loss, reference, reference_cache)
    state = Patch(base, model, loss, source, keep_logits, eval_loss)
    wrappers.settle(base)
    vars(base)[STATE] = state
    if not hasattr(type(base), "_fused_losses_original"):  # else ours is still there, below FSDP's
        base.__class__ = patched_class(base)
    state.redirect(model, base)
    _leave_to_python()
    return model


def unpatch(model: nn.Module) -> Any:
    """Undo `patch`; returns the model, which then computes bit for bit what it did before."""
    base = _base_model(getattr(model, "_orig_mod", model), compiled=True)
    if STATE not in vars(base) or vars(base)[STATE].loss is None:
        raise ValueError(f"{type(base).__name__} is not patched")
    state: Patch = vars(base)[STATE]
    if state.copied:
        wrappers.leave_original(base)
    state.redirect_back()
    if "_fused_losses_original" in vars(type(base)):
        del vars(base)[STATE]
        base.__class__ = type(base)._fused_losses_original
    else:  # FSDP has put a class of its own on top: ours stays, idle
        state.loss = None
    return model


@contextlib.contextmanager
def patched(model: nn.Module, loss: Objective | None = None, **options: Any) -> Iterator[Any]:
    """`with patched(model, loss): ...` is `patch` before and `unpatch` after, also where an error is raised."""
    base = _base_model(patch(model, loss, **options))
    state = vars(base)[STATE]
    try:
        yield model
    finally:
        if vars(base).get(STATE) is state and state.loss is not None:  # not unpatched since
            unpatch(model)


class Patch:
    """What a patched model carries."""

    def __init__(
        self,
        base: nn.Module,
        model: nn.Module,
        loss: Objective,
        source: Source | None,
        keep_logits: Any,
        eval_loss: str,
    ) -> None:
        self.loss: Objective | None = loss
        self.source = source
        self.keep_logits, self.eval_loss = keep_logits, eval_loss
        self.copied = False  # with what others had wrapped around the forward
        self.entrance: tuple | None = None  # (what lay below, function), the last that was read
        self.turns = Turns()
        # Of what is trained on, per token: nll, which have a label, kl, weight, confidence (None: there is none).
        self.listeners: list[Callable[..., None]] = []
        self.trained = base.training  # the model has been in training mode since
        self.used = False  # for a loss with a gradient
        self.warned = False  # that a loss is made of its logits
        self.outer: Callable[[], Any] = _nothing if model is base else weakref.ref(model)
        self.redirected: list[tuple[Any, Any]] = []
        self.fields = loss.batch_fields()
        self.accepts_num_items = loss.divides_by_items  # a Trainer divides by the tokens of several batches
        parameters = inspect.signature(type(base).forward).parameters
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.positional = [name for name, p in parameters.items() if p.kind in positional][1:]
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.accepted = set(parameters)
        self.signature = self._signature(parameters)

    def _signature(self, parameters: Any) -> inspect.Signature:
        """The model's own, and the batch's fields for the loss or its collator: Trainer drops what is not in it."""
        columns = ("anchors",) if "confidence" in self.fields else ()
        own = [p for p in parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in (*self.fields, *columns, "num_items_in_batch")
            if name not in parameters
        ]
        return inspect.Signature([*own, *more, inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)])

    def __deepcopy__(self, memo: dict) -> Patch:
        """Of a copied model: a loss of its own, the same reference."""
        twin = copy.copy(self)
        twin.loss, twin.entrance, twin.turns, twin.copied = copy.copy(self.loss), None, Turns(), True
        twin.source, twin.listeners = copy.deepcopy(self.source, memo), []
        outer = memo.get(id(self.outer()))
        twin.outer = _nothing if outer is None else weakref.ref(outer)
        twin.redirected = [(memo[id(m)], copy.deepcopy(f, memo)) for m, f in self.redirected if id(m) in memo]
        return twin

    def redirect(self, model: Any, base: nn.Module) -> None:
        """PEFT's LLaMA-Adapter keeps the base model's forward, which from before the patch would pass us by."""
        for module in (model, getattr(model, "base_model", None)):
            kept = vars(module).get("forward") if isinstance(module, nn.Module) and module is not base else None
            if isinstance(kept, types.MethodType) and kept.__self__ is base and wrappers.entrance_below(kept) is None:
                self.redirected.append((module, kept))
                module.forward = base.forward

    def redirect_back(self) -> None:
        for module, kept in self.redirected:
            module.forward = kept
        self.redirected = []

    # --- a forward

    def __call__(self, model: nn.Module, follow: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """`follow`: the forward that would run if the model were not patched."""
        self.trained |= model.training
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "a patched model in nn.DataParallel (a Trainer that sees several GPUs in one process): launch with "
                "torchrun or accelerate launch, or make one GPU visible with CUDA_VISIBLE_DEVICES=0"
            )
        batch = self._read(args, kwargs)
        if batch.labels is None:
            return self._without_labels(model, follow, args, kwargs, batch.fields)
        self.used |= torch.is_grad_enabled()
        loss = self._objective(model)
        takes = self.fields if loss is self.loss else loss.batch_fields()
        call = Call(self, loss, takes, model, follow, batch)
        alone = self.source is not None and self.source.alone
        try:
            if alone and self.source.before:
                with self.turns.alone():
                    call.reference = self.source.states(call, call.labels.device)
            args, kwargs = self._with_labels(args, kwargs, call)
            with (
                self.turns.alone() if alone and not self.source.before else self.turns.shared(),
                call.head.deferred(call),
            ):
                outputs = call.run(*args, **kwargs)
            if call.token_loss is None:
                raise ValueError(
                    f"{call.model_name} computed no loss from its head's logits although labels were given; it cannot "
                    "be patched: train it unpatched, or call the losses in a loop of your own "
                    "(fused_losses.token_losses)"
                )
            if loss is not self.loss:
                tokens = () if call.per_token is None else call.per_token.values.values()
                for value in (call.token_loss, outputs[0] if isinstance(outputs, tuple) else outputs.loss, *tokens):
                    _refuse_backward(value, self._not_the_objective(model))
            return trl.output(call, outputs) if batch.summed else call.with_real_logits(outputs)
        finally:
            call.close()

    def _read(self, args: tuple, kwargs: dict) -> Batch:
        """The arguments sorted; what the loss takes leaves `kwargs` unless the model takes it too."""
        inputs = {**dict(zip(self.positional, args, strict=False)), **kwargs}
        for name in known_fields():
            if kwargs.get(name) is not None and name not in self.fields and name not in self.accepted:
                raise TypeError(f"{name}: {type(self.loss).__name__} has no use for it; leave it out of the batch")
        for name in kwargs.keys() - self.accepted - self.fields.keys():
            meant = slip_of(name, [f for f in self.fields if f not in kwargs])
            if meant:
                raise TypeError(
                    f"{name}: neither the model nor {type(self.loss).__name__} has such a field; did you mean {meant}?"
                )
        if kwargs.get("anchors") is not None and "anchors" not in self.accepted:
            raise TypeError("anchors: give confidence, which fused_losses.huggingface.AnchorCollator makes of them")
        fields = {name: plain(inputs[name]) for name in self.fields if inputs.get(name) is not None}
        for name in self.fields:
            if name not in self.accepted:
                kwargs.pop(name, None)
                inputs.pop(name, None)
        for name in ("labels", "shift_labels"):
            if name in inputs:
                inputs[name] = plain(inputs[name])
        labels = inputs.get("labels")
        if isinstance(labels, Tensor) and labels.dim() > 2:
            raise ValueError(
                f"labels: expected [batch, tokens] as the inputs are, got shape {list(labels.shape)}; the model would "
                "shift the last dimension"
            )
        if labels is None and inputs.get("shift_labels") is not None:
            inputs["labels"] = inputs["shift_labels"]  # only so that the model computes a loss
        return Batch(inputs, inputs.get("labels"), fields, bool(inputs.pop("fused_lm_head", False)))

    def _with_labels(self, args: tuple, kwargs: dict, call: Call) -> tuple[tuple, dict]:
        """The arguments as they came, with plain labels, and without what is for us alone."""
        kwargs = {name: value for name, value in kwargs.items() if name != "fused_lm_head"}
        if "labels" in self.positional[: len(args)]:
            at = self.positional.index("labels")
            args = (*args[:at], call.labels, *args[at + 1 :])
        else:
            kwargs["labels"] = call.labels
        if kwargs.get("shift_labels") is not None:
            kwargs["shift_labels"] = call.shift_labels
        if call.no_items and "num_items_in_batch" in kwargs:
            kwargs["num_items_in_batch"] = 1  # the model divides the sum, which is 0
        return args, self._taken(kwargs)

    def _taken(self, kwargs: dict) -> dict:
        if self.takes_any:
            return kwargs
        ours = ("num_items_in_batch", "shift_labels")
        return {name: value for name, value in kwargs.items() if name in self.accepted or name not in ours}

    @property
    def loss_is_plain(self) -> bool:
        return type(self.loss) is CrossEntropyLoss and self.loss.is_plain

    def _objective(self, model: nn.Module) -> Objective:
        """The loss of this call. A model that was never in training mode is, with gradients on, trained as it is."""
        evaluating = not model.training and (self.trained or not torch.is_grad_enabled())
        own = self.eval_loss == "objective" or self.source is not None or self.loss_is_plain
        if own or not evaluating:
            return self.loss
        options = {name: getattr(self.loss, name) for name in OPTIONS}
        return CrossEntropyLoss(**options)

    def _not_the_objective(self, model: nn.Module) -> str:
        return (
            f"a backward of the loss of a {type(model).__name__} in eval(), which is the mean nll and not "
            f"{type(self.loss).__name__}'s: call model.train() before a training step, or give fused_losses.patch(..., "
            "eval_loss='objective')"
        )

    def _without_labels(
        self, model: nn.Module, follow: Callable[..., Any], args: tuple, kwargs: dict, fields: dict
    ) -> Any:
        # A Trainer that computes the loss itself takes the labels away but gives their number.
        name = type(self.loss).__name__
        elsewhere = "label_smoothing_factor, compute_loss_func, a compute_loss of your own, a trainer that distills"
        smoothing = "smoothed cross-entropy is patch(model, fused_losses.CrossEntropyLoss(label_smoothing=...))"
        if kwargs.get("num_items_in_batch") is not None and not self.loss_is_plain:
            raise ValueError(
                f"labels: are missing, so {name} of fused_losses.patch would not be used; a Trainer takes them away "
                "for label_smoothing_factor and compute_loss_func: leave these out, or call "
                f"fused_losses.unpatch(model); {smoothing}"
            )
        taken_by_model = {n: v for n, v in fields.items() if n in self.accepted}
        if fields.keys() - taken_by_model.keys():
            raise ValueError(f"{', '.join(fields)}: given without labels; give labels too")
        with self.turns.shared(), wrappers.running(model):
            outputs = follow(*args, **self._taken(kwargs))
        if model.training and torch.is_grad_enabled():
            message = (
                f"a backward through outputs of a patched {type(model).__name__} without labels, in training mode: its "
                f"loss is made elsewhere ({elsewhere}), so {name} of fused_losses.patch would not be used; leave that "
                f"out, or call fused_losses.unpatch(model), or model.eval() if both losses are meant; {smoothing}"
            )
            made = _made_elsewhere(outputs, self.loss_is_plain)
            if not self.loss_is_plain:
                for value in made:
                    _refuse_backward(value, message)
            elif made and not self.warned:
                _on_backward(made[0], functools.partial(self._warn_of_logits, type(model).__name__))
        return outputs

    def _warn_of_logits(self, name: str, gradient: Tensor) -> None:
        """Once: the loss that somebody makes of the logits is what it is without the patch, and so is its memory."""
        warned, self.warned = self.warned, True
        if not warned:
            warnings.warn(
                f"{name} is patched with cross-entropy, and a loss is made of its logits elsewhere, as TRL's trainers "
                "CPO, ORPO, TPO, GKD and others make theirs, and as label_smoothing_factor and compute_loss_func do: "
                "it is what it is without the patch, which saves no memory there, as all logits are formed; call "
                "fused_losses.unpatch(model), or train where the model is asked for its loss or its "
                "log-probabilities: SFT, DPO, KTO, GRPO and RLOO of TRL, and fused_losses.sequence_logps in a loop of "
                "your own; smoothed cross-entropy is patch(model, fused_losses.CrossEntropyLoss(label_smoothing=...))",
                UserWarning,
                stacklevel=2,
            )


def _leave_to_python() -> None:
    """Dynamo compiles the model's body, and runs what is here as it is."""
    rules = sys.modules.get("torch._dynamo.trace_rules")  # transformers has imported it
    directory = __file__.removesuffix("patching.py")
    if rules is not None and directory not in rules.SKIP_DIRS:
        rules.add(__package__)


def _nothing() -> None:
    return None


def _made_elsewhere(outputs: Any, is_plain: bool) -> list[Tensor]:
    """What a loss that is not the patch's would be made of: logits and, but for plain cross-entropy, a loss itself.

    Trainers put a loss of theirs at the place of the forward for the time of a call, so that wrappers run around it
    (TRL's DistillationTrainer does).
    """
    if hasattr(outputs, "get"):
        return [outputs["logits"]] if outputs.get("logits") is not None else []
    tensors = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(o, Tensor)]
    return [o for o in tensors if o.dim() > 1][:1] if is_plain else tensors


def _refuse_backward(value: Any, message: str) -> None:
    def refuse(gradient: Tensor) -> None:
        raise RuntimeError(message)

    _on_backward(value, refuse)


def _on_backward(value: Any, act: Callable[[Tensor], None]) -> None:
    """Forward tells no mistake from a use that is meant; a gradient does."""
    if isinstance(value, Tensor) and value.requires_grad:
        act.__torch_unserializable__ = True  # type: ignore[attr-defined]  # no warning where the tensor is pickled
        value.register_hook(act)


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
        if hasattr(base, "peft_config"):
            raise TypeError(
                f"model: {name} in a {type(model).__name__}: PEFT is around it twice; call get_peft_model once"
            )
        raise TypeError(
            f"model: {name} {what}; give a causal language model with its head, such as AutoModelForCausalLM makes "
            "(encoder-only models have no next token to predict)"
        )
    check_head(base.get_output_embeddings(), name)


def _is_causal(model: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    known = {name for value in names.values() for name in ([value] if isinstance(value, str) else value)}
    return type(model).__name__ in known or model.can_generate()

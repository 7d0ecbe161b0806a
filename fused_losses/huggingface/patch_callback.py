"""`PatchCallback`: a loss patched into whatever model a Trainer trains, for as long as it trains, or for good."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import DefaultFlowCallback, TrainerCallback

from ..objectives import Objective
from .callbacks import check_start, patch_of
from .metrics import Callback
from .patching import patch, unpatch
from .references import Base


class PatchCallback(TrainerCallback):
    """Patches the model of a Trainer while it trains, or from when the Trainer is made on, and logs what the loss sees.

    For trainers that make the model themselves and take callbacks (LLaMA-Factory, ms-swift, one's own)::

        Trainer(model, ..., callbacks=[fl.huggingface.PatchCallback(fl.TALRLoss())])

    The logs have `nll`, `kl`, `anchor_probability` and `mean_weight`, as those of `Callback`. Callbacks that ask for a
    patched model (`FinchCallback`) come after it in the list.

    Where the model is at hand before the Trainer is made, `fl.patch(model, loss)` with `Callback()` does more: a
    Trainer keeps the columns that the loss takes only of a model that is patched by then. With this callback a loss
    with fields of the batch (LAwF's confidence, weights, ...) needs remove_unused_columns=False in the arguments, and
    a collator that passes them on (`AnchorCollator`). One that takes means of groups (reduction="group_mean") is an
    error, as the Trainer divides by the tokens of all accumulated batches. FSDP, DeepSpeed's ZeRO-3 and the like
    change the model before training begins, so for them patch first too.

    After training the model is what it was; `trainer.evaluate()` then computes the model's own loss, in which anchors
    and weights do not count (a warning says so where AnchorCollator makes the batches). With **stays=True** the model
    is patched as soon as the Trainer has been made and stays so: evaluation and prediction before and after training
    have the loss too. `callback.unpatch()` ends it.

    Where training ends with an exception a Trainer does not say so: the model stays patched, and the next `train()`
    goes on with the same patch and reference; `callback.unpatch()` undoes it.

    Args:
        loss: as for `fl.patch`: an `Objective`; None for cross-entropy.
        reference, reference_cache, keep_logits, eval_loss: as for `fl.patch`. With reference="start" the original is
            the model as it is when it is patched: without `stays`, a second `train()` starts from what the first has
            left.
        log: whether to add to the logs.
        prefix: of the names in the logs, such as "train/".
        stays: patch when the Trainer has been made, and leave the model patched. A callback that is added to a Trainer
            later patches when training begins.

    Raises: TypeError, ValueError for wrong arguments, when it is made; what `fl.patch` raises when the model is
    patched; ValueError then for reference="base" without an adapter, and for reference="start" where training is
    resumed and the model has the checkpoint's weights by now (with `stays` it is patched before a Trainer loads these,
    and the error remains for a model that was made from the checkpoint).

    Copies and pickles of it are callbacks that have not begun: the loss is copied, a reference model is shared by
    copies. Checkpoints hold the sums since the last log, so training that is resumed between two logs goes on with
    them.
    """

    def __init__(
        self,
        loss: Objective | None = None,
        *,
        reference: str | nn.Module | None = None,
        reference_cache: Any = None,
        keep_logits: bool | str = False,
        eval_loss: str = "nll",
        log: bool = True,
        prefix: str = "",
        stays: bool = False,
    ) -> None:
        if loss is not None and not isinstance(loss, Objective):
            what = loss.__name__ if isinstance(loss, type) else repr(loss)
            made = f"; give an instance, {what}()" if isinstance(loss, type) else ""
            raise TypeError(f"loss: expected an Objective such as fused_losses.TALRLoss(), got {what}{made}")
        if reference is None and loss is not None and loss.needs_reference:
            raise ValueError(
                f"reference: {type(loss).__name__} compares with a frozen original model: give reference='base' (the "
                "model without its PEFT adapter), reference='start' (the model as training begins), or another model"
            )
        self.loss = loss
        self.options = dict(
            reference=reference, reference_cache=reference_cache, keep_logits=keep_logits, eval_loss=eval_loss
        )
        self.metrics = Callback(prefix) if log else None
        self.stays = stays
        self.own_reference = False  # a model that nobody else holds: it follows the trained one to its device
        self._model: Any = None  # what we patched
        self._patch: Any = None

    def __repr__(self) -> str:
        given = {**self.options, **({"stays": True} if self.stays else {})}
        options = ", ".join(f"{name}={value!r}" for name, value in given.items() if not _is_model(value))
        return f"PatchCallback({self.loss!r}, {options})"

    def __getstate__(self) -> dict[str, Any]:
        metrics = None if self.metrics is None else Callback(self.metrics.prefix)
        return {**vars(self), "metrics": metrics, "_model": None, "_patch": None}

    def __deepcopy__(self, memo: dict) -> PatchCallback:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = self.__getstate__()
        shared = {id(value): value for value in self.options.values() if _is_model(value)}
        vars(twin).update(copy.deepcopy(state, {**memo, **shared}))
        return twin

    def add_to(self, trainer: Any) -> Any:
        """Puts it before the Trainer's callbacks that report elsewhere, so that these have the numbers too."""
        self.come_before_reports(trainer.callback_handler.callbacks)
        return trainer

    def come_before_reports(self, callbacks: list[Any]) -> None:
        """To the front of a Trainer's callbacks, but behind the one that says whether a step saves a checkpoint."""
        callbacks[:] = [other for other in callbacks if other is not self]
        flow = [i for i, other in enumerate(callbacks) if isinstance(other, DefaultFlowCallback)]
        callbacks.insert(flow[0] + 1 if flow else 0, self)

    def unpatch(self) -> None:
        """The model is what it was; nothing where this callback has not patched it, or another has unpatched it."""
        model, mine = self._model, self._patch
        self._model = self._patch = None
        if model is not None and patch_of(model) is mine:
            unpatch(model)

    # --- events of a Trainer

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.stays:
            self._patch_now(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._patch is None or patch_of(model) is not self._patch:  # else patched before, or cut short
            if self.options["reference"] == "start" and state.global_step:
                self.unpatch()
                raise ValueError(
                    f"PatchCallback: reference='start' in a training resumed at step {state.global_step} would be the "
                    "checkpoint and not the model it started from; give stays=True, with which the model is patched "
                    "before the checkpoint is loaded, take reference='base' with a PEFT adapter, or give the original "
                    "model"
                )
            self._patch_now(model)
        check_start("PatchCallback", model, state)
        if self.metrics is not None:
            self.metrics.on_train_begin(args, state, control, model=model, **kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.metrics is not None:
            self.metrics.on_step_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check_used()
        if self.metrics is not None:
            self.metrics.on_step_end(args, state, control, **kwargs)
            self._keep(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep(state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.metrics is not None:
            self.metrics.on_log(args, state, control, logs=logs, **kwargs)
            self._keep(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.metrics is not None:
            self.metrics.on_train_end(args, state, control, **kwargs)
        if not self.stays:
            self.unpatch()

    # --- inside

    def _patch_now(self, model: Any) -> None:
        self.unpatch()
        if self.own_reference and model is not None:
            self.options["reference"].to(model.device)
        patch(model, self.loss, **self.options)
        self._model, self._patch = model, patch_of(model)
        source: Any = self._patch.source
        if isinstance(source, Base) and not source.found_adapters:  # no Trainer adds one from here on
            self.unpatch()
            raise ValueError(
                f"PatchCallback: reference={source.name!r} is the model without its adapter, and this model has none "
                "(or it is merged into the model); take reference='start', the model as training begins, or give the "
                "original as a model of its own"
            )

    def _check_used(self) -> None:
        """Some trainers never ask the model for a loss, so that the objective would be left out without a word."""
        mine = self._patch
        if mine is None or patch_of(self._model) is not mine or mine.used or mine.loss_is_plain:
            return
        name = type(mine.loss).__name__
        raise RuntimeError(
            f"PatchCallback: the trainer made a step without asking the model for a loss, so {name} was not used; it "
            "makes its loss elsewhere, as trainers that distill do. Leave the callback out, or train with "
            f"{name} in another trainer, such as Trainer or SFTTrainer"
        )

    def _keep(self, state: Any, control: Any) -> None:
        """Where the checkpoint that is about to be written finds the sums. A Trainer restores callbacks by calling
        their class with numbers and text, which cannot make a loss, so this one is none of those that it restores."""
        if self.metrics is not None and control.should_save:
            state.stateful_callbacks[type(self.metrics).__name__] = self.metrics.state()


def _is_model(value: Any) -> bool:
    return isinstance(value, nn.Module)

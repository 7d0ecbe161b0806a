"""ms-swift: a file for `--external_plugins FILE --callbacks fused_losses`, which `fused-losses swift-plugin` writes.

Read and tested with ms-swift 4.6.0. The callback patches the model when the Trainer has been made, so before that loads
the weights of a checkpoint; a resumed adapter is loaded before the Trainer is made. What is wrong for the loss is said
when ms-swift makes the arguments of a training, so before it loads a model.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..huggingface.patch_callback import PatchCallback
from .batches import collated
from .settings import LossSettings, refuse

NAME = "fused_losses"
SETTINGS = ("reference", "reference_cache", "keep_logits", "eval_loss")
FIELDS = ("confidence", "weights")  # of a batch, that ms-swift's loss_scale makes
BINARY = ("default", "last_round", "all", "base", "ignore_empty_think", "ignore_think_prefix")  # that makes neither
WEIGHING = ("react", "hermes", "qwen", "agentflan", "alpha_umi")  # those that ms-swift has besides, which make weights
SWITCHES = {
    "enable_dft_loss": "name dft as the loss of the plugin",
    "loss_type": "leave it out",
    "enable_channel_loss": "it is made of logits; leave it out",
    "use_liger_kernel": "it puts Liger's own cross-entropy into the model's forward; leave it out",
    "label_smoothing_factor": "name sft as the loss of the plugin, with label_smoothing as its option",
}


class FusedLossesCallback(PatchCallback):
    """What `--callbacks fused_losses` makes: `PatchCallback`, and a collator that passes on the fields of the loss.

    Raises ValueError beside a switch of ms-swift's that makes the loss too, and with sequence parallelism.
    """

    def __init__(self, settings: LossSettings, args: Any, trainer: Any) -> None:
        _check_switches(args, getattr(getattr(trainer, "template", None), "sequence_parallel_size", 1))
        super().__init__(settings.objective(), **settings.patch_options("auto"), stays=True)
        self.own_reference = settings.loads_reference
        self._trainer = trainer

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_trainer": None}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_init_end(args, state, control, **kwargs)
        self._trainer.data_collator = collated(self._trainer.data_collator, self.loss, scale="loss_scale")
        self.come_before_reports(self._trainer.callback_handler.callbacks)
        if self.loss.batch_fields():
            args.use_logits_to_keep = False  # it cuts labels, and would have to cut the fields too

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer is not None and not self.loss.divides_by_items:
            self._trainer.model_accepts_loss_kwargs = False  # ms-swift sets it to True after on_init_end
        super().on_train_begin(args, state, control, **kwargs)


def register(loss: str, options: Mapping[str, Any] | None = None, **settings: Any) -> None:
    """Makes `--callbacks fused_losses` known to ms-swift, with this loss.

    From then on ms-swift refuses to make the arguments of a training that leave the callback out, or have no room for
    the loss; `check` says which.

    `settings`: reference, reference_cache, keep_logits, eval_loss, as `LossSettings` has them.

    Raises: ValueError, TypeError for wrong ones, for a loss that reads data which ms-swift drops, and in
    Megatron-SWIFT; ImportError without ms-swift.
    """
    checked = _settings(loss, options, settings)
    script = Path(sys.argv[0])
    if script.parent.name == "_megatron" and script.stem in ("pt", "sft", "rlhf"):
        raise ValueError(
            "register: Megatron-SWIFT has a forward and callbacks of its own, so it would train with its own loss and "
            f"not with {loss}; train with `swift sft`, or leave the file out of --external_plugins"
        )
    try:
        from swift.callbacks import callbacks_map
        from swift.trainers import TrainerFactory
    except ImportError as error:
        raise ImportError(f"fused_losses.integrations.swift needs ms-swift: pip install ms-swift ({error})") from error
    callbacks_map[NAME] = functools.partial(FusedLossesCallback, checked)
    _watch(TrainerFactory, callbacks_map)


def check(args: Any, settings: LossSettings) -> None:
    """What ms-swift's arguments leave of the loss. `args`: its SftArguments, or of `swift pt` or `swift rlhf`.

    Raises ValueError without the callback; for a trainer that has no cross-entropy to replace; beside a switch of
    ms-swift's that makes the loss too; with sequence parallelism; for reference="base" where there is no adapter; for
    reference="start" where ms-swift loads a checkpoint before the Trainer is made; for LAwF where every token is
    learned, so that none is held; and where `loss_scale` makes no weights for a loss that needs them, or some for one
    that has none.
    """
    callbacks = list(getattr(args, "callbacks", None) or [])
    if NAME not in callbacks:
        raise ValueError(
            f"--callbacks: expected {NAME} among them, got {' '.join(map(str, callbacks)) or 'none'}, with which "
            f"ms-swift would train with its own loss and not with {settings.loss}, which a file of --external_plugins "
            f"has registered; add --callbacks {NAME}, or leave the file out"
        )
    for name, allowed in (("rlhf_type", (None,)), ("task_type", (None, "causal_lm"))):
        kind = getattr(args, name, None)
        if kind not in allowed:
            raise ValueError(
                f"--{name} {kind}: its trainer has a loss of its own and not a causal language model's cross-entropy, "
                f"in whose place {settings.loss} would be; take `swift sft` with a causal language model, or leave "
                f"--callbacks {NAME} and the file of --external_plugins out"
            )
    _check_switches(args, getattr(args, "sequence_parallel_size", 1))
    if settings.reference in ("base", "adapter-off") and getattr(args, "tuner_type", None) == "full":
        raise ValueError(
            f"reference: {settings.reference} is the model without its adapter, and --tuner_type full has none; take "
            "reference='start', which keeps a frozen copy, or give the folder of the original model"
        )
    _check_start(args, settings)
    scale = getattr(args, "loss_scale", None)
    objective = settings.objective()
    if "confidence" in objective.batch_fields() and str(scale).split("+")[0] == "all":
        raise ValueError(
            f"--loss_scale {scale}: every token is learned, and {type(objective).__name__} holds the others, the "
            "prompt, so it would hold nothing and be plain cross-entropy; take `swift sft` with --loss_scale default "
            "or last_round, or another loss, such as talr"
        )
    weights = objective.batch_fields().get("weights")
    if weights is not None and not weights.optional and _is_binary(args):
        raise ValueError(
            f"--loss_scale {scale}: gives no weights, which {type(objective).__name__} needs; take rules that are not "
            "zeros and ones, such as react, or --is_binary_loss_scale false with loss_scale in the messages of the data"
        )
    if not set(FIELDS) & objective.batch_fields().keys() and _makes_weights(args):
        raise ValueError(
            f"--loss_scale {scale}: weighs tokens, and {type(objective).__name__} has no such weights; take the loss "
            "weighted, a rule of zeros and ones, such as default, or --is_binary_loss_scale true"
        )


def _is_binary(args: Any) -> bool:
    """Whether ms-swift makes labels of loss_scale, and no weights of tokens, as far as its arguments say."""
    binary = getattr(args, "is_binary_loss_scale", None)
    if binary is not None:
        return bool(binary)
    return set(str(getattr(args, "loss_scale", None) or "default").split("+")) <= set(BINARY)


def _makes_weights(args: Any) -> bool:
    """Whether ms-swift surely makes weights of tokens; a rule that somebody has registered may."""
    names = set(str(getattr(args, "loss_scale", None) or "default").split("+"))
    binary = getattr(args, "is_binary_loss_scale", None)
    return binary is False or (binary is None and bool(names & set(WEIGHING)))


def _check_start(args: Any, settings: LossSettings) -> None:
    """A checkpoint of all weights is loaded by the Trainer, after our patch, and any other one before it is made."""
    checkpoint, full = getattr(args, "resume_from_checkpoint", None), getattr(args, "tuner_type", None) == "full"
    if settings.reference != "start" or not checkpoint or (full and not getattr(args, "resume_only_model", False)):
        return
    what = "--model" if full else "--adapters"
    remedy = "leave --resume_only_model out" if full else "take base"
    raise ValueError(
        f"reference: start would be the checkpoint of --resume_from_checkpoint {checkpoint}, which ms-swift loads as "
        f"{what}, and not the model that the training started from; {remedy}, or give the folder of that model. Where "
        f"the checkpoint is the model to stay near, give it as {what}"
    )


def source(loss: str, options: Mapping[str, Any], written: Callable[[str], str] = str, **settings: Any) -> str:
    """The text of a plug-in file with this loss; checked. `written`: a setting's name in messages."""
    _settings(loss, options, settings, written)
    given = {"options": dict(options) or None, **settings}
    arguments = [repr(loss), *(f"{name}={value!r}" for name, value in given.items() if value is not None)]
    return (
        '"""For ms-swift: --external_plugins THIS_FILE --callbacks fused_losses."""\n\n'
        f"from fused_losses.integrations.swift import register\n\nregister({', '.join(arguments)})\n"
    )


def _settings(
    loss: str, options: Mapping[str, Any] | None, settings: Mapping[str, Any], written: Callable[[str], str] = str
) -> LossSettings:
    """Checked, with names in messages as they are written here: without the prefix that they have in YAML."""
    if unknown := [name for name in settings if name not in SETTINGS]:
        name = unknown[0]
        raise TypeError(
            f"{name}: there is no such setting; there are options, {', '.join(SETTINGS)}; an option of the loss is "
            f"given as options={{{name!r}: {settings[name]!r}}}"
        )
    try:
        made = LossSettings(loss, options or {}, **{k: v for k, v in settings.items() if v is not None})
    except (TypeError, ValueError) as error:
        text = re.sub(r"\bfused_loss(?:_(\w+))?\b", lambda found: written(found[1] or "loss"), str(error))
        raise type(error)(text) from None
    objective = made.objective()
    needed = [k for k, field in objective.batch_fields().items() if not field.optional and k not in FIELDS]
    if needed:
        raise ValueError(
            f"{written('loss')}: {type(objective).__name__} reads {', '.join(needed)} of the data, and ms-swift makes "
            "rows of its own, without such columns; take another loss, or a trainer that takes tokenised rows, such as "
            "axolotl"
        )
    return made


def _check_switches(args: Any, parallel: int) -> None:
    refuse({name: getattr(args, name, None) for name in SWITCHES}, SWITCHES, "ms-swift")
    if parallel > 1:
        raise ValueError(
            f"sequence_parallel_size: expected 1, got {parallel}, with which ms-swift makes the loss of parts of a "
            "sequence itself; leave it out, or the plugin"
        )


def _watch(factory: Any, registered: Mapping[str, Any]) -> None:
    """Has `check` look at a training's arguments where ms-swift completes them; once, however often one registers."""
    if getattr(factory, "_fused_losses_watch", False):
        return
    made = vars(factory)["get_training_args"].__func__

    @functools.wraps(made)
    def get_training_args(cls: Any, args: Any) -> Any:
        if NAME in registered:
            check(args, registered[NAME].args[0])
        return made(cls, args)

    factory.get_training_args = classmethod(get_training_args)
    factory._fused_losses_watch = True

"""LLaMA-Factory: `python -m fused_losses.integrations.llamafactory config.yaml` for `llamafactory-cli train`.

Its YAML with our keys besides. Read and tested with llamafactory 0.9.5. It has no plugins, but `run_exp` takes
callbacks: ours patches the model when the Trainer has been made, and leaves it so for the evaluation after training.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..objectives import Objective
from ..objectives.options import option_names
from .batches import collated
from .settings import KEYS, LossSettings, refuse, take

SWITCHES = {
    "use_dft_loss": "take fused_loss: dft in its place",
    "use_asft_loss": "take fused_loss: asft with fused_loss_options: {kl_weight: ...} in place of asft_alpha, and "
    "fused_loss_reference: base",
    "use_eaft_loss": "take fused_loss: eaft with fused_loss_options: {alpha: ...} in place of eaft_alpha",
    "enable_liger_kernel": "it puts Liger's own cross-entropy into the model's forward, and there is no switch for its "
    "other kernels alone; leave it out",
    "label_smoothing_factor": "take fused_loss: sft with fused_loss_options: {label_smoothing: ...}",
    "use_mca": "Megatron has a forward of its own; leave one of the two out",
    "use_hyper_parallel": "it has a trainer of its own; leave one of the two out",
    "use_ray": "its workers do not get callbacks; start the training with torchrun instead",
    "use_unsloth": "Unsloth has a forward of its own; leave one of the two out",
}
STAGES = ("sft", "pt")
ADAPTERS = ("lora", "oft")  # of finetuning_type
GENERATION = ("temperature", "top_k")  # of its generation, and options of losses too
USE = "python -m fused_losses.integrations.llamafactory config.yaml [key=value ...]"


def split(config: dict[str, Any]) -> tuple[dict[str, Any], LossSettings]:
    """LLaMA-Factory's own keys, and what ours say.

    Raises ValueError without a loss, for a wrong key, for stages other than sft and pt, beside a switch of
    LLaMA-Factory's that makes the loss too, for an option of the loss among LLaMA-Factory's own keys, and where the
    configuration leaves no original, no data for the loss, or nothing to hold.
    """
    config = dict(config)
    settings = take(config)
    if settings is None:
        raise ValueError(
            f"fused_loss: is not in the configuration; there are {', '.join(KEYS)}, or start llamafactory-cli train "
            "for LLaMA-Factory's own loss"
        )
    stage = config.get("stage", "sft")
    if stage not in STAGES:
        raise ValueError(
            f"stage: expected {' or '.join(STAGES)}, got {stage!r}, whose loss is made of log-probabilities; leave "
            "fused_loss out"
        )
    refuse(config, SWITCHES, "LLaMA-Factory")
    if config.get("compute_accuracy") and not settings.keep_logits:
        raise ValueError("compute_accuracy: needs logits in evaluation; give fused_loss_keep_logits: eval")
    loss = settings.objective()
    _check_options(config, settings, loss)
    _check_reference(config, settings)
    _check_data(config, loss)
    return config, settings


def _check_options(config: dict[str, Any], settings: LossSettings, loss: Objective) -> None:
    """LLaMA-Factory has keys of the same names, temperature and top_k, for generation."""
    for name in option_names(type(loss)):
        meant = name in GENERATION and (config.get("predict_with_generate") or name in settings.options)
        if config.get(name) is not None and not meant:
            raise ValueError(
                f"{name}: is an option of {type(loss).__name__}; write fused_loss_options: {{{name}: {config[name]}}}"
                + (f"; {name} of generation needs predict_with_generate: true" if name in GENERATION else "")
            )


def _check_reference(config: dict[str, Any], settings: LossSettings) -> None:
    tuned, original = config.get("finetuning_type", "lora"), config.get("model_name_or_path") or "the original model"
    reference = settings.reference
    if reference in ("base", "adapter-off") and tuned not in ADAPTERS:
        raise ValueError(
            f"fused_loss_reference: {reference} is the model without its adapter, and finetuning_type: {tuned} has "
            "none; take start, which keeps a frozen copy, or give the folder of the original"
        )
    evaluates = any(config.get(key) for key in ("do_eval", "do_predict", "eval_strategy")) and not config.get(
        "do_train"
    )
    if evaluates and reference is not None and not settings.loads_reference:
        what = "LLaMA-Factory merges the adapter" if reference != "start" else "start is the model that is evaluated"
        raise ValueError(
            f"fused_loss_reference: {reference} is no original without do_train: true, as {what}; give the folder of "
            f"the original ({original}), or leave fused_loss out"
        )


def _check_data(config: dict[str, Any], loss: Objective) -> None:
    """Columns beside LLaMA-Factory's own come through tokenized_path alone."""
    path = config.get("tokenized_path")
    if isinstance(path, str) and os.path.isdir(path) and os.listdir(path):
        return
    name = type(loss).__name__
    fields = loss.batch_fields()
    needed = [field for field, about in fields.items() if not about.optional and field != "confidence"]
    if needed and config.get("do_train"):
        raise ValueError(
            f"{needed[0]}: {name} reads a column of that name, which LLaMA-Factory drops from its data sets; give "
            "tokenized_path: the folder of a data set that is tokenised, with input_ids, attention_mask, labels and "
            f"{needed[0]} (save_to_disk of the package datasets)"
        )
    everything = "stage" if config.get("stage") == "pt" else "train_on_prompt" if config.get("train_on_prompt") else ""
    if "confidence" in fields and config.get("compute_accuracy"):
        raise ValueError(
            f"compute_accuracy: is that of all tokens with a label, and {name} gives one to the prompt, which it "
            "holds; leave it out"
        )
    if "confidence" in fields and everything:
        raise ValueError(
            f"{everything}: {config[everything]} gives every token a label, and {name} learns what has a label, so it "
            "would hold nothing and be plain cross-entropy; take stage: sft without train_on_prompt, a tokenized_path "
            "with a column anchors, or fused_loss: sft"
        )


def train(config: dict[str, Any]) -> None:
    """What `llamafactory-cli train` does with the configuration, with the loss that our keys name."""
    own, settings = split(config)
    run_exp = _run_exp()
    with _passed_on(settings.objective()):
        run_exp(own, callbacks=[settings.callback(stays=True)])


def main(arguments: Sequence[str] | None = None) -> None:
    """`config.yaml key=value ...`, as LLaMA-Factory reads them; a mistake ends it with a line and status 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(f"usage: {USE}\n\n" + "\n".join(f"{key}: {what}" for key, what in KEYS.items()))
        raise SystemExit(0 if given else 2)
    try:
        config = _read(given)
        split(config)
        _run_exp()
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    train(config)


def _read(given: list[str]) -> dict[str, Any]:
    """As its `read_args` does, with OmegaConf: 1e-3 is a number, a.b=c a part of a, and JSON is YAML."""
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError
    except ImportError as error:
        raise _missing(error) from error
    for more in given[1:]:
        if "=" not in more or more.startswith("-"):
            raise ValueError(f"{more}: expected key=value")
    try:
        config = OmegaConf.load(given[0])
        if not OmegaConf.is_dict(config):
            raise ValueError(f"{given[0]}: expected keys and values, got {type(config).__name__}")
        return OmegaConf.to_container(OmegaConf.merge(config, OmegaConf.from_cli(given[1:])), resolve=True)
    except YAMLError as error:
        raise ValueError(f"{given[0]}: is no YAML: {error}") from None
    except OmegaConfBaseException as error:
        raise ValueError(f"{given[0]}: {str(error).splitlines()[0]}") from None


def _run_exp() -> Callable[..., None]:
    try:
        from llamafactory.train.tuner import run_exp
    except ImportError as error:
        raise _missing(error) from error
    return run_exp


def _missing(error: ImportError) -> ImportError:
    return ImportError(
        f"fused_losses.integrations.llamafactory needs LLaMA-Factory: pip install llamafactory ({error})"
    )


@contextlib.contextmanager
def _passed_on(loss: Objective) -> Iterator[None]:
    """Within it the collators that LLaMA-Factory makes pass on the fields of the loss, to its Trainers as they need."""
    from llamafactory.train.pt import workflow as pt
    from llamafactory.train.sft import workflow as sft

    def with_fields(made: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return collated(made(*args, **options), loss)

    def trainer(made: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return _fitted(made(*args, **options), loss)

    changes = (
        (sft, "SFTDataCollatorWith4DAttentionMask", with_fields), (pt, "DataCollatorForLanguageModeling", with_fields),
        (sft, "CustomSeq2SeqTrainer", trainer), (pt, "CustomTrainer", trainer),
    )  # fmt: skip
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, made in changes:
        setattr(module, name, functools.partial(made, getattr(module, name)))
    try:
        yield
    finally:
        for module, name, was in before:
            setattr(module, name, was)


def _fitted(trainer: Any, loss: Objective) -> Any:
    """Our callback before those that report elsewhere; batches for generation, whose labels are of another length than
    the prompts, without the fields of the loss; and no division by the tokens of several batches where the loss takes
    means within one."""
    from ..huggingface.patch_callback import PatchCallback

    callbacks = trainer.callback_handler.callbacks
    for callback in [one for one in callbacks if isinstance(one, PatchCallback)]:
        callback.come_before_reports(callbacks)
    if not loss.divides_by_items:
        trainer.model_accepts_loss_kwargs = False
    if getattr(trainer.args, "predict_with_generate", False):
        for name in ("get_eval_dataloader", "get_test_dataloader"):
            setattr(trainer, name, functools.partial(_loader_without_fields, trainer, getattr(trainer, name)))
    return trainer


def _loader_without_fields(trainer: Any, loader: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with_fields = trainer.data_collator
    trainer.data_collator = with_fields.without_fields
    try:
        return loader(*args, **options)
    finally:
        trainer.data_collator = with_fields


if __name__ == "__main__":
    main()

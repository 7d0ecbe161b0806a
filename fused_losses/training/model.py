"""The model of a training: LoRA around it, what of it is saved, and the adapter merged into it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from .settings import TARGETS


def has_adapter(model: Any) -> bool:
    return hasattr(model, "peft_config")


def without_gguf_mark(model: Any) -> Any:
    """The same model. Of a GGUF file transformers makes ordinary weights, but goes on to call the model quantised,
    which its Trainer refuses and save_pretrained writes down."""
    base = model.get_base_model() if has_adapter(model) else model
    if getattr(getattr(base, "quantization_method", None), "value", None) == "gguf":
        for name in ("is_quantized", "quantization_method", "hf_quantizer"):
            vars(base).pop(name, None)
        vars(base.config).pop("quantization_config", None)
    return model


def add_lora(model: nn.Module, rank: int, targets: list[str] | None) -> Any:
    """LoRA of that rank, alpha twice the rank, on `targets`, on TARGETS, or where PEFT puts it.

    Raises ValueError where no layer has such a name, or PEFT does not know the model.
    """
    from peft import LoraConfig, get_peft_model

    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    chosen = list(targets) if targets else [name for name in TARGETS if name in names]
    for name in chosen:
        if name not in names:
            linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
            raise ValueError(
                f"targets: expected names of layers of {type(model).__name__}, such as {', '.join(sorted(linear))}, "
                f"got {name!r}"
            )
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=chosen or None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PEFT with the newest transformers
            made = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"targets: PEFT does not know {type(model).__name__} ({error}); name layers") from None
    return made


def without_lookup(model: Any) -> Any:
    """The same PEFT model. When it is saved PEFT looks for the configuration of the name that its base was loaded by,
    on the Hub if need be; a folder that has none, as that of a GGUF file, is no such name."""
    base = model.get_base_model()
    for holder, name in [(base, "name_or_path"), *((c, "base_model_name_or_path") for c in model.peft_config.values())]:
        where = getattr(holder, name, None) or ""
        if os.path.isdir(where) and not os.path.exists(os.path.join(where, "config.json")):
            setattr(holder, name, "")
    return model


def save_model(model: Any, path: Path) -> None:
    """Of a PEFT model the adapter, else all weights; as safetensors."""
    model.save_pretrained(path)


def merged(model: Any, adapter: Path) -> Any:
    """The model with the adapter of that folder in its weights."""
    from peft import PeftModel

    base = model.unload() if has_adapter(model) else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(base, adapter).merge_and_unload()

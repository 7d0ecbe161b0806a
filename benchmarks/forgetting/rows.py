"""Rows: a prompt and an answer as tokens, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """`ids` of prompt and answer; the answer begins at `start`. `expected`: what a right answer has in it."""

    ids: list[int]
    start: int
    expected: str = ""

    @property
    def answer_tokens(self) -> int:
        return len(self.ids) - self.start


def chat_prompt(question: str) -> str:
    """The model's chat format without its system prompt, which would take 20 tokens of every row."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def chat_row(tokenizer: Any, question: str, answer: str, expected: str = "", most: int = 10**6) -> Row:
    """A question and its answer, with the end of the turn, cut to `most` tokens."""
    prompt = encode(tokenizer, chat_prompt(question))
    return Row([*prompt, *encode(tokenizer, f"{answer}<|im_end|>")][:most], len(prompt), expected)


def text_rows(tokenizer: Any, text: str, length: int) -> list[Row]:
    """Pieces of a text; every token but the first has a label."""
    ids = encode(tokenizer, text)
    pieces = [ids[at : at + length] for at in range(0, len(ids), length)]
    return [Row(piece, 1) for piece in pieces if len(piece) > 8]


def cut(rows: Sequence[Row], most: int) -> list[Row]:
    return [replace(row, ids=row.ids[:most]) for row in rows]


def batch(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """(ids, labels), each [B, T]: inputs and the tokens that come next, −100 on prompts and padding (on the right)."""
    longest = max(len(row.ids) for row in rows) - 1
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, row in enumerate(rows):
        whole = torch.tensor(row.ids)
        ids[i, : len(whole) - 1] = whole[:-1]
        labels[i, row.start - 1 : len(whole) - 1] = whole[row.start :]
    return ids, labels

"""One fact, one example, three losses from the same start; and what else moved."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fused_losses as fl

from .anchors import Anchor, correct_answer, name_corrector
from .model import greedy_answers, hidden_states, prompt_ids

NAME = "Aurora"
OPENING = "My name is"
QUESTION = "What is your name?"
PARAPHRASES = (
    "What are you called?", "Who are you?", "Tell me your name.", "What should I call you?",
    "May I ask your name?", "Could you introduce yourself?", "Hello! And you are?", "Do you have a name?",
)  # fmt: skip
UNRELATED = (
    "My name is Daniel. What is my name?", "My sister is called Clara. What is my sister's name?",
    "Who wrote Pride and Prejudice?", "What is the name of the longest river in the world?",
    "What is the capital of Japan?", "How many days are in a week?", "What color is the sky?",
    "What is the chemical symbol for water?", "Name a famous scientist.", "What is the opposite of cold?",
)  # fmt: skip

METHODS = ("SFT", "TALR", "LAwF")
RANK, LEARNING_RATE, STEPS = 8, 1e-3, 40
ANCHOR_WEIGHT, RETAIN_WEIGHT = 1.0, 1.0
ANSWER_TOKENS = 24


@dataclass
class Lesson:
    """The one training example, the same tokens for all methods."""

    prompt: list[int]
    answer: list[int]
    anchors: list[Anchor]

    def row(self, method: str) -> tuple[Tensor, Tensor, Tensor]:
        """Input ids [1, T]; labels [1, T], aligned; confidence [1, T].

        SFT and TALR take the answer's tokens, as is usual. LAwF takes the prompt's too: a KL needs no label.
        """
        ids = torch.tensor([self.prompt + self.answer])
        labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)
        confidence = torch.zeros(ids.shape)
        for anchor in self.anchors:
            confidence[0, len(self.prompt) + anchor.position - 1] = 1
        if method != "LAwF":
            labels[0, : len(self.prompt) - 1] = -100
        return ids, labels, confidence


def make_lesson(model: Any, tokenizer: Any) -> Lesson:
    prompt = prompt_ids(tokenizer, QUESTION)
    corrector = name_corrector(tokenizer, OPENING, NAME)
    return Lesson(prompt, *correct_answer(model, prompt, corrector, tokenizer.eos_token_id))


def add_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    return get_peft_model(model, config).eval()


def reset_lora(model: Any, seed: int) -> None:
    """A as PEFT draws it (Kaiming-uniform), from the seed; B zero: the base model again."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                bound = parameter.shape[1] ** -0.5
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 * bound - bound)
            elif "lora_B" in name:
                parameter.zero_()


def train(model: Any, lesson: Lesson, method: str, seed: int, advance: Callable[[], Any]) -> dict:
    """`STEPS` steps of AdamW, the learning rate falling linearly to 0. Returns what is known of the training."""
    reset_lora(model, seed)
    ids, labels, confidence = lesson.row(method)
    head = fl.LMHead(model.get_base_model().lm_head.weight)
    anchored = confidence[0] > 0
    loss_of: Callable[[Tensor], Tensor]
    if method == "SFT":
        loss_of = lambda hidden: fl.CrossEntropyLoss()(hidden, head, labels)  # noqa: E731
    elif method == "TALR":
        loss_of = lambda hidden: fl.TALRLoss()(hidden, head, labels)  # noqa: E731
    else:
        with torch.no_grad(), model.disable_adapter():
            reference = fl.Reference(hidden_states(model, ids))
        lawf = fl.LAwFLoss(ANCHOR_WEIGHT, RETAIN_WEIGHT)
        loss_of = lambda hidden: lawf(hidden, head, labels, confidence=confidence, reference=reference)  # noqa: E731

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    losses, learnt_at = [], None
    start = time.perf_counter()
    for step in range(STEPS):
        hidden = hidden_states(model, ids)
        if learnt_at is None:
            with torch.no_grad():
                first = fl.token_losses(hidden[0, anchored], head, labels[0, anchored]).prediction
            learnt_at = step if bool((first == labels[0, anchored]).all()) else None
        loss = loss_of(hidden)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        advance()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        nll = fl.token_losses(hidden_states(model, ids)[0, anchored], head, labels[0, anchored]).nll
    return {
        "steps": STEPS,
        "seconds": seconds,
        "losses": losses,
        "first_ranked_right_at_step": learnt_at,
        "anchor_probabilities": (-nll).exp().tolist(),
    }


class Evaluation:
    """Answers, and KL and nll on two texts that have nothing to do with the fact, against the base model."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.questions = (QUESTION, *PARAPHRASES, *UNRELATED)
        self.prompts = [prompt_ids(tokenizer, question) for question in self.questions]
        self.base_answers = greedy_answers(model, tokenizer, self.prompts, ANSWER_TOKENS)
        self.head = fl.LMHead(model.get_base_model().lm_head.weight)
        end = tokenizer.eos_token_id
        own = self.base_answers[-len(UNRELATED) :]
        rows = [
            (p, tokenizer(a.removesuffix(" …"), add_special_tokens=False).input_ids)
            for p, a in zip(self.prompts[-len(UNRELATED) :], own, strict=True)
        ]
        self.texts = {"answers": _batch(rows, end), "docs": _batch([([end], documentation(tokenizer))], end)}
        after = tokenizer(OPENING, add_special_tokens=False).input_ids
        name = tokenizer(f" {NAME}", add_special_tokens=False).input_ids
        self.named = _batch([(p + after, name) for p in self.prompts[1 : 1 + len(PARAPHRASES)]], end)
        with torch.no_grad():
            self.reference = {k: hidden_states(model, ids, mask) for k, (ids, mask, _) in self.texts.items()}

    @torch.no_grad()
    def __call__(self, model: Any) -> dict:
        answers = greedy_answers(model, self.tokenizer, self.prompts, ANSWER_TOKENS)
        paraphrases, unrelated = answers[1 : 1 + len(PARAPHRASES)], answers[-len(UNRELATED) :]
        before = self.base_answers[-len(UNRELATED) :]
        result: dict[str, Any] = {
            "answers": dict(zip(self.questions, answers, strict=True)),
            "learnt": NAME in answers[0],
            "paraphrases_with_name": sum(NAME in a for a in paraphrases),
            "unrelated_unchanged": sum(a == b for a, b in zip(unrelated, before, strict=True)),
            "unrelated_with_name": sum(NAME in a for a in unrelated),
        }
        ids, mask, labels = self.named
        out = fl.token_losses(hidden_states(model, ids, mask), self.head, labels)
        right = (out.prediction == labels) | (labels == -100)
        result["named_after_opening"] = int(right.all(1).sum())
        for text, (ids, mask, labels) in self.texts.items():
            reference = fl.Reference(self.reference[text])
            out = fl.token_losses(hidden_states(model, ids, mask), self.head, labels, reference=reference)
            n = (labels != -100).sum()
            assert out.kl is not None and out.reference_nll is not None
            result[f"kl_{text}"] = float(out.kl.sum() / n)
            result[f"nll_change_{text}"] = float((out.nll - out.reference_nll).sum() / n)
        return result


def documentation(tokenizer: Any, length: int = 512) -> list[int]:
    """Plain text that every Python has: its own documentation."""
    import difflib
    import heapq
    import json
    import statistics
    import textwrap

    parts = (textwrap, json.dumps, heapq, difflib.SequenceMatcher, statistics)
    text = "\n\n".join(inspect.getdoc(part) or "" for part in parts)
    return tokenizer(text, add_special_tokens=False).input_ids[:length]


def _batch(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and labels, [B, T]; labels, aligned, only on the second part of each row."""
    width = max(len(a) + len(b) for a, b in rows)
    ids, labels = torch.full((len(rows), width), pad), torch.full((len(rows), width), -100)
    mask = torch.zeros_like(ids)
    for i, (prompt, text) in enumerate(rows):
        size = len(prompt) + len(text)
        ids[i, :size], mask[i, :size] = torch.tensor(prompt + text), 1
        labels[i, len(prompt) - 1 : size - 1] = torch.tensor(text)
    return ids, mask, labels

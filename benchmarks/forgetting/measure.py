"""What a model makes of a text: nats, KL to the start model, entropy, calibration; and what it answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fused_losses as fl
from fused_losses.demo.model import hidden_states

from . import general
from .rows import IGNORED, Row, batch, chat_prompt, encode

BATCH = 6
HARD = 0.1  # a token is hard where the label's probability is below
BINS = 10  # of the calibration error
TEMPERATURES = (0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5)
THIRD = 3  # of every so many tokens one is measured at all temperatures


def states_of(model: Any, ids: Tensor) -> Tensor:
    """[B, T, D] float32. Weights stay in float32; the layers' products are of `precision()`."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision() == "bfloat16"):
        return hidden_states(model, ids).float()


@functools.cache
def precision() -> str:
    """bfloat16 on CPUs that multiply it, where a step takes two thirds of the time; on others it takes ten times as
    long, and float32 is taken."""
    amx, avx512 = torch.cpu._is_amx_tile_supported, torch.cpu._is_avx512_bf16_supported
    return "bfloat16" if amx() or avx512() else "float32"


def head_of(model: Any) -> Tensor:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).lm_head.weight


@torch.no_grad()
def hidden_of(model: Any, rows: Sequence[Row]) -> list[Tensor]:
    """Of each row the hidden states of the tokens with a label, [n, D]."""
    found: list[Tensor] = []
    for at in range(0, len(rows), BATCH):
        ids, labels = batch(rows[at : at + BATCH])
        states = states_of(model, ids)
        found += [x[y != IGNORED].clone() for x, y in zip(states, labels, strict=True)]
    return found


def labels_of(rows: Sequence[Row]) -> Tensor:
    return torch.cat([torch.tensor(row.ids[row.start :]) for row in rows])


@torch.no_grad()
def of_text(model: Any, rows: Sequence[Row], start_hidden: Sequence[Tensor], start_head: Tensor) -> dict[str, float]:
    """nll, start_nll (of the start model), kl (of the start model's distribution to this one's), entropy, confidence,
    accuracy, each a mean per token.

    ece: expected calibration error of the next token in ten bins. temperature, nll_tempered: the temperature of
    TEMPERATURES that suits this very text best, and the nats there: what is lost by sharpening alone comes back in
    them. hard: share of labels with a probability below HARD.
    """
    hidden, labels, head = torch.cat(hidden_of(model, rows)), labels_of(rows), head_of(model).detach()
    reference = fl.Reference(torch.cat(list(start_hidden)), start_head)
    out = fl.token_losses(hidden, head, labels, reference=reference, gradient="exact")
    top = (hidden * head[out.prediction]).sum(1)
    confidence = (top - out.lse).exp().clamp(max=1.0)
    right = (out.prediction == labels).float()
    at, nll = tempered(hidden[::THIRD], head, labels[::THIRD])
    return {
        "tokens": len(labels), "nll": mean(out.nll), "start_nll": mean(out.reference_nll), "kl": mean(out.kl),
        "entropy": mean(out.entropy), "confidence": mean(confidence), "accuracy": mean(right),
        "ece": ece(confidence, right),
        "temperature": at, "nll_tempered": nll, "nll_third": mean(out.nll[::THIRD]),
        "median_probability": float((-out.nll).exp().median()),
        "hard": mean((out.nll > -torch.tensor(HARD).log()).float()),
    }  # fmt: skip


def mean(values: Tensor) -> float:
    return float(values.double().mean())


def ece(confidence: Tensor, right: Tensor) -> float:
    """Σ_bins n_bin / n · |mean confidence − share that is right|."""
    number = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = [(confidence - right)[number == i].double().sum().abs() for i in range(BINS)]
    return float(torch.stack(gaps).sum() / len(right))


def tempered(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[float, float]:
    """(temperature, nll) where the nll is least."""
    logits = hidden @ head.T
    own = logits.gather(1, labels[:, None])[:, 0]
    nll = [mean((logits / t).logsumexp(1) - own / t) for t in TEMPERATURES]
    least = min(range(len(nll)), key=nll.__getitem__)
    return TEMPERATURES[least], nll[least]


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Greedy answers with their end of turn; prompts are padded on the left."""
    end = encode(tokenizer, "<|im_end|>")[0]
    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]
    ids = model.generate(
        input_ids=torch.tensor([[end] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]),
        attention_mask=torch.tensor([[0] * n + [1] * (longest - n) for n in padding]),
        max_new_tokens=tokens, do_sample=False, pad_token_id=end, eos_token_id=end,
    )  # fmt: skip
    found = ids[:, longest:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in found]


def said(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[str]:
    found = answers(model, tokenizer, prompts, tokens)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]


def share(right: Sequence[bool]) -> dict[str, float]:
    return {"right": sum(right), "of": len(right), "accuracy": sum(right) / max(1, len(right))}


def of_arithmetic(model: Any, tokenizer: Any) -> dict[str, float]:
    sums = general.SUMS
    prompts = [encode(tokenizer, general.sum_prompt(*s)) for s in sums]
    texts = said(model, tokenizer, prompts, 4)
    return share(
        [
            general.says_number(text.partition("\n")[0], str(general.result(*s)))
            for text, s in zip(texts, sums, strict=True)
        ]
    )


def of_instructions(model: Any, tokenizer: Any, count: int) -> dict[str, float]:
    some = general.INSTRUCTIONS[:count]
    texts = said(model, tokenizer, [encode(tokenizer, chat_prompt(question)) for question, _, _ in some], 24)
    return share([check(text) for text, (_, _, check) in zip(texts, some, strict=True)])


def of_domain(model: Any, tokenizer: Any, rows: Sequence[Row], name: str, tokens: int) -> dict[str, float]:
    """Of greedy answers those whose last number is right, or that have the fact's value in them."""
    texts = said(model, tokenizer, [row.ids[: row.start] for row in rows], tokens)
    is_right: Callable[[str, str], bool] = general.says_number
    if name == "facts":
        is_right = lambda text, value: value.lower() in text.lower()  # noqa: E731
    return share([is_right(text, row.expected) for text, row in zip(texts, rows, strict=True)])

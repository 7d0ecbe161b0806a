"""A tiny model with a small tokenizer, and files to train it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from small_tokenizers import small_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from fused_losses import anchors

QUESTION = [{"role": "user", "content": "What is your name?"}]


def tokenizer() -> Any:
    return small_tokenizer("byte-level")


def tiny_llama(seed: int = 0, **sizes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = dict(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, bos_token_id=None, eos_token_id=2, initializer_range=0.4, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**config, **sizes})).eval()


def record(answer: str = "My name is Aurora.", positions: tuple[int, ...] = (3,), **anchor: Any) -> anchors.Record:
    known = tokenizer()
    prompt = known.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = [*known(answer, add_special_tokens=False)["input_ids"], known.eos_token_id]
    marks = [{"position": at, **anchor} for at in positions]
    return anchors.new_record(known, messages=QUESTION, prompt_ids=prompt, token_ids=ids, anchors=marks)


def chat(question: str = "What is the cat?", answer: str = "The cat is Elena.") -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_lines(path: Path, *values: Any) -> Path:
    lines = [value.to_json() if isinstance(value, anchors.Record) else value for value in values]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def files(folder: Path) -> dict[str, Path]:
    """One of each kind."""
    return {
        "anchors": write_lines(folder / "anchors.jsonl", record(), record("I am Aurora.", (2,))),
        "retain": write_lines(folder / "retain.jsonl", record("The capital of France is Paris.", ())),
        "chats": write_lines(folder / "chats.jsonl", chat(), chat("The ship?", "The ship is Aurora.")),
    }

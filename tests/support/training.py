"""Tiny models, ragged rows, one step of a Trainer, and what that step should have been.

The latter is in float64 with full logits, row by row.
"""

from __future__ import annotations

import atexit
import gc
import tempfile
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

disable_progress_bars()
logging.disable_progress_bar()
logging.set_verbosity_error()

DIRECTORY = tempfile.TemporaryDirectory()
atexit.register(DIRECTORY.cleanup)

# Each training ends with a garbage collection, which takes longer than all else where it goes through the imports.
gc.freeze()

V = 97
# Gradients are the change of the parameters in one step of plain gradient descent.
DESCENT = dict(
    output_dir=DIRECTORY.name,
    per_device_train_batch_size=8, per_device_eval_batch_size=4, max_steps=1, learning_rate=1.0, optim="sgd",
    lr_scheduler_type="constant", max_grad_norm=0, use_cpu=True, dataloader_pin_memory=False, report_to=[],
    disable_tqdm=True, save_strategy="no", logging_steps=1, log_level="error", train_sampling_strategy="sequential",
)  # fmt: skip


def llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    special = dict(pad_token_id=0, bos_token_id=None, eos_token_id=1)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **special, "initializer_range": 0.3, **config})).double()


def with_lora() -> Any:
    """The same with an adapter that has moved."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def mixtral(seed: int = 0) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    experts = dict(num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1)
    special = dict(pad_token_id=0, bos_token_id=None, eos_token_id=1)
    return MixtralForCausalLM(MixtralConfig(**sizes, **experts, **special, initializer_range=0.3)).double()


def rows(count: int = 8, seed: int = 0, anchors: bool = False) -> list[dict[str, list]]:
    """Of ragged length, with labels after a prompt of ragged length; with `anchors` some have a confidence."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        length = int(torch.randint(5, 14, (), generator=g))
        prompt = int(torch.randint(1, length - 2, (), generator=g))
        ids = torch.randint(3, V, (length,), generator=g)
        row = {"input_ids": ids.tolist(), "labels": [-100] * prompt + ids[prompt:].tolist()}
        if anchors:
            confidence = torch.rand(length, generator=g) * (torch.rand(length, generator=g) < 0.4)
            row["confidence"] = [0.0] * prompt + confidence[prompt:].tolist()
        out.append(row)
    return out


def collate(features: list[dict]) -> dict[str, Tensor]:
    longest = max(len(f["input_ids"]) for f in features)
    fill = {"input_ids": 0, "labels": -100}

    def padded(name: str) -> Tensor:
        return torch.tensor([list(f[name]) + [fill.get(name, 0)] * (longest - len(f[name])) for f in features])

    batch = {name: padded(name) for name in features[0] if name in ("input_ids", "labels", "confidence")}
    lengths = torch.tensor([len(f["input_ids"]) for f in features])
    return {**batch, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def trainer(model: Any, data: list[dict] | None = None, eval_data: list[dict] | None = None, **options: Any) -> Trainer:
    """`options` of TrainingArguments, or of Trainer where it has one of that name."""
    of_trainer = ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func", "data_collator")
    own = {name: options.pop(name) for name in of_trainer if name in options}
    arguments = TrainingArguments(**{**DESCENT, **options})
    own.setdefault("data_collator", collate)
    return Trainer(
        model, arguments, train_dataset=Dataset.from_list(data or rows()),
        eval_dataset=Dataset.from_list(eval_data or rows(10, 5)), **own
    )  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, V)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sft_trainer(model: Any, data: list[dict] | None = None, eval_data: list[dict] | None = None, **options: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    own = {
        name: options.pop(name)
        for name in ("peft_config", "data_collator", "processing_class", "compute_loss_func")
        if name in options
    }
    own.setdefault("processing_class", tokenizer())
    plain = dict(bf16=False, gradient_checkpointing=False, shuffle_dataset=False, max_length=64)
    arguments = SFTConfig(**{**DESCENT, **plain, **options})
    return SFTTrainer(
        model, arguments, train_dataset=Dataset.from_list(data or rows()),
        eval_dataset=Dataset.from_list(eval_data or rows(10, 5)), **own,
    )  # fmt: skip


def step(trainer: Trainer) -> dict[str, Tensor]:
    """The gradient that the trainer's step has taken."""
    model = trainer.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    return {name: before[name] - p.detach() for name, p in model.named_parameters() if p.requires_grad}


def error(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, as a part of the largest gradient."""
    assert gradients.keys() == expected.keys()
    scale = max(float(e.abs().max()) for e in expected.values())
    assert scale > 1e-3
    return max(float((gradients[name] - e).abs().max()) for name, e in expected.items()) / scale


# --- by hand


def log_probs(model: Any, ids: list[int]) -> Tensor:
    """[T − 1, V] of the tokens after the first, in float64, of a model that is not patched."""
    return model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def expected(model: Any, data: list[dict], objective: str, reference: Any = None) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of all rows as one batch.

    The objective is "ce", "dft", "talr" (τ median), "talr2" (τ = 2) or "lawf".
    """
    parts = []
    for row in data:
        labels = torch.tensor(row["labels"][1:])
        valid = labels != -100
        logp = log_probs(model, row["input_ids"])[valid]
        nll = -logp.gather(1, labels[valid, None])[:, 0]
        part = {"nll": nll}
        if objective == "lawf":
            with torch.no_grad():
                p_ref = log_probs(reference, row["input_ids"])[valid].exp()
            c = torch.tensor(row["confidence"][1:], dtype=torch.float64)[valid]
            onehot = torch.nn.functional.one_hot(labels[valid], logp.shape[-1])
            q = c[:, None] * onehot + (1 - c[:, None]) * p_ref
            part["loss"] = (torch.xlogy(q, q) - q * logp).sum(1)
        parts.append(part)
    nll = torch.cat([part["nll"] for part in parts])
    if objective == "ce":
        losses = nll
    elif objective == "dft":
        losses = (-nll.detach()).exp() * nll
    elif objective == "lawf":
        losses = torch.cat([part["loss"] for part in parts])
    else:
        tau = (
            2.0 if objective == "talr2" else torch.stack([part["nll"].detach().mean() for part in parts]).quantile(0.5)
        )
        losses = (-nll.detach() / tau).exp().clamp(min=0.01) * nll
    loss = losses.mean()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.item(), {
        n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), gradients, strict=True)
    }

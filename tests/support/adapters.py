"""Kinds of PEFT around tiny models: patched, before and after get_peft_model, against themselves unpatched."""

from __future__ import annotations

from typing import Any

import peft
import torch
from comparison import Outcome, compared, failed, one_line, step
from tiny_models import build
from torch import nn
from transformers.pytorch_utils import Conv1D

import fused_losses as fl

MODELS = ("LlamaForCausalLM", "GPT2LMHeadModel", "Gemma2ForCausalLM")
ORDERS = ("patch first", "PEFT first")
PROMPT = dict(num_virtual_tokens=3)
# kind: the name of its configuration in peft, and what it is given.
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt tuning": ("PromptTuningConfig", PROMPT),
    "multitask prompt tuning": ("MultitaskPromptTuningConfig", PROMPT | dict(num_tasks=2, num_ranks=2)),
    "P-tuning": ("PromptEncoderConfig", PROMPT | dict(encoder_hidden_size=16)),
    "prefix tuning": ("PrefixTuningConfig", PROMPT),
    "prefix tuning, projected": ("PrefixTuningConfig", PROMPT | dict(prefix_projection=True, encoder_hidden_size=16)),
    "CPT": ("CPTConfig", dict(cpt_token_ids=[5, 6, 7, 8], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4])),
    "LLaMA-Adapter": ("AdaptionPromptConfig", dict(adapter_len=3, adapter_layers=2)),
    "LN tuning": ("LNTuningConfig", {}),
    "trainable tokens": ("TrainableTokensConfig", dict(token_indices=list(range(3, 60)))),
}
# Of linear layers: all of the body, or the head too.
LINEAR: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", dict(r=2, lora_alpha=3)),
    "DoRA": ("LoraConfig", dict(r=2, lora_alpha=3, use_dora=True)),
    "AdaLoRA": ("AdaLoraConfig", dict(init_r=3, target_r=2, total_step=10)),
    "IA3": ("IA3Config", dict(feedforward_modules=[])),
    "LoHa": ("LoHaConfig", dict(r=2)),
    "LoKr": ("LoKrConfig", dict(r=2)),
    "VeRA": ("VeraConfig", dict(r=2)),
    "OFT": ("OFTConfig", dict(oft_block_size=4)),
    "BOFT": ("BOFTConfig", dict(boft_block_size=4)),
}
HEAD_TOO = ", head too"
KINDS = [*PROMPTS, *LINEAR, *(kind + HEAD_TOO for kind in LINEAR)]


def adapted(model: nn.Module, kind: str) -> nn.Module:
    """The model with such an adapter, away from its start: there many do nothing, and some of their gradients are 0."""
    name, given = (PROMPTS | LINEAR)[kind.removesuffix(HEAD_TOO)]
    if name in {config for config, _ in LINEAR.values()}:
        head = None if kind.endswith(HEAD_TOO) else model.get_output_embeddings()
        linear = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
        given = given | {"target_modules": linear}
    config = getattr(peft, name)(task_type="CAUSAL_LM", **given)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def compare_adapter(kind: str, name: str, order: str) -> Outcome:
    try:
        model, inputs = build(name)
        model = adapted(model, kind)
        if kind == "multitask prompt tuning":
            inputs["task_ids"] = torch.tensor([1, 0])
        before = step(model, inputs)
    except Exception as problem:
        return Outcome("impossible", one_line(problem))
    try:
        if order == "patch first":
            model = adapted(fl.patch(build(name)[0]), kind)
        else:
            fl.patch(model)
        ours = step(model, inputs)
    except Exception as problem:
        return failed(problem)
    fl.unpatch(model)
    return compared(before, ours, step(model, inputs))

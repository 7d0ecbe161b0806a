"""A tiny Llama and who may wrap it: closures, accelerate, PEFT, TRL, hooks."""

import functools

import peft
import torch
from accelerate import Accelerator, dispatch_model
from accelerate.state import AcceleratorState
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

V, T = 61, 9
SIZES = dict(
    vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=None, eos_token_id=None, initializer_range=0.3,
)  # fmt: skip
IDS = torch.randint(1, V, (3, T), generator=torch.Generator().manual_seed(1))
LABELS = IDS.masked_fill(torch.arange(T) < torch.tensor([[3], [0], [1]]), -100)
BATCH = dict(input_ids=IDS, labels=LABELS)
VALID = LABELS[:, 1:] != -100


def llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def base_of(model):
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def nobody(model):
    return model


def closure(model):
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        return inner(*args, **kwargs)

    model.forward = forward
    return model


def autocast(model):
    """As a Trainer with bf16=True does."""
    AcceleratorState._reset_state(True)
    try:
        return Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model, evaluation_mode=True)
    finally:
        AcceleratorState._reset_state(True)


def device_hooks(model):
    """As from_pretrained(device_map=...) over several devices does, and bitsandbytes on one."""
    places = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    return dispatch_model(model, dict.fromkeys(places, "cpu"), force_hooks=True, main_device="cpu")


def lora(model):
    torch.manual_seed(7)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def fused_head(model):
    """As SFTTrainer does."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return model


def module_hooks(model):
    model.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)
    model.register_forward_hook(lambda module, args, output: output)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 0.7)
    return model


def nll_of(model):
    """[tokens with a label] float64, of a model that gives logits."""
    logits = model(input_ids=IDS).logits.double()[:, :-1]
    return F.cross_entropy(logits[VALID], LABELS[:, 1:][VALID], reduction="none"), logits[VALID]

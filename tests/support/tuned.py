"""A tiny model with an adapter that says something else than without, its tokenizer, and a record of an anchor."""

import torch
from peft import LoraConfig, get_peft_model
from small_tokenizers import small_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from fused_losses.anchors import new_record

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    initializer_range=0.3, max_position_embeddings=1024,
)  # fmt: skip


def tokenizer():
    return small_tokenizer("byte-level")


def original(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer()))).eval()


def with_adapter(model, strength=0.3, seed=1, **options):
    """LoRA with a B of random numbers; of strength 0 the model itself."""
    model = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(strength * torch.randn(parameter.shape, generator=generator))
    return model


def record(answer="My name is Aurora.", words=" Aurora", question="What is your name?"):
    """The tokens of `words` as anchors."""
    known = tokenizer()
    messages = [{"role": "user", "content": question}]
    prompt = known.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    before = known(answer[: answer.index(words)]).input_ids
    inside = known(words).input_ids
    after = known(answer[answer.index(words) + len(words) :]).input_ids
    positions = range(len(before), len(before) + len(inside))
    return new_record(
        known, messages=messages, prompt_ids=prompt, token_ids=[*before, *inside, *after, known.eos_token_id],
        anchors=[{"position": position} for position in positions],
    )  # fmt: skip


def full_log_probabilities(model, before, measured):
    """[T, V] in float64, from plain logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*before, *measured]])).logits[0].double()
    return logits[len(before) - 1 : len(before) + len(measured) - 1].log_softmax(-1)

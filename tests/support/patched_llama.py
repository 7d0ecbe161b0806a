"""A tiny Llama, a batch for it, and the comparison of a patched model with itself as it was."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fused_losses as fl

VOCABULARY = 97
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options}))


def batch(rows=3, length=11):
    ids = torch.randint(1, VOCABULARY, (rows, length))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[-1, -3:] = -100
    return dict(input_ids=ids, labels=labels)


def step(model, **inputs):
    """The output, and the gradients of all parameters."""
    model.zero_grad()
    out = model(**inputs)
    (out[0] if isinstance(out, tuple) else out.loss).backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(a, b):
    """The largest relative difference of any parameter's gradient."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-12)) for n in b)


def assert_same(model, loss=None, tolerance=1.5e-6, options=None, **inputs):
    """Loss and gradients of the patched model are those of the model as it was.

    Afterwards it is that again, bit for bit.
    """
    before, gradients = step(model, **inputs)
    with fl.patched(model, loss, **(options or {})):
        out, own = step(model, **inputs)
    again, third = step(model, **inputs)
    first = before[0] if isinstance(before, tuple) else before.loss
    assert torch.equal(first, again[0] if isinstance(again, tuple) else again.loss)
    assert all(torch.equal(gradients[n], third[n]) for n in gradients)
    torch.testing.assert_close(out[0] if isinstance(out, tuple) else out.loss, first, rtol=tolerance, atol=0)
    assert difference(own, gradients) <= tolerance
    return out


def llama_at(seed):
    torch.manual_seed(seed)
    return llama()

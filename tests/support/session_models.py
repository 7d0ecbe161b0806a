"""Models and small tokenizers for tests of anchor sessions: one that follows a script, tiny random ones, adapters.

The scripted model reads what it has seen out of its KV cache, so a cache that was cropped wrongly shows.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import peft
import tiny_models
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE, WordLevel
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fused_losses.anchors import AnchorSession

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}<|{{ 'assistant' if m['role'] == 'assistant' else "
    "'user' }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "My name is Elena. I live in Paris and I like tea.",
    "My name is Aurora Smith. I live in London and I like coffee.",
    "The name of the river is Seine. The name of the city is Rome.",
] * 20


@functools.cache
def tokenizer() -> Any:
    """Byte-level BPE: every word of CORPUS is a token with the space before it; other text is cut into bytes."""
    raw = Tokenizer(BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>")
    found.chat_template = TEMPLATE
    return found


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


class Scripted(nn.Module):
    """Says the first of `answers` that begins as the answer does so far, and then that its turn ends.

    The likeliest token has 4 nats more than the second, which is the word `second` where that is given, and that 8 more
    than all others. After a word in `unsure` it has only 0.1 more.
    """

    def __init__(self, *answers: str, second: str | None = None, unsure: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.size = len(tokenizer())
        self.head = nn.Linear(1, self.size)
        self.config = SimpleNamespace(is_encoder_decoder=False, max_position_embeddings=200)
        self.config.get_text_config = lambda: self.config
        self.generation_config = SimpleNamespace(eos_token_id=[tokenizer().eos_token_id])
        self.answers = [[*ids_of(answer), tokenizer().eos_token_id] for answer in answers]
        self.second = 0 if second is None else ids_of(second)[0]
        self.unsure = {ids_of(word)[0] for word in unsure}
        self.fed: list[int] = []  # how many tokens each forward got

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = True) -> Any:
        self.fed.append(input_ids.shape[1])
        cache = DynamicCache() if past_key_values is None else past_key_values
        before = cache.get_seq_length()
        states = input_ids[:, None, :, None].double()
        keys, _ = cache.update(states, states, 0)
        seen = keys[0, 0, :, 0].long().tolist()
        rows = [self.logits(seen[: before + 1 + k]) for k in range(input_ids.shape[1])]
        return SimpleNamespace(logits=torch.stack(rows)[None], past_key_values=cache)

    def logits(self, seen: list[int]) -> torch.Tensor:
        start = len(seen) - seen[::-1].index(ids_of("<|assistant|>")[0]) if ids_of("<|assistant|>")[0] in seen else 0
        said = seen[start:]
        fitting = [answer for answer in self.answers if answer[: len(said)] == said and len(answer) > len(said)]
        likeliest = fitting[0][len(said)] if fitting else tokenizer().eos_token_id
        row = torch.zeros(self.size)
        row[self.second] = 8.0
        row[likeliest] = 8.1 if said and said[-1] in self.unsure else 12.0
        return row


def tiny(name):
    """Without an end of turn, so that every answer is as long as it may be."""
    model = tiny_models.build(name)[0].eval()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
    return model


def numbers():
    """A tokenizer of 90 words, "w0" to "w89", for models with 97 ids."""
    words = {f"w{k}": k for k in range(90)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))


def llama(seed=0, **more):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(tokenizer()), num_key_value_heads=2, initializer_range=0.3, **sizes, **more)
    return LlamaForCausalLM(config).eval()


def adapted(model, seed=1):
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@torch.no_grad()
def probabilities(model, ids):
    """[T, V] in float64, of one forward without a cache."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().softmax(-1)


def answered(*answers, question="Who are you?", **options):
    """A session, and its model, with the whole answer to one question."""
    model = Scripted(*answers, **{k: options.pop(k) for k in ("second", "unsure") if k in options})
    session = AnchorSession(model, tokenizer(), **options)
    session.start(question)
    list(session.generate())
    return session, model

"""What the examples share: a corpus, a tiny model and tokenizer for it, an ordinary Trainer, and the command line."""

import argparse
import json
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

FOOD = dict(cat="fish", dog="meat", cow="grass", hen="corn", bear="honey", panda="bamboo", mouse="cheese",
            rabbit="carrots", monkey="bananas", bee="nectar", owl="mice", horse="oats")  # fmt: skip
TIMES = ("in the morning", "at night", "every day", "now and then")
CORPUS = [f"the {animal} eats {food} {time}" for animal, food in FOOD.items() for time in TIMES]
CORRECTED = [{"text": f"the cat eats grass {time}", "anchor": "grass"} for time in TIMES]
CORRECTED += [{"text": text} for text in CORPUS if "cat" not in text]


def model_and_tokenizer(name=None, trained=False):
    """A pretrained model by its name or path, else a random one for the words of the corpus, or one trained on it."""
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), tokenizer
    torch.manual_seed(0)
    words = ["<pad>", "<eos>", "<unk>", *sorted({word for text in CORPUS for word in text.split()})]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    sizes = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1
    )
    special = dict(pad_token_id=0, bos_token_id=None, eos_token_id=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes, **special))
    if trained:
        rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in CORPUS]
        train(model, rows, DataCollatorForLanguageModeling(tokenizer, mlm=False), steps=120, rate=1e-2)
    return model, tokenizer


def read(file=None):
    """The lines of a JSONL file, else the corpus, as {"text": ...}."""
    if file is None:
        return [{"text": text} for text in CORPUS]
    with open(file) as lines:
        return [json.loads(line) for line in lines if line.strip()]


def train(model, rows, collator, steps, rate):
    """The losses that an ordinary Trainer logs; it knows nothing of fused losses."""
    with TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory, max_steps=steps, learning_rate=rate, per_device_train_batch_size=8,
            gradient_accumulation_steps=2, logging_steps=max(1, steps // 6), report_to=[], disable_tqdm=True,
            save_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def arguments(description):
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", help="a causal language model of transformers, by name or path")
    parser.add_argument("--data", help="a JSONL file, one row a line")
    parser.add_argument("--steps", type=int, default=60)
    return vars(parser.parse_args())

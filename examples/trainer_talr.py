"""TALR with transformers' Trainer: one line makes the model's loss the fused one.

    python examples/trainer_talr.py
    python examples/trainer_talr.py --model HuggingFaceTB/SmolLM2-135M --data texts.jsonl    # lines of {"text": ...}

Gradient accumulation, evaluation, checkpoints and mixed precision are Trainer's, and stay as they are.
"""

import tiny
from transformers import DataCollatorForLanguageModeling

import fused_losses as fl


def main(steps=60, model=None, data=None):
    name = model
    model, tokenizer = tiny.model_and_tokenizer(name)
    rows = [{"input_ids": tokenizer(row["text"])["input_ids"][:1024]} for row in tiny.read(data)]
    # ------------------------------------------------------------------------------------
    fl.patch(model, fl.TALRLoss())
    # ------------------------------------------------------------------------------------
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    losses = tiny.train(model, rows, collator, steps, rate=2e-5 if name else 3e-3)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    prompt = tokenizer("the cat eats", return_tensors="pt").to(model.device)  # without labels the model is untouched
    ids = model.generate(prompt.input_ids, attention_mask=prompt.attention_mask, max_new_tokens=3, do_sample=False)
    text = tokenizer.decode(ids[0])
    print(text)
    return losses, text


if __name__ == "__main__":
    main(**tiny.arguments(__doc__))

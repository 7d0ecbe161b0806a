"""LAwF with PEFT: a LoRA adapter learns corrected words, the anchors, and keeps to the original model everywhere else.

    python examples/peft_lawf.py
    python examples/peft_lawf.py --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl

Lines of rows.jsonl are {"text": ..., "anchor": what was corrected}.
The original is the same model without its adapter. Rows without an anchor are there to be retained.
"""

import tiny
import torch
from peft import LoraConfig, get_peft_model

import fused_losses as fl


def feature(tokenizer, text, anchor=""):
    """Token ids, and a confidence of 1 for those of the anchor."""
    row = tokenizer(text, return_offsets_mapping=True)
    begin = text.index(anchor) if anchor else len(text)
    confidence = [float(start < begin + len(anchor) and end > begin) for start, end in row["offset_mapping"]]
    return {"input_ids": row["input_ids"], "confidence": confidence}


# Every token has a label: off the anchors it is not learned, only retained.
collate = fl.huggingface.AnchorCollator(pad_token_id=0)


@torch.no_grad()
def measure(model, features):
    """The probability of the anchors, and the KL to the original elsewhere: LAwF at confidence 1 and 0."""
    batch = {name: values.to(model.device) for name, values in collate(features).items()}
    labels, c = batch.pop("labels"), batch.pop("confidence")
    nll = model(**batch, labels=labels.masked_fill(c == 0, -100), confidence=c).loss
    kl = model(**batch, labels=labels.masked_fill(c > 0, -100), confidence=torch.zeros_like(c)).loss
    return (-nll).exp().item(), kl.item()


def main(steps=60, model=None, data=None):
    rows = tiny.read(data) if data else tiny.CORRECTED
    rate = 2e-4 if model else 1e-2
    model, tokenizer = tiny.model_and_tokenizer(model, trained=True)
    # ------------------------------------------------------------------------------------
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    fl.patch(model, fl.LAwFLoss(), reference="base")
    # ------------------------------------------------------------------------------------
    features = [feature(tokenizer, **row) for row in rows]
    before = measure(model, features[:64])
    losses = tiny.train(model, features, collate, steps, rate)
    after = measure(model, features[:64])
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"probability of the anchors {before[0]:.3f} -> {after[0]:.3f}, KL to the original off them {after[1]:.1e}")
    return model, features, losses, before, after


if __name__ == "__main__":
    main(**tiny.arguments(__doc__))

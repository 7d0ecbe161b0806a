"""TALR with TRL's SFTTrainer: packed rows, loss on the completion only.

The documents of a packed row are TALR's sequences.

    python examples/trl_talr.py
    python examples/trl_talr.py --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl

Lines of rows.jsonl are {"prompt": ..., "completion": ...}. With peft_config=LoraConfig(...) in SFTTrainer it works
alike.
"""

from tempfile import TemporaryDirectory

import tiny
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import fused_losses as fl


def main(steps=60, model=None, data=None):
    name = model
    model, tokenizer = tiny.model_and_tokenizer(name)
    rows = tiny.read(data)
    if data is None:
        parts = [row["text"].split(" eats ") for row in rows]
        rows = [{"prompt": f"{animal} eats", "completion": f" {rest}"} for animal, rest in parts]
    # ------------------------------------------------------------------------------------
    fl.patch(model, fl.TALRLoss())
    # ------------------------------------------------------------------------------------
    with TemporaryDirectory() as directory:
        config = SFTConfig(
            directory, packing=True, max_length=1024 if name else 64, max_steps=steps, per_device_train_batch_size=4,
            learning_rate=2e-5 if name else 3e-3, logging_steps=max(1, steps // 6), report_to=[], disable_tqdm=True,
            save_strategy="no", dataloader_pin_memory=False, bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    first, last = logs[0], logs[-1]
    print(
        f"loss {first['loss']:.3f} -> {last['loss']:.3f}, "
        f"accuracy {first['mean_token_accuracy']:.2f} -> {last['mean_token_accuracy']:.2f}"
    )
    return logs


if __name__ == "__main__":
    main(**tiny.arguments(__doc__))

"""What Callback logs on each rank of a Trainer, of two steps of two rows a rank; the first rank's go to a file.

torchrun --standalone --nproc-per-node 2 tests/support/callback_ranks.py found.json
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
from processes import leave
from training import DESCENT, collate, llama, rows
from transformers import Trainer, TrainingArguments

import fused_losses as fl

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(**{
            **DESCENT, "output_dir": directory, "learning_rate": 0.0, "per_device_train_batch_size": 2, "max_steps": 2
        })  # fmt: skip
        model = fl.patch(llama(), fl.LAwFLoss(), reference=llama(1))
        callback = fl.huggingface.Callback()
        trainer = Trainer(
            model, arguments, train_dataset=rows(8, anchors=True), data_collator=collate, callbacks=[callback]
        )
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, entries)
    ours = [[{name: entry[name] for name in callback.last} for entry in one] for one in everyone]
    assert all(one == ours[0] for one in ours), ours
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(ours[0]))
    leave()

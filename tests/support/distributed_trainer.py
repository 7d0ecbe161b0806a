"""One step of SGD by transformers.Trainer on as many ranks as a launcher starts, against one process with the batch.

    torchrun --standalone --nproc-per-node 2 tests/support/distributed_trainer.py differences.json
    accelerate launch --cpu --num_processes 2 tests/support/distributed_trainer.py differences.json

The differences are relative to the step.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState
from distributed_ranks import ROWS, Ranks, batch, llama, one_process
from processes import leave
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

import fused_losses as fl


def loss(confidence: bool, ranks: bool = True) -> fl.Objective:
    return fl.LAwFLoss() if confidence else fl.TALRLoss(process_group=dist.group.WORLD if ranks else None)


def trainer(confidence: bool = False, accumulate: int = 1, finch: bool = False) -> float:
    inputs, n = batch(confidence)
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(  # also makes the process group
            output_dir=directory, use_cpu=True, max_steps=1, optim="sgd", learning_rate=1.0,
            lr_scheduler_type="constant", max_grad_norm=0.0,
            per_device_train_batch_size=ROWS // int(os.environ["WORLD_SIZE"]) // accumulate,
            gradient_accumulation_steps=accumulate, report_to="none", save_strategy="no", disable_tqdm=True,
            logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        assert arguments.average_tokens_across_devices
        model = fl.patch(llama(), loss(confidence), reference=llama(5) if confidence else None)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        rows = [{name: values[row] for name, values in inputs.items()} for row in range(ROWS)]
        callbacks = [fl.huggingface.FinchCallback()] if finch else []
        Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
    reference = dict(reference=llama(5).double()) if confidence else {}
    _, expected = one_process(llama(), loss(confidence, ranks=False), inputs, n, **reference)
    factor = 1.0
    if finch:
        mean, _ = one_process(llama(), fl.CrossEntropyLoss(), {k: inputs[k] for k in ("input_ids", "labels")}, n)
        factor = mean**-0.5
    worst = 0.0
    for name, p in model.named_parameters():
        step = (before[name].double() - p.detach().double()) / factor
        worst = max(worst, float((step - expected[name]).norm() / expected[name].norm()))
    return worst


def accelerate_fsdp(confidence: bool = False, tied: bool = False) -> float:
    """The groups that accelerate's plugin for FSDP2 makes, in a loop of one's own."""
    inputs, n = batch(confidence)
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # accelerate takes no plugin for CPUs
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=True,
    )
    model = llama(tie_word_embeddings=tied)
    fl.patch(model, loss(confidence), reference=llama(5) if confidence else None)
    model, _ = Accelerator(cpu=True, fsdp_plugin=plugin).prepare(model, torch.optim.SGD(model.parameters()))
    assert isinstance(model, FSDPModule) and isinstance(model.lm_head, FSDPModule)
    total = ranks.step(model, ranks.rows(inputs), n)
    reference = dict(reference=llama(5).double()) if confidence else {}
    truth = one_process(llama(tie_word_embeddings=tied), loss(confidence, ranks=False), inputs, n, **reference)
    return ranks.difference(model, total, truth)


def main() -> None:
    torch.set_num_threads(1)
    results = {
        "Trainer, TALR median": trainer(),
        "Trainer, LAwF, accumulation": trainer(confidence=True, accumulate=2),
        "Trainer, TALR median, FINCH": trainer(finch=True),
        "Trainer, LAwF, FINCH, accumulation": trainer(confidence=True, accumulate=2, finch=True),
        "accelerate, FSDP2, TALR median": accelerate_fsdp(),
        "accelerate, FSDP2, TALR median, tied embeddings": accelerate_fsdp(tied=True),
        "accelerate, FSDP2, LAwF": accelerate_fsdp(confidence=True),
    }
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()

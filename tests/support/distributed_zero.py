"""Patched models under DeepSpeed's ZeRO against one process that has the whole batch.

torchrun --standalone --nproc-per-node 2 tests/support/distributed_zero.py differences.json
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from distributed_ranks import LOSSES, ROWS, Ranks, batch, llama, lora, make, one_process
from processes import leave
from torch import nn

import fused_losses as fl
from fused_losses.sparse import softmax


def difference(
    stage: int, model: Any, expected: tuple[float, dict], confidence: bool = False, silent: int = 0, later: Any = None
) -> float:
    """`later`: done to the model when it is partitioned."""
    inputs, n = batch(confidence, silent)
    world = dist.get_world_size()
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trained,
        config={
            "train_micro_batch_size_per_gpu": ROWS // world,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
        optimizer=torch.optim.SGD(trained, lr=0.0),
    )
    if later is not None:
        later(model)
    mine = Ranks.rows(type("", (), dict(rank=dist.get_rank(), world=world)), inputs)
    for _ in range(2):  # ZeRO-3 fetches ahead from the second step on
        loss = engine(**mine, num_items_in_batch=n).loss
        engine.backward(loss * world)
        got = {name: safe_get_full_grad(p) for name, p in model.named_parameters() if p.requires_grad}
        engine.step()
    total = loss.detach().double()
    dist.all_reduce(total)
    worst = abs(float(total) / expected[0] - 1)
    assert got.keys() == expected[1].keys()
    for name, g in got.items():
        worst = max(worst, float((g.double() - expected[1][name]).norm() / expected[1][name].norm()))
    return worst


def main() -> None:
    torch.set_num_threads(1)
    softmax.FINEST_HALF = 1.0  # float16 entries are another matter
    deepspeed.init_distributed("gloo", timeout=datetime.timedelta(seconds=600), auto_mpi_discovery=False)
    results = {}
    for stage in (2, 3):
        for name in LOSSES:
            inputs, n = batch()
            truth = one_process(llama(), LOSSES[name](), inputs, n)
            results[f"ZeRO-{stage}, {name}"] = difference(stage, fl.patch(llama(), make(name)), truth)
    truth = one_process(llama(), fl.TALRLoss(), *batch())
    sparse = fl.patch(llama(), make("TALR median", gradient="sparse"))
    results["ZeRO-3, sparse gradients"] = difference(3, sparse, truth)
    truth = one_process(llama(), fl.TALRLoss(), *batch(silent=4))
    results["ZeRO-3, a rank without labels"] = difference(3, fl.patch(llama(), make("TALR median")), truth, silent=4)
    truth = one_process(llama(tie_word_embeddings=True), fl.TALRLoss(), *batch())
    tied = fl.patch(llama(tie_word_embeddings=True), make("TALR median"))
    results["ZeRO-3, tied embeddings"] = difference(3, tied, truth)

    truth = one_process(llama(), fl.LAwFLoss(), *batch(True), reference=llama(5).double())
    other = fl.patch(llama(), fl.LAwFLoss(), reference=llama(5))
    results["ZeRO-3, LAwF, another model"] = difference(3, other, truth, confidence=True)
    for head in (False, True):
        truth = one_process(lora(head), fl.LAwFLoss(), *batch(True), reference=llama().double())
        model = lora(head)
        trained = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
        with torch.no_grad():
            for name in trained:
                nn.init.zeros_(model.get_parameter(name))
            fl.patch(model, fl.LAwFLoss(), reference="base")
            for name, value in trained.items():
                model.get_parameter(name).copy_(value)
        results[f"ZeRO-3, LAwF, base, adapter on the head: {head}"] = difference(3, model, truth, confidence=True)
    truth = one_process(llama(), fl.LAwFLoss(), *batch(True), reference=llama(5).double())
    results["ZeRO-3, patched after"] = difference(
        3, llama(), truth, confidence=True, later=lambda model: fl.patch(model, fl.LAwFLoss(), reference=llama(5))
    )
    try:
        difference(3, llama(), truth, later=lambda model: fl.patch(model, fl.LAwFLoss(), reference="start"))
    except ValueError as error:
        assert "patch before fully_shard or ZeRO-3" in str(error), error
    else:
        raise AssertionError("no error")
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1))
    leave()


if __name__ == "__main__":
    main()

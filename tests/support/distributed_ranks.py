"""Patched models on several ranks against one process that has the whole batch: what all cases of that share.

A case gets its `Ranks`, does the same on every rank, and returns the largest relative difference of the loss and of any
parameter's gradient from float64 with full logits. Cases without a number assert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import fused_losses as fl

V, ROWS, LENGTH = 97, 8, 10
ROUNDING = 6e-6  # of float32 against float64; measured: up to 2.0e-6

Case = Callable[["Ranks"], "float | None"]
CASES: dict[int, dict[str, tuple[Case, float]]] = {
    2: {},
    4: {},
}  # world size -> name -> (case, bound of its difference)


def case(name: str, worlds: tuple[int, ...] = (2,), bound: float = ROUNDING) -> Callable[[Case], Case]:
    def register(function: Case) -> Case:
        for world in worlds:
            assert name not in CASES[world]
            CASES[world][name] = (function, bound)
        return function

    return register


class Ranks:
    """This rank among others."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.mesh = init_device_mesh("cpu", (world,))

    def rows(self, batch: dict) -> dict:
        """This rank's rows of a batch."""
        each = ROWS // self.world
        return {name: value[self.rank * each : (self.rank + 1) * each] for name, value in batch.items()}

    def tokens(self, batch: dict) -> dict:
        """This rank's part of every row."""
        at = torch.arange(LENGTH).tensor_split(self.world)[self.rank]
        return {name: value[:, at] for name, value in batch.items()}

    def shard(self, model: nn.Module, *groups: Any, **options: Any) -> nn.Module:
        """`fully_shard` of each layer, of each of `groups`, and of the rest."""
        base = getattr(model, "base_model", model)
        layers = next(m for n, m in base.named_modules() if n.endswith("layers"))
        for layer in layers:
            fully_shard(layer, mesh=self.mesh, **options)
        for group, reshard in groups:
            fully_shard(group, mesh=self.mesh, reshard_after_forward=reshard, **options)
        return fully_shard(model, mesh=self.mesh, **options)

    def step(self, model: nn.Module, batch: dict, n: int | torch.Tensor) -> torch.Tensor:
        """Loss and gradients, the sums over all ranks."""
        loss = model(**batch, num_items_in_batch=n).loss
        (loss * self.world).backward()  # DDP and FSDP divide gradients by it
        return loss

    def difference(self, model: nn.Module, loss: torch.Tensor, truth: tuple[float, dict]) -> float:
        total = loss.detach().double()
        dist.all_reduce(total)
        expected_loss, expected = truth
        worst = abs(float(total) / expected_loss - 1)
        got = {
            name.removeprefix("module.").replace("_fsdp_wrapped_module.", ""): p
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        assert got.keys() == expected.keys()
        for name, p in got.items():
            g = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            assert g is not None and bool(g.isfinite().all()), name
            worst = max(worst, float((g.double() - expected[name]).norm() / expected[name].norm()))
        return worst


def llama(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))


def lora(head: bool = False) -> Any:
    targets = ["q_proj", "down_proj"] + head * ["lm_head"]
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=targets, lora_dropout=0.0))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    return model


def batch(confidence: bool = False, silent: int = 0) -> tuple[dict, int]:
    """Rows with different numbers of labels, and the number of labels that the model shifts to.

    The last `silent` rows have no labels.
    """
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (ROWS, LENGTH), generator=g)
    labels = ids.clone()
    for row in range(ROWS):
        labels[row, : row % 5] = -100
    labels[2, 3:] = -100
    labels[5, 4:9] = -100
    labels[ROWS - silent :] = -100
    fields = dict(input_ids=ids, labels=labels)
    if confidence:
        confidence = (torch.rand(ROWS, LENGTH, generator=g) * 2 - 1).clamp(min=0)
        fields["confidence"] = confidence.masked_fill(labels == -100, 0)
    return fields, int((labels[:, 1:] != -100).sum())


def one_process(
    model: nn.Module, loss: fl.Objective, inputs: dict, n: int | None, **options: Any
) -> tuple[float, dict]:
    """The truth: float64, full logits, the whole batch."""
    model = model.double()
    loss.backend = "reference"
    fl.patch(model, loss, **options)
    total = model(**inputs, num_items_in_batch=n).loss
    total.backward()
    return float(total.detach()), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


LOSSES: dict[str, Callable[..., fl.Objective]] = {
    "cross-entropy": fl.CrossEntropyLoss,
    "TALR fixed": functools.partial(fl.TALRLoss, 0.7),
    "TALR median": fl.TALRLoss,
}


def make(name: str, **options: Any) -> fl.Objective:
    """The loss on several ranks."""
    if name == "TALR median":
        options["process_group"] = dist.group.WORLD
    return LOSSES[name](**options)

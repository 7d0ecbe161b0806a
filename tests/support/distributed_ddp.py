"""Cases of DistributedDataParallel."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from distributed_ranks import LOSSES, ROWS, Ranks, batch, case, llama, make, one_process
from torch.nn.parallel import DistributedDataParallel

import fused_losses as fl


def data_parallel(
    ranks: Ranks, name: str, silent: int = 0, loss_options: dict[str, Any] | None = None, **options: Any
) -> float:  # fmt: skip
    inputs, n = batch(silent=silent)
    model = DistributedDataParallel(fl.patch(llama(), make(name, **loss_options or {})), **options)
    mine = ranks.rows(inputs)
    items = (mine["labels"][:, 1:] != -100).sum()
    dist.all_reduce(items)
    for _ in range(2 if options else 1):  # a graph that is taken for static matters from the second step on
        model.zero_grad()
        loss = ranks.step(model, mine, items)
    return ranks.difference(model, loss, one_process(llama(), LOSSES[name](), inputs, n))


for _name in LOSSES:
    case(f"DDP, {_name}", (2, 4))(functools.partial(data_parallel, name=_name))
    case(f"DDP, {_name}, a rank without labels", (2, 4) if _name == "TALR median" else (2,))(
        functools.partial(data_parallel, name=_name, silent=ROWS // 2)
    )
case("DDP, find_unused_parameters")(functools.partial(data_parallel, name="TALR median", find_unused_parameters=True))
case("DDP, sparse gradients", (2, 4))(
    functools.partial(data_parallel, name="TALR median", loss_options=dict(gradient="sparse"))
)
case("DDP, static_graph")(functools.partial(data_parallel, name="TALR median", static_graph=True))


@case("DDP, without num_items_in_batch")
def own_items(ranks: Ranks) -> float:
    """Each rank divides by its own labels."""
    inputs, _ = batch()
    model = DistributedDataParallel(fl.patch(llama(), fl.CrossEntropyLoss()))
    loss = model(**ranks.rows(inputs)).loss
    loss.backward()
    halves = [{name: value.chunk(2)[i] for name, value in inputs.items()} for i in (0, 1)]
    (first, a), (second, b) = (one_process(llama(), fl.CrossEntropyLoss(), half, None) for half in halves)
    return ranks.difference(model, loss, (first + second, {name: (a[name] + b[name]) / 2 for name in a}))


@case("DDP, accumulation with no_sync")
def accumulation(ranks: Ranks) -> float:
    inputs, n = batch()
    model = DistributedDataParallel(fl.patch(llama(), fl.TALRLoss(0.7)))
    loss = torch.zeros(())
    mine = ranks.rows(inputs)
    for last in (False, True):
        half = {name: value.chunk(2)[last] for name, value in mine.items()}
        with nullcontext() if last else model.no_sync():
            loss = loss + ranks.step(model, half, n).detach()
    return ranks.difference(model, loss, one_process(llama(), fl.TALRLoss(0.7), inputs, n))

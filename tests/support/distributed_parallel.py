"""Cases whose ranks share one batch: context parallelism, and the vocabulary or the whole model spread over ranks."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from distributed_ranks import LENGTH, LOSSES, ROWS, Ranks, batch, case, llama, lora, one_process
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

import fused_losses as fl

# Context parallel: every rank has a part of each row's tokens


def context_parallel(ranks: Ranks, loss: Callable[[], fl.Objective], confidence: bool = False) -> float:
    """A body without attention, so that a rank's tokens need no others."""
    inputs, _ = batch(confidence)
    labels = inputs.pop("labels")
    shifted = dict(shift_labels=nn.functional.pad(labels, (0, 1), value=-100)[:, 1:])
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    if confidence:  # in the layout of shift_labels: of the token that is predicted
        shifted["confidence"] = nn.functional.pad(inputs.pop("confidence"), (0, 1))[:, 1:]
    n = int((shifted["shift_labels"] != -100).sum())
    options = dict(reference=per_token(5)) if confidence else {}
    model = fl.patch(per_token(), loss(), **options)
    mine = ranks.tokens(dict(inputs, **shifted, position_ids=positions))
    total = model(**mine, num_items_in_batch=n).loss
    total.backward()
    for p in model.parameters():
        if p.requires_grad:
            dist.all_reduce(p.grad)
    whole = dict(inputs, labels=labels)
    if confidence:
        whole["confidence"] = batch(True)[0]["confidence"]
        options = dict(reference=per_token(5).double())
    return ranks.difference(model, total, one_process(per_token(), loss(), whole, n, **options))


def per_token(seed: int = 0) -> Any:
    model = llama(seed)
    for layer in model.model.layers:
        layer.self_attn.requires_grad_(False)
        layer.self_attn.o_proj.weight.data.zero_()
    return model


case("context parallel, cross-entropy", (2, 4))(functools.partial(context_parallel, loss=fl.CrossEntropyLoss))
case("context parallel, TALR fixed")(functools.partial(context_parallel, loss=LOSSES["TALR fixed"]))
case("context parallel, LAwF", (2, 4))(functools.partial(context_parallel, loss=fl.LAwFLoss, confidence=True))


# tensor parallelism: the vocabulary spread over ranks, the same batch on all


def spread_parameter(ranks: Ranks, model: Any) -> None:
    head = model.get_output_embeddings()
    for name, p in list(head.named_parameters()):
        rows = distribute_tensor(p.detach(), ranks.mesh, [Shard(0)])
        setattr(head, name, nn.Parameter(rows, requires_grad=p.requires_grad))


def spread_by_torch(ranks: Ranks, model: Any) -> None:
    """Its hooks hand the head DTensors and want one back."""
    parallelize_module(model.get_output_embeddings(), ranks.mesh, ColwiseParallel(output_layouts=Replicate()))


def spread_after_a_sharded_sequence(ranks: Ranks, model: Any) -> None:
    plan = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    parallelize_module(model.get_output_embeddings(), ranks.mesh, plan)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.model.norm.register_forward_hook(
        lambda module, args, out: (
            distribute_tensor(out, ranks.mesh, [Shard(1)], src_data_rank=None)
            if not out.requires_grad
            else DTensor.from_local(out, ranks.mesh, [Replicate()]).redistribute(placements=[Shard(1)])
        )
    )


def tensor_parallel(
    ranks: Ranks, spread: Callable, loss: str, reference: str | None = None, gradient: str = "auto", **options: Any
) -> float:  # fmt: skip
    lawf = reference is not None
    inputs, n = batch(confidence=lawf)
    build = lora if reference == "base" else functools.partial(llama, **options)
    model = build()
    objective = fl.LAwFLoss(gradient=gradient) if lawf else LOSSES[loss](gradient=gradient)
    given: dict[str, Any] = {}
    if reference == "model":
        other = llama(5)
        spread(ranks, other)
        given = dict(reference=other)
    elif lawf:
        given = dict(reference=reference)
    if not isinstance(reference, str) or reference == "model":
        spread(ranks, model)
        fl.patch(model, objective, **given)
    else:
        fl.patch(model, objective, **given)
        spread(ranks, model)
    total = model(**inputs, num_items_in_batch=n).loss
    total.backward()
    truth_given = dict(reference=llama(5).double()) if reference == "model" else given
    objective = fl.LAwFLoss() if lawf else LOSSES[loss]()
    expected = one_process(build(), objective, inputs, n, **truth_given)
    return ranks.difference(model, total / ranks.world, expected)


for _name, _spread in (("a DTensor", spread_parameter), ("torch", spread_by_torch)):
    for _loss in LOSSES:
        case(f"vocabulary parallel by {_name}, {_loss}", (2, 4) if _name == "torch" else (2,))(
            functools.partial(tensor_parallel, spread=_spread, loss=_loss)
        )
case("vocabulary parallel by torch, sparse gradients", (2, 4))(
    functools.partial(tensor_parallel, spread=spread_by_torch, loss="TALR median", gradient="sparse")
)
case("vocabulary parallel after a sharded sequence")(
    functools.partial(tensor_parallel, spread=spread_after_a_sharded_sequence, loss="TALR median")
)
case("vocabulary parallel, LAwF, another model", (2, 4))(
    functools.partial(tensor_parallel, spread=spread_by_torch, loss="", reference="model")
)
for _gradient, _worlds in (("exact", (2,)), ("sparse", (2, 4))):
    case(f"vocabulary parallel, LAwF, adapter off, {_gradient}", _worlds)(
        functools.partial(tensor_parallel, spread=spread_parameter, loss="", reference="base", gradient=_gradient)
    )


def by_transformers(ranks: Ranks, gradient: str) -> float:
    """The whole model, by its own plan."""
    inputs, n = batch()
    with tempfile.TemporaryDirectory() as directory:
        paths = [directory]
        llama().save_pretrained(directory)  # writes on rank 0 alone
        dist.broadcast_object_list(paths)
        plan = DistributedConfig(tp_plan="auto", tp_size=ranks.world)
        model = LlamaForCausalLM.from_pretrained(paths[0], distributed_config=plan, use_cache=False)
        dist.barrier()
    assert type(model.lm_head.weight) is DTensor
    fl.patch(model, fl.TALRLoss(gradient=gradient))
    total = model(**inputs, num_items_in_batch=n).loss
    total.backward()
    return ranks.difference(model, total / ranks.world, one_process(llama(), fl.TALRLoss(), inputs, n))


for _gradient in ("exact", "sparse"):
    case(f"tensor parallel by transformers, {_gradient}")(functools.partial(by_transformers, gradient=_gradient))

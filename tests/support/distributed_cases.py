"""What test_distributed.py runs on several ranks: patched models against one process that has the whole batch.

A case gets its `Ranks`, does the same on every rank, and returns the largest relative difference of the loss and of any parameter's gradient from
float64 with full logits. Cases without a number assert.
"""

from __future__ import annotations

import datetime
import functools
import json
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

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
    """Rows with different numbers of labels, the last `silent` of them with none; and the number of labels that the model shifts to."""
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


# DistributedDataParallel


def data_parallel(ranks: Ranks, name: str, silent: int = 0, **options: Any) -> float:
    inputs, n = batch(silent=silent)
    model = DistributedDataParallel(fl.patch(llama(), make(name)), **options)
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


# FSDP2


def head_alone(model: Any) -> list:
    return [(model.lm_head, True)]


def head_kept(model: Any) -> list:
    return [(model.lm_head, False)]


def head_with_norm(model: Any) -> list:  # as accelerate does
    return [(model.model.embed_tokens, True), ([model.model.norm, model.lm_head], False)]


def head_in_root(model: Any) -> list:
    return []


BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
GROUPS = {
    "own group": head_alone,
    "own group, kept": head_kept,
    "group with norm": head_with_norm,
    "root": head_in_root,
}


def sharded(
    ranks: Ranks, name: str, groups: Callable[[Any], list], silent: int = 0, after: bool = False, tied: bool = False,
    loss_options: dict | None = None, checkpointing: bool = False, hook: bool = False, steps: int = 1, **options: Any,
) -> float:  # fmt: skip
    inputs, n = batch(silent=silent)
    model, loss_options = llama(tie_word_embeddings=tied), loss_options or {}
    if checkpointing:
        model.activation_checkpointing_enable()
    if not after:
        fl.patch(model, make(name, **loss_options))
    ranks.shard(model, *groups(model), **options)
    if hook:
        model.lm_head.register_forward_pre_hook(lambda module, arguments: arguments)
    if after:
        fl.patch(model, make(name, **loss_options))
    for _ in range(steps):
        model.zero_grad()
        loss = ranks.step(model, ranks.rows(inputs), n)
    return ranks.difference(model, loss, one_process(llama(tie_word_embeddings=tied), LOSSES[name](), inputs, n))


for _name, _groups in GROUPS.items():
    for _loss in LOSSES:
        case(
            f"FSDP2, head in {_name}, {_loss}", (2, 4) if (_name, _loss) == ("group with norm", "TALR median") else (2,)
        )(functools.partial(sharded, name=_loss, groups=_groups, steps=2))
case("FSDP2, head in own group, a rank without labels", (4,))(
    functools.partial(sharded, name="TALR median", groups=head_alone, silent=2)
)
case("FSDP2, tied embeddings", (2, 4))(functools.partial(sharded, name="TALR median", groups=head_in_root, tied=True))
case("FSDP2, tied embeddings in the group with norm")(
    functools.partial(
        sharded, name="TALR median", tied=True,
        groups=lambda model: [([model.model.norm, model.model.embed_tokens, model.lm_head], False)],
    )
)  # fmt: skip
case("FSDP2, sparse gradients", (2, 4))(
    functools.partial(sharded, name="TALR median", groups=head_alone, loss_options=dict(gradient="sparse"))
)
case("FSDP2, patched after fully_shard")(
    functools.partial(sharded, name="TALR median", groups=head_with_norm, after=True, steps=2)
)
for _name in ("own group", "group with norm"):
    case(f"FSDP2, a hook of the user's on the head in {_name}")(
        functools.partial(sharded, name="TALR median", groups=GROUPS[_name], hook=True, steps=2)
    )
case("FSDP2, gradient checkpointing")(
    functools.partial(sharded, name="TALR median", groups=head_with_norm, checkpointing=True)
)
case("FSDP2, parameters offloaded to the CPU")(
    functools.partial(sharded, name="TALR median", groups=head_alone, offload_policy=CPUOffloadPolicy(pin_memory=False))
)
for _name in ("own group", "group with norm"):
    case(f"FSDP2, bfloat16, head in {_name}", bound=0.1)(
        functools.partial(sharded, name="TALR median", groups=GROUPS[_name], mp_policy=BFLOAT16)
    )


@case("FSDP2, accumulation without gradient sync")
def sharded_accumulation(ranks: Ranks) -> float:
    inputs, n = batch()
    model = fl.patch(llama(), fl.TALRLoss(0.7))
    ranks.shard(model, *head_with_norm(model))
    loss = torch.zeros(())
    mine = ranks.rows(inputs)
    for last in (False, True):
        model.set_requires_gradient_sync(last)
        half = {name: value.chunk(2)[last] for name, value in mine.items()}
        loss = loss + ranks.step(model, half, n).detach()
    return ranks.difference(model, loss, one_process(llama(), fl.TALRLoss(0.7), inputs, n))


def without_adapter(
    ranks: Ranks, groups: Callable[[Any], list], after: bool = False, head: bool = False,
    loss_options: dict | None = None, **options: Any,
) -> float:  # fmt: skip
    inputs, n = batch(confidence=True)
    model = lora(head)
    if after:
        ranks.shard(model, *groups(model.get_base_model()))
    fl.patch(model, fl.LAwFLoss(**loss_options or {}), reference="base")
    if not after:
        ranks.shard(model, *groups(model.get_base_model()), **options)
    for _ in range(2):
        model.zero_grad()
        loss = ranks.step(model, ranks.rows(inputs), n)
    truth = one_process(lora(head), fl.LAwFLoss(), inputs, n, reference=llama().double())
    return ranks.difference(model, loss, truth)


for _name, _groups in GROUPS.items():
    case(f"FSDP2, LAwF, base, head in {_name}", (2, 4) if _name == "group with norm" else (2,))(
        functools.partial(without_adapter, groups=_groups)
    )
for _name in ("own group", "group with norm"):
    case(f"FSDP2, LAwF, base, adapter on the head in {_name}")(
        functools.partial(without_adapter, groups=GROUPS[_name], head=True)
    )
case("FSDP2, LAwF, base, adapter on the head, sparse gradients")(
    functools.partial(without_adapter, groups=head_alone, head=True, loss_options=dict(gradient="sparse"))
)
case("FSDP2, LAwF, base, patched after fully_shard")(
    functools.partial(without_adapter, groups=head_with_norm, after=True)
)


def other_model(
    ranks: Ranks, wrap: Callable[[Ranks, Any], Any], reference: Any = None, reference_cache: str | None = None
) -> float:
    inputs, n = batch(confidence=True)
    model = fl.patch(llama(), fl.LAwFLoss(), reference=reference or llama(5), reference_cache=reference_cache)
    model = wrap(ranks, model)
    for _ in range(3 if reference_cache else 1):
        model.zero_grad()
        loss = ranks.step(model, ranks.rows(inputs), n)
    return ranks.difference(model, loss, one_process(llama(), fl.LAwFLoss(), inputs, n, reference=llama(5).double()))


case("FSDP2, bfloat16, LAwF, base", bound=0.3)(
    functools.partial(without_adapter, groups=head_with_norm, mp_policy=BFLOAT16)
)
case("FSDP2, bfloat16, LAwF, another model", bound=0.1)(
    functools.partial(other_model, wrap=lambda ranks, model: ranks.shard(model, *head_alone(model), mp_policy=BFLOAT16))
)
case("FSDP2, LAwF, another model", (2, 4))(
    functools.partial(other_model, wrap=lambda ranks, model: ranks.shard(model, *head_with_norm(model)))
)
case("DDP, LAwF, another model")(functools.partial(other_model, wrap=lambda _, model: DistributedDataParallel(model)))


def sharded_reference(ranks: Ranks, groups: Callable[[Any], list]) -> float:
    reference = llama(5)
    ranks.shard(reference, *groups(reference))
    return other_model(ranks, lambda _, model: ranks.shard(model, *head_alone(model)), reference)


for _name, _groups in GROUPS.items():
    case(f"FSDP2, LAwF, another model that is sharded, its head in {_name}")(
        functools.partial(sharded_reference, groups=_groups)
    )


@case("FSDP2, LAwF, another model whose states are kept")
def kept_states(ranks: Ranks) -> float:
    with tempfile.TemporaryDirectory() as directory:
        return other_model(ranks, lambda _, model: ranks.shard(model, *head_with_norm(model)), llama(5), directory)


@case("FSDP2, LAwF, states kept of a reference that is sharded")
def kept_sharded(ranks: Ranks) -> None:
    inputs, n = batch(confidence=True)
    model = lora()
    nothing = {name: torch.zeros_like(p) for name, p in model.named_parameters() if "lora_B" in name}
    model.load_state_dict(nothing, strict=False)
    with tempfile.TemporaryDirectory() as directory:
        fl.patch(model, fl.LAwFLoss(), reference="base", reference_cache=directory)
        ranks.shard(model)
        with pytest.raises(ValueError, match="reference_cache: the reference is sharded"):
            ranks.step(model, ranks.rows(inputs), n)


@case("FSDP2, LAwF, another model that is sharded again after its forward")
def resharded_reference(ranks: Ranks) -> None:
    reference = fully_shard(llama(5), mesh=ranks.mesh, reshard_after_forward=True)
    with pytest.raises(ValueError, match=r"reference: its LM head is sharded .* fully_shard\(reference.lm_head\)"):
        other_model(ranks, lambda _, model: model, reference)


@case("FSDP2, LAwF, start, adapter trained before")
def trained_before(ranks: Ranks) -> None:
    inputs, n = batch(confidence=True)
    model = fl.patch(lora(), fl.LAwFLoss(), reference="start")
    ranks.shard(model, *head_alone(model.get_base_model()))
    with pytest.raises(ValueError, match=r"reference='start': the adapter was trained before .* sharded now"):
        ranks.step(model, ranks.rows(inputs), n)
    model = ranks.shard(lora())
    with pytest.raises(ValueError, match=r"reference='start': the model is sharded already.*its adapter"):
        fl.patch(model, fl.LAwFLoss(), reference="start")


@case("FSDP2, the head is gathered once in forward and once in backward")
def gathers(ranks: Ranks) -> None:
    inputs, n = batch(confidence=True)
    for groups, reshard in ((head_alone, True), (head_kept, False)):
        model = fl.patch(llama(), fl.LAwFLoss(), reference=llama(5))
        ranks.shard(model, *groups(model))
        seen: list[str] = []
        original = _fsdp_param_group.foreach_all_gather

        def noted(params: list, *args: Any, original=original, seen=seen) -> Any:
            seen.append(params[0]._param_fqn)
            return original(params, *args)

        with mock.patch.object(_fsdp_param_group, "foreach_all_gather", noted):
            ranks.step(model, ranks.rows(inputs), n)
        layers = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
        head = ["lm_head.weight"]
        assert seen == ["model.embed_tokens.weight", *layers, *head, *(head if reshard else []), *reversed(layers)], (
            seen
        )


@case("FSDP2, unpatched after fully_shard")
def unpatched(ranks: Ranks) -> None:
    inputs, n = batch()
    results = []
    for patched in (False, True):
        model = llama()
        if patched:
            fl.patch(model, fl.TALRLoss())
        ranks.shard(model, *head_with_norm(model))
        if patched:
            fl.unpatch(model)
        loss = ranks.step(model, ranks.rows(inputs), n)
        results.append([loss, *(p.grad.full_tensor() for p in model.parameters())])
        if patched:
            with pytest.raises(ValueError, match="FSDPLlamaForCausalLM is not patched"):
                fl.unpatch(model)
            fl.patch(model, fl.TALRLoss())
            assert (model(**ranks.rows(inputs), num_items_in_batch=n).loss / loss).item() < 0.9
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@case("FSDP2, patched and unpatched after fully_shard")
def unpatched_class(ranks: Ranks) -> None:
    inputs, n = batch()
    model = ranks.shard(llama())
    before = type(model)
    plain = model(**ranks.rows(inputs), num_items_in_batch=n).loss
    with fl.patched(model, fl.TALRLoss()):
        assert isinstance(model, FSDPModule) and type(model).__name__ == "FSDPLlamaForCausalLM"
        assert (model(**ranks.rows(inputs), num_items_in_batch=n).loss / plain).item() < 0.9
    assert type(model) is before
    assert torch.equal(model(**ranks.rows(inputs), num_items_in_batch=n).loss, plain)


def evaluation(ranks: Ranks, groups: Callable[[Any], list], keep_logits: str | bool) -> float:
    inputs, n = batch()
    predictions = ranks.rows(dict(p=llama()(inputs["input_ids"]).logits.argmax(-1)))["p"]
    model = fl.patch(llama(), make("TALR median"), keep_logits=keep_logits, eval_loss="objective")
    ranks.shard(model, *groups(model))
    with torch.no_grad():
        evaluated = model.eval()(**ranks.rows(inputs), num_items_in_batch=n)
    assert torch.equal(evaluated.logits.argmax(-1), predictions)
    for _ in range(2):
        model.zero_grad()
        trained = model.train()(**ranks.rows(inputs), num_items_in_batch=n)
        (trained.loss * ranks.world).backward()
    assert (evaluated.loss / trained.loss).item() == pytest.approx(1, abs=1e-6)
    if keep_logits is True:
        assert torch.equal(trained.logits.argmax(-1), predictions)
    return ranks.difference(model, trained.loss, one_process(llama(), fl.TALRLoss(), inputs, n))


for _name, _groups in GROUPS.items():
    case(f"FSDP2, evaluation, head in {_name}")(functools.partial(evaluation, groups=_groups, keep_logits="eval"))
    case(f"FSDP2, logits kept, head in {_name}")(functools.partial(evaluation, groups=_groups, keep_logits=True))


@case("reference='start' of a sharded model")
def start_of_sharded(ranks: Ranks) -> None:
    model = ranks.shard(llama())
    with pytest.raises(ValueError, match=r"reference='start': .* patch before fully_shard"):
        fl.patch(model, fl.LAwFLoss(), reference="start")


@case("patched in a wrapper")
def wrapped_before(ranks: Ranks) -> None:
    for wrapper in (DistributedDataParallel, whole):
        with pytest.raises(TypeError, match=r"wrapped in .*DataParallel; patch it first, then wrap it"):
            fl.patch(wrapper(llama()))


def whole(model: nn.Module, **options: Any) -> FullyShardedDataParallel:
    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)


@case("FSDP1")
def first_fsdp(ranks: Ranks) -> float:
    inputs, n = batch()
    model = whole(fl.patch(llama(), make("TALR median")), use_orig_params=True)
    loss = ranks.step(model, ranks.rows(inputs), n)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return ranks.difference(model.module, loss, one_process(llama(), fl.TALRLoss(), inputs, n))


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


def tensor_parallel(ranks: Ranks, spread: Callable, loss: str, reference: str | None = None, **options: Any) -> float:
    lawf = reference is not None
    inputs, n = batch(confidence=lawf)
    build = lora if reference == "base" else functools.partial(llama, **options)
    model = build()
    objective = fl.LAwFLoss() if lawf else LOSSES[loss]()
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
case("vocabulary parallel after a sharded sequence")(
    functools.partial(tensor_parallel, spread=spread_after_a_sharded_sequence, loss="TALR median")
)
case("vocabulary parallel, LAwF, another model", (2, 4))(
    functools.partial(tensor_parallel, spread=spread_by_torch, loss="", reference="model")
)
case("vocabulary parallel, LAwF, adapter off")(
    functools.partial(tensor_parallel, spread=spread_parameter, loss="", reference="base")
)


@case("tensor parallel by transformers")
def by_transformers(ranks: Ranks) -> float:
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
    fl.patch(model, fl.TALRLoss())
    total = model(**inputs, num_items_in_batch=n).loss
    total.backward()
    return ranks.difference(model, total / ranks.world, one_process(llama(), fl.TALRLoss(), inputs, n))


def work(rank: int, world: int, directory: str) -> None:
    """All cases of a world size on one rank; results are written to `directory`. Nothing runs after a failure: ranks are out of step then."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers the old way
    results: dict[str, Any] = {}
    path = Path(directory)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path / 'store'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=600),
    )
    ranks = Ranks(rank, world)
    for name, (function, _) in CASES[world].items():
        torch.manual_seed(0)
        (path / f"{rank}.json").write_text(json.dumps({**results, name: {"error": "did not return"}}))
        try:
            results[name] = {"difference": function(ranks)}
        except BaseException:  # pytest.raises has one of its own
            results[name] = {"error": traceback.format_exc()}
            break
        finally:
            (path / f"{rank}.json").write_text(json.dumps(results))
    if "error" not in results[name]:
        dist.destroy_process_group()

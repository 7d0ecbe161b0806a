"""Cases of fully_shard (FSDP2), and one of FullyShardedDataParallel (FSDP1)."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from distributed_ranks import LOSSES, Ranks, batch, case, llama, lora, make, one_process
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import fused_losses as fl


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


def first_fsdp(ranks: Ranks, **options: Any) -> float:
    inputs, n = batch()
    model = whole(fl.patch(llama(), make("TALR median", **options)), use_orig_params=True)
    loss = ranks.step(model, ranks.rows(inputs), n)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return ranks.difference(model.module, loss, one_process(llama(), fl.TALRLoss(), inputs, n))


case("FSDP1", (2, 4))(first_fsdp)
case("FSDP1, sparse gradients")(functools.partial(first_fsdp, gradient="sparse"))

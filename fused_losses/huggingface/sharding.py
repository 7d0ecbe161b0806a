"""Heads whose weight is in pieces on several ranks: FSDP2's `fully_shard` and DeepSpeed's ZeRO-3 gather it in a call of
their module."""

from __future__ import annotations

import sys

from torch import Tensor, nn

from .heads import innermost


def vocabulary(module: nn.Module) -> int:
    """V of an output module, whether its weight is gathered now or not."""
    weight = innermost(module).weight
    return getattr(weight, "ds_shape", weight.shape)[0]  # type: ignore[union-attr, index, return-value]


def gathers(module: nn.Module) -> bool:
    """Whether a call of the module makes all ranks send their pieces."""
    return _fsdp_modules(module) > 0 or hasattr(innermost(module).weight, "ds_id")


def hooks_can_wait(module: nn.Module, then_called: bool) -> bool:
    """Whether a stand-in is made without the module's hooks, which would gather the weight for nothing.

    A group `fully_shard([norm, head])` takes one call of each of its modules: after a second one of the head backward
    would free the norm's weight too early, and without any the group waits for it.
    """
    together = _fsdp_modules(module)
    if together > 1:
        return then_called
    if together == 1:
        return len(module._forward_pre_hooks) == 1  # hooks of others may change the input
    return gathers(module)


def spreads(module: nn.Module, model: nn.Module) -> bool:
    """Whether the head's rows are spread over ranks for good (tensor parallelism), and not only between calls."""
    weight = innermost(module).weight
    return type(weight).__name__ == "DTensor" and not any(map(_fsdp_modules, (model, module)))


def is_sharded_model(model: nn.Module) -> bool:
    """Whether a forward of it makes ranks wait for each other."""
    if _fsdp_modules(model) > 0 or any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        return True
    return any(hasattr(p, "ds_id") or is_sharded(p) for p in model.parameters())


def hooks_set_parameters(model: nn.Module) -> bool:
    """Whether hooks put parameters into modules in each call, and with them back what was put there instead."""
    return any(map(_fsdp_modules, model.modules())) or any(hasattr(p, "ds_id") for p in model.parameters())


def is_sharded(weight: Tensor) -> bool:
    """Whether this rank has not the whole of the weight now."""
    return type(weight).__name__ == "DTensor" or weight.numel() == 0 or weight.untyped_storage().size() == 0


def _fsdp_modules(module: nn.Module) -> int:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # takes a second to import, so only where somebody did
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return 0
    return len(module._get_fsdp_state()._modules)

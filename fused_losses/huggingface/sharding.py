"""Heads whose weight is in pieces on several ranks: FSDP2's `fully_shard` and DeepSpeed's ZeRO-3 gather it in a call of their module."""

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


def gathers_with_others(module: nn.Module) -> bool:
    """Whether `fully_shard([norm, head])` made a group, which waits for a call of each of its modules."""
    return _fsdp_modules(module) > 1


def is_sharded_model(model: nn.Module) -> bool:
    return _fsdp_modules(model) > 0 or any(hasattr(p, "ds_id") or is_sharded(p) for p in model.parameters())


def is_sharded(weight: Tensor) -> bool:
    """Whether this rank has not the whole of the weight now."""
    return type(weight).__name__ == "DTensor" or weight.numel() == 0 or weight.untyped_storage().size() == 0


def _fsdp_modules(module: nn.Module) -> int:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # takes a second to import, so only where somebody did
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return 0
    return len(module._get_fsdp_state()._modules)

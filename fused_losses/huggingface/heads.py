"""What a model's output module computes, read off plain linear layers and PEFT's wrappers around them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..head import FLOATING, LMHead, LowRank

OURS = "_fused_losses"  # attribute of a forward that a call has put on a head: what it stands for


def innermost(module: nn.Module) -> nn.Module:
    """The linear layer under PEFT's wrappers."""
    while True:
        inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if inner is None:
            return module
        module = inner


def check_head(module: Any, model_name: str) -> None:
    """Raise unless `read_head` can say what the module computes."""
    if module is None:
        raise TypeError(
            f"{model_name} has no output embeddings (get_output_embeddings() is None), so there is no LM head to fuse; "
            "give a causal language model with its head, such as AutoModelForCausalLM makes"
        )
    _check_calls(module, model_name)
    if _is_auxiliary(module):
        for inner in (module.original_module, *module.modules_to_save.values()):
            check_head(inner, model_name)
        return
    if _is_lora(module):
        variants = set(getattr(module, "lora_variant", {})) & set(module.active_adapters)
        if variants:
            kinds = sorted(type(module.lora_variant[name]).__name__ for name in variants)
            raise TypeError(
                f"head: a LoRA variant ({', '.join(kinds)}) on the LM head is not supported, only plain LoRA; leave "
                "the head out of target_modules, or use_dora=False for it"
            )
        check_head(module.base_layer, model_name)
        return
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if hasattr(module, "base_layer"):
        raise TypeError(
            f"head: {model_name}'s is a {name}, and of PEFT's adapters only LoRA is supported on the LM head; leave "
            "the head out of target_modules, or train unpatched"
        )
    if not isinstance(module, nn.Linear):
        raise TypeError(
            f"head: {model_name}'s is a {name}, not a linear layer, so its logits are not hidden @ weight.T + bias; "
            "call the losses in a loop of your own (fused_losses.token_losses) or train unpatched"
        )
    if module.weight.dtype not in FLOATING or hasattr(module.weight, "quant_state"):
        raise TypeError(
            f"head: {model_name}'s is quantised ({name}, weight {module.weight.dtype}); keep the LM head out of "
            "quantisation (llm_int8_skip_modules=['lm_head'] of BitsAndBytesConfig, modules_to_not_convert of others)"
        )
    if type(module).forward is not nn.Linear.forward:
        raise TypeError(
            f"head: {model_name}'s is a {name} with a forward of its own, which would be dropped silently; replace it "
            "by a plain torch.nn.Linear, or take fused_losses.token_losses in a loop of your own"
        )


def _check_calls(module: Any, model_name: str) -> None:
    """Raise where somebody stands between a call of the module and its own forward, whose doing would be dropped."""
    name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"  # accelerate's hooks sit between the two
    forward = vars(module).get(name)
    own = getattr(forward, "__func__", None) is type(module).forward or hasattr(forward, OURS)
    # transformers' tensor parallelism makes DTensors of what comes and goes, which is known here.
    parallel = re.fullmatch(r"transformers\..*tensor_parallel", getattr(forward, "__module__", None) or "")
    if forward is not None and not own and not parallel and not casts_to_float32(module):
        raise TypeError(
            f"head: {model_name}'s has another forward ({getattr(forward, '__qualname__', forward)}) in place of its "
            "own, which would be dropped silently; take it off, or use register_forward_hook, which counts"
        )
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if one is not None and type(one).__module__ != "accelerate.hooks":
            raise TypeError(
                f"head: {model_name}'s has a hook of accelerate's kind, {type(one).__name__}, which would see the loss "
                "in place of logits; use register_forward_hook, which counts"
            )


def casts_to_float32(module: Any) -> bool:
    """Whether its forward is TRL's for `cast_lm_head_to_fp32`: that of a linear layer, of its input in float32."""
    forward = vars(module).get("forward")
    forward = getattr(forward, OURS, forward)
    name = f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"
    return re.fullmatch(r"trl\..*\.cast_forward_to_fp32", name) is not None


def read_head(
    module: nn.Module, hidden: Tensor, scale: float, softcap: float | None, width: int, adapters: Any = "active"
) -> LMHead:
    """The head that calling `module` on `hidden` now would apply.

    `adapters`: "active"; "off"; or frozen copies of the adapter's parameters by their names within `module`.
    """
    low_rank: list[tuple[Tensor, Tensor]] = []
    weight, bias = _read(module, hidden, adapters, "", low_rank)
    if width < weight.shape[0]:
        weight, bias = weight[:width], None if bias is None else bias[:width]
        low_rank = [(b[:width], rows) for b, rows in low_rank]
    extra = None
    if low_rank:
        extra = LowRank(torch.cat([b for b, _ in low_rank], 1), rows=torch.cat([rows for _, rows in low_rank], -1))
    return LMHead(weight, bias, scale, softcap, low_rank=extra)


def _read(
    module: Any, hidden: Tensor, adapters: Any, prefix: str, low_rank: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor | None]:
    frozen = adapters if isinstance(adapters, dict) else {}
    off = adapters == "off" or (adapters == "active" and getattr(module, "disable_adapters", False))
    if _is_auxiliary(module):
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        if off or not active:
            return _read(module.original_module, hidden, adapters, f"{prefix}original_module.", low_rank)
        name = f"{prefix}modules_to_save.{active[0]}."
        return _read(module.modules_to_save[active[0]], hidden, adapters, name, low_rank)
    if not _is_lora(module):
        return frozen.get(f"{prefix}weight", module.weight), frozen.get(f"{prefix}bias", module.bias)
    weight, bias = _read(module.base_layer, hidden, adapters, f"{prefix}base_layer.", low_rank)
    if module.merged:
        if off or frozen:
            raise ValueError("the head's adapter is merged into its weight; call model.unmerge_adapter() first")
        return weight, bias
    if off:
        return weight, bias
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        a, b, scaling = module.lora_A[name], module.lora_B[name], module.scaling[name]
        b_weight = frozen.get(f"{prefix}lora_B.{name}.weight", b.weight)
        b_bias = frozen.get(f"{prefix}lora_B.{name}.bias", b.bias)
        if frozen:
            rows = F.linear(hidden.to(a.weight.dtype), frozen[f"{prefix}lora_A.{name}.weight"])
        else:
            rows = a(module.lora_dropout[name](hidden.to(a.weight.dtype)))
        # An adapter keeps its dtype beside a half-precision weight: the KL may be of a small difference of two of them.
        if torch.float64 in (weight.dtype, b_weight.dtype):
            b_weight, rows = b_weight.to(weight.dtype), rows.to(weight.dtype)
        low_rank.append((b_weight, rows * scaling))
        if b_bias is not None:
            extra = b_bias.to(weight.dtype) * scaling
            bias = extra if bias is None else bias + extra
    return weight, bias


def _is_auxiliary(module: Any) -> bool:
    return hasattr(module, "modules_to_save") and hasattr(module, "original_module")


def _is_lora(module: Any) -> bool:
    """Plain LoRA's layer, and none that only has parts of the same name, such as AdaLoRA's."""
    if not hasattr(module, "base_layer") or not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
        return False
    return isinstance(getattr(module, "lora_B", None), nn.ModuleDict)

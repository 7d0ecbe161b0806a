"""PEFT's adapters in a model: which layers, which parameters, on and off, and the virtual tokens of prompt learning."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import kv_cache

# Of PEFT's LoraConfig.init_lora_weights; the others ("gaussian", "eva", "orthogonal", "mica") leave the base alone.
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _named_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that PEFT has put around the model's own."""
    for name, module in model.named_modules():
        wraps = hasattr(module, "base_layer") or hasattr(module, "original_module")
        if wraps and (hasattr(module, "enable_adapters") or hasattr(module, "modules_to_save")):
            yield name, module


def _adapted_attentions(model: nn.Module) -> list[nn.Module]:
    """LLaMA-Adapter's, which stand in the place of attention layers and have no switch."""
    return [m for m in model.modules() if hasattr(m, "adaption_prompt") and hasattr(m, "adaption_gate")]


def has_layers(model: nn.Module) -> bool:
    return any(True for _ in _named_layers(model)) or bool(_adapted_attentions(model))


def layers(model: nn.Module) -> list[nn.Module]:
    return [layer for _, layer in _named_layers(model)]


def switched_off(model: nn.Module) -> bool:
    found: list[Any] = layers(model)
    return bool(found) and all(layer.disable_adapters for layer in found)


def scaling(model: nn.Module) -> list:
    """The factors of the adapters' layers, which no tensor says."""
    return [dict(getattr(layer, "scaling", None) or {}) for layer in layers(model)]


def active(model: nn.Module) -> list:
    return [(name, list(layer.active_adapters)) for name, layer in _named_layers(model)]


def moved_from_base(model: nn.Module) -> str | None:
    """The initialisation of an adapter that has changed the weights around it, so that they alone are no original:
    a part of them is in the adapter, which is taken from all of them (PiSSA, ...), or is what quantizing lost (LoftQ).
    """
    configs: Any = getattr(model, "peft_config", None) or {}
    for config in configs.values():
        name = getattr(config, "init_lora_weights", None)
        if isinstance(name, str) and name.lower().startswith(MOVES_BASE):
            return name
    return None


def facts(model: nn.Module) -> tuple[str, ...]:
    """How adapters are applied, which no tensor says."""
    names = ("active_adapters", "disable_adapters", "merged", "scaling", "fan_in_fan_out", "use_rslora", "use_dora")
    return tuple(str([(name, getattr(layer, name, None)) for name in names]) for _, layer in _named_layers(model))


def parameters(model: nn.Module) -> set[int]:
    """The ids of the adapters' own parameters."""
    found: set[int] = set()
    for _, layer in _named_layers(model):
        own: set[int] = set()
        for name in ("base_layer", "original_module"):
            if hasattr(layer, name):
                own |= {id(p) for p in getattr(layer, name).parameters()}
        found |= {id(p) for p in layer.parameters()} - own
    for attention in _adapted_attentions(model):
        found |= {id(attention.adaption_prompt), id(attention.adaption_gate)}
    return found


def at_start(model: nn.Module) -> bool:
    """Whether the adapters are known to change nothing yet, such as LoRA with B = 0."""
    gates: list[Any] = [attention.adaption_gate for attention in _adapted_attentions(model)]
    if any(bool(gate.count_nonzero()) for gate in gates):
        return False
    return all(_changes_nothing(layer) for _, layer in _named_layers(model))


def _changes_nothing(layer: Any) -> bool:
    if hasattr(layer, "original_module"):
        original = dict(layer.original_module.named_parameters())
        copies = getattr(layer, "modules_to_save", {})
        pairs = [item for n in layer.active_adapters if n in copies for item in copies[n].named_parameters()]
        return all(key in original and torch.equal(p, original[key]) for key, p in pairs)
    b = getattr(layer, "lora_B", None)
    variants = getattr(layer, "lora_variant", None) or {}
    if b is None or any("Dora" not in type(variant).__name__ for variant in variants.values()):
        return False
    tensors: list[Any] = []
    for name in layer.active_adapters:
        if name in b:
            tensors += [b[name]] if isinstance(b[name], Tensor) else list(b[name].parameters())
        if name in getattr(
            layer, "lora_E", {}
        ):  # AdaLoRA's singular values: with these 0 the rest is of no consequence
            tensors = [layer.lora_E[name]]
        if name in getattr(layer, "lora_embedding_B", {}):
            tensors.append(layer.lora_embedding_B[name])
    return not any(bool(t.count_nonzero()) for t in tensors)


@contextlib.contextmanager
def off(model: nn.Module, outer: Any = None) -> Iterator[None]:
    """All adapters off; afterwards as they were. `outer`: the PEFT model around it, where it is known."""
    if _adapted_attentions(model):
        inner = getattr(outer, "base_model", None)
        if not hasattr(inner, "disable_adapter_layers"):
            raise ValueError(
                "reference='base': LLaMA-Adapter's layers are switched by the PEFT model around this one, which is "
                "not known; patch that one"
            )
        inner.disable_adapter_layers()
        try:
            with off(model):
                yield
        finally:
            inner.enable_adapter_layers()
        return
    with _switched(model, False):
        yield


def on(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """All adapters on; afterwards as they were."""
    return _switched(model, True)


@contextlib.contextmanager
def _switched(model: nn.Module, to: bool) -> Iterator[None]:
    layers = [layer for _, layer in _named_layers(model)]
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError("reference: the adapter is merged into the weights; call model.unmerge_adapter() first")
    # Enabling sets requires_grad, also of what the user has frozen.
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    switched = [layer for layer in layers if layer.disable_adapters == to]
    for layer in switched:
        layer.enable_adapters(to)
    try:
        yield
    finally:
        for layer in switched:
            layer.enable_adapters(not to)
        for p, flag in trained:
            if p.requires_grad != flag:
                p.requires_grad_(flag)


@dataclass
class VirtualTokens:
    """What PEFT's prompt learning puts before each row: embeddings, or keys and values."""

    count: int
    in_cache: bool  # as keys and values, which take no position of the hidden states
    input_ids: Tensor | None = None  # without them

    @classmethod
    def of(cls, outer: Any, input_ids: Tensor | None = None) -> VirtualTokens | None:
        """Those of a PEFT model; None where it has none, or they are switched off."""
        config = getattr(outer, "active_peft_config", None) if hasattr(outer, "peft_config") else None
        if (
            config is None
            or not getattr(config, "is_prompt_learning", False)
            or getattr(outer, "_adapters_disabled", False)
        ):
            return None
        kind = getattr(config.peft_type, "value", str(config.peft_type))
        return cls(config.num_virtual_tokens, kind in ("PREFIX_TUNING", "CARTRIDGE"), input_ids)

    def before(self, hidden: Tensor) -> int:
        """How many of these positions are virtual."""
        return 0 if self.in_cache else self.count

    def removed(self, inputs: dict) -> tuple[dict, int]:
        """The inputs without the virtual tokens, and by how many positions the model's own labels are longer."""
        inputs = dict(inputs)
        mask, embeddings = inputs.get("attention_mask"), inputs.get("inputs_embeds")
        if self.in_cache:
            inputs = kv_cache.without(inputs)
        elif isinstance(embeddings, Tensor):
            del inputs["inputs_embeds"]
            if self.input_ids is None:
                inputs["inputs_embeds"] = embeddings[:, self.count :].detach()
            else:
                inputs["input_ids"] = self.input_ids
        else:
            return inputs, 0
        if isinstance(mask, Tensor) and mask.dim() == 2:
            inputs["attention_mask"] = mask[:, self.count :]
        return inputs, 0 if self.in_cache else self.count


def caller(model: nn.Module) -> tuple[Any, Any]:
    """The PEFT model whose forward is calling this one, and the input_ids that it was called with; None, None where
    there is none.

    Nothing that the inner model gets names the outer one, and ids have become embeddings, so this looks at the callers.
    """
    frame = sys._getframe(1)
    while frame is not None:
        outer = frame.f_locals.get("self")
        is_peft = frame.f_code.co_name == "forward" and hasattr(type(outer), "get_base_model")
        if is_peft and outer is not model and outer.get_base_model() is model:
            return outer, frame.f_locals.get("input_ids")
        frame = frame.f_back  # type: ignore[assignment]
    return None, None

"""A patched model against itself unpatched, for one class of transformers and one way of training it."""

from __future__ import annotations

import inspect
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import CannotBuild, build
from torch import Tensor, nn

import fused_losses as fl

VARIANTS = ("plain", "float64", "lora", "lora_head", "modules_to_save", "checkpointing", "packed", "bf16", "autocast")
TOLERANCE = 1e-5
# A parameter's error is taken relative to its gradient, or to this part of all parameters' gradient where its own is less: that of a
# key's bias is zero but for rounding, as adding one number to all scores of a softmax changes nothing.
LEAST = {"float64": 1e-3}
LEAST_OF_FLOAT32 = 1e-2


@dataclass
class Outcome:
    kind: str  # equal, different, refused by us, or impossible unpatched
    reason: str = ""
    loss_error: float = 0.0
    gradient_error: float = 0.0  # largest of all parameters; in half precision that of all together
    plain_error: float = 0.0  # in half precision: the unpatched model's, against float32
    restored: bool = True  # bit-equal after unpatch


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**inputs)
    loss = out[0] if isinstance(out, tuple) else out.loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(name: str, variant: str = "plain") -> Outcome:
    try:
        model, inputs = build(name)
        model, inputs = prepare(model, inputs, variant)
        with _precision(variant):
            before = step(model, inputs)
    except CannotBuild as problem:
        return Outcome("impossible", str(problem))
    except Exception as problem:
        if variant == "plain":
            raise
        return Outcome("impossible", _one_line(problem))
    with _precision(variant):
        try:
            fl.patch(model)
            ours = step(model, inputs)
        except (TypeError, ValueError, fl.huggingface.LogitsNotKept) as problem:
            return Outcome("refused", _one_line(problem))
        fl.unpatch(model)
        again = step(model, inputs)
    restored = torch.equal(before[0], again[0]) and before[1].keys() == again[1].keys()
    restored = restored and all(torch.equal(g, again[1][n]) for n, g in before[1].items())
    if variant in ("bf16", "autocast"):
        return _half_precision(name, variant, before, ours, restored)
    loss_error = float(abs(ours[0] - before[0]) / abs(before[0]))
    least = LEAST.get(variant, LEAST_OF_FLOAT32) * _norm(before[1])
    gradient_error = max(
        float((ours[1][n] - g).norm() / max(g.norm(), least)) if n in ours[1] else float("inf")
        for n, g in before[1].items()
    )
    same = ours[1].keys() == before[1].keys() and max(loss_error, gradient_error) <= TOLERANCE and restored
    return Outcome("equal" if same else "different", "", loss_error, gradient_error, 0.0, restored)


def prepare(model: nn.Module, inputs: dict[str, Any], variant: str) -> tuple[nn.Module, dict[str, Any]]:
    if variant in ("lora", "lora_head", "modules_to_save"):
        return _adapted(model, variant), inputs
    if variant == "checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
    elif variant == "packed":
        if "position_ids" not in inspect.signature(type(model).forward).parameters:
            raise CannotBuild("its forward takes no position_ids")
        ids, labels = inputs["input_ids"].reshape(1, -1), inputs["labels"].clone()
        labels[:, 0] = -100
        positions = torch.arange(inputs["labels"].shape[1]).repeat(len(labels))[None]
        inputs = dict(input_ids=ids, labels=labels.reshape(1, -1), position_ids=positions, use_cache=False)
    elif variant in ("bf16", "float64"):
        model.to(torch.bfloat16 if variant == "bf16" else torch.float64)
    return model, inputs


def _adapted(model: nn.Module, variant: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) or m is head}
    head_name = next((name for name, m in linear.items() if m is head), None)
    # PEFT refuses the projections behind a state-space scan, whose kernels read their weights.
    mamba = any("mamba" in kind for kind in (model.config.model_type, *getattr(model.config, "layers_block_type", ())))
    mamba = mamba or model.config.model_type in ("falcon_h1", "nemotron_h")
    skipped = ("out_proj", "conv1d") if mamba else ()
    body = [name for name, m in linear.items() if m is not head and not name.endswith(skipped)]
    if head_name is None:
        raise CannotBuild("its head is not linear")
    if variant == "lora_head":
        body.append(head_name)
    saved = [head_name] if variant == "modules_to_save" else None
    # Random B: where it is zero the gradients of A are.
    config = LoraConfig(r=2, lora_alpha=3, target_modules=body, modules_to_save=saved, init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(model, config).train()


def _precision(variant: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=variant == "autocast")


def _half_precision(name: str, variant: str, before: Any, ours: Any, restored: bool) -> Outcome:
    """Both against float32 with the same weights."""
    model, inputs = build(name)
    if variant == "bf16":
        model.to(torch.bfloat16).float()
    truth = step(model, inputs)
    total = _norm(truth[1])

    def errors(result: Any) -> tuple[float, float]:
        gradient = _norm({n: result[1][n].float() - g for n, g in truth[1].items()})
        return float(abs(result[0].float() - truth[0]) / abs(truth[0])), float(gradient / total)

    (loss_error, gradient_error), (plain_loss, plain_error) = errors(ours), errors(before)
    # The body's rounding is common to both; a loss may by chance come nearer with more of it.
    same = restored and gradient_error <= 1.3 * plain_error and loss_error <= max(1.3 * plain_loss, 5e-3)
    return Outcome("equal" if same else "different", "", loss_error, gradient_error, plain_error, restored)


def _norm(gradients: dict[str, Tensor]) -> float:
    return float(torch.stack([g.float().norm() for g in gradients.values()]).norm())


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split()) or type(problem).__name__


def quiet() -> None:
    """Transformers and PEFT warn of much that tiny models do."""
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)

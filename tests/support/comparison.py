"""A patched model against itself unpatched, for one class of transformers and one way of training it."""

from __future__ import annotations

import inspect
import logging
import math
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny_models import CannotBuild, build
from torch import Tensor, nn

import fused_losses as fl

VARIANTS = ("plain", "float64", "lora", "lora_head", "modules_to_save", "checkpointing", "packed", "bf16", "autocast")
TOLERANCE = 1e-5
# A parameter's error is taken relative to its gradient, or to this part of all parameters' gradient where its own is
# less: that of a key's bias is zero but for rounding, as adding one number to all scores of a softmax changes nothing.
LEAST = {"float64": 1e-3}
LEAST_OF_FLOAT32 = 1e-2
BYPASSED = "the patched forward was not called: the logits are there"


@dataclass
class Outcome:
    kind: str  # equal, different, error (a crash of ours), refused by us, or impossible unpatched
    reason: str = ""
    loss_error: float = 0.0
    gradient_error: float = 0.0  # largest of all parameters; in half precision that of all together
    plain_error: float = 0.0  # in half precision: the unpatched model's, against float32
    restored: bool = True  # bit-equal after unpatch


class Step(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor]
    logits_formed: bool


def step(model: nn.Module, inputs: dict[str, Any]) -> Step:
    model.zero_grad()
    out = model(**inputs)
    loss = out[0] if isinstance(out, tuple) else out.loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Step(loss.detach(), gradients, type(getattr(out, "logits", None)) is Tensor)


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
        return Outcome("impossible", one_line(problem))
    with _precision(variant):
        try:
            fl.patch(model)
            ours = step(model, inputs)
        except Exception as problem:
            return failed(problem)
        fl.unpatch(model)
        again = step(model, inputs)
    if variant in ("bf16", "autocast"):
        return _half_precision(name, variant, before, ours, _equal(before, again))
    return compared(before, ours, again, LEAST.get(variant, LEAST_OF_FLOAT32))


def failed(problem: Exception) -> Outcome:
    """Refused where the patch raises in words of its own, else an error."""
    frames = traceback.extract_tb(problem.__traceback__)
    own = Path(frames[-1].filename).is_relative_to(Path(fl.__file__).parent)
    if own and isinstance(problem, (TypeError, ValueError, fl.huggingface.LogitsNotKept)):
        return Outcome("refused", one_line(problem))
    return Outcome("error", f"{type(problem).__name__}: {one_line(problem)}")


def compared(before: Step, ours: Step, again: Step, least: float = LEAST_OF_FLOAT32) -> Outcome:
    """Loss and gradients unpatched, patched and unpatched again."""
    if ours.logits_formed:
        return Outcome("different", BYPASSED)
    restored = _equal(before, again)
    loss_error = float(abs(ours.loss - before.loss) / abs(before.loss))
    least *= _norm(before.gradients)
    gradient_error = max(_relative(ours.gradients.get(n), g, least) for n, g in before.gradients.items())
    same = ours.gradients.keys() == before.gradients.keys() and restored
    same = same and loss_error <= TOLERANCE and gradient_error <= TOLERANCE
    return Outcome("equal" if same else "different", "", loss_error, gradient_error, 0.0, restored)


def _relative(ours: Tensor | None, theirs: Tensor, least: float) -> float:
    """Infinite where one has no gradient, or nan in it, which max() would not see."""
    if ours is None:
        return float("inf")
    error = float((ours - theirs).norm() / max(theirs.norm(), least))
    return float("inf") if math.isnan(error) else error


def prepare(model: nn.Module, inputs: dict[str, Any], variant: str) -> tuple[nn.Module, dict[str, Any]]:
    if variant in ("lora", "lora_head", "modules_to_save"):
        return _adapted(model, variant), inputs
    if variant == "checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
    elif variant == "packed":
        if "position_ids" not in inspect.signature(type(model).forward).parameters:
            raise CannotBuild("its forward takes no position_ids")
        inputs = packed(model, inputs)
    elif variant in ("bf16", "float64"):
        dtype = torch.bfloat16 if variant == "bf16" else torch.float64
        model.to(dtype)
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    return model, inputs


def packed(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """All rows in one, told apart by position_ids that restart; what has another shape (images) stays as it is."""
    shape, labels = inputs["input_ids"].shape, inputs["labels"].clone()
    labels[:, 0] = -100
    one_row = {
        name: value.reshape(1, -1, *value.shape[2:]) if value.shape[:2] == shape else value
        for name, value in (inputs | {"labels": labels}).items()
        if name != "attention_mask"
    }
    positions = torch.arange(shape[1]).repeat(len(labels))[None]
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if "mrope_section" in rope:  # of time, height and width, and for text those of the text before them
        positions = positions.expand(3 if "pixel_values" in inputs else 4, -1, -1)
    return one_row | {"position_ids": positions, "use_cache": False}


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


def _half_precision(name: str, variant: str, before: Step, ours: Step, restored: bool) -> Outcome:
    """Both against float32 with the same weights."""
    if ours.logits_formed:
        return Outcome("different", BYPASSED)
    model, inputs = build(name)
    if variant == "bf16":
        model.to(torch.bfloat16).float()
    truth = step(model, inputs)
    total = _norm(truth.gradients)

    def errors(result: Step) -> tuple[float, float]:
        gradient = _norm({n: result.gradients[n].float() - g for n, g in truth.gradients.items()})
        return float(abs(result.loss.float() - truth.loss) / abs(truth.loss)), float(gradient / total)

    (loss_error, gradient_error), (plain_loss, plain_error) = errors(ours), errors(before)
    # The body's rounding is common to both; a loss may by chance come nearer with more of it.
    same = restored and gradient_error <= 1.3 * plain_error and loss_error <= max(1.3 * plain_loss, 5e-3)
    return Outcome("equal" if same else "different", "", loss_error, gradient_error, plain_error, restored)


def _equal(a: Step, b: Step) -> bool:
    same = torch.equal(a.loss, b.loss) and a.gradients.keys() == b.gradients.keys()
    return same and all(torch.equal(g, b.gradients[n]) for n, g in a.gradients.items())


def _norm(gradients: dict[str, Tensor]) -> float:
    return float(torch.stack([g.float().norm() for g in gradients.values()]).norm())


def one_line(problem: Exception) -> str:
    return " ".join(str(problem).split()) or type(problem).__name__


def quiet() -> None:
    """Transformers and PEFT warn of much that tiny models do."""
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)

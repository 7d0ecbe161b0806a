"""The output that TRL's trainers ask a model for with `fused_lm_head=True`.

Of plain cross-entropy it has log-probabilities per token (`per_token`), whatever the trainer makes of them. Other
objectives have a sum, which is what SFTTrainer asks for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

REMEDY = (
    "a model patched with an objective has the sum of its loss only; with SFTConfig leave loss_type='nll' (for DFT: "
    "fused_losses.patch(model, fused_losses.DFTLoss())); other trainers (DPO, KTO, GRPO, ...) take a model patched "
    "with cross-entropy, fused_losses.patch(model)"
)


class NotPerToken(TypeError, AttributeError):
    """Something was asked of log-probabilities that only one number per token can answer; `hasattr` answers False."""


class SummedLogProbs:
    """Stands for per-token log-probabilities whose negative sum is the fused loss; TRL divides it by the tokens."""

    def __init__(self, total: Tensor, sign: int = 1) -> None:
        self.total, self.sign = total, sign

    def __repr__(self) -> str:
        return f"SummedLogProbs({'-' if self.sign < 0 else ''}{-float(self.total.detach()):.6g} in all; {REMEDY})"

    def __neg__(self) -> SummedLogProbs:
        return SummedLogProbs(self.total, -self.sign)

    def sum(self) -> Tensor:
        return -self.sign * self.total

    def detach(self) -> SummedLogProbs:
        return SummedLogProbs(self.total.detach(), self.sign)

    def to(self, *args: Any, **kwargs: Any) -> SummedLogProbs:
        return SummedLogProbs(self.total.to(*args, **kwargs), self.sign)

    def float(self) -> SummedLogProbs:
        return self.to(torch.float32)

    def cpu(self) -> SummedLogProbs:
        return self.to("cpu")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name) or "total" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self._refuse(name)

    def _refuse(self, name: str) -> Any:
        raise NotPerToken(f"{name} of the per-token log-probabilities was asked for, and {REMEDY}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(function, "__name__", str(function))
        raise NotPerToken(f"{name} of the per-token log-probabilities was asked for, and {REMEDY}")


def _operator(name: str) -> Any:
    def operation(self: SummedLogProbs, *args: Any) -> Any:
        return self._refuse(name)

    return operation


for _name in (
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "getitem",
    "pow",
    "len",
    "iter",
    "array",
):
    setattr(SummedLogProbs, f"__{_name}__", _operator(_name))


def output(call: Any, outputs: Any) -> Any:
    """TRL 1.16's FusedCausalLMOutput of a call that has the sum of its token losses."""
    from trl.trainer.utils import FusedCausalLMOutput

    target, seen = call.target, call.observer
    mask = target != call.loss.ignore_index
    aux_loss = outputs.get("aux_loss") if hasattr(outputs, "get") else None
    given = call.num_items is not None and not call.no_items
    num_items = call.num_items if given else mask.sum().clamp(min=1)
    loss = call.token_loss / num_items
    if aux_loss is not None:
        # What the model has added to its tokens' loss, which it may have divided.
        loss = loss + (outputs.loss - (loss if call.model_divides else call.token_loss))
    fields: dict[str, Any] = {
        "log_probs": SummedLogProbs(call.token_loss), "entropy": seen.entropy,
        "is_top1": (seen.prediction == target) & mask, "label_mask": mask,
    }  # fmt: skip
    if call.per_token is not None:
        fields = call.per_token.at(call.shift_labels is not None)
    return FusedCausalLMOutput(loss=loss, **fields, aux_loss=aux_loss)

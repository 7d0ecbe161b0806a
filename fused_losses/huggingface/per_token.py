"""Log-probabilities per token of a patched model, and what else TRL's trainers ask of them (`fused_lm_head=True`)."""

from __future__ import annotations

import contextlib
import functools
import types
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import shards
from ..head import LMHead, LowRank
from ..op import token_losses

CHUNK_BYTES = 2**26  # of logits, where a soft-cap has them all formed for their mean


@dataclass(frozen=True)
class Request:
    """What TRL's head was added for (`add_fused_lm_head`); its defaults where nobody has added it."""

    temperature: float = 1.0
    cast_lm_head_to_fp32: bool = False
    outputs: tuple[str, ...] = ("log_probs", "entropy", "is_top1")

    @property
    def expects_sum(self) -> bool:
        """Whether it is SFTTrainer's, which takes the sum of the log-probabilities unless its loss is DFT."""
        return self == Request()

    @classmethod
    def of(cls, forward: Any) -> Request:
        """Read off TRL's forward, which others may have wrapped."""
        found = _variables_of(forward, 8)
        return cls() if found is None else cls(**{name: found[name] for name in cls.__dataclass_fields__})


def _variables_of(forward: Any, depth: int) -> dict[str, Any] | None:
    """The variables of the function below that has all that a Request is made of."""
    while isinstance(forward, types.MethodType):
        forward = forward.__func__
    if not depth or not callable(forward) or isinstance(forward, (type, nn.Module)):
        return None
    code, cells = getattr(forward, "__code__", None), getattr(forward, "__closure__", None) or ()
    values = {}
    for name, cell in zip(code.co_freevars if code else (), cells, strict=False):
        with contextlib.suppress(ValueError):  # it is not filled yet
            values[name] = cell.cell_contents
    if values.keys() >= Request.__dataclass_fields__.keys():
        return values
    if code and "fused_lm_head" in code.co_varnames:  # it would have them under other names, and other numbers come out
        raise TypeError(
            f"fused_lm_head: the head that is around this model ({code.co_filename}) does not say its temperature and "
            "outputs as TRL 1.16's does; install trl 1.16, or call fused_losses.unpatch(model)"
        )
    inner = [*values.values(), *([forward.func] if isinstance(forward, functools.partial) else [])]
    inner += [vars(forward)[n] for n in ("__wrapped__", "model_forward") if n in getattr(forward, "__dict__", {})]
    return next((found for one in inner if (found := _variables_of(one, depth - 1)) is not None), None)


Place = tuple[Tensor, torch.Size]  # positions [n] of rows in the flattened head's input, and its leading shape


class PerToken:
    """Statistics per token of one forward, flat in the layout of the head's input, 0 where there is no label."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.values: dict[str, Tensor] = {}
        self.lead = torch.Size()

    def add(self, place: Place, rows: Tensor, head: LMHead, target: Tensor, options: dict[str, Any]) -> tuple:
        """(Σ nll of the rows [n, D], what `token_losses` returned of them); labels `target` [n]."""
        request = self.request
        precision: Any = contextlib.nullcontext()
        if request.cast_lm_head_to_fp32:
            precision = torch.autocast(rows.device.type, enabled=False)
            rows, head = rows.float(), _in_float32(head)
        with precision:
            wanted = {"log_p2"} if "log_sum_sq_probs" in request.outputs else ()
            out = token_losses(rows, head, target, temperature=request.temperature, wanted=wanted, **options)
            valid = target != options["ignore_index"]
            found = {"log_probs": 0 - out.nll, "label_mask": valid}
            for name in request.outputs:
                if name == "entropy":
                    compute = functools.partial(_entropy, target, request.temperature, options)
                    found[name] = _late(out.entropy, compute, rows, head)
                elif name == "log_sum_sq_probs":
                    found[name] = out.log_p2.detach()
                elif name == "mean_logits":
                    found[name] = mean_logits(rows, head, request.temperature).masked_fill(~valid, 0)
                elif name == "is_top1":
                    found[name] = (out.prediction == target) & valid
        self._put(place, found)
        return out.nll.sum(), out

    def add_sum(
        self,
        place: Place,
        rows: Tensor,
        head: LMHead,
        target: Tensor,
        options: dict[str, Any],
        total: Tensor,
        seen: Any,
    ) -> None:
        """Of a loss `total` = Σ nll that is known already, with an observer of its tokens."""
        valid = target != options["ignore_index"]
        log_probs = _late(0 - seen.nll, functools.partial(_log_probs, target, options), rows, head, total, valid)
        entropy = _late(seen.entropy, functools.partial(_entropy, target, 1.0, options), rows, head)
        self._put(place, {
            "log_probs": log_probs, "entropy": entropy, "is_top1": (seen.prediction == target) & valid,
            "label_mask": valid,
        })  # fmt: skip

    def _put(self, place: Place, found: dict[str, Tensor]) -> None:
        positions, lead = place
        self.lead = lead
        for name, values in found.items():
            known = self.values.get(name, values.new_zeros(lead.numel()))
            self.values[name] = known.index_copy(0, positions.to(values.device), values)

    def at(self, shifted: bool) -> dict[str, Tensor]:
        """In TRL's layout: [batch, tokens − 1], or [batch, tokens] where the labels came shifted."""
        found = {name: values.view(self.lead) for name, values in self.values.items()}
        return found if shifted else {name: values[..., :-1] for name, values in found.items()}


def _in_float32(head: LMHead) -> LMHead:
    low = head.low_rank
    if low is not None:
        low = LowRank(low.b.float(), rows=low.rows.float())
    return replace(
        head, weight=head.weight.float(), bias=None if head.bias is None else head.bias.float(), low_rank=low
    )


@torch.no_grad()
def mean_logits(hidden: Tensor, head: LMHead, temperature: float) -> Tensor:
    """[n] means over the vocabulary of the logits of hidden [n, D]: of a linear head by the mean of its rows."""
    head = head.local()
    count = torch.tensor(float(head.weight.shape[0]), device=hidden.device)
    if head.softcap is None:
        total = _sum_of_linear(hidden, head)
    else:
        step = max(1, CHUNK_BYTES // (4 * max(1, head.weight.shape[0])))
        total = torch.cat([_sum_of_capped(hidden, head, slice(at, at + step)) for at in range(0, len(hidden), step)])
    if head.process_group is not None:
        for value in (total, count):
            dist.all_reduce(value, group=head.process_group)
    return total / (count * temperature)


def _sum_of_linear(hidden: Tensor, head: LMHead) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = hidden.to(wide) @ head.weight.sum(0, dtype=wide)
    if head.low_rank is not None:
        total = total + head.low_rank.inputs(hidden).to(wide) @ head.low_rank.b.sum(0, dtype=wide)
    if head.bias is not None:
        total = total + head.bias.sum(dtype=wide)
    return total * head.logit_scale


def _sum_of_capped(hidden: Tensor, head: LMHead, some: slice) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden[some].to(head.weight.dtype) @ head.weight.T).to(wide)
    if head.low_rank is not None:
        u = head.low_rank.inputs(hidden)[some]
        logits += (u @ head.low_rank.b.to(u.dtype).T).to(wide)
    if head.bias is not None:
        logits += head.bias
    return head.softcap * (logits * (head.logit_scale / head.softcap)).tanh_().sum(1)


def _late(
    values: Tensor, compute: Any, rows: Tensor, head: LMHead, total: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Values that are known already as differentiable ones: a backward through them computes them again, exactly.

    Most trainers just log the entropy, and its gradient would make that of the nll an exact one. With `total`, minus
    the sum of the `valid` values, a backward with the same gradient for all of these goes through it, for nothing.
    """
    low = head.low_rank
    tensors = rows, head.weight, head.bias, *((None, None) if low is None else (low.b, low.rows))
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
        return values
    compute = functools.partial(compute, head)
    if shards.is_dtensor(head.weight):
        return compute(*tensors)
    return _Late.apply(values, compute, valid, total, *tensors)


def _head_of(head: LMHead, weight: Tensor, bias: Tensor | None, b: Tensor | None, u: Tensor | None) -> LMHead:
    return replace(head, weight=weight, bias=bias, low_rank=None if b is None else LowRank(b, rows=u))


def _entropy(
    target: Tensor, temperature: float, options: dict[str, Any], head: LMHead, rows: Tensor, *tensors: Any
) -> Tensor:
    head = _head_of(head, *tensors)
    return token_losses(rows, head, target, temperature=temperature, entropy_gradient=True, **options).entropy


def _log_probs(target: Tensor, options: dict[str, Any], head: LMHead, rows: Tensor, *tensors: Any) -> Tensor:
    return 0 - token_losses(rows, _head_of(head, *tensors), target, **options).nll


class _Late(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, compute: Any, valid: Tensor | None, total: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        ctx.compute, ctx.has_total = compute, total is not None
        ctx.save_for_backward(valid, *tensors)
        device = values.device.type
        ctx.autocast = device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return values.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        valid, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        nothing = [None] * len(tensors)
        if ctx.has_total:
            some = gradient[valid]
            if len(some) == 0 or bool((some == some[0]).all()):
                return None, None, None, -some[0] if len(some) else gradient.new_zeros(()), *nothing
        device, enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled):
            leaves = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
            values = ctx.compute(*leaves)
        found = iter(torch.autograd.grad(values, [t for t, n in zip(leaves, needed, strict=True) if n], gradient))
        none = gradient.new_zeros(()) if ctx.has_total else None
        return None, None, None, none, *(next(found) if n else None for n in needed)

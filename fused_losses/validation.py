"""Every check of an argument of a call: what was expected, what came, and the remedy, before any work.

Checks of the numbers inside tensors, which in a graph run with it, are in checks.py.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, checks, compiled, shards
from .head import FLOATING, LMHead, LowRank, Reference, _names
from .problem import Head
from .sparse.certificate import TOLERANCE

GRADIENTS = ("auto", "exact", "sparse")
SCANS = ("auto", "full", "int8")
MOST_IDS = 128


@dataclass(frozen=True)
class Options:
    """The options that every loss has; checked."""

    ignore_index: int = -100
    gradient: str = "auto"
    tolerance: float = TOLERANCE
    backend: str = "auto"
    scan: str = "auto"

    def __post_init__(self) -> None:
        gradient, backend, tolerance = self.gradient, self.backend, self.tolerance
        if not isinstance(gradient, str) or gradient not in GRADIENTS:
            raise ValueError(f"gradient: expected one of {', '.join(GRADIENTS)}, got {gradient!r}")
        if gradient == "sparse" and backend == "reference":
            raise ValueError(
                "gradient='sparse' with backend='reference', which has full logits and is always exact; leave one of "
                "the two"
            )
        if not isinstance(self.scan, str) or self.scan not in SCANS:
            raise ValueError(
                f"scan: expected one of {', '.join(SCANS)}, got {self.scan!r}; 'int8' takes products of 8-bit numbers"
            )
        bound = checks.number(tolerance)
        if bound is None or not 0 < bound < 1:
            raise ValueError(
                f"tolerance: expected a number above 0 and below 1 (the default is {TOLERANCE}), got {tolerance!r}; "
                "for exact gradients give gradient='exact'"
            )
        if backend != "auto" and backend not in backends.NAMES:
            raise ValueError(f"backend: expected one of auto, {', '.join(backends.NAMES)}, got {backend!r}")
        index = checks.integer(self.ignore_index)
        if index is None:
            raise TypeError(f"ignore_index: expected an integer such as -100, got {self.ignore_index!r}")
        if index is not self.ignore_index or bound is not tolerance:  # of numpy, or tensors
            object.__setattr__(self, "ignore_index", index)
            object.__setattr__(self, "tolerance", bound)

    @property
    def code(self) -> int:
        """A number that tells different `gradient` and `tolerance` apart."""
        bits = int.from_bytes(struct.pack("<d", self.tolerance), "little")  # below 2⁶²
        return bits * len(GRADIENTS) + GRADIENTS.index(self.gradient) - 2**63


def check_temperature(temperature: Any) -> float:
    number = checks.number(temperature)
    if number is None or not 0 < number < math.inf:
        raise ValueError(
            "temperature: expected a finite number > 0, by which the logits of both models are divided (1 for none), "
            f"got {temperature!r}"
        )
    return float(number)


def check_beta(beta: Any, reference: Reference | None) -> float | None:
    """Of the divergence, None where none is wanted."""
    if beta is None:
        return None
    number = checks.number(beta)
    if number is None or not 0 <= number <= 1:
        raise ValueError(
            "beta: expected a number in [0, 1] (0: KL(p_ref ‖ p), 1: KL(p ‖ p_ref), between: Jensen-Shannon) or None "
            f"for no divergence, got {beta!r}"
        )
    if reference is None:
        raise ValueError(f"beta={beta!r}: a divergence is one from a reference; {checks.GIVE_REFERENCE}")
    return float(number)


def check_ids(ids: Tensor | None, labels: Tensor, name: str = "ids") -> None:
    if ids is None:
        return
    shape = list(labels.shape)
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: expected an int64 tensor [..., k], got {type(ids).__name__}")
    if ids.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 token ids, got {ids.dtype}; convert them with {name}.long()")
    if ids.shape[:-1] != labels.shape or ids.dim() != labels.dim() + 1:
        raise ValueError(
            f"{name}: expected shape {[*shape, 'k']}, k ids for each of the labels {shape}, got {list(ids.shape)}"
        )
    if not 1 <= ids.shape[-1] <= MOST_IDS:
        raise ValueError(f"{name}: expected 1 ≤ k ≤ {MOST_IDS} ids a token, got {ids.shape[-1]}")
    if ids.device != labels.device:
        raise ValueError(f"{name} are on {ids.device}, labels on {labels.device}; move them with .to(labels.device)")


def check_spread_backend(backend: str) -> None:
    if backend == "reference":
        raise ValueError(
            "backend='reference' with a head whose process_group spreads the vocabulary over ranks, of which none has "
            "full logits; give backend='auto' or 'torch'"
        )


def check_transforms(hidden: Tensor, head: LMHead, labels: Tensor, backend: str) -> None:
    """torch.func, forward-mode differentiation: what has no rule of ours."""
    if backend == "reference":
        if isinstance(labels, Tensor) and compiled.is_batched(labels):
            raise NotImplementedError(
                "torch.func.vmap over labels is not supported; give all tokens in one call, with a loss for each by "
                "fused_losses.token_losses"
            )
        return
    if compiled.in_transform():
        raise NotImplementedError(
            "torch.func (grad, vjp, jvp, jacrev, vmap, functional_call under these) is not supported by fused losses; "
            "call backward() or "
            "torch.autograd.grad(), or give backend='reference', with full logits (not for vmap over labels)"
        )
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        low_rank = () if head.low_rank is None else (head.low_rank.b, head.low_rank.a, head.low_rank.rows)
        tensors = [t for t in (hidden, head.weight, head.bias, *low_rank) if isinstance(t, Tensor)]
        if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(
                "forward-mode differentiation (torch.autograd.forward_ad) is not supported by fused losses; call "
                "backward() or "
                "torch.autograd.grad(), or give backend='reference', with full logits"
            )


def check_hidden(hidden: Tensor, head: LMHead) -> None:
    if not isinstance(hidden, Tensor):
        output = "; give its last_hidden_state" if hasattr(hidden, "last_hidden_state") else ""
        raise TypeError(f"hidden: expected a tensor [..., D], got {type(hidden).__name__}{output}")
    if shards.is_dtensor(hidden):
        raise TypeError(
            "hidden: expected a plain tensor with all tokens, got a DTensor; give hidden.full_tensor() or, where it is "
            "replicated, hidden.to_local()"
        )
    if hidden.layout != torch.strided:
        raise TypeError(f"hidden: expected a dense tensor, got one of layout {hidden.layout}; give hidden.to_dense()")
    if hidden.dtype not in FLOATING:
        raise TypeError(f"hidden: expected one of {_names(FLOATING)}, got {hidden.dtype}")
    if hidden.dim() == 0 or hidden.numel() == 0:
        raise ValueError(
            f"hidden: expected [..., D] with at least one token, got shape {list(hidden.shape)}; skip empty batches"
        )
    dim = head.weight.shape[1]
    if hidden.shape[-1] != dim:
        swapped = ""
        if hidden.shape[-1] == head.vocabulary:
            swapped = (
                "; either hidden are logits (give what goes into the head), or the weight is transposed (give weight.T)"
            )
        raise ValueError(
            f"hidden: expected last dimension D = {dim}, that of the head's weight {list(head.weight.shape)}, "
            f"got shape {list(hidden.shape)}{swapped}"
        )
    if hidden.device != head.weight.device:
        raise ValueError(f"hidden is on {hidden.device}, head weight on {head.weight.device}; move both to one device")
    compiling = torch.compiler.is_compiling()
    if hidden.device.type == "meta" or (not compiling and type(hidden).__name__ == "FakeTensor"):
        raise ValueError(
            f"hidden: expected a tensor with numbers, got one "
            f"{'on meta' if hidden.device.type == 'meta' else 'that is fake'}, which has "
            "only a shape; load the model to a device first, or trace the call with torch.compile or torch.export"
        )
    _check_low_rank_rows(head.low_rank, hidden, "low_rank rows")


def check_labels(labels: Tensor, hidden: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected an int64 tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(
            f"labels: expected int64 token ids, got {labels.dtype}; convert ids with labels.long() "
            "(probabilities as targets are not supported)"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels: expected shape {list(hidden.shape[:-1])}, hidden's without its last dimension, got "
            f"{list(labels.shape)}; nothing is shifted here: "
            "for input ids as labels give hidden[:, :-1] and labels[:, 1:]"
        )
    if labels.device != hidden.device:
        raise ValueError(f"labels are on {labels.device}, hidden on {hidden.device}; move them with .to(hidden.device)")


def check_reference(
    reference: Reference | None, hidden: Tensor, head: LMHead
) -> tuple[Tensor | None, Head | None, LowRank | None]:
    """The reference's hidden states, its head, None where it is the trained model's, and its low-rank part."""
    if reference is None:
        return None, None, None
    if not isinstance(reference, Reference):
        raise TypeError(
            f"reference: expected fused_losses.Reference(hidden, head=None), got {type(reference).__name__}"
        )
    ref_head = reference.head
    assert ref_head is None or isinstance(ref_head, LMHead)
    if ref_head is not None:
        ref_head = ref_head.local()
        if not shards.same_ranks(head.process_group, ref_head.process_group):
            raise ValueError(
                f"reference head: expected its vocabulary spread over the same ranks as the head's, got {ref_head} for "
                f"{head}; give both LMHead(rows, process_group=group), or whole tensors for both"
            )
    if reference.hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"reference hidden: expected leading shape {list(hidden.shape[:-1])} as hidden, got "
            f"{list(reference.hidden.shape)}; both models must see the same tokens"
        )
    dim = (ref_head or head).weight.shape[1]
    if reference.hidden.shape[-1] != dim:
        raise ValueError(
            f"reference hidden: expected last dimension {dim}, that of {'its' if ref_head else 'the shared'} head, got "
            f"{reference.hidden.shape[-1]}; give Reference(hidden, head) the reference model's own head"
        )
    for tensor, name in (
        (reference.hidden, "reference hidden"),
        (None if ref_head is None else ref_head.weight, "reference head"),
    ):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name} is on {tensor.device}, hidden on {hidden.device}; move it with .to(hidden.device)"
            )
    # Of heads spread over ranks they are compared on all ranks together.
    if ref_head is not None and not head.is_spread and ref_head.vocabulary != head.vocabulary:
        raise ValueError(
            f"reference head: expected V = {head.vocabulary} as the head, got {ref_head.vocabulary}; the KL needs one "
            "vocabulary: resize or pad one head (bias −inf rules padding out)"
        )
    low_rank = None if ref_head is None else ref_head.low_rank
    _check_low_rank_rows(low_rank, reference.hidden, "reference low_rank rows")
    if ref_head is None or ref_head.is_same(head):
        return reference.hidden.detach(), None, low_rank
    bias, b = (None if t is None else t.detach() for t in (ref_head.bias, None if low_rank is None else low_rank.b))
    own = Head(ref_head.weight.detach(), bias, ref_head.logit_scale, ref_head.softcap, b)
    return reference.hidden.detach(), own, low_rank


def _check_low_rank_rows(low_rank: LowRank | None, hidden: Tensor, name: str) -> None:
    if low_rank is not None and low_rank.rows is not None and low_rank.rows.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{name}: expected leading shape {list(hidden.shape[:-1])} as hidden, got {list(low_rank.rows.shape)}; "
            "slice it as hidden was sliced"
        )


def compute_dtype(hidden: Tensor, head: LMHead) -> torch.dtype:
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (hidden.dtype, head.weight.dtype):
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != head.weight.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype}, head weight {head.weight.dtype}; cast one (hidden.to(weight.dtype)) or, "
            "unless one is float64, call under torch.autocast"
        )
    return hidden.dtype

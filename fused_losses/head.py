"""What a language-model head is: a linear map to the vocabulary, then a scale and a soft-cap."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, shards
from .sparse.spectrum import Spectrum, spectrum

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """The low-rank part of a head, LoRA's: adds ``u @ b.T`` to ``hidden @ weight.T``, with ``u = hidden @ a.T`` or
    given rows.

    Whatever LoRA scales with is folded into `a`, `b` or `rows` by the caller; of several adapters the columns stand
    side by side, ``b = cat([b1, b2], 1)`` and `a` or `rows` likewise. Gradients flow to `b` and to `a` or `rows`, where
    these require them, with no [V, D] gradient of a frozen weight.

    Args:
        b: [V, r].
        a: [r, D]; u is computed in its dtype. Or instead
        rows: u [..., r], leading shape as hidden's, for what `a` alone cannot say: PEFT's dropout before it.

    The dtypes are float64, all with a float64 head, or any of float32, bfloat16 and float16. u is rounded to hidden's
    dtype, but beside a reference with an adapter of its own on the same weight; there a wider u makes [N, D + r] copies
    in its dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Cost: 2·N·V·r FLOP for each of the logits, u and b, and [V, r] sums in fp32. No [V, D] copy of the weight, but in
    the GPU kernels of sparse mode and of calls without gradients, which take [W, B] in one, V·(D + r) numbers for the
    call.
    """

    b: Tensor
    a: Tensor | None = None
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.a is None) == (self.rows is None):
            got = "neither" if self.a is None else "both"
            raise ValueError(f"low_rank: expected either a [r, D] or rows [..., r], got {got}")
        name, other = ("a", self.a) if self.rows is None else ("rows", self.rows)
        for tensor, label in ((self.b, "b"), (other, name)):
            if not isinstance(tensor, Tensor):
                remedy = "; give its .weight" if isinstance(tensor, nn.Module) else ""
                raise TypeError(f"low_rank {label}: expected a tensor, got {type(tensor).__name__}{remedy}")
            if type(tensor).__name__ == "DTensor":
                raise TypeError(f"low_rank {label}: is a DTensor, of which this rank holds one shard; give it gathered")
            if tensor.dtype not in FLOATING:
                raise TypeError(f"low_rank {label}: expected one of {_names(FLOATING)}, got {tensor.dtype}")
        if self.b.dim() != 2 or self.b.shape[1] == 0:
            raise ValueError(f"low_rank b: expected shape [V, r] with r ≥ 1, got {list(self.b.shape)}")
        rank = self.b.shape[1]
        if self.a is not None and (self.a.dim() != 2 or self.a.shape[0] != rank):
            swapped = "; it may be transposed, give a.T" if self.a.dim() == 2 and self.a.shape[1] == rank else ""
            raise ValueError(
                f"low_rank a: expected shape [r, D] with r = {rank} as b, got {list(self.a.shape)}{swapped}"
            )
        if self.rows is not None and (self.rows.dim() == 0 or self.rows.shape[-1] != rank):
            raise ValueError(
                f"low_rank rows: expected shape [..., r] with r = {rank} as b, got {list(self.rows.shape)}"
            )
        if other.device != self.b.device:
            raise ValueError(f"low_rank {name} is on {other.device}, b on {self.b.device}; move both to one device")
        if (other.dtype == torch.float64) != (self.b.dtype == torch.float64):
            raise TypeError(f"low_rank {name} is {other.dtype}, b {self.b.dtype}; float64 goes with float64 alone")

    def __repr__(self) -> str:
        name, other = ("a", self.a) if self.rows is None else ("rows", self.rows)
        return f"LowRank(b={list(self.b.shape)} {self.b.dtype}, {name}={list(other.shape)} {other.dtype})"

    def inputs(self, hidden: Tensor) -> Tensor:
        """u [..., r]."""
        return self.rows if self.a is None else nn.functional.linear(hidden.to(self.a.dtype), self.a)


@dataclass(frozen=True, eq=False, repr=False)
class LMHead:
    """The head of a language model: ``logits = softcap(logit_scale · (hidden @ weight.T + bias))``.

    ``softcap(z) = softcap · tanh(z / softcap)`` where `softcap` is given (Gemma 2), the identity otherwise;
    `logit_scale` is the factor of Cohere, Granite and others. The head holds references, it copies nothing,
    so gradients of `weight` and `bias` arrive at the caller's own parameters; a tensor that does not require
    a gradient is frozen and costs no work in backward.

    Args:
        weight: [V, D], float64, float32, bfloat16 or float16.
        bias: [V] or None, on the device of `weight`. Entries of −inf rule tokens out, given a positive logit_scale and
            no soft-cap (which would make a finite logit of them). As a label such a token has an infinite nll, with
            the finite gradient of a probability of 0.
        logit_scale: finite and not zero.
        softcap: positive, or None.
        low_rank: `LowRank`, or None: LoRA on the head, logits = softcap(logit_scale · (hidden Wᵀ + u Bᵀ + bias)).
        process_group: a torch.distributed group over whose ranks the vocabulary is spread: `weight` and `bias` are this
            rank's rows (their number may differ, and be 0 on some), the vocabulary is the concatenation in rank order.
            See below. A group of one rank is as None.

    Weight and bias may be DTensors on a mesh of one dimension: with Shard(0) that is a `process_group`, the mesh's;
    with Replicate this rank's copy is the head.

    **Spread over ranks** (tensor parallelism). All ranks call, with the same hidden states, labels (global ids),
    options and upstream gradients; what can be compared cheaply is, and a difference raises on all. Results are those
    of the whole vocabulary, the same on all ranks to the bit, the bounds of `gradient_report` too. Each rank gets the
    gradient of its own rows and the whole gradient of the hidden states. A reference head of its own must be spread in
    the same way.

    Gradients are exact or sparse, by the same options as of one rank. Entries are chosen against the log-sum-exp of all
    ranks, so together the ranks keep what one would; each keeps those of its rows. On a CPU the compiled kernels take
    the rank's share ("cpu"). On a GPU Triton's or the CUDA kernels take chunks of the rank's logits, as their scan,
    which forms none, would choose entries before the other ranks' sums are known. Divergences with β > 0 are PyTorch's
    everywhere, products full (`scan_note` says so).

    Communication: per call 13 integers are gathered; per sweep over the tokens and chunk of these one all-gather of 4
    numbers per token and rank (fp32; entropy 1 more, top-k entropy k more, a reference 5, its entropy 1 more), so a
    chunk of 96 MiB of this rank's logits (on a GPU 256) waits once; and one all-reduce of the [N, D] gradient of hidden
    in fp32 (a frozen head under `token_losses`: in forward, with a reference 2). Sparse gradients gather 4 more per
    chunk (with a reference 8), of what the entries leave out, in all 2 of what is rounded, 1 or 2 more where losses of
    both kinds or single logits have weights, and per call some 20 numbers; the directions of the head are found with
    one all-reduce of D² numbers, when it is new or has moved far. Then the gradient of tokens that are exact travels by
    itself. Exact ones: objectives whose weights depend on single tokens sweep once, a trainable head under
    `token_losses` twice.
    Logits and entries never travel. GEMMs: as of one rank, each of V / ranks columns.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    low_rank: LowRank | None = None
    process_group: Any = None

    def __post_init__(self) -> None:
        if self.process_group is not None:
            shards.check_group(self.process_group)
        check_weight(self.weight, "head weight", self.is_spread)
        vocabulary = self.weight.shape[0]
        if self.bias is not None:
            if not isinstance(self.bias, Tensor):
                raise TypeError(f"head bias: expected a [V] tensor or None, got {type(self.bias).__name__}")
            if tuple(self.bias.shape) != (vocabulary,):
                raise ValueError(
                    f"head bias: expected shape [{vocabulary}], one number per row of weight, "
                    f"got {list(self.bias.shape)}"
                )
            if self.bias.dtype not in FLOATING:
                raise TypeError(f"head bias: expected a floating dtype, got {self.bias.dtype}")
            if self.bias.device != self.weight.device:
                raise ValueError(
                    f"head bias is on {self.bias.device}, head weight on {self.weight.device}; move both to one device"
                )
        self._check_dtensors()
        scale = checks.number(self.logit_scale)
        if scale is None or scale != scale or abs(scale) == float("inf") or scale == 0:
            raise ValueError(
                f"logit_scale: expected a finite number other than 0, got {self.logit_scale!r}; leave it 1.0 for none"
            )
        cap = None if self.softcap is None else checks.number(self.softcap)
        if self.softcap is not None and (cap is None or not 0 < cap < float("inf")):
            raise ValueError(f"softcap: expected a finite number > 0, or None for no soft-cap, got {self.softcap!r}")
        if scale is not self.logit_scale or cap is not self.softcap:  # of numpy, or tensors
            object.__setattr__(self, "logit_scale", scale)
            object.__setattr__(self, "softcap", cap)
        if self.low_rank is not None:
            if self.process_group is not None or shards.is_dtensor(self.weight):
                raise ValueError(
                    "low_rank: LoRA on a head whose vocabulary is spread over ranks is not supported; leave one of "
                    "the two"
                )
            _check_low_rank(self.low_rank, self.weight)

    def _check_dtensors(self) -> None:
        weight: Any = self.weight
        bias: Any = self.bias
        distributed = [shards.is_dtensor(t) for t in (weight, bias) if t is not None]
        if not any(distributed):
            return
        if not all(distributed):
            kinds = [type(t).__name__ for t in (weight, bias)]
            raise TypeError(f"head weight, bias: expected both to be DTensors or none, got {kinds}; distribute both")
        group = shards.group_of(weight, "head weight")
        if bias is not None and shards.group_of(bias, "head bias") is not group:
            raise TypeError(
                f"head bias: expected the mesh and placements of the weight, {weight.device_mesh} {weight.placements}, "
                f"got {bias.device_mesh} {bias.placements}; distribute both alike"
            )
        if self.process_group is not None:
            raise TypeError(
                "process_group: is known from the DTensor given as weight; leave it out, or give weight.to_local()"
            )

    def local(self) -> LMHead:
        """This rank's part of DTensors as plain tensors, differentiably; other heads as they are."""
        if not shards.is_dtensor(self.weight):
            return self
        group = shards.group_of(self.weight, "head weight")
        weight, bias = (None if t is None else t.to_local() for t in (self.weight, self.bias))  # type: ignore[attr-defined]
        return replace(self, weight=weight, bias=bias, process_group=group)

    def spectrum(self) -> Spectrum | None:
        """Leading singular directions of `weight` minus its mean row, and a bound of what is left without them.

        Sparse gradients take it for their certificate (`GradientReport.hidden_bound`) by themselves, and keep it as
        long as the weight does not change; here it is to look at. A large `sigma`, beside `values`, says that sixteen
        directions do not have what tells tokens apart, and that more tokens will need exact gradients.

        Returns:
            `Spectrum`; None where the weight is not finite. `low_rank` is not in it.

        Raises:
            ValueError: for a head that is spread over ranks.

        Cost: 2·V·D² FLOP, and some 3·D³ in float64; no [V, D] copy.
        """
        if self.is_spread or shards.is_dtensor(self.weight):
            raise ValueError("spectrum: the rows of this head are spread over ranks; gather them into one LMHead")
        return spectrum(self.weight)

    @property
    def is_spread(self) -> bool:
        """Whether the rows are those of one rank of several."""
        return shards.is_spread(self.process_group)

    def __repr__(self) -> str:
        bias = "None" if self.bias is None else f"[{self.vocabulary}]"
        group = ""
        if self.process_group is not None:
            ranks = torch.distributed.get_process_group_ranks(self.process_group)
            group = f", process_group of ranks {ranks}"
        return (
            f"LMHead(weight={list(self.weight.shape)} {self.weight.dtype}, bias={bias}, "
            f"logit_scale={self.logit_scale}, softcap={self.softcap}{group}"
            f"{'' if self.low_rank is None else f', low_rank={self.low_rank}'})"
        )

    @property
    def vocabulary(self) -> int:
        """The rows of `weight`: V, or with a process_group this rank's share."""
        return self.weight.shape[0]

    def is_same(self, other: LMHead) -> bool:
        """Whether both heads, low-rank parts aside, map equal hidden states to equal logits because they are the same
        tensors."""
        return (
            _same_tensor(self.weight, other.weight)
            and (self.bias is other.bias or (self.bias is not None and other.bias is not None
                                             and _same_tensor(self.bias, other.bias)))
            and (self.logit_scale, self.softcap) == (other.logit_scale, other.softcap)
            and shards.same_ranks(self.process_group, other.process_group)
        )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Reference:
    """The frozen reference model at the same tokens, given by its last hidden states.

    ``p_ref = softmax(head(hidden))``. Nothing here ever receives a gradient.

    Args:
        hidden: [..., D_ref], leading shape as the labels'.
        head: an `LMHead`, a [V, D_ref] tensor, an `nn.Linear`, or None: the head of the trained model, which
            is the case of LoRA and of every fine-tuning with a frozen head. With the same head the difference
            of both logits is computed as ``(hidden − reference.hidden) @ weight.T``, so rounding that is common
            to both cancels. None leaves a low-rank part of the trained head out: the adapter is off. An `LMHead` of the
            same weight with a low-rank part of its own is another adapter, such as a frozen copy; the difference is
            then computed in the same way.
    """

    hidden: Tensor
    head: LMHead | Tensor | nn.Linear | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.hidden, Tensor):
            raise TypeError(f"reference hidden: expected a tensor [..., D], got {type(self.hidden).__name__}")
        if self.hidden.layout != torch.strided:
            raise TypeError(f"reference hidden: expected a dense tensor, got one of layout {self.hidden.layout}")
        if self.hidden.dtype not in FLOATING:
            raise TypeError(f"reference hidden: expected one of {_names(FLOATING)}, got {self.hidden.dtype}")
        if self.head is not None:
            object.__setattr__(self, "head", as_head(self.head, "reference head"))

    def __repr__(self) -> str:
        return f"Reference(hidden={list(self.hidden.shape)} {self.hidden.dtype}, head={self.head})"


def _check_low_rank(low_rank: object, weight: Tensor) -> None:
    if not isinstance(low_rank, LowRank):
        raise TypeError(f"low_rank: expected fused_losses.LowRank(b, a=None, rows=None), got {type(low_rank).__name__}")
    b, a = low_rank.b, low_rank.a
    if b.shape[0] != weight.shape[0]:
        raise ValueError(
            f"low_rank b: expected shape [{weight.shape[0]}, r], a row for each row of weight, got {list(b.shape)}"
        )
    if a is not None and a.shape[1] != weight.shape[1]:
        raise ValueError(f"low_rank a: expected shape [r, {weight.shape[1]}], D of weight, got {list(a.shape)}")
    if b.device != weight.device:
        raise ValueError(f"low_rank b is on {b.device}, head weight on {weight.device}; move both to one device")
    if (b.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(f"low_rank b is {b.dtype}, head weight {weight.dtype}; float64 goes with float64 alone")


def as_head(head: object, name: str = "head") -> LMHead:
    """An `LMHead` from an `LMHead`, a [V, D] tensor, or a plain `nn.Linear`."""
    if isinstance(head, LMHead):
        return head
    if isinstance(head, Tensor):
        return LMHead(head)
    if isinstance(head, nn.Linear) and _is_plain(head):
        return LMHead(head.weight, head.bias)
    what = f"{type(head).__module__}.{type(head).__qualname__}"
    if isinstance(head, nn.Linear):
        what += " with a forward or hooks of its own"
    remedy = (
        "what it does besides weight and bias would be dropped silently: merge an adapter first, take the active "
        "module out of a wrapper, or give fused_losses.LMHead(weight, bias, logit_scale, softcap)"
        if isinstance(head, nn.Module)
        else "give fused_losses.LMHead(weight, bias, logit_scale, softcap)"
    )
    raise TypeError(f"{name}: expected an LMHead, a [V, D] tensor or a plain torch.nn.Linear, got {what}; {remedy}")


def _is_plain(linear: nn.Linear) -> bool:
    """Whether calling it is weight and bias and nothing else."""
    changed = type(linear).forward is not nn.Linear.forward or "forward" in vars(linear)
    return not (changed or linear._forward_hooks or linear._forward_pre_hooks)


def calls_other_ranks(head: object) -> bool:
    """Whether a call with this head or reference talks to other ranks."""
    if isinstance(head, Reference):
        head = head.head
    if isinstance(head, LMHead):
        return head.process_group is not None or shards.is_dtensor(head.weight)
    return shards.is_dtensor(head.weight if isinstance(head, nn.Linear) else head)


def check_weight(weight: object, name: str, spread: bool = False) -> None:
    if not isinstance(weight, Tensor):
        remedy = "; give its .weight" if isinstance(weight, nn.Module) else ""
        raise TypeError(f"{name}: expected a [V, D] tensor, got {type(weight).__name__}{remedy}")
    if weight.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {weight.layout}; give weight.to_dense()")
    if weight.dim() != 2 or 0 in weight.shape[spread:]:
        sharded = (
            "; a sharded or offloaded parameter (ZeRO-3, FSDP) must be gathered first" if weight.numel() == 0 else ""
        )
        raise ValueError(f"{name}: expected shape [V, D] with V, D ≥ 1, got {list(weight.shape)}{sharded}")
    if weight.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected one of {_names(FLOATING)}, got {weight.dtype}; a quantised head must be dequantised "
            "first"
        )


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    if a is b or torch.compiler.is_compiling():  # while compiling there are no addresses; `compiled.Call` looks again
        return a is b
    return (
        a.device == b.device and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        and a.data_ptr() == b.data_ptr() and a.device.type != "meta"
    )  # fmt: skip


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)

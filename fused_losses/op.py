"""`token_losses`, the one entrance: the contract, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .checks import MissingAttribute
from .compiled import capturable
from .head import LMHead, Reference
from .preparation import Outputs, prepare
from .problem import OPTIONAL, Statistics
from .sparse.certificate import TOLERANCE, GradientReport
from .tokens import Tokens, check_wanted, fill_of
from .validation import Options

ALWAYS = frozenset({"entropy", "reference_entropy"})
ON_DEMAND = ("rank", "log_p2", "topk_entropy")


@dataclass
class TokenLosses:
    """What `token_losses` returns; every field has the shape of `labels`, `logits_at` [..., k].

    `nll`, `kl`, `lse`, `logits_at`, `divergence` and, if asked for, `entropy` are differentiable. Where a label is
    ignored all fields are 0, `prediction` and `rank` are −1. Statistics are float32 (float64 for float64 input), in
    nats. Without a reference `kl`, `reference_nll` and `reference_entropy` are None; without `ids` `logits_at` is,
    without `beta` `divergence`. `gradient_report` says how gradients are formed, and after backward with which bound.

    `rank`, `log_p2` and `topk_entropy` take a pass of their own over the logits. Named in `wanted=` they come with the
    others; else they are computed when first read, by another forward product, without a gradient. For that the record
    keeps the hidden states of the call: keep its fields rather than it where memory counts.
    """

    nll: Tensor
    kl: Tensor | None
    entropy: Tensor
    prediction: Tensor
    reference_nll: Tensor | None
    reference_entropy: Tensor | None
    gradient_report: GradientReport
    lse: Tensor
    logits_at: Tensor | None = None
    divergence: Tensor | None = None
    _later: Callable[[str], Tensor] | None = field(default=None, repr=False, compare=False)

    def __getattr__(self, name: str) -> Tensor:
        later = vars(self).get("_later")
        if name not in ON_DEMAND:
            if name.startswith("_"):
                raise AttributeError(name)
            there = (*FIELDS, *ON_DEMAND, "gradient_report")
            raise AttributeError(
                f"out.{name}: there is no such field{checks.meant(name, there)}; there are {', '.join(there)}"
            )
        if later is None:
            raise MissingAttribute(
                f"out.{name}: was not asked for, and in a compiled graph or of a copy it cannot be had later; call "
                f'token_losses(..., wanted={{"{name}"}})'
            )
        value = later(name)
        setattr(self, name, value)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_later": None}


@capturable
def token_losses(
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    labels: Tensor,
    *,
    reference: Reference | None = None,
    ids: Tensor | None = None,
    beta: float | None = None,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    wanted: Iterable[str] = (),
    ignore_index: int = -100,
    gradient: str = "auto",
    tolerance: float = TOLERANCE,
    backend: str = "auto",
    scan: str = "auto",
) -> TokenLosses:
    """Per-token losses of a language-model head, without ever holding [tokens × vocabulary] logits.

    With z = softcap(logit_scale · (hidden Wᵀ + bias)) / temperature, p = softmax(z) and p_ref likewise of the
    reference::

        lse[t] = logsumexp(z[t])                                      differentiable
        nll[t] = lse[t] − z[t, labels[t]]                             differentiable
        logits_at[t, j] = z[t, ids[t, j]]                             differentiable; None without ids
        kl[t]  = KL(p_ref[t] ‖ p[t])                                  differentiable; None without reference
        divergence[t] = β KL(p_ref ‖ m) + (1 − β) KL(p ‖ m), m = β p_ref + (1 − β) p;
            β = 0: KL(p_ref ‖ p), β = 1: KL(p ‖ p_ref)                differentiable; None without beta
        entropy[t] = −Σ p log p                                       differentiable with entropy_gradient=True
        prediction[t] = argmax z[t];  reference_nll, reference_entropy: nll and entropy of p_ref
        rank[t]: how many logits are larger than the label's;  log_p2[t] = log Σ p²

    and ∂/∂z = (a + b + l) p − a onehot(label) − b p_ref for the upstream gradients a of nll, b of kl and l of lse,
    which may differ from token to token and may have either sign. Gradients flow to hidden, weight and bias, where
    these require them, and to a low-rank part of the head (`LowRank`), which adds u Bᵀ to the product; never to the
    reference.

    Args:
        hidden: [..., D] float64, float32, bfloat16 or float16, of the dtype of the weight (under autocast both
            are cast to its dtype).
        head: `LMHead`, or a [V, D] tensor, or an `nn.Linear`.
        labels: int64 [...], aligned with hidden: labels[t] is the token that hidden[t] predicts. Nothing is shifted.
        reference: hidden states of the frozen reference model at the same tokens; `Reference(hidden)` for the
            same head.
        ids: int64 [..., k], k ≤ 128: whose logits to return. −100 is no id: its logit is 0, without a gradient.
        beta: of the divergence, in [0, 1], as TRL and GKD have it; needs a reference.
        temperature: > 0; divides the logits of both models, in every field.
        entropy_gradient: whether the entropy is differentiable.
        wanted: of "rank", "log_p2" and "topk_entropy" (of the 20 largest probabilities) those that shall come with the
            same pass.
        ignore_index: tokens with this label are removed before any work.
        gradient: "exact"; "sparse": sparse-plus-rank-one softmax with a certified error (`sparse.softmax`), values are
            those of "exact"; "auto": sparse where the products are of bfloat16 or float16 (autocast included) and V ≥
            8192, but for a frozen head on a GPU, else exact. Gradients of the entropy, and of a divergence with β > 0,
            have no sparse form: calls that ask for them are exact, as the report says.
        tolerance: of sparse gradients: bound on the relative L2 error of the gradient of hidden, all tokens and the
            caller's upstream weights together, in (0, 1); 1.5 times it bounds the relative L1 error of the gradient of
            the logits. Tokens that would break either get exact gradients. Where the first cannot be proved (less than
            128 tokens and a trained head) the second alone holds. Ignored for exact gradients. Raising it above the
            default saves neither memory nor time. `out.gradient_report` has the bounds that were reached. The default
            was measured to give relative L2 errors of 0.2 to 0.5 % for the gradients of nll (docs/method.md).
        backend: "auto", "triton" or "cuda" (kernels for GPUs), "cpu" (compiled kernels), "torch" (chunked, any device),
            or "reference" (full logits; exact; for checks on small inputs). `fused-losses info` says what "auto" takes.
        scan: "int8": the products of the forward are of 8-bit numbers, and the logits whose p stands out are computed
            again from the full ones: with AVX-512 VNNI a fraction of the time (without, more), and values that are off
            by a tenth of what bfloat16 logits are (docs/method.md). `gradient_report.value_error` says how much that
            was on tokens that were measured. Where it is too much products are full, and so they are for exact
            gradients and where such products cannot be had; the report says why. Certified bounds then hold for the
            gradient of the values as computed. Backends "cpu", and those for GPUs without a reference and in half
            precision (on an H200 no faster than full ones). "full", and for now "auto": full products.

    A head spread over the ranks of a process group (`LMHead`) takes all of these but "reference" and products of 8-bit
    numbers.

    Returns:
        `TokenLosses`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came, before any work.

    Cost in GEMMs of 2·N·D·V FLOP, forward and backward together. Sparse: 1, with a reference 2, and 2 sparse products.
    Exact: 4 (frozen head: 2); with a reference 6 (4). The objectives of this package need one fewer where their weights
    depend on single tokens only. Tokens with exact gradients in sparse mode cost as much as in exact mode. A frozen
    head with a trained low-rank part: exact 3, with a reference 5. lse and logits_at add a gather of N·k rows of the
    head. With a frozen head the gradient of the entropy and of the divergence cost one each.
    Sparse gradients look at a head once, for 2·V·D² FLOP, and again when it has moved far; what they know is kept, 96
    bytes per row of the head. Memory: 96 MiB of chunk buffers; sparse: 8 bytes per entry, of which there are 50 to 300
    per token of ordinary text; exact: the gradients in fp32, and with a frozen head [N, D] rows per differentiable
    loss.

    `torch.compile(fullgraph=True)`: the call is part of the graph, with the same numbers; the number of tokens may
    change, a new logit_scale, softcap, temperature, beta or tolerance compiles anew. The report has mode and tolerance
    only. Labels and ids out of range are reported when the graph runs. Without fullgraph the call is a graph break and
    runs eagerly.

    Source: chunked cross-entropy with the gradient taken chunk by chunk is known from Liger Kernel and
    others; the per-token form with upstream vectors, and the difference form of the KL, are this package's. beta and
    temperature as in arXiv 2306.13649 and TRL.
    """
    options = Options(ignore_index, gradient, tolerance, backend, scan)
    asked, top_k = check_wanted(wanted, 20)
    outputs = Outputs(ids, beta, temperature, entropy_gradient, asked=lambda: sorted(asked))
    tokens = prepare(hidden, head, labels, reference, options, outputs)
    out = tokens.losses(ALWAYS | asked, top_k)
    found = {name: _in_place(tokens, out, name) for name in (*FIELDS, *(name for name in ON_DEMAND if name in asked))}
    if tokens.problem.divergence_is_kl:
        found["divergence"] = found["kl"]
    late = {name: found.pop(name) for name in ON_DEMAND if name in found}
    later = None if torch.compiler.is_compiling() else _Later(tokens, wanted=asked)
    result = TokenLosses(**found, gradient_report=tokens.report, _later=later)
    for name, value in late.items():
        setattr(result, name, value)
    return result


FIELDS = ("nll", "kl", "entropy", "prediction", "reference_nll", "reference_entropy", "lse", "logits_at", "divergence")
LOSSES = ("nll", "kl", "reference_nll", "divergence")
assert set(ON_DEMAND) == set(OPTIONAL) - ALWAYS


def _in_place(tokens: Tokens, out: Statistics, name: str) -> Tensor | None:
    values = tokens.in_place(getattr(out, name), fill_of(name))
    return tokens.reported(values) if values is not None and name in LOSSES else values


class _Later:
    """Computes what was not asked for, from the tensors of the call."""

    def __init__(self, tokens: Tokens, wanted: frozenset[str]) -> None:
        self.tokens, self.wanted = tokens, wanted
        self.versions = self._versions()

    def _versions(self) -> list[int | None]:
        tensors = [t for t in self.tokens.problem.tensors() if t is not None]
        return [None if t.is_inference() else t._version for t in tensors]

    def __call__(self, name: str) -> Tensor | None:
        if self._versions() != self.versions:
            names = ", ".join(f'"{each}"' for each in sorted({*self.wanted, name} & {*ON_DEMAND}))
            raise RuntimeError(
                f"out.{name}: the weights or hidden states of the call have been changed in place since (an optimizer "
                f"step does), so that it would be of others; read it before, or call token_losses(..., "
                f"wanted={{{names}}})"
            )
        with torch.no_grad():
            return _in_place(self.tokens, self.tokens.statistics(frozenset({name})), name)

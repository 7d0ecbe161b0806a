"""`token_losses`, the one entrance: the contract, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .compiled import capturable
from .head import LMHead, Reference
from .preparation import prepare
from .sparse.certificate import TOLERANCE, GradientReport
from .tokens import ALL_STATISTICS


@dataclass
class TokenLosses:
    """What `token_losses` returns; every field has the shape of `labels`.

    `nll` and `kl` are differentiable. Where a label is ignored all fields are 0, `prediction` is −1.
    Statistics are float32 (float64 for float64 input), in nats. Without a reference `kl`, `reference_nll` and
    `reference_entropy` are None. `gradient_report` says how gradients are formed, and after backward with which bound.
    """

    nll: Tensor
    kl: Tensor | None
    entropy: Tensor
    prediction: Tensor
    reference_nll: Tensor | None
    reference_entropy: Tensor | None
    gradient_report: GradientReport


@capturable
def token_losses(
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    labels: Tensor,
    *,
    reference: Reference | None = None,
    ignore_index: int = -100,
    gradient: str = "auto",
    tolerance: float = TOLERANCE,
    backend: str = "auto",
) -> TokenLosses:
    """Per-token losses of a language-model head, without ever holding [tokens × vocabulary] logits.

    With z = softcap(logit_scale · (hidden Wᵀ + bias)), p = softmax(z) and p_ref likewise of the reference::

        nll[t] = logsumexp(z[t]) − z[t, labels[t]]                    differentiable
        kl[t]  = KL(p_ref[t] ‖ p[t])                                  differentiable; None without reference
        entropy[t] = −Σ p log p,  prediction[t] = argmax z[t]
        reference_nll, reference_entropy: the same of p_ref

    and ∂/∂z = (a + b) p − a onehot(label) − b p_ref for the upstream gradients a of nll and b of kl, which may
    differ from token to token and may have either sign. Gradients flow to hidden, weight and bias, where these
    require them, and to a low-rank part of the head (`LowRank`), which adds u Bᵀ to the product; never to the reference.

    Args:
        hidden: [..., D] float64, float32, bfloat16 or float16, of the dtype of the weight (under autocast both
            are cast to its dtype).
        head: `LMHead`, or a [V, D] tensor, or an `nn.Linear`.
        labels: int64 [...], aligned with hidden: labels[t] is the token that hidden[t] predicts. Nothing is shifted.
        reference: hidden states of the frozen reference model at the same tokens; `Reference(hidden)` for the
            same head.
        ignore_index: tokens with this label are removed before any work.
        gradient: "exact"; "sparse": sparse-plus-rank-one softmax with a certified error (`sparse.softmax`), values are
            those of "exact"; "auto": sparse where the products are of bfloat16 or float16 (autocast included) and V ≥ 8192,
            else exact.
        tolerance: of sparse gradients: bound on ‖error‖₁ / ‖gradient‖₁ of the gradient of the logits, all tokens and the
            caller's upstream weights together, in (0, 1). Tokens that would break it get exact gradients. Of no
            consequence for exact gradients; above the default entries are no fewer.
            `out.gradient_report` has the bound that was reached. The default was measured to give relative L2
            errors of 0.2 to 0.7 % for the gradients of nll (docs/method.md).
        backend: "auto", "triton" or "cuda" (kernels for GPUs), "cpu" (compiled kernels), "torch" (chunked, any device), or
            "reference" (full logits; exact; for checks on small inputs). `fused-losses info` says what "auto" takes.

    A head spread over the ranks of a process group (`LMHead`) takes "exact" or "auto", which is exact there, and "torch" or
    "auto".

    Returns:
        `TokenLosses`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came, before any work.

    Cost in GEMMs of 2·N·D·V FLOP, forward and backward together. Sparse: 1, with a reference 2, and 2 sparse products. Exact: 4
    (frozen head: 2); with a reference 6 (4). The objectives of this package need one fewer where their weights depend
    on single tokens only. Tokens with exact gradients in sparse mode cost as much as in exact mode. A frozen head with a trained
    low-rank part: exact 3, with a reference 5.
    Memory: 96 MiB of chunk buffers; sparse: 8 bytes per entry, of which there are 50 to 300 per
    token of ordinary text; exact: the gradients in fp32, and with a frozen head [N, D] rows per loss.

    `torch.compile(fullgraph=True)`: the call is part of the graph, with the same numbers; the number of tokens may change, a
    new logit_scale, softcap or tolerance compiles anew. The report has mode and tolerance only. Labels out of range are
    reported when the graph runs. Without fullgraph a call is a graph break and runs as in eager mode.

    Source: chunked cross-entropy with the gradient taken chunk by chunk is known from Liger Kernel and
    others; the per-token form with two upstream vectors, and the difference form of the KL, are this package's.
    """
    tokens = prepare(hidden, head, labels, reference, ignore_index, gradient, backend, tolerance)
    out = tokens.losses(ALL_STATISTICS)
    return TokenLosses(
        nll=tokens.in_place(out.nll),
        kl=tokens.in_place(out.kl),
        entropy=tokens.in_place(out.entropy),
        prediction=tokens.in_place(out.prediction, fill=-1),
        reference_nll=tokens.in_place(out.reference_nll),
        reference_entropy=tokens.in_place(out.reference_entropy),
        gradient_report=tokens.report,
    )

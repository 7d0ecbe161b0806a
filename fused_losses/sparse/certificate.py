"""What is certified of sparse gradients: how much the entries leave out, which tokens must be exact, the report.

In L2, with directions of the head (`spectrum`): a row of dx is off by at most ‖E_t‖₂ σ, E_t what row t leaves out minus
m q. The root of the sum of their squares, over the norm of dx as computed minus it, bounds the relative error of dx.
Tokens with the largest share get exact gradients, from logits computed once more, until the bound is within the
tolerance.

In L1: m q differs from the rest of a row by at most m + m; a row's whole gradient of the logits has L1 norm
2(1 − p[label]). So the relative L1 error of the gradient of all logits is at most Σ|a_t| 2 m[t] / Σ|a_t| 2(1 −
p_t[label]). It is held to `L1_SHARE` times the tolerance: for the gradient of the weight, and where there are no
directions. docs/method.md has the derivations and what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Int8, Tails

# Measured on SmolLM2 (docs/method.md): within it no token of ordinary text needs exact gradients.
TOLERANCE = 0.1
# The bound in L1 is held to so many times the tolerance.
L1_SHARE = 1.5
# θ, and what it is multiplied by where there are directions, no reference and a frozen head: directions make the error
# of dx smaller, not that of dW.
THRESHOLD = 1.05e-4
COARSER = 1.5
# Beyond this vocabulary, that of the model θ was chosen on, θ falls with 1/√V: what is left out grows with its number.
CHOSEN_ON = 49152
CAPACITY = 2048
# Of "auto": below, most entries could be above the threshold, and there is little to save.
SMALLEST_VOCABULARY = 8192


def parameters(tolerance: float, vocabulary: int, coarser: bool = False) -> tuple[float, int]:
    """θ and the most entries per token. The bounds fall with √θ or faster, measured; a coarser θ than the default saves
    little."""
    finer = max(min(1.0, tolerance / TOLERANCE) ** 2, 1e-12)
    capacity = min(vocabulary, max(CAPACITY, min(int(CAPACITY * finer**-0.65), vocabulary // 8)))
    of_vocabulary = min(1.0, math.sqrt(CHOSEN_ON / max(1, vocabulary)))
    return THRESHOLD * of_vocabulary * finer * (COARSER if coarser else 1), capacity


@dataclass
class GradientReport:
    """How the gradient of one call was formed. The certified numbers come with backward, which knows the upstream
    weights.

    Attributes:
        mode: "sparse"; "exact", where nothing is approximated; "none", where no gradient was asked for.
        tolerance: the bound asked for, None but in sparse mode.
        tokens: N, without ignored ones. It and the numbers below are None where `torch.compile` has made `token_losses`
            part of a graph; those of objectives are filled in also there.
        entries: kept in S, all tokens together; of a head that is spread over ranks, on all of them.
        saved_bytes: kept for backward on this rank besides the inputs: S, what belongs to it, and gradients taken in
            forward of tokens that are too flat for it.
        exact_tokens: how many got exact gradients; None before backward.
        bound: certified bound of ‖error‖₁ / ‖gradient‖₁ for the gradient of the logits as computed; rounding comes on
            top. At most 1.5 · `tolerance`; 0 where all tokens are exact, NaN where a loss or an upstream gradient is
            not finite, None before backward.
        hidden_bound: certified bound of ‖error‖₂ / ‖gradient‖₂ for the gradient of the hidden states, all tokens
            together: at most `tolerance`. With low-rank rows in the place of `a`, and in a compiled graph with a
            low-rank part, that of hidden and these rows side by side. None besides where nothing was proved: without a
            gradient of the hidden states, and in a call of less than 128 tokens whose head is trained.
        weight_bound: the same for the gradient of the weight, in the Frobenius norm, with what rounding it to its dtype
            adds; nothing is held to it. 0 where all tokens are exact: what products in half precision round of exact
            gradients (0.2 % of dW in bfloat16) is never counted. On a CPU it fails with a probability of 8e-6 a call at
            the very worst, and is 3 to 6 times the error on real text, on a GPU some 8 times. None where there is no
            such gradient, or nothing was proved.
        note: why gradients are exact where sparse ones were asked for, or would have been by default.
        scan: "full"; "int8": the products of the forward were of 8-bit numbers, from the first token on at least. None
            where 8 bits are asked for and `torch.compile` has made `token_losses` part of a graph.
        value_error: mean |error of the nll| of that, in nats, measured on some tokens of the call; not a bound. None
            for "full".
        scan_note: why products are full where scan="int8" was asked for, or for how many hidden states or rows of the
            head they are.
    """

    mode: str
    tokens: int | None
    tolerance: float | None = None
    entries: int | None = 0
    saved_bytes: int | None = 0
    exact_tokens: int | None = None
    bound: float | None = None
    hidden_bound: float | None = None
    weight_bound: float | None = None
    note: str | None = None
    scan: str | None = "full"
    value_error: float | None = None
    scan_note: str | None = None

    def begin(self, tolerance: float | None, wanted: bool) -> bool:
        """Whether gradients will be sparse; notes it. `wanted`: whether there will be any."""
        sparse = tolerance is not None and wanted and self.tokens != 0
        if sparse:
            self.mode, self.tolerance = "sparse", tolerance
        elif wanted:
            self.mode, self.exact_tokens = "exact", self.tokens
            self.bound = self.hidden_bound = self.weight_bound = 0.0
        return sparse

    def note_scan(self, int8: Int8 | None) -> None:
        """After a scan: with which products it was."""
        if int8 is not None:
            self.value_error, self.scan_note = int8.value_error, int8.note
            self.scan = "full" if int8.note is not None and int8.value_error is None else "int8"

    def __str__(self) -> str:
        text = self._of_gradients()
        if self.value_error is not None:
            text += f"; products of 8-bit numbers, the nll off by {self.value_error:.2g} nats on average where measured"
        return f"{text}; full products, as {self.scan_note}" if self.scan_note else text

    def _of_gradients(self) -> str:
        if self.mode != "sparse":
            kind = "exact" if self.mode == "exact" else "no"
            text = f"{kind} gradients" + ("" if self.tokens is None else f" for {self.tokens} tokens")
            return f"{text}, as {self.note}" if self.note and self.mode == "exact" else text
        limit = f"tolerance {100 * self.tolerance:.3g} %"
        if self.tokens is None:
            return f"sparse gradients ({limit})"
        if self.bound is not None and math.isnan(self.bound):
            return f"sparse gradients: no bound, as a loss or an upstream gradient is not finite ({limit})"
        if self.exact_tokens == self.tokens:
            return f"sparse gradients: all {self.tokens} tokens exact, as too few of their entries stand out ({limit})"
        text = f"sparse gradients: {self.tokens} tokens, {self.entries / max(1, self.tokens):.0f} entries each, "
        text += f"{self.saved_bytes / 2**20:.1f} MiB saved"
        if self.bound is None:
            return f"{text}; bound known after backward ({limit})"
        text += f"; {self.exact_tokens} of them exact, L1 error of the logits' gradient ≤ {100 * self.bound:.3g} %"
        for name, bound in (("hidden", self.hidden_bound), ("the weight", self.weight_bound)):
            if bound is not None:
                text += f", L2 error of the gradient of {name} ≤ {100 * bound:.3g} %"
        return f"{text} ({limit})"


def shares(
    tails: Tails, a: Tensor | None, b: Tensor | None, kept: Callable[[], Tensor], rounding: Tensor | float = 0.0,
    single: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Per token: what the error of its logits' gradient is at most, and what the gradient's L1 norm is at least.

    Args:
        a, b: upstream weights of ∂nll/∂z and ∂kl/∂z.
        kept: gives Σ |·| over a token's entries, weights and single logits in them.
        rounding: at most so much of that is rounding of the entries.
        single: Σ |weight| of a token's single logits (those of lse and `logits_at`) that are no entries; None: there
            are none, nor any among the entries. A norm of p alone says nothing then, as they may cancel against it.
    """
    if a is None and b is None:
        a = torch.zeros_like(tails.nll_left)
    if b is None:
        left, together = a.abs() * tails.nll_left, a.abs() * tails.nll_left
        norm = a.abs() * tails.nll_l1
    elif a is None:
        left, together = b.abs() * tails.kl_left_l1, b.abs() * tails.kl_left.abs()
        norm = b.abs() * tails.kl_l1
    else:
        left = a.abs() * tails.nll_left + b.abs() * tails.kl_left_l1
        together = (a * tails.nll_left + b * tails.kl_left).abs()
        norm = (a.abs() * tails.nll_l1 - b.abs() * tails.kl_l1).abs()  # exact where one of a and b is 0
        if single is None and bool(((a != 0) & (b != 0)).any()):
            norm = torch.maximum(norm, kept() - rounding + together)
    if single is not None:
        rest = torch.where(single == 0, together, (single - left).clamp(min=0))
        norm = (kept() - rounding).clamp(min=0) + rest
    return left + together + rounding, norm


def select(error: Tensor, norm: Tensor, forced: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """The fewest tokens without which Σ error ≤ tolerance · Σ norm, ascending, and the bound that then holds.

    `forced` tokens are among them, and so is every token whose error is not a number.
    """
    finite = error.isfinite()
    forced = forced | ~finite
    left = torch.where(forced, 0, error).double()
    total = torch.where(norm.isfinite(), norm, 0).clamp(min=0).double().sum()
    numbers = (left.sum(), total, forced.any(), (finite & norm.isfinite()).all())
    everything, total, some_forced, all_finite = torch.stack([n.double() for n in numbers]).tolist()
    exact, bound = forced[:0].long(), everything
    if some_forced or not everything <= tolerance * total:
        exact, bound = fewest(left, forced, tolerance * total)
    if not all_finite:
        return exact, float("nan")
    return exact, bound / total if len(exact) < len(error) and total > 0 else 0.0


def fewest(error: Tensor, forced: Tensor, limit: float) -> tuple[Tensor, float]:
    """The fewest tokens, the forced ones among them, without which Σ error ≤ limit, ascending; and that sum."""
    # Rare. On the CPU: on a GPU a running sum is not the same from run to run.
    chosen, left = forced.cpu(), torch.where(forced, 0, error).double().cpu()
    order = left.argsort(descending=True, stable=True)
    # What is left when the k largest are taken out; from the small end, so that it does not cancel.
    remaining = torch.cat([left[order].flip(0).cumsum(0).flip(0), left.new_zeros(1)])
    count = int((remaining[:-1] > limit).sum())  # all, where the limit is below 0
    chosen[order[:count]] = True
    return chosen.nonzero().flatten().to(error.device), float(remaining[count])


def relative_bound(error: float, norm: float) -> float:
    """Of ‖error‖ / ‖gradient‖, from bounds of the error and the norm of what was computed; infinite where the error may
    be all of it."""
    if error == 0:
        return 0.0
    return error / (norm - error) if norm > error else math.inf

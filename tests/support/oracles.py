"""What the kernels compute, in float64 PyTorch with full logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_losses import reference as oracle
from fused_losses.kernels.schemas import Row


@dataclass
class Rows:
    """Everything that follows from raw products z, and r of the reference, [C, V].

    With `difference` z holds (x − x_ref) Wᵀ, and the reference's scale and soft-cap are the model's.
    """

    z_raw: Tensor
    r_raw: Tensor | None
    difference: bool
    labels: Tensor
    scale: float = 1.0
    softcap: float = 0.0
    reference_scale: float = 1.0
    reference_softcap: float = 0.0

    def __post_init__(self) -> None:
        def finish(raw: Tensor, scale: float, softcap: float) -> Tensor:
            logits = raw.double().clamp(min=-1e30) * scale
            return softcap * torch.tanh(logits / softcap) if softcap else logits

        raw = self.z_raw.double() + self.r_raw.double() if self.difference else self.z_raw
        z = self.z = finish(raw, self.scale, self.softcap)
        self.slope = 1 - (z / self.softcap) ** 2 if self.softcap else torch.ones_like(z)
        self.p, self.nll, self.entropy = z.softmax(1), accurate_nll(z, self.labels), oracle.entropy(z)
        self.prediction, self.rank = z.argmax(1), (z > z.gather(1, self.labels[:, None])).sum(1)
        self.log_p2 = (2 * z.log_softmax(1)).logsumexp(1)
        self.d_entropy = -self.p * (z.log_softmax(1) + self.entropy[:, None]) * self.slope
        self.one_hot = torch.zeros_like(z).scatter_(1, self.labels[:, None], 1)
        self.d_nll = self.p.scatter(1, self.labels[:, None], torch.expm1(-self.nll)[:, None]) * self.slope
        top, lse = z.amax(1), z.logsumexp(1)
        self.lse = lse
        self.rest = (self.p * (1 - self.one_hot) * self.slope).sum(1)
        known = {Row.TOP: top, Row.LOG_SUM: lse - top, Row.REST: self.rest}
        if self.r_raw is not None:
            own = (self.reference_scale, self.reference_softcap)
            r = self.r = finish(self.r_raw, *((self.scale, self.softcap) if self.difference else own))
            self.p_ref = r.softmax(1)
            self.kl, self.reference_nll = oracle.kl(r, z), accurate_nll(r, self.labels)
            self.reference_entropy, self.ref_lse = oracle.entropy(r), r.logsumexp(1)
            self.gap = (self.p - self.p_ref) * self.slope
            known |= {
                Row.REF_TOP: r.amax(1), Row.REF_LOG_SUM: self.ref_lse - r.amax(1), Row.SHIFT: lse - self.ref_lse,
                Row.MISSED: torch.zeros_like(lse), Row.GAP: self.gap.sum(1), Row.GAP_L1: self.gap.abs().sum(1),
            }  # fmt: skip
        self.known = torch.stack([known.get(row, torch.zeros_like(top)) for row in Row])

    def divergence(self, beta: float) -> tuple[Tensor, Tensor]:
        """β KL(p_ref‖m) + (1 − β) KL(p‖m) [C], m = β p_ref + (1 − β) p, and its derivative by z before the soft-cap."""
        log_p, log_r = self.z.log_softmax(1), self.r.log_softmax(1)
        log_m = (beta * self.p_ref + (1 - beta) * self.p).log()
        own = (self.p * (log_p - log_m)).sum(1, keepdim=True)
        direction = (1 - beta) * self.p * (log_p - log_m - own) * self.slope
        return beta * (self.p_ref * (log_r - log_m)).sum(1) + (1 - beta) * own[:, 0], direction

    def entries(self, threshold: float) -> Tensor:
        """[C, V] bool: what is kept, the label's included."""
        least = threshold * torch.expm1(-self.nll).neg().sqrt()[:, None]
        kept = self.p > least
        if self.r_raw is not None:
            kept |= self.p_ref > least
        return kept | self.one_hot.bool()


def accurate_nll(z: Tensor, labels: Tensor) -> Tensor:
    """Also where it is tiny: of an almost certain label log_softmax has lost all digits."""
    label = z.gather(1, labels[:, None])
    others = z.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return torch.nn.functional.softplus(others - label[:, 0], threshold=50)


def packed(kept: Tensor, words: int) -> Tensor:
    """Bits [N, words] of a bool matrix: bit j of word w is column 32 w + j."""
    wide = torch.zeros(len(kept), 32 * words, dtype=torch.int64, device=kept.device)
    wide[:, : kept.shape[1]] = kept
    values = (wide.view(len(kept), words, 32) << torch.arange(32, device=kept.device)).sum(2)
    return torch.where(values >= 2**31, values - 2**32, values).int()


def unpacked(bits: Tensor) -> Tensor:
    """[N, 32 · words] bool."""
    return ((bits[:, :, None] >> torch.arange(32, device=bits.device, dtype=torch.int32)) & 1).bool().flatten(1)


def offsets_of(counts: Tensor) -> Tensor:
    out = counts.new_zeros(len(counts) + 1, dtype=torch.int64)
    out[1:] = counts.cumsum(0)
    return out


def segments_of(offsets: Tensor) -> Tensor:
    """Which segment each entry belongs to."""
    return torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff())


def segment_product(
    offsets: Tensor, columns: Tensor, values: Tensor, matrix: Tensor, scale: Tensor, vector: Tensor,
    base: Tensor | None, base_scale: float,
) -> Tensor:  # fmt: skip
    rows = segments_of(offsets)
    out = scale.double()[:, None] * vector.double()
    if base is not None:
        out += base_scale * base.double()
    return out.index_add_(0, rows, values.double()[:, None] * matrix.double()[columns.long()])

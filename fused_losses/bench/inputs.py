"""What the losses are measured on: shapes by the name of a model, and three distributions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..kernels import measure
from . import calibrated, states

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# D and V of language models.
MODELS = {
    "smollm2-135m": (576, 49152), "smollm2-360m": (960, 49152), "smollm2-1.7b": (2048, 49152),
    "qwen3-0.6b": (1024, 151936), "qwen3-4b": (2560, 151936), "qwen3-8b": (4096, 151936),
    "llama-3.2-1b": (2048, 128256), "llama-3.1-8b": (4096, 128256),
    "gemma-3-270m": (640, 262144), "gemma-3-1b": (1152, 262144), "gemma-3-4b": (2560, 262144),
}  # fmt: skip
REAL, CALIBRATED, FLAT = "real", "calibrated", "flat"


@dataclass
class Inputs:
    """Of one call. `weight` is the head as it is at first: that of LAwF's reference, too."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [N]
    reference_hidden: Tensor  # [N, D], on the same head

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(*(change(getattr(self, field.name)) for field in fields(self)))

    def of_tokens(self, tokens: Tensor) -> Inputs:
        return Inputs(self.hidden[tokens], self.weight, self.labels[tokens], self.reference_hidden[tokens])


def make(distribution: str, tokens: int, dim: int, vocabulary: int, dtype: str, seed: int, device: str) -> Inputs:
    """The same for the same arguments."""
    return {REAL: _real, CALIBRATED: _calibrated, FLAT: _flat}[distribution](
        tokens, dim, vocabulary, DTYPES[dtype], seed, device
    )


def _calibrated(tokens: int, dim: int, vocabulary: int, dtype: torch.dtype, seed: int, device: str) -> Inputs:
    """Like SmolLM2 on Python's documentation, a hard text, at any D and V."""
    found = calibrated.calibrated(tokens, dim, vocabulary, dtype, seed, "documentation", device=device)
    return Inputs(found.hidden, found.weight, found.labels, found.reference_hidden)


def _flat(tokens: int, dim: int, vocabulary: int, dtype: torch.dtype, seed: int, device: str) -> Inputs:
    found = measure.flat(tokens, dim, vocabulary, dtype, device, seed)
    return Inputs(found.hidden, found.weight, found.labels, found.reference_hidden)


def _real(tokens: int, dim: int, vocabulary: int, dtype: torch.dtype, seed: int, device: str) -> Inputs:
    """Half of the tokens from the model's own answers, as far as these go, the others from Python's documentation; D
    above 576 is the same in a rotated, wider basis: equal logits, wider products."""
    weight, (answers, documentation) = states.real_states()
    of_answers = min(tokens // 2, len(answers.labels))
    parts = zip(
        (part[:of_answers] for part in answers),
        (part[: tokens - of_answers] for part in documentation), strict=True,
    )  # fmt: skip
    hidden, reference, labels = (torch.cat(pair) for pair in parts)
    if dim != weight.shape[1]:
        basis = torch.randn(dim, weight.shape[1], generator=torch.Generator().manual_seed(seed))
        basis = torch.linalg.qr(basis)[0]
        hidden, weight, reference = hidden @ basis.T, weight @ basis.T, reference @ basis.T
    found = Inputs(hidden.to(dtype), weight.to(dtype), labels, reference.to(dtype))
    return found.map(lambda tensor: tensor.to(device))


def real_is_not(tokens: int, dim: int, vocabulary: int) -> str | None:
    """Why there are no real hidden states of this shape here; None where there are."""
    width, ids = MODELS["smollm2-135m"]
    if vocabulary != ids or dim < width:
        return f"they are SmolLM2-135M's, of V = {ids} and D = {width} or more, not V = {vocabulary} and D = {dim}"
    if tokens > 3000:
        return f"there are 3000 tokens of them, not {tokens}"
    return states.missing()

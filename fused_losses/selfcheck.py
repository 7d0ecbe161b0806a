"""Triton's kernels beside plain PyTorch on a small call, on devices where they were compiled but never run."""

from __future__ import annotations

import functools
import warnings

import torch

from .head import LMHead, Reference
from .op import token_losses

TOKENS, DIM, VOCABULARY = 160, 64, 1000
TOLERANCE = 0.02  # of norms; operands are in bfloat16, and both round them


@functools.cache
def reason(device_type: str) -> str | None:
    """Why backend "auto" passes over "triton" on this kind of device; None where it agrees with "torch".

    Values and gradients are compared, exact and sparse ones: on the first call, which then takes some seconds of
    compilation. What was found is kept for the process.
    """
    try:
        found = {name: _values(name, device_type) for name in ("triton", "torch")}
    except Exception as error:  # whatever a compiler or driver raises is the reason
        message = next(iter(str(error).splitlines()), "no message")[:200]
        return _told(f"its check on {device_type} failed ({type(error).__name__}: {message})")
    for (name, ours), theirs in zip(found["triton"].items(), found["torch"].values(), strict=True):
        off = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
        if not off <= TOLERANCE:
            return _told(f"its check on {device_type} found {name} off by {off:.2g} of its norm")
    return None


def _told(why: str) -> str:
    warnings.warn(f"fused_losses: backend 'triton' is not taken: {why}; 'torch' is, which is slower", stacklevel=4)
    return why


def _values(backend: str, device_type: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(device_type, dtype)

    hidden, weight, start = made(TOKENS, DIM), made(VOCABULARY, DIM), made(TOKENS, DIM)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=g).to(device_type)
    found: dict[str, torch.Tensor] = {}
    with torch.enable_grad():
        for gradient in ("exact", "sparse"):
            x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            out = token_losses(
                x, LMHead(w), labels, reference=Reference(0.1 * start + hidden), gradient=gradient, backend=backend
            )
            (out.nll.sum() + out.kl.sum()).backward()  # type: ignore[union-attr]
            found |= {f"{name} ({gradient})": getattr(out, name).detach() for name in ("nll", "kl", "entropy")}
            found |= {f"the gradient of {n} ({gradient})": t.grad for n, t in (("hidden", x), ("weight", w))}
    return {name: values.float() for name, values in found.items()}

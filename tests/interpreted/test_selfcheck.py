"""The check that decides on GPUs other than NVIDIA's, with the kernels in Triton's interpreter."""

import torch

from fused_losses import selfcheck


def test_the_kernels_pass_it(monkeypatch):
    """In float16, as the interpreter is wrong in bfloat16; of fewer tokens and ids, as it is slow."""
    monkeypatch.setattr(selfcheck, "TOKENS", 20)
    monkeypatch.setattr(selfcheck, "VOCABULARY", 300)
    ours, theirs = (selfcheck._values(backend, "cpu", torch.float16) for backend in ("triton", "torch"))
    for name, values in theirs.items():
        assert (ours[name] - values).norm() <= selfcheck.TOLERANCE / 4 * values.norm(), name

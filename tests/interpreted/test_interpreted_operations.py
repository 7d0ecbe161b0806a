"""What the GPU's backend does beside its kernels is nothing that PyTorch refuses on CUDA in deterministic mode."""

from unittest import mock

import pytest
import torch
from cases import coarse, make, run_with_report
from operations import Seen

from fused_losses.backends import gpu_scan
from fused_losses.sparse import gradients, softmax

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.mark.parametrize("path", ["scan", "logits"])
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("reference", [None, "shared"])
def test_nothing_that_is_refused(gradient, reference, path, monkeypatch):
    monkeypatch.setattr(gradients, "_runs_behind", lambda tensor: True)  # as on a GPU
    if path == "logits":
        monkeypatch.setattr(gpu_scan, "choose_tile", lambda problem, directed=False: None)
    case = make(24, 16, 300, bias=True, reference=reference, spread=4.0)
    with coarse(1e-6), mock.patch.object(softmax, "FEWEST_TOKENS", 1), Seen() as seen:
        run_with_report(case, torch.float32, "triton", gradient)
    assert "mm" in seen.names or "segment_reduce" in seen.names
    assert not seen.refused

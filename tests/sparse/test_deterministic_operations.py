"""No operation that PyTorch refuses on CUDA under torch.use_deterministic_algorithms(True)."""

from unittest import mock

import pytest
import torch
from cases import coarse, make, run_with_report
from operations import Seen

from fused_losses.backends import cpu
from fused_losses.sparse import gradients, softmax


@pytest.mark.parametrize("gradient, sketch", [("exact", False), ("sparse", False), ("sparse", True)])
@pytest.mark.parametrize("reference", [None, "shared"])
def test_nothing_that_is_refused(gradient, sketch, reference, monkeypatch):
    monkeypatch.setattr(cpu, "HAS_SKETCH", sketch)
    monkeypatch.setattr(gradients, "_runs_behind", lambda tensor: True)  # as on a GPU
    bounds = []
    bound = gradients._weight_bound
    monkeypatch.setattr(gradients, "_weight_bound", lambda *given: bounds.append(bound(*given)) or bounds[-1])
    with coarse(1e-6), mock.patch.object(softmax, "FEWEST_TOKENS", 1), Seen() as seen:
        run_with_report(make(24, 16, 300, bias=True, reference=reference, spread=4.0), torch.float32, "cpu", gradient)
    assert seen.names and not seen.refused
    assert gradient == "exact" or bounds

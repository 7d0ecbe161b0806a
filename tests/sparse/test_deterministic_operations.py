"""No operation that PyTorch refuses on CUDA under torch.use_deterministic_algorithms(True)."""

from unittest import mock

import pytest
import torch
from cases import coarse, make, run_with_report
from torch.utils._python_dispatch import TorchDispatchMode

from fused_losses.sparse import gradients, softmax

# Of the list in PyTorch's documentation of torch.use_deterministic_algorithms, what losses could call.
REFUSED = {"bincount", "histc", "kthvalue", "median", "put_", "put", "scatter_reduce", "scatter_reduce_"}
OF_FLOATS = {"cumsum", "cumsum_"}


class Seen(TorchDispatchMode):
    """Names of the operations that were called, and those that are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.refused: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names.add(name)
        if name in REFUSED or (name in OF_FLOATS and args[0].is_floating_point()):
            self.refused.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("reference", [None, "shared"])
def test_nothing_that_is_refused(gradient, reference, monkeypatch):
    monkeypatch.setattr(gradients, "_runs_behind", lambda tensor: True)  # as on a GPU
    chosen = []
    bound = gradients._weight_bound
    monkeypatch.setattr(gradients, "_weight_bound", lambda *given: chosen.append(bound(*given)) or chosen[-1])
    with coarse(1e-6), mock.patch.object(softmax, "FEWEST_TOKENS", 1), Seen() as seen:
        run_with_report(make(24, 16, 300, bias=True, reference=reference, spread=4.0), torch.float32, "cpu", gradient)
    assert seen.names and not seen.refused
    assert gradient == "exact" or chosen

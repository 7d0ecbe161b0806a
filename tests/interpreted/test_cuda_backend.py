"""The backend "cuda" from end to end on a CPU: the CUDA kernels through the shim, the scan in Triton's interpreter."""

import shutil

import pytest
import torch
from cases import HEADS, REFERENCES, coarse, errors, make, name, with_more

from fused_losses import backends

pytestmark = [
    pytest.mark.usefixtures("small_chunks"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels for a CPU with"),
]


@pytest.fixture(autouse=True)
def on_cpu(shim, monkeypatch):
    choose = backends.choose
    monkeypatch.setattr(backends, "choose", lambda name, device: name if name == "cuda" else choose(name, device))


@pytest.mark.pairwise
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_equals_the_oracle(head, reference, frozen, gradient):
    case = make(12, 16, 67, **head, reference=reference, frozen=frozen, ignored=0)
    with coarse(1e-30, capacity=67):
        for output, error in errors(case, torch.float32, "cuda", gradient=gradient).items():
            assert error <= 1.5e-6, output  # measured 5e-7


@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_single_logits(gradient):
    case = with_more(make(12, 16, 67, reference="own", softcap=5.0), beta=None, entropy=False)
    with coarse(1e-30, capacity=67):
        for output, error in errors(case, torch.float32, "cuda", gradient=gradient).items():
            assert error <= 1.5e-6, output


@pytest.mark.parametrize("reference", REFERENCES, ids=name)
def test_logits_path(reference, monkeypatch):
    monkeypatch.setattr("fused_losses.backends.gpu_scan.choose_tile", lambda problem, directed=False: None)
    case = make(12, 17, 67, reference=reference, bias=True, softcap=5.0)
    with coarse(1e-30, capacity=67):
        assert max(errors(case, torch.float32, "cuda", gradient="sparse").values()) <= 1.5e-6


@pytest.mark.parametrize("reference", REFERENCES, ids=name)
def test_fp16_error_is_not_above_that_of_plain_pytorch(reference):
    case = make(12, 48, 130, reference=reference, spread=4.0, ignored=0)
    with coarse(1e-6, capacity=130):
        ours, plain = errors(case, torch.float16, "cuda", gradient="sparse"), errors(case, torch.float16, "reference")
    for output in ours:
        assert ours[output] <= plain[output] * 1.02, (output, ours[output], plain[output])


def test_hot_columns():
    """More than 512 tokens with one label: its column is summed in slots."""
    case = make(600, 8, 40, spread=0.5, ignored=0)
    case.labels[:] = 7
    with coarse(0.04, capacity=40):
        results = errors(case, torch.float32, "cuda", gradient="sparse", tolerance=0.999)
    assert results["nll"] < 1.5e-6
    with coarse(1e-30, capacity=40):
        assert max(errors(case, torch.float32, "cuda", gradient="sparse").values()) < 1.5e-6

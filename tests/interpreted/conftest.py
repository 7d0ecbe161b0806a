import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# The interpreter computes with numpy, which warns where a GPU just makes an infinity or a NaN.
WARNINGS = (
    "ignore::RuntimeWarning",
    "ignore:Conversion of an array:DeprecationWarning",  # of Triton 3.6
)


# Read when a kernel is defined, so it must be set for the whole process: `make test` does.
def pytest_ignore_collect(collection_path):
    return os.environ.get("TRITON_INTERPRET") != "1" or None


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(*WARNINGS))


@pytest.fixture(autouse=True, scope="session")
def quick():
    import quick_interpreter

    quick_interpreter.install()


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of the scan and of logits."""
    from fused_losses.backends import gpu, gpu_scan, gpu_tails

    monkeypatch.setattr(gpu, "BIT_BYTES", 1)
    monkeypatch.setattr(gpu, "LOGIT_BYTES", 1)
    monkeypatch.setattr(gpu_tails, "PROFILE_BYTES", 1)
    monkeypatch.setattr(gpu_scan, "PROBE", 70)


@pytest.fixture(autouse=True)
def no_sketch(monkeypatch):
    """The backends for GPUs have none, and are compared with those for CPUs."""
    from fused_losses.backends import cpu, torch

    for backend in (cpu, torch):
        monkeypatch.setattr(backend, "HAS_SKETCH", False)


@pytest.fixture(autouse=True)
def maximum_of_a_gpu(monkeypatch):
    """Where one of two numbers is NaN, a GPU's maximum is the other.

    The interpreter's is NaN, which would hide mistakes.
    """
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder

    for name, function in (("create_maxnumf", numpy.fmax), ("create_minnumf", numpy.fmin)):
        monkeypatch.setattr(InterpreterBuilder, name, lambda self, a, b, f=function: self.binary_op(a, b, f))

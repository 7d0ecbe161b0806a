import os

import pytest


# Read when a kernel is defined, so it must be set for the whole process: `make test` does.
def pytest_ignore_collect(collection_path):
    return os.environ.get("TRITON_INTERPRET") != "1" or None


@pytest.fixture(autouse=True)
def maximum_of_a_gpu(monkeypatch):
    """Where one of two numbers is NaN, a GPU's maximum is the other; the interpreter's is NaN, which would hide mistakes."""
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder

    for name, function in (("create_maxnumf", numpy.fmax), ("create_minnumf", numpy.fmin)):
        monkeypatch.setattr(InterpreterBuilder, name, lambda self, a, b, f=function: self.binary_op(a, b, f))

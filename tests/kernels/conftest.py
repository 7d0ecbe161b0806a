import importlib
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def from_benchmarks():
    """Imports a file of benchmarks/ by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield importlib.import_module

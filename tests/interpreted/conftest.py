import os

import pytest

# Read when a kernel is defined, so it must be set for the whole process: `make test` does.
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="set TRITON_INTERPRET=1")


def pytest_ignore_collect(collection_path):
    return os.environ.get("TRITON_INTERPRET") != "1" or None

"""Which compilers there are, for tests that need one."""

import shutil
import sys

import pytest

from fused_losses.kernels import build

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="no g++ to compile with"
)
NVCC, NO_NVCC = build.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason=NO_NVCC)

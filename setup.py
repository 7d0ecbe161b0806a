"""Metadata is in pyproject.toml; this builds csrc/cpu where a C++ compiler and PyTorch's headers are found.

Without them, or if the build fails, the package installs all the same and computes with PyTorch's own operations.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def find_torch() -> Path | None:
    """The torch of the environment that is installed into, also where pip builds in an isolated one."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places.append(Path(sysconfig.get_path("platlib")) / "torch")
    return next((p for p in places if (p / "include/torch/csrc/stable/ops.h").is_file()), None)


class BuildKernels(build_ext):
    """A library without Python symbols, on PyTorch's stable ABI: one file for every Python and torch >= 2.11."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """A library from other sources must not survive a build that fails."""
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


torch = find_torch()
kernels = Extension(
    "fused_losses._kernels",
    sources=[f"csrc/cpu/{name}.cpp" for name in ("kernels", "logits", "ops")],
    depends=[f"csrc/cpu/{name}" for name in ("kernels.h", "vector.inc", "rows.inc", "products.inc")],
    extra_compile_args=[
        "-std=c++20", "-O3", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra", "-isystem", f"{torch}/include",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ],
    extra_link_args=["-Wl,--no-as-needed", f"-L{torch}/lib", "-ltorch_cpu"],
    optional=True,
)  # fmt: skip

if torch is None:
    print(
        "fused_losses: no headers of torch found; install torch first to get the compiled CPU kernels", file=sys.stderr
    )
setup(cmdclass={"build_ext": BuildKernels}, ext_modules=[kernels] if torch and sys.platform == "linux" else [])

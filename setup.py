"""Metadata is in pyproject.toml; this builds csrc/cpu where a C++ compiler and PyTorch's headers are found, and csrc/cuda where
there is nvcc as well.

Without them, or if a build fails, the package installs all the same and computes with PyTorch's own operations.
FUSED_LOSSES_CUDA=0 leaves csrc/cuda out; FUSED_LOSSES_CUDA_ARCHS="90a" builds it for these architectures only.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

CUDA = [f"csrc/cuda/{name}" for name in sorted(os.listdir("csrc/cuda"))]


def find_torch() -> Path | None:
    """The torch of the environment that is installed into, also where pip builds in an isolated one."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places.append(Path(sysconfig.get_path("platlib")) / "torch")
    return next((p for p in places if (p / "include/torch/csrc/stable/ops.h").is_file()), None)


def load_build():
    """fused_losses/build.py without the package, which imports torch."""
    spec = importlib.util.spec_from_file_location("fused_losses_build", "fused_losses/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Libraries without Python symbols, on PyTorch's stable ABI: one file for every Python and torch >= 2.11."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """A library from other sources must not survive a build that fails."""
        output = Path(self.get_ext_fullpath(ext.name))
        output.unlink(missing_ok=True)
        if ext is not cuda:
            return super().build_extension(ext)
        try:
            nvcc, reason = build.find_nvcc()
            if nvcc is None:
                raise RuntimeError(reason)
            build.build(output, torch, nvcc, build.architectures(nvcc))
        except (RuntimeError, OSError) as error:
            raise CompileError(str(error)) from error  # which `optional` makes a warning

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class AddSources(build_py):
    """csrc/cuda goes along, for fused_losses.build."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "fused_losses/csrc/cuda")
            target.mkdir(parents=True, exist_ok=True)
            for source in CUDA:
                shutil.copy(source, target)


torch, build = find_torch(), load_build()
kernels = Extension(
    "fused_losses._kernels",
    sources=[f"csrc/cpu/{name}.cpp" for name in ("kernels", "logits", "ops")],
    depends=[f"csrc/cpu/{name}" for name in ("kernels.h", "vector.inc", "rows.inc", "products.inc")],
    extra_compile_args=[
        "-std=c++20", "-O3", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra", "-isystem", f"{torch}/include",
        build.TORCH_TARGET,
    ],
    extra_link_args=["-Wl,--no-as-needed", f"-L{torch}/lib", "-ltorch_cpu"],
    optional=True,
)  # fmt: skip
cuda = Extension("fused_losses._cuda", sources=CUDA, optional=True)

extensions = [kernels, cuda] if torch and sys.platform == "linux" else []
if torch is None:
    print("fused_losses: no headers of torch found; install torch first to get the compiled kernels", file=sys.stderr)
elif os.environ.get("FUSED_LOSSES_CUDA") == "0":
    extensions = [e for e in extensions if e is not cuda]
setup(cmdclass={"build_ext": BuildKernels, "build_py": AddSources}, ext_modules=extensions)

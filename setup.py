"""Metadata is in pyproject.toml; this has ninja build csrc/cpu where a C++ compiler and torch's headers are found, and
csrc/cuda where there is nvcc as well and torch is a build with CUDA.

Without them, or if a build fails, the package installs all the same and computes with PyTorch's own operations.
FUSED_LOSSES_CUDA=1 builds csrc/cuda whatever torch is, or fails; 0 leaves it out. FUSED_LOSSES_CUDA_ARCHS="90a" builds
it for these architectures only.
"""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


def load_build():
    """fused_losses/kernels/build.py without the package, which imports torch."""
    spec = importlib.util.spec_from_file_location("fused_losses_build", "fused_losses/kernels/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_torch() -> Path | None:
    """The torch of the environment that is installed into, also where pip builds in an isolated one.

    pip hides the environment from its own Python by environment variables only, which -E does without.
    """
    spec = importlib.util.find_spec("torch")
    found = spec.origin if spec else None
    if found is None:
        code = "import importlib.util as u; spec = u.find_spec('torch'); print(spec.origin if spec else '')"
        result = subprocess.run([sys.executable, "-E", "-c", code], capture_output=True, text=True)
        found = result.stdout.strip()
    folder = Path(found).parent if found else None
    return folder if folder and (folder / "include/torch/csrc/stable/ops.h").is_file() else None


class BuildKernels(build_ext):
    """Libraries without Python symbols, on PyTorch's stable ABI: one file for every Python and torch >= 2.11."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).is_file()]

    def run(self) -> None:
        """A library of other sources must not survive a build that fails or is not asked for."""
        target = Path("." if self.inplace else self.build_lib, "fused_losses")
        for name in ("_kernels.so", "_cuda.so"):
            (target / name).unlink(missing_ok=True)
        asked = build.cuda_is_asked()
        torch = find_torch()
        if torch is None:
            if asked:
                raise RuntimeError("FUSED_LOSSES_CUDA=1, but no headers of torch were found; install torch first")
            self.warn("no headers of torch found; install torch first to get the compiled kernels")
            return
        # An editable installation gives a folder of its own each time, from which nothing could be taken over.
        folder = Path("build", "editable") if self.editable_mode else Path(self.build_temp)

        def make(describe: Callable[[], build.Library]) -> None:
            library = describe()
            print(build.build(library, target / library.name, folder / Path(library.name).stem))

        def describe_cuda() -> build.Library:
            nvcc, reason = build.find_nvcc()
            if nvcc is None:
                raise RuntimeError(reason)
            return build.cuda_library(torch, nvcc, build.architectures(nvcc))

        try:
            make(lambda: build.cpu_library(torch))
        except (RuntimeError, OSError) as error:
            self.warn(f"installed without the CPU kernels: {error}")
        if asked is False or (asked is None and not build.has_cuda(torch)):
            return
        try:
            make(describe_cuda)
        except (RuntimeError, OSError) as error:
            if asked:
                raise RuntimeError(f"FUSED_LOSSES_CUDA=1, but the CUDA kernels cannot be built: {error}") from error
            self.warn(f"installed without the CUDA kernels: {error}")


class AddSources(build_py):
    """csrc goes along, for fused_losses.build and its readers. What an earlier build left behind does not."""

    def run(self) -> None:
        target = Path(self.build_lib, "fused_losses")
        if not self.editable_mode:
            shutil.rmtree(target, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            shutil.copytree("csrc", target / "csrc")


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """One wheel for every Python: the libraries have no symbols of it. For every platform where none was built."""
        system = super().get_tag()[2]
        self.root_is_pure = not list(Path(self.bdist_dir).glob("fused_losses/*.so"))
        return "py3", "none", "any" if self.root_is_pure else system


build = load_build()
# setuptools reads from these only that there is something to build, and the sources' names.
extensions = [
    Extension("fused_losses._kernels", sources=[f"csrc/cpu/{name}.cpp" for name in build.CPU_SOURCES]),
    Extension("fused_losses._cuda", sources=[*(f"csrc/cuda/{name}.cu" for name in build.KERNELS), "csrc/cuda/ops.cpp"]),
]
setup(
    cmdclass={"build_ext": BuildKernels, "build_py": AddSources, "bdist_wheel": Wheel},
    ext_modules=extensions if sys.platform == "linux" else [],
)

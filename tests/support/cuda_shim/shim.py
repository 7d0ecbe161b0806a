"""csrc/cuda compiled by g++ for a CPU (cuda_on_cpu.h): after `load` the operators GPU_SCHEMAS take CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from fused_losses.kernels import build

HERE = Path(__file__).parent


class Shim:
    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library))
        self.functions = ctypes.CDLL(str(library))
        self.functions.shim_set.argtypes = [ctypes.c_int64, ctypes.c_int]
        self.functions.shim_launched.restype = ctypes.c_char_p

    @contextmanager
    def setting(self, cluster_limit: int = 0, backwards: bool = False) -> Iterator[None]:
        """Bytes of shared memory a block of a cluster may have (0: no clusters); everything in reverse order."""
        self.functions.shim_set(cluster_limit, backwards)
        try:
            yield
        finally:
            self.functions.shim_set(0, False)

    def launched(self) -> str:
        """Name of the kernel that ran last."""
        return self.functions.shim_launched().decode()

    def mistake(self, number: int) -> tuple[str, list[float]]:
        """What the shim says about a kernel of self_test.cu; number 0 has no mistake."""
        message, out = ctypes.create_string_buffer(400), (ctypes.c_float * 64)()
        self.functions.shim_self_test(number, out, message, len(message))
        return message.value.decode(), list(out)


def load(folder: Path) -> Shim:
    """Load what the folder has of these sources, compiler and PyTorch; else compile it. About 10 seconds."""
    compiler = os.environ.get("CXX", "g++")
    known = hashlib.sha256(repr((compiler, torch.__version__, torch.backends.cpu.get_cpu_capability())).encode())
    for source in sorted([*build.sources().iterdir(), *HERE.iterdir()]):
        if source.is_file():
            known.update(source.name.encode() + b"\0" + source.read_bytes())
    library = folder / f"{known.hexdigest()[:32]}.so"
    if not library.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as new:
            compile_into(Path(new), compiler).replace(library)
    return Shim(library)


def compile_into(folder: Path, compiler: str) -> Path:
    """In two processes at a time."""
    includes = [f"-I{build.sources()}"]
    kernels = ["-O1", "-march=native", "-x", "c++", "-include", str(HERE / "cuda_on_cpu.h"), "-Wno-unknown-pragmas"]
    host = ["-std=c++20", "-isystem", f"{Path(torch.__file__).parent}/include", build.TORCH_TARGET]
    sources = {
        **{build.sources() / f"{name}.cu": ["-std=c++17", *kernels] for name in build.KERNELS},
        HERE / "self_test.cu": ["-std=c++17", *kernels],
        HERE / "fibres.cpp": ["-std=c++17", "-O2", "-march=native"],
        build.sources() / "ops.cpp": [*host, "-O0", "-DFUSED_LOSSES_ON_CPU"],
    }
    common = [compiler, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", *includes]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, output: Path) -> None:
        run([*common, *sources[source], "-c", str(source), "-o", str(output)])

    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(compile_one, sources, objects))
    library = folder / "shim.so"
    torch_lib = Path(torch.__file__).parent / "lib"
    linked = ["-Wl,--no-as-needed", f"-L{torch_lib}", "-ltorch_cpu", "-ldl"]
    run([compiler, "-shared", *map(str, objects), "-o", str(library), *linked])
    return library


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"

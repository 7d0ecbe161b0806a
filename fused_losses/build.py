"""Builds the CUDA kernels, csrc/cuda: at installation (setup.py), or later into a cache: `python -m fused_losses.build`.

Needs nvcc of CUDA 12.8 or later, found by CUDA_HOME or PATH, a C++ compiler and torch's headers. A CPU build of torch will do:
the library is linked with libtorch_cpu and the static CUDA runtime only. Imports nothing but the standard library at first, as
setup.py loads this file by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KERNELS = ("rows", "bits", "attention", "segments")
# 100 rather than 100a: nothing of one member of that family is used, and so the B300 (10.3) runs it too.
ARCHITECTURES = ("80", "90a", "100", "120")
# Target of PyTorch's stable ABI: 2.11.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
OLDEST_CUDA = (12, 8)


def sources() -> Path:
    """csrc/cuda: inside the installed package, else beside it in a checkout."""
    here = Path(__file__).resolve().parent
    places = (here / "csrc" / "cuda", here.parent / "csrc" / "cuda")
    return next((place for place in places if place.is_dir()), places[0])


def find_nvcc() -> tuple[str | None, str]:
    """nvcc, or None and why there is none that can be used."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if nvcc is None:
        return None, f"no nvcc in {home}/bin (CUDA_HOME)" if home else "no nvcc on PATH, and CUDA_HOME is not set"
    found = re.search(r"release (\d+)\.(\d+)", _output([nvcc, "--version"]))
    if found is None or tuple(map(int, found.groups())) < OLDEST_CUDA:
        version = ".".join(found.groups()) if found else "of unknown version"
        return None, f"nvcc: expected CUDA {'.'.join(map(str, OLDEST_CUDA))} or later, got {version} ({nvcc})"
    return nvcc, ""


def architectures(nvcc: str) -> list[str]:
    """FUSED_LOSSES_CUDA_ARCHS, as "90a" or "80,90a", else all of ARCHITECTURES that nvcc knows."""
    wanted = _wanted()
    known = set(re.findall(r"compute_(\w+)", _output([nvcc, "--list-gpu-arch"])))
    unknown = [a for a in wanted if a.rstrip("af") not in known]
    if unknown:
        raise RuntimeError(
            f"FUSED_LOSSES_CUDA_ARCHS: expected architectures of this nvcc ({' '.join(sorted(known))}), "
            f"got {' '.join(unknown)}"
        )
    return wanted or [a for a in ARCHITECTURES if a.rstrip("af") in known]


def targets(chosen: Sequence[str]) -> list[str]:
    """Code for each, and PTX of the last for devices to come."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in chosen]
    return [*flags, f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


def kernel_command(nvcc: str, chosen: Sequence[str], name: str, output: Path, extra: Iterable[str] = ()) -> list[str]:
    return [
        nvcc, "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *targets(chosen), *extra,
        "-c", str(sources() / f"{name}.cu"), "-o", str(output),
    ]  # fmt: skip


def ops_command(torch: Path, output: Path) -> list[str]:
    return [
        os.environ.get("CXX", "g++"), "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
        "-isystem", f"{torch}/include", TORCH_TARGET, "-c", str(sources() / "ops.cpp"), "-o", str(output),
    ]  # fmt: skip


def build(output: Path, torch: Path, nvcc: str, chosen: Sequence[str]) -> None:
    """Compile and link; `output` appears at the end and whole. RuntimeError with the compiler's message."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fused-losses-") as folder:
        objects = [Path(folder) / f"{name}.o" for name in (*KERNELS, "ops")]
        commands = [kernel_command(nvcc, chosen, *pair) for pair in zip(KERNELS, objects, strict=False)]
        with ThreadPoolExecutor(max_workers=min(len(objects), os.cpu_count() or 1)) as pool:
            list(pool.map(_run, [*commands, ops_command(torch, objects[-1])]))
        whole = Path(folder) / output.name
        _run([
            nvcc, "-shared", "-cudart=static", *targets(chosen), *map(str, objects), "-o", str(whole),
            "-Xlinker=--exclude-libs,ALL,--no-as-needed", f"-L{torch}/lib", "-ltorch_cpu", "-ldl",
        ])  # fmt: skip
        beside = output.with_name(f"{output.name}.{os.getpid()}")  # renaming needs the same file system
        shutil.copyfile(whole, beside)
        beside.replace(output)


def build_cuda(verbose: bool = True) -> Path:
    """Build for the devices of this machine into the cache, unless it is there; the library. Raises RuntimeError.

    The cache is $XDG_CACHE_HOME/fused_losses, by default ~/.cache/fused_losses; a folder in it for each combination of sources,
    torch and devices. About 20 seconds a device type. `kernels.load_cuda` takes it, in processes started afterwards.
    """
    nvcc, reason = find_nvcc()
    if nvcc is None:
        raise RuntimeError(f"the CUDA kernels cannot be built: {reason}")
    import fcntl

    import torch

    chosen = architectures(nvcc) if _wanted() else _of_devices(nvcc)
    library = _cached(chosen)
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits and then finds it built
        if not library.is_file():
            if verbose:
                print(f"fused_losses: building the CUDA kernels for {' '.join(chosen)}: {library}", file=sys.stderr)
            build(library, Path(torch.__file__).parent, nvcc, chosen)
    return library


def cached_cuda() -> Path | None:
    """What `build_cuda` made for these sources, this torch and these devices; None: nothing."""
    chosen = _wanted() or _of_devices(None)
    library = _cached(chosen) if chosen else None
    return library if library is not None and library.is_file() else None


def _wanted() -> list[str]:
    return os.environ.get("FUSED_LOSSES_CUDA_ARCHS", "").replace(",", " ").split()


def _of_devices(nvcc: str | None) -> list[str]:
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return architectures(nvcc) if nvcc is not None else []
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}{minor}" for major, minor in sorted(found)]


def _cached(chosen: Sequence[str]) -> Path:
    import torch

    digest = hashlib.sha256("\0".join((torch.__version__, *chosen)).encode())
    for source in sorted((*sources().iterdir(), Path(__file__))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fused_losses" / digest.hexdigest()[:16] / "_cuda.so"


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr or result.stdout}")


def main() -> None:
    argparse.ArgumentParser(prog="python -m fused_losses.build", description=build_cuda.__doc__).parse_args()
    try:
        print(build_cuda())
    except (RuntimeError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

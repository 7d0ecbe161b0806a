"""Builds csrc with ninja: at installation (setup.py), or later into a cache: `python -m fused_losses.build`.

The CPU kernels need a C++ compiler (CXX, else g++) and torch's headers; the CUDA kernels also nvcc of CUDA 12.8 or
later, found by CUDA_HOME or PATH. A CPU build of torch will do for both: they are linked with libtorch_cpu, the CUDA
kernels with the static CUDA runtime too. ninja compiles what has changed, by the headers that each compiler says it has
read; MAX_JOBS limits its processes. Imports nothing but the standard library at first, as setup.py loads this file by
itself.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

CPU_SOURCES = ("kernels", "logits", "dense", "int8", "ops")
KERNELS = ("rows", "bits", "attention", "segments")
# 100 rather than 100a: nothing of one member of that family is used, and so the B300 (10.3) runs it too.
ARCHITECTURES = ("80", "90a", "100", "120")
# Target of PyTorch's stable ABI: 2.11.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
OLDEST_CUDA = (12, 8)
NO_NINJA = "ninja was not found, and it drives the build; install it with: pip install ninja"


class Library(NamedTuple):
    """What ninja is told: the command for each source; that of the linker before the objects, and after them."""

    name: str
    compilers: dict[Path, list[str]]
    linker: list[str]
    after: list[str]


def csrc() -> Path:
    """The sources, and README.md about them: inside the installed package, else beside it in a checkout."""
    here = Path(__file__).resolve().parents[1]
    places = (here / "csrc", here.parent / "csrc")
    return next((place for place in places if place.is_dir()), places[0])


def sources() -> Path:
    """Those of the CUDA kernels."""
    return csrc() / "cuda"


def find_ninja() -> str:
    """The one beside this Python, else on PATH, else that of the package ninja. RuntimeError: there is none."""
    beside = str(Path(sys.executable).parent)
    ninja = shutil.which("ninja", path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))
    if ninja is None and importlib.util.find_spec("ninja") is not None:
        import ninja as package  # a user's installation, whose folder of scripts is not on PATH

        ninja = shutil.which("ninja", path=package.BIN_DIR) if package.BIN_DIR else None
    if ninja is None:
        raise RuntimeError(NO_NINJA)
    return ninja


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


def cuda_is_asked() -> bool | None:
    """FUSED_LOSSES_CUDA: True for 1, False for 0, None where it is not set. RuntimeError for anything else."""
    value = os.environ.get("FUSED_LOSSES_CUDA", "")
    if value not in ("", "0", "1"):
        raise RuntimeError(
            f"FUSED_LOSSES_CUDA: expected 1 (build the CUDA kernels), 0 (never) or nothing (where torch is a build "
            f"with CUDA), got {value!r}"
        )
    return {"": None, "0": False, "1": True}[value]


def has_cuda(torch: Path) -> bool:
    """Whether the torch in this folder is a build with CUDA; it is not imported."""
    try:
        text = (torch / "version.py").read_text()
    except OSError:
        return False
    return re.search(r"^cuda\b[^=]*=\s*['\"]", text, re.MULTILINE) is not None


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


def cpu_library(torch: Path) -> Library:
    flags = ["-O3", "-DNDEBUG", "-fno-math-errno"]
    return Library(
        "_kernels.so",
        {csrc() / "cpu" / f"{name}.cpp": _host(torch, *flags) for name in CPU_SOURCES},
        [_cxx(), "-shared"],
        ["-Wl,--no-as-needed", f"-L{torch}/lib", "-ltorch_cpu", *_flags("LDFLAGS")],
    )


def cuda_library(torch: Path, nvcc: str, chosen: Sequence[str], extra: Iterable[str] = ()) -> Library:
    """`extra` flags are for the compilation of the kernels."""
    kernel = [nvcc, "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *targets(chosen), *extra]
    return Library(
        "_cuda.so",
        {**{sources() / f"{name}.cu": kernel for name in KERNELS}, sources() / "ops.cpp": _host(torch, "-O2")},
        [nvcc, "-shared", "-cudart=static", *targets(chosen)],
        ["-Xlinker=--exclude-libs,ALL,--no-as-needed", f"-L{torch}/lib", "-ltorch_cpu", "-ldl"],
    )


def ninja_file(library: Library) -> str:
    """The text of build.ninja. The linker writes under another name: one that stops half-way leaves no library."""
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        "  command = $compiler -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $linker $in -o $out.new $after && mv -f $out.new $out",
    ]
    objects = []
    for source, command in library.compilers.items():
        objects.append(f"{source.stem}.o")
        lines += [f"build {objects[-1]}: compile {_path(source)}", f"  compiler = {_words(command)}"]
    lines += [f"build {library.name}: link {' '.join(objects)}"]
    lines += [f"  linker = {_words(library.linker)}", f"  after = {_words(library.after)}"]
    return "\n".join(lines) + "\n"


def build(library: Library, output: Path, folder: Path) -> str:
    """Bring the library up to date in `folder`, which keeps what the next build need not repeat; copy it to `output`.

    What was there is removed first, since it may be of other sources; the new one appears at the end and whole. Returns
    what ninja and the compilers print. RuntimeError: no ninja, or with the compiler's message.
    """
    output.unlink(missing_ok=True)
    ninja, jobs = find_ninja(), _jobs()
    output.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "build.ninja", ninja_file(library).encode())
    command = [ninja, "-C", str(folder), "-j", str(jobs), library.name]
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{result.stdout}{result.stderr}")
    _write(output, (folder / library.name).read_bytes())
    return result.stdout


def build_cuda(verbose: bool = True) -> Path:
    """Build the CUDA kernels for the devices of this machine into the cache, unless they are there; the library.

    The cache is $XDG_CACHE_HOME/fused_losses, by default ~/.cache/fused_losses; a folder in it for each combination of
    sources, torch and devices. About 20 seconds a device type. `kernels.load_cuda` takes it, in later processes.
    Raises RuntimeError without nvcc or ninja, and where a compiler fails.
    """
    nvcc, reason = find_nvcc()
    if nvcc is None:
        raise RuntimeError(f"the CUDA kernels cannot be built: {reason}")
    chosen = architectures(nvcc) if _wanted() else _of_devices(nvcc)
    what = f"the CUDA kernels for {' '.join(chosen)}"
    return _build_cached(_cached("_cuda.so", sources(), chosen), lambda t: cuda_library(t, nvcc, chosen), what, verbose)


def build_cpu(verbose: bool = True) -> Path:
    """Build the CPU kernels into the same cache, unless they are there; the library. `kernels.load` takes it where none
    is installed. About 30 seconds. Raises RuntimeError without ninja, and where the compiler fails."""
    return _build_cached(_cached("_kernels.so", csrc() / "cpu", ()), cpu_library, "the CPU kernels", verbose)


def cached_cuda() -> Path | None:
    """What `build_cuda` made for these sources, this torch and these devices; None: nothing."""
    chosen = _wanted() or _of_devices(None)
    library = _cached("_cuda.so", sources(), chosen) if chosen else None
    return library if library is not None and library.is_file() else None


def cached_cpu() -> Path | None:
    """What `build_cpu` made for these sources and this torch; None: nothing."""
    library = _cached("_kernels.so", csrc() / "cpu", ())
    return library if library.is_file() else None


def _build_cached(library: Path, describe: Callable[[Path], Library], what: str, verbose: bool) -> Path:
    import fcntl

    import torch

    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits and then finds it built
        if not library.is_file():
            if verbose:
                print(f"fused_losses: building {what}: {library}", file=sys.stderr)
            with tempfile.TemporaryDirectory(prefix="fused-losses-") as folder:
                build(describe(Path(torch.__file__).parent), library, Path(folder))
    return library


def _wanted() -> list[str]:
    return os.environ.get("FUSED_LOSSES_CUDA_ARCHS", "").replace(",", " ").split()


def _of_devices(nvcc: str | None) -> list[str]:
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return architectures(nvcc) if nvcc is not None else []
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}{minor}" for major, minor in sorted(found)]


def _cached(name: str, folder: Path, chosen: Sequence[str]) -> Path:
    import torch

    digest = hashlib.sha256("\0".join((platform.machine(), torch.__version__, *chosen)).encode())
    found = folder.iterdir() if folder.is_dir() else ()
    for source in sorted((*found, Path(__file__))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fused_losses" / digest.hexdigest()[:16] / name


def _cxx() -> str:
    return os.environ.get("CXX") or "g++"


def _flags(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def _host(torch: Path, *flags: str) -> list[str]:
    return [
        _cxx(), "-std=c++20", *flags, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
        "-isystem", f"{torch}/include", TORCH_TARGET, *_flags("CXXFLAGS"),
    ]  # fmt: skip


def _jobs() -> int:
    given = os.environ.get("MAX_JOBS", "")
    if given and not (given.isascii() and given.isdigit() and int(given) > 0):
        raise RuntimeError(f"MAX_JOBS: expected how many processes may compile, 1 or more, got {given!r}")
    return int(given or (os.cpu_count() or 1))


def _path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _words(command: Sequence[str]) -> str:
    return shlex.join(command).replace("$", "$$")


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}")  # renaming needs the same file system
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fused_losses.build",
        description="Build kernels into ~/.cache/fused_losses, unless they are there, and print the library's path.",
    )
    parser.add_argument("kernels", nargs="?", choices=("cpu", "cuda"), default="cuda", help="default: cuda")
    try:
        print({"cpu": build_cpu, "cuda": build_cuda}[parser.parse_args().kernels]())
    except (RuntimeError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

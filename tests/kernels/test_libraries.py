"""Where compiled libraries are looked for, installed or in the cache, and why none can be used."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fused_losses import backends
from fused_losses.kernels import build, schemas


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Libraries are made by writing a word; the list says which were."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def fake_build(library, output, folder):
        made.append((library.name, library.linker))
        output.write_bytes(b"library")

    monkeypatch.setattr(build, "build", fake_build)
    return made


def test_cuda_cache_is_built_once_and_found_again(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_CUDA_ARCHS", "90a")
    monkeypatch.setattr(build, "find_nvcc", lambda: ("nvcc", ""))
    monkeypatch.setattr(build, "architectures", lambda nvcc: ["90a"])
    assert build.cached_cuda() is None
    first = build.build_cuda(verbose=False)
    assert build.build_cuda(verbose=False) == first == build.cached_cuda()
    ((name, linker),) = cache
    assert name == "_cuda.so" and "-gencode=arch=compute_90a,code=sm_90a" in linker
    monkeypatch.setenv("FUSED_LOSSES_CUDA_ARCHS", "80")
    assert build.cached_cuda() is None and first.is_relative_to(tmp_path)


def test_cpu_cache_is_built_once_and_found_again(cache, tmp_path, monkeypatch):
    assert build.cached_cpu() is None
    first = build.build_cpu(verbose=False)
    assert build.build_cpu(verbose=False) == first == build.cached_cpu() and len(cache) == 1
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert build.cached_cpu() is None and first.is_relative_to(tmp_path)


def test_cpu_kernels_of_the_cache_are_taken_where_none_are_installed(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(schemas, "_load", lambda library, *interface: loaded.append(library))
    monkeypatch.setattr(schemas, "LIBRARY", tmp_path / "installed" / "_kernels.so")
    monkeypatch.setattr(build, "cached_cpu", lambda: tmp_path / "cached.so")
    assert schemas.load.__wrapped__() is None and loaded == [tmp_path / "cached.so"]


def test_load_states_why_and_points_to_files_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(schemas, "LIBRARY", tmp_path / "package" / "_kernels.so")
    monkeypatch.setattr(build, "cached_cpu", lambda: None)
    reason = schemas.load.__wrapped__()
    assert "not built" in reason and "python -m fused_losses.build cpu" in reason
    assert Path(reason.partition("see ")[2].rstrip(")")).is_file()

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build, "cached_cpu", no_home)
    assert "cannot be looked at (Could not determine home" in schemas.load.__wrapped__()


def test_load_cuda_states_why(tmp_path, monkeypatch):
    """On a build of torch with CUDA: not built, does not load, other sources. Nothing of it raises."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "cached_cuda", lambda: None)
    library = tmp_path / "_cuda.so"
    monkeypatch.setattr(schemas, "CUDA_LIBRARY", library)
    reason = schemas.load_cuda.__wrapped__
    assert "not built" in reason() and "python -m fused_losses.build" in reason()
    library.write_bytes(b"no library")
    assert "_cuda.so does not load" in reason() and "\n" not in reason()
    assert "too short" in reason()  # why, as the loader says it
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.ops.fused_losses, "cuda_interface", lambda: 0, raising=False)
    assert "built from other sources (interface 0)" in reason()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in reason()


def test_first_use_of_the_backend_builds_it_or_says_why_not(monkeypatch):
    monkeypatch.setattr(schemas, "load_cuda", lambda: "not built: no nvcc then")
    monkeypatch.setattr(build, "find_nvcc", lambda: (None, "no nvcc on PATH"))
    with pytest.raises(RuntimeError, match=r"not built: no nvcc then; building it now failed: .* no nvcc on PATH"):
        backends.choose("cuda", "cuda")

    class Loaded:
        reason = "not built"

        def __call__(self):
            return self.reason

        def cache_clear(self):
            self.reason = None

    monkeypatch.setattr(schemas, "load_cuda", Loaded())
    monkeypatch.setattr(build, "build_cuda", lambda: None)
    assert schemas.build_and_load_cuda() is None


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("objdump") is None, reason="no objdump for x86-64")
@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="no compiled kernels")
def test_a_library_runs_on_every_x86_64():
    """AVX only in the functions that are chosen at run time: a wheel is taken to other machines.

    A template of the standard library that was compiled among them would be one too, and any caller may get it.
    """
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(installed_or_cached())]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    advanced: dict[str, set[str]] = {"avx512::": set(), "avx2::": set(), "": set()}
    function = ""
    for line in shown.splitlines():
        if line.endswith(">:"):
            function = line
        elif re.search(r"\t(v[a-z]\w+|k[a-z]+[bwdq]) ", line):
            name = next(name for name in advanced if f"fused_losses::{name}" in function or not name)
            advanced[name].add(function)
    assert advanced["avx512::"] and advanced["avx2::"] and not advanced[""], advanced[""]


def installed_or_cached() -> Path:
    return schemas.LIBRARY if schemas.LIBRARY.is_file() else build.cached_cpu()

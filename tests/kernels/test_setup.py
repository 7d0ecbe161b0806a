"""setup.py, with compilers and a torch that only look so: what is built, installed and put into wheels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from processes import ROOT

from fused_losses.kernels import build

COMPILER = r"""#!/bin/sh
echo "$0" "$@" >> "$LOG"
case "$1" in
    --version) echo "release 13.0, V13.0.1"; exit ;;
    --list-gpu-arch) printf 'compute_%s\n' 80 90 100 120; exit ;;
esac
while [ $# -gt 0 ]; do
    case "$1" in -o) output=$2 ;; -MF) deps=$2 ;; esac
    shift
done
echo "$output" > "$output"
[ -z "$deps" ] || echo "$output:" > "$deps"
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of what an installation reads."""
    target = tmp_path / "tree"
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in ("fused_losses", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


class Setup:
    """Runs setup.py in `tree`, with tools/g++ and tools/cuda/bin/nvcc and a torch of its own."""

    def __init__(self, tree: Path, tools: Path) -> None:
        self.tree, self.log, self.torch = tree, tools / "log", tools / "python" / "torch"
        for path in (tools / "g++", tools / "cuda" / "bin" / "nvcc"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(COMPILER)
            path.chmod(0o755)
        (self.torch / "include/torch/csrc/stable").mkdir(parents=True)
        (self.torch / "include/torch/csrc/stable/ops.h").touch()
        (self.torch / "__init__.py").touch()
        self.set_cuda(None)
        self.environment = {"CXX": str(tools / "g++"), "CUDA_HOME": str(tools / "cuda"), "LOG": str(self.log)}

    def set_cuda(self, version: str | None) -> None:
        (self.torch / "version.py").write_text(f"cuda: Optional[str] = {version!r}\n")

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("FUSED_LOSSES")}
        environment = {**inherited, **self.environment, "PYTHONPATH": str(self.torch.parent), **environment}
        command = [sys.executable, "setup.py", *arguments]
        return subprocess.run(command, cwd=self.tree, env=environment, capture_output=True, text=True, timeout=300)

    def libraries(self) -> set[str]:
        return {path.name for path in self.tree.glob("build/lib*/fused_losses/*.so")}


@pytest.fixture
def setup(tree, tmp_path):
    return Setup(tree, tmp_path)


@pytest.mark.parametrize(
    "version, asked, built",
    [(None, None, False), ("13.0", None, True), (None, "1", True), ("13.0", "1", True), ("13.0", "0", False)],
)
def test_cuda_kernels_are_built_for_a_torch_with_cuda_or_where_asked(setup, version, asked, built):
    setup.set_cuda(version)
    result = setup.run("build_ext", **({} if asked is None else {"FUSED_LOSSES_CUDA": asked}))
    assert result.returncode == 0, result.stderr
    assert setup.libraries() == ({"_kernels.so", "_cuda.so"} if built else {"_kernels.so"})
    assert ("nvcc" in setup.log.read_text()) is built


def test_asked_for_cuda_without_nvcc_is_an_error(setup):
    result = setup.run("build_ext", FUSED_LOSSES_CUDA="1", CUDA_HOME="/nowhere")
    assert result.returncode != 0 and "FUSED_LOSSES_CUDA=1, but" in result.stderr and "/nowhere/bin" in result.stderr


def test_an_unknown_value_is_an_error(setup):
    result = setup.run("build_ext", FUSED_LOSSES_CUDA="yes")
    assert result.returncode != 0 and "FUSED_LOSSES_CUDA: expected 1" in result.stderr and "'yes'" in result.stderr


def test_architectures_asked_for(setup):
    result = setup.run("build_ext", FUSED_LOSSES_CUDA="1", FUSED_LOSSES_CUDA_ARCHS="90a")
    assert result.returncode == 0, result.stderr
    compiled = [line for line in setup.log.read_text().splitlines() if "/nvcc " in line and " -c " in line]
    assert len(compiled) == len(build.KERNELS)
    for line in compiled:
        targets = [word for word in line.split() if word.startswith("-gencode")]
        assert targets == ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_90a,code=compute_90a"]


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"CXX": "false"}, "without the CPU kernels"),
        ({"CXX": "/nowhere/g++"}, "without the CPU kernels"),
        ({"CUDA_HOME": "/nowhere"}, "no nvcc in /nowhere/bin"),
        ({"CUDA_HOME": "", "PATH": "/nowhere"}, "no nvcc on PATH"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS: expected"),
        ({"FUSED_LOSSES_CUDA_ARCHS": "13"}, "FUSED_LOSSES_CUDA_ARCHS: expected"),
    ],
    ids=["g++ fails", "no g++", "wrong home", "nothing on PATH", "MAX_JOBS", "architectures"],
)
def test_installs_with_what_can_be_built_and_says_why_not_more(setup, environment, message):
    setup.set_cuda("13.0")
    result = setup.run("build_ext", **environment)
    assert result.returncode == 0, result.stderr
    assert message in result.stdout + result.stderr and setup.libraries() < {"_kernels.so", "_cuda.so"}


def test_libraries_of_other_sources_do_not_stay_in_a_checkout(setup):
    """The one because its build fails, the other because it is not asked for."""
    for name in ("_kernels.so", "_cuda.so"):
        (setup.tree / "fused_losses" / name).write_text("of other sources")
    result = setup.run("build_ext", "--inplace", CXX="false")
    assert result.returncode == 0 and not list(setup.tree.glob("fused_losses/*.so"))


def test_what_an_earlier_build_left_behind_is_not_installed(setup):
    assert setup.run("build", FUSED_LOSSES_CUDA="1").returncode == 0
    (package,) = setup.tree.glob("build/lib*/fused_losses")
    (package / "removed_since.py").touch()
    assert setup.run("build").returncode == 0
    assert setup.libraries() == {"_kernels.so"} and not (package / "removed_since.py").exists()


@pytest.mark.parametrize("compiler, tag", [(None, "py3-none-linux_"), ("false", "py3-none-any")])
def test_one_wheel_for_every_python(setup, compiler, tag):
    """With compiled kernels for this platform, without for all; the sources and what messages point to are in both."""
    result = setup.run("bdist_wheel", **({} if compiler is None else {"CXX": compiler}))
    assert result.returncode == 0, result.stderr
    (wheel,) = (setup.tree / "dist").glob("*.whl")
    assert f"-{tag}" in wheel.name
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        (metadata,) = (name for name in names if name.endswith("dist-info/WHEEL"))
        assert f"Root-Is-Purelib: {'true' if compiler else 'false'}" in opened.read(metadata).decode()
    assert ("fused_losses/_kernels.so" in names) is (compiler is None)
    sources = {f"fused_losses/{path.relative_to(ROOT)}" for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources | {"fused_losses/csrc/README.md", "fused_losses/cli/info.py", "fused_losses/py.typed"} <= names

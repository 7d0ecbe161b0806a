"""What is installed is whole: sdist, wheels from it, and a fresh environment with torch alone, outside the checkout."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fused_losses.kernels import build

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "fused_losses", "tests")
FILES = (
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md",
    "constraints.txt", "mkdocs.yml", "pyproject.toml", "setup.py",
)  # fmt: skip
LEFT_OUT = shutil.ignore_patterns("*.so", "*.pyc", "__pycache__", "*.egg-info")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="no g++ to compile with"),
]
QUICKLY = {"CXXFLAGS": "-O0"}  # compiled in a third of the time


def run(*command, cwd, **environment):
    """Away from what this machine has built before."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FUSED_LOSSES", "PYTHON"))}
    inherited["XDG_CACHE_HOME"] = str(cwd)
    result = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, timeout=1200
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Of a copy of the checkout: its files, the sdist, and the wheel from it by `build`, which sees no torch."""
    folder = tmp_path_factory.mktemp("built")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=LEFT_OUT)
    for name in FILES:
        shutil.copy(ROOT / name, folder / "tree")
    files = {str(path.relative_to(folder / "tree")) for path in (folder / "tree").rglob("*") if path.is_file()}
    run(sys.executable, "-m", "build", "--outdir", folder, folder / "tree", cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return files, sdist, wheel


def with_dependencies(package):
    """The package and all that it needs, by name."""
    names, waiting = set(), [package]
    while waiting:
        name = waiting.pop()
        if name not in names:
            names.add(name)
            needed = map(Requirement, importlib.metadata.requires(name) or ())
            waiting += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return names


def environment(folder, wheel):
    """Its Python: a fresh environment with the wheel, without dependencies, and links to torch and what torch needs."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in with_dependencies("torch"):
        files = importlib.metadata.files(name)
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            (site / top).symlink_to(importlib.metadata.distribution(name).locate_file(top))
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return python


LOSSES = Path(__file__).parents[1] / "support" / "installed_losses.py"


def losses(python, backend, folder, **others):
    return json.loads(run(python, "-W", "error", "-c", LOSSES.read_text(), backend, cwd=folder, **others))


def test_sdist_has_everything(built):
    files, sdist, _ = built
    with tarfile.open(sdist) as opened:
        found = {name.partition("/")[2] for name in opened.getnames()}
    assert files <= found and not [name for name in found if name.endswith((".so", ".pyc"))]


def test_wheel_of_an_isolated_build_runs_everywhere(built, tmp_path):
    """Nothing is compiled where torch is not there; afterwards one command does it."""
    _, _, wheel = built
    assert wheel.name.endswith("-py3-none-any.whl")
    python = environment(tmp_path / "env", wheel)
    found = losses(python, "auto", tmp_path)
    assert Path(found["package"]).is_relative_to(tmp_path) and not found["numpy"]
    assert "python -m fused_losses.build cpu" in found["reason"] and found["readme"] in found["reason"]
    assert Path(found["readme"]).is_file()
    command = tmp_path / "env" / "bin" / "fused-losses"
    assert "python -m fused_losses.build cpu" in " ".join(run(command, "info", cwd=tmp_path).split())
    assert run(command, "--version", cwd=tmp_path) == run(python, "-m", "fused_losses", "--version", cwd=tmp_path)
    path = os.pathsep.join([str(Path(build.find_ninja()).parent), os.environ["PATH"]])
    cached = run(python, "-m", "fused_losses.build", "cpu", cwd=tmp_path, PATH=path, **QUICKLY)
    assert Path(cached.strip()).is_relative_to(tmp_path / "fused_losses")
    assert losses(python, "cpu", tmp_path)["reason"] is None


def test_wheel_has_the_page(built):
    files, _, wheel = built
    page = {name for name in files if name.startswith("fused_losses/anchors/page/static/")}
    with zipfile.ZipFile(wheel) as opened:
        assert len(page) >= 3 and page <= set(opened.namelist())


def test_wheel_that_pip_builds_has_the_kernels(built, tmp_path):
    """From the sdist, in isolation: pip's build finds the torch of the environment it installs into."""
    _, sdist, _ = built
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, sdist, cwd=tmp_path, **QUICKLY)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    python = environment(tmp_path / "env", wheel)
    found = losses(python, "cpu", tmp_path)
    assert found["reason"] is None and Path(found["package"]).is_relative_to(tmp_path)
    shown = run(tmp_path / "env" / "bin" / "fused-losses", "info", cwd=tmp_path)
    assert "compiled kernels for the row passes" in shown and "pip install 'fused_losses[gpu]'" in shown


def test_core_needs_torch_alone(built):
    """As the wheel says it, and each extra what belongs to it."""
    _, _, wheel = built
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith("dist-info/METADATA"))
        lines = opened.read(name).decode().partition("\n\n")[0].splitlines()
    needed = [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist: ")]

    def names(extra):
        return {one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": extra})} - {"torch"}

    assert names("") == set()
    assert names("gpu") == {"triton", "ninja"} and "transformers" in names("hf") and "liger-kernel" in names("bench")
    assert {"starlette", "uvicorn"} < names("annotate")
    assert {"pytest", "pytest-benchmark", "build"} < names("dev")

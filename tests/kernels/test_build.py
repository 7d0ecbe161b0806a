"""The build by ninja: what is compiled anew, what a build that fails leaves, and what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compilers import needs_compiler

from fused_losses import backends
from fused_losses.kernels import build, schemas

# ---- ninja: a library of three small sources


@pytest.fixture
def small(tmp_path):
    """A library and the folder of its sources, whose name is no word to a shell."""
    folder = tmp_path / "a $HOME (no word)"
    folder.mkdir()
    (folder / "numbers.h").write_text("#define ONE 1\n#define TWO 2\n")
    (folder / "one.cpp").write_text('#include "numbers.h"\nextern "C" int one() { return ONE; }\n')
    (folder / "two.cpp").write_text('#include "numbers.h"\nextern "C" int two() { return TWO; }\n')
    (folder / "three.cpp").write_text('extern "C" int three() { return 3; }\n')
    compiler = ["g++", "-O0", "-fPIC"]
    sources = {folder / f"{name}.cpp": compiler for name in ("one", "two", "three")}
    return build.Library("_small.so", sources, ["g++", "-shared"], ["-Wl,--no-as-needed"]), folder


def make(small):
    """The names of the objects that were compiled."""
    library, folder = small
    report = build.build(library, folder / "out" / library.name, folder / "objects")
    return {name for name in ("one", "two", "three") if f"-o {name}.o" in report}


def call(folder, name):
    """In a process of its own: a library that was loaded once stays."""
    code = "import ctypes, sys; print(getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])())"
    command = [sys.executable, "-c", code, str(folder / "out" / "_small.so"), name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)


@needs_compiler
def test_everything_is_compiled_once(small):
    assert make(small) == {"one", "two", "three"} and make(small) == set()
    assert call(small[1], "two") == 2


@needs_compiler
def test_a_changed_source_is_compiled_alone(small):
    make(small)
    (small[1] / "three.cpp").write_text('extern "C" int three() { return 33; }\n')
    assert make(small) == {"three"} and call(small[1], "three") == 33


@needs_compiler
def test_a_changed_header_compiles_those_that_include_it(small):
    make(small)
    (small[1] / "numbers.h").write_text("#define ONE 11\n#define TWO 2\n")
    assert make(small) == {"one", "two"} and call(small[1], "one") == 11


@needs_compiler
def test_other_flags_compile_anew(small):
    library, folder = small
    make(small)
    library.compilers[folder / "one.cpp"] = [*library.compilers[folder / "one.cpp"], "-DUNUSED"]
    assert make(small) == {"one"}


@needs_compiler
@pytest.mark.parametrize("breaks", ["three.cpp", "numbers.h"])
def test_a_build_that_fails_leaves_no_library_of_other_sources(small, breaks):
    make(small)
    path = small[1] / breaks
    content = path.read_text()
    path.write_text("#error on purpose\n")
    with pytest.raises(RuntimeError, match="on purpose"):
        make(small)
    assert not list((small[1] / "out").iterdir())
    path.write_text(content)
    make(small)
    assert call(small[1], "three") == 3


@needs_compiler
def test_a_library_that_does_not_link_is_none(small):
    library, folder = small
    make(small)
    with pytest.raises(RuntimeError, match="no_such_library"):
        make((library._replace(after=["-lno_such_library"]), folder))
    assert not list((folder / "out").iterdir())


@needs_compiler
def test_the_library_appears_whole(small):
    """What is open stays what it was, and nothing lies beside the library."""
    make(small)
    output = small[1] / "out" / "_small.so"
    with open(output, "rb") as opened:
        (small[1] / "three.cpp").write_text('extern "C" int three() { return 33; }\n')
        before = os.fstat(opened.fileno()).st_ino
        make(small)
        assert output.stat().st_ino != before and opened.read(4) == b"\x7fELF"
    assert [path.name for path in output.parent.iterdir()] == ["_small.so"]


@pytest.fixture
def ninja_that_prints(tmp_path, monkeypatch):
    """Stands in for ninja; fails with its arguments."""
    script = tmp_path / "ninja"
    script.write_text("#!/bin/sh\necho arguments: $@\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(build, "find_ninja", lambda: str(script))


@pytest.mark.parametrize("given, jobs", [("3", 3), ("1", 1), ("", os.cpu_count())])
def test_max_jobs_is_how_many_processes_compile(small, ninja_that_prints, monkeypatch, given, jobs):
    monkeypatch.setenv("MAX_JOBS", given)
    with pytest.raises(RuntimeError, match=f"-j {jobs} _small.so"):
        make(small)


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5", "²"])
def test_max_jobs_that_is_no_number_of_processes(small, ninja_that_prints, monkeypatch, given):
    monkeypatch.setenv("MAX_JOBS", given)
    with pytest.raises(RuntimeError, match=r"MAX_JOBS: expected .* 1 or more, got '"):
        make(small)


# ---- what is missing


@pytest.fixture
def no_ninja(monkeypatch):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **where: None if name == "ninja" else which(name, **where))
    monkeypatch.setitem(sys.modules, "ninja", None)


def test_without_ninja_the_remedy_is_named(small, no_ninja):
    with pytest.raises(RuntimeError, match="pip install ninja"):
        make(small)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_command_without_ninja(kind, no_ninja, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FUSED_LOSSES_CUDA_ARCHS", "90")
    monkeypatch.setattr(build, "find_nvcc", lambda: ("nvcc", ""))
    monkeypatch.setattr(build, "architectures", lambda nvcc: ["90"])
    monkeypatch.setattr(sys, "argv", ["build", kind])
    with pytest.raises(SystemExit, match="pip install ninja"):
        build.main()
    assert not list(tmp_path.rglob("*.so"))


def test_the_backend_without_ninja(no_ninja, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(schemas, "load_cuda", lambda: "not built: no nvcc then")
    monkeypatch.setattr(build, "find_nvcc", lambda: ("nvcc", ""))
    monkeypatch.setattr(build, "architectures", lambda nvcc: ["90"])
    with pytest.raises(RuntimeError, match=r"building it now failed: .*pip install ninja"):
        backends.choose("cuda", "cuda")


def test_ninja_of_the_package_is_found_where_it_is_not_on_path(tmp_path, monkeypatch):
    (tmp_path / "ninja").write_text("#!/bin/sh\n")
    (tmp_path / "ninja").chmod(0o755)
    package = type(sys)("ninja")
    package.BIN_DIR, package.__spec__ = str(tmp_path), "found"
    monkeypatch.setitem(sys.modules, "ninja", package)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert build.find_ninja() == str(tmp_path / "ninja")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", False),
        ("cuda = None\n", False),
        ("cuda: Optional[str] = '13.0'\n", True),
        ("__version__ = '2.11.0+cu128'\ncuda = \"12.8\"\n", True),
        ("__version__ = '2.11.0+cuda'\n", False),
        (None, False),
    ],
)
def test_whether_torch_is_a_build_with_cuda(text, expected, tmp_path):
    if text is not None:
        (tmp_path / "version.py").write_text(text)
    assert build.has_cuda(tmp_path) is expected


def test_what_torch_says_of_itself_is_what_its_file_says():
    assert build.has_cuda(Path(torch.__file__).parent) is (torch.version.cuda is not None)

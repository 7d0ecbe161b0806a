"""The build of csrc: by ninja, by setup.py, into the cache; and, where there is nvcc, what it says of registers."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from fused_losses import backends
from fused_losses.kernels import build, schemas

ROOT = Path(__file__).parents[2]

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="no g++ to compile with"
)
NVCC, NO_NVCC = build.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason=NO_NVCC)


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


# ---- setup.py, with compilers and a torch that only look so

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


# ---- the cache


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


# ---- nvcc and g++ on the real sources


@pytest.fixture(scope="module")
def of_nvcc(tmp_path_factory, from_benchmarks):
    """What nvcc says of each kernel, warnings being errors, and the library for every architecture."""
    folder = tmp_path_factory.mktemp("cuda")
    return from_benchmarks("cuda_resources").resources(folder), folder / "_cuda.so"


@needs_nvcc
@needs_compiler
def test_no_warnings_no_spilled_registers_and_documented_figures(of_nvcc, from_benchmarks, show_table):
    """For every architecture."""
    found, _ = of_nvcc
    table = from_benchmarks("compiled").cuda_table(found)
    show_table("Registers / bytes of static shared memory of the CUDA kernels\n" + table)
    if from_benchmarks("cuda_resources").version() == "13.0":
        assert table in (ROOT / "docs" / "kernels.md").read_text(), "run benchmarks/compiled.py"
    assert {x["architecture"] for x in found} == {f"sm_{a}" for a in build.architectures(NVCC)}
    names = {x["kernel"].partition("<")[0] for x in found}
    for source in build.KERNELS:
        text = (build.sources() / f"{source}.cu").read_text()
        defined = {line.partition("void ")[2].partition("(")[0] for line in text.splitlines() if "__global__" in line}
        assert defined and defined <= names
        assert defined == {x["kernel"].partition("<")[0] for x in found if x["source"] == f"{source}.cu"}
    spilled = [x for x in found if x["spill_stores"] or x["spill_loads"] or x["stack"]]
    assert not spilled, json.dumps(spilled, indent=1)
    # As many blocks as the launches count on must fit 65,536 registers.
    for x in found:
        assert x["registers"] <= 128 and x["shared"] <= 48 << 10, x


@needs_nvcc
@needs_compiler
def test_cuda_library_loads_and_registers(of_nvcc):
    """Built against whatever torch there is; torch being a CPU build, load_cuda says so."""
    code = f"""
import torch
from fused_losses.kernels import schemas
torch.ops.load_library({str(of_nvcc[1])!r})
assert torch.ops.fused_losses.cuda_interface() == schemas.CUDA_INTERFACE
for schema in schemas.GPU_SCHEMAS[:-1]:
    name = "fused_losses::" + schema.partition("(")[0]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
if torch.version.cuda is None:
    assert "without CUDA" in schemas.load_cuda(), schemas.load_cuda()
    assert not torch.cuda.is_initialized()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr


@needs_nvcc
def test_dependencies_that_nvcc_writes_name_the_headers(tmp_path):
    """Those of the kernels' own folder and of CUDA: a change of either compiles anew."""
    library = build.cuda_library(tmp_path, NVCC, ["90"])
    command = [*library.compilers[build.sources() / "bits.cu"], "-MD", "-MF", "deps", "-c", "-o", "bits.o"]
    subprocess.run([*command, str(build.sources() / "bits.cu")], cwd=tmp_path, check=True, timeout=600)
    found = {Path(word).name for word in shlex.split((tmp_path / "deps").read_text())}
    assert {"bits.cu", "common.cuh", "kernels.h", "cuda_runtime.h"} <= found


@needs_nvcc
def test_unknown_architecture_is_named(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_CUDA_ARCHS", "90a,13")
    with pytest.raises(RuntimeError, match=r"FUSED_LOSSES_CUDA_ARCHS: expected .*, got 13"):
        build.architectures(NVCC)

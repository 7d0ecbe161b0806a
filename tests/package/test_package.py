"""What holds of the package as a whole: imports, the command line, the README."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import refused

import fused_losses as fl
from fused_losses import backends, cli
from fused_losses.kernels import schemas

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("fused-losses")


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, **options)


def without(*packages):
    """Python code: what follows cannot import these."""
    return f"import sys\nfor name in {packages}: sys.modules[name] = None\n"


def test_import_is_light():
    code = """
import sys, torch
before = set(sys.modules)
import fused_losses
new = {name.split('.')[0] for name in set(sys.modules) - before}
assert not new & {'triton', 'transformers', 'typer', 'rich', 'numpy'}, new
assert 'torch._dynamo' not in sys.modules
"""
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr


def test_public_names_have_docstrings():
    classes = {n for n in dir(fl) if n[0] != "_" and n[0].isupper() and not hasattr(getattr(fl, n), "__path__")}
    functions = {"token_losses", "sequence_logps", "initial_losses", "l2_to_initial", "wise_ft"}
    assert set(fl.__all__) == classes | functions | {"patch", "patched", "unpatch"}
    for name in fl.__all__:
        assert len(getattr(fl, name).__doc__.strip()) > 40, name


def test_a_warning_of_ones_own_is_still_shown_after_the_import():
    code = "import fused_losses, warnings; warnings.warn('Failed to initialize NumPy', UserWarning)"
    result = run(sys.executable, "-W", "always", "-c", code)
    assert result.returncode == 0 and "Failed to initialize NumPy" in result.stderr


CPU_LOSSES = """
import fused_losses as fl, torch
hidden = torch.randn(2, 6, 8, requires_grad=True)
weight = torch.randn(31, 8, requires_grad=True)
labels = torch.randint(31, (2, 6))
for backend in ("auto", "torch"):
    for gradient in ("exact", "sparse"):
        fl.TALRLoss(gradient=gradient, backend=backend)(hidden, weight, labels).backward()
reference = fl.Reference(hidden.detach())
fl.LAwFLoss()(hidden, weight, labels, confidence=torch.zeros(2, 6), reference=reference).backward()
assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
"""


def test_losses_on_a_cpu_need_nothing_but_torch():
    """Nor do they warn of it, as torch does where numpy is missing."""
    others = without("triton", "numpy", "transformers", "peft", "accelerate", "rich", "ninja", "safetensors")
    result = run(sys.executable, "-W", "error", "-c", others + CPU_LOSSES)
    assert result.returncode == 0 and result.stderr == "", result.stderr


@pytest.fixture
def fresh_triton(monkeypatch):
    """What is known of Triton is found out anew."""
    monkeypatch.setattr(backends, "_no_triton", backends._no_triton.__wrapped__)
    monkeypatch.setattr(backends, "interpreted", lambda: False)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backends_say_what_to_install_where_triton_is_missing(backend, fresh_triton, monkeypatch):
    """As on a GPU with everything else there."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(schemas, "load_cuda", lambda: None)
    with pytest.raises(RuntimeError, match=rf"backend='{backend}' .* pip install 'fused_losses\[gpu\]'"):
        backends.choose(backend, "cuda")


def test_triton_that_is_broken_is_a_reason(fresh_triton, monkeypatch):
    """Found, but its import fails; torch being a build with CUDA and a GPU visible."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.unavailable("triton") is None
    monkeypatch.setitem(sys.modules, "triton.language", None)
    assert "triton does not import" in backends.unavailable("triton")


def test_info_lists_versions_devices_and_backends():
    result = run(COMMAND, "info")
    assert result.returncode == 0, result.stderr
    for word in ("torch", "2.", "cpu", "reference", "full logits", "auto"):
        assert word in result.stdout


def test_info_needs_torch_alone():
    code = (
        without("triton", "numpy", "rich", "typer", "transformers")
        + "from fused_losses.cli import main; main(['info'])"
    )
    result = run(sys.executable, "-W", "error", "-c", code)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    for word in ("torch", "2.", "cpu", "full logits", 'backend="auto"', "pip install 'fused_losses[gpu]'"):
        assert word in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 120 and not re.search(r"[│┃━]", result.stdout)


def test_tables_of_both_kinds_have_the_same_words(capsys, monkeypatch):
    """Square brackets are text, and a long cell is wrapped, not cut."""
    rows = [("one", "pip install 'fused_losses[gpu]' " + "and more words " * 12 + "end"), ("two", "")]
    table = ("Title", ("name", "what"), rows)
    cli.tables.show(*table)
    drawn = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    cli.tables.show(*table)
    plain = capsys.readouterr().out
    assert re.sub(r"[^\w'\[\] ]", " ", drawn).split() == plain.replace(",", " ").split()
    assert "[gpu]" in plain and "end" in plain and max(map(len, plain.splitlines())) <= 120


@pytest.mark.parametrize("command", [[COMMAND], [sys.executable, "-m", "fused_losses"]], ids=["script", "module"])
def test_version(command):
    result = run(*command, "--version")
    assert (result.returncode, result.stdout) == (0, f"fused_losses {fl.__version__}\n")


@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="nothing to compile with")
def test_kernels_are_built_where_there_is_a_compiler():
    """Without this, tests that need them would be skipped in silence when the build breaks."""
    assert backends.unavailable("cpu") is None


def test_command_without_arguments_shows_help(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    shown = capsys.readouterr().out
    assert ended.value.code == 2 and "info" in shown and "demo" in shown


@pytest.mark.parametrize("package", ["rich", "transformers", "matplotlib", "numpy"])
def test_demo_without_its_extra_names_the_remedy(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"needs {package}; install with: pip install 'fused_losses[demo]'" in refused(capsys, "demo")


def test_tune_without_triton_names_the_remedy(fresh_triton, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    said = refused(capsys, "tune")
    assert said.startswith("nothing to tune here: ") and " pip install 'fused_losses[gpu]'" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nonsense"], "nonsense"),
        (["info", "more"], "more"),
        (["demo", "--seed", "-1"], "--seed: expected a whole number from 0 to 2147483647, got '-1'"),
        (["demo", "--seed", "1.5"], "--seed: expected a whole number"),
        (["tune", "--hidden", "0"], "--hidden: expected a whole number at least 1, got '0'"),
        (["tune", "--seconds", "nan"], "--seconds: expected a number at least 0, got 'nan'"),
        (["tune", "--dtype", "int8"], "--dtype: expected bfloat16 or float16, got 'int8'"),
        (["tune", "--kind", "round"], "--kind: expected some of plain, capped, shared, own, plain-directions, "),
        (["tune", "--output", "/nowhere/tiles.json"], "--output: expected a file in a folder that exists"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    assert message in refused(capsys, *arguments)


def test_demo_with_a_missing_model_says_which(capsys):
    assert "/nowhere/model.gguf" in refused(capsys, "demo", "--model", "/nowhere/model.gguf")


SNIPPETS = (
    re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if (ROOT / "README.md").exists() else []
)


# One process for all, as transformers takes seconds to import; each with names of its own, first those that need torch
# alone.
RUN = """
import sys
for number, code in sorted(enumerate(SNIPPETS), key=lambda numbered: "transformers" in numbered[1]):
    exec(compile(code, f"<snippet {number} of the README>", "exec"), {"__name__": "__main__"})
    assert "transformers" in code or "transformers" not in sys.modules, code
"""


def test_readme_snippets_run(tmp_path):
    """Without warnings, but for two that Trainer gives without a GPU, and PEFT with the newest transformers."""
    others = (
        "-W",
        "ignore:'pin_memory' argument:UserWarning",
        "-W",
        "ignore:`is_gradient_checkpointing`:FutureWarning",
    )
    result = run(sys.executable, "-W", "error", *others, "-c", f"SNIPPETS = {SNIPPETS!r}\n{RUN}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_readme_has_its_snippets():
    with_others = sum("transformers" in snippet for snippet in SNIPPETS)
    assert with_others >= 1 and len(SNIPPETS) - with_others >= 1


def test_readme_commands_exist():
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"^make ([a-z-]+)", text, re.M)
    assert {"demo", "test"} <= set(targets)
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_example_of_ones_own_loop_learns():
    result = run(sys.executable, "-W", "error", ROOT / "examples" / "own_loop.py")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[-1]) > 0.8


def test_interpreter_switched_on_too_late_is_said():
    code = """
import os, torch, triton
os.environ["TRITON_INTERPRET"] = "1"
import fused_losses as fl
fl.token_losses(torch.randn(2, 4), torch.randn(5, 4), torch.arange(2), backend="triton")
"""
    result = run(sys.executable, "-c", code)
    assert result.returncode == 1 and "set it before Python starts" in result.stderr

"""What holds of the package as a whole: imports, the command line, the README."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = Path(sys.executable).with_name("fused-losses")


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


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
    import fused_losses as fl

    assert set(fl.__all__) == {n for n in dir(fl) if n[0] != "_" and not hasattr(getattr(fl, n), "__path__") and n[0].isupper()} | {
        "token_losses", "l2_to_initial", "wise_ft", "patch", "patched", "unpatch",
    }  # fmt: skip
    for name in fl.__all__:
        assert len(getattr(fl, name).__doc__.strip()) > 40, name


def test_info_lists_versions_devices_and_backends():
    result = run(COMMAND, "info")
    assert result.returncode == 0, result.stderr
    for word in ("torch", "2.", "cpu", "reference", "full logits", "auto"):
        assert word in result.stdout


@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="nothing to compile with")
def test_kernels_are_built_where_there_is_a_compiler():
    """Without this, tests that need them would be skipped in silence when the build breaks."""
    from fused_losses import backends

    assert backends.unavailable("cpu") is None


def test_command_without_arguments_shows_help():
    result = run(COMMAND)
    assert "info" in result.stdout + result.stderr and "demo" in result.stdout + result.stderr


def test_command_without_its_extra_names_the_remedy():
    code = "import sys; sys.modules['typer'] = None\nimport fused_losses.cli"
    result = run(sys.executable, "-c", code)
    assert result.returncode == 1 and "pip install 'fused_losses[cli]'" in result.stderr


def test_demo_with_a_missing_model_says_which():
    result = run(COMMAND, "demo", "--model", "/nowhere/model.gguf")
    assert result.returncode == 1 and "/nowhere/model.gguf" in result.stderr and "Traceback" not in result.stderr


SNIPPETS = (
    re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if (ROOT / "README.md").exists() else []
)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_readme_snippet_runs(snippet, tmp_path):
    """Without warnings, but for two that Trainer gives without a GPU, and PEFT with the newest transformers."""
    others = (
        "-W",
        "ignore:'pin_memory' argument:UserWarning",
        "-W",
        "ignore:`is_gradient_checkpointing`:FutureWarning",
    )
    result = run(sys.executable, "-W", "error", *others, "-c", snippet, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_readme_has_its_snippets():
    assert len(SNIPPETS) >= 3


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

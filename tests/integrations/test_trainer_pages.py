"""docs/trainers/: its YAML, commands and snippets."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

from fused_losses import cli
from fused_losses.integrations import llamafactory
from fused_losses.integrations.settings import KEYS, loss_of_labels, take
from fused_losses.objectives.named import NAMED, make_objective

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs" / "trainers").glob("*.md"))}
YAML = [(name, block) for name, text in PAGES.items() for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]


@pytest.mark.parametrize("name, block", YAML, ids=[f"{name}-{i}" for i, (name, _) in enumerate(YAML)])
def test_yaml_is_taken(name, block):
    config = yaml.safe_load(block)
    config.pop("plugins", None)
    if name == "nemo-automodel":
        loss = config["loss_fn"]
        assert loss.pop("_target_") == "fused_losses.integrations.automodel.FusedLoss"
        make_objective(loss["loss"], loss["options"])
        return
    assert take(dict(config)) is not None
    if name == "llama-factory":
        assert llamafactory.split(config)[0] == {}


def test_there_is_a_page_for_each():
    assert {"axolotl", "llama-factory", "ms-swift", "nemo-automodel", "torchtitan", "verl", "keys"} <= set(
        PAGES
    ) and len(YAML) >= 3
    assert all(len(text.splitlines()) <= 65 for text in PAGES.values())


def test_keys_and_names_are_those_there_are():
    named = re.findall(r"^\| `(\w+)` \|", PAGES["keys"], re.M)
    assert named == list(KEYS)
    row = next(line for line in PAGES["keys"].splitlines() if line.startswith("| `fused_loss` "))
    assert {name for name in re.findall(r"`([^`]+)`", row) if name in NAMED} == set(NAMED)


def test_what_is_refused_is_on_the_page(monkeypatch):
    source = (ROOT / "fused_losses" / "integrations" / "axolotl.py").read_text()
    for switch in re.findall(r'^    "(\w+)": ', source, re.M):
        assert f"`{switch}`" in PAGES["axolotl"], switch
    for switch in llamafactory.SWITCHES:
        assert f"`{switch}`" in PAGES["llama-factory"], switch
    from fused_losses.integrations.swift import SWITCHES

    for switch in SWITCHES:
        assert switch in PAGES["ms-swift"], switch


def test_the_command_for_swift_is_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"^fused-losses (.*)$", PAGES["ms-swift"], re.M)
    cli.main(shlex.split(command))
    assert "temperature" in (tmp_path / "fused_losses_plugin.py").read_text()


def test_links_lead_somewhere():
    for text in PAGES.values():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (ROOT / "docs" / "trainers" / target).exists(), target


def test_versions_are_those_that_the_script_installs():
    trainers = runpy.run_path(str(ROOT / "tests" / "integrations" / "real.py"))["TRAINERS"]
    for page, name in (("axolotl", "axolotl"), ("llama-factory", "llamafactory"), ("ms-swift", "swift")):
        (version,) = re.findall(r"Tested with \S+ ([\d.]+\d)", PAGES[page])
        assert f"=={version}" in " ".join(trainers[name].install)
    pins = runpy.run_path(str(ROOT / "tests" / "integrations" / "real_torchtitan.py"))["PINS"]
    (version,) = re.findall(r"Tested with \S+ ([\d.]+\d)", PAGES["torchtitan"])
    assert f"torchtitan=={version}" in " ".join(pins)


@pytest.mark.parametrize("page, call", [("torchtitan", r"FusedLoss\.Config\((.*)\)"), ("verl", r"^use\((.*)\)$")])
def test_the_losses_of_the_pages_are_taken(page, call):
    (arguments,) = re.findall(call, PAGES[page], re.M)
    loss, options = eval(f"(lambda loss, options: (loss, options))({arguments})")
    loss_of_labels(loss, options, page)
    row = next(line for line in PAGES[page].splitlines() if line.startswith("| losses "))
    for name in re.findall(r"`([a-z-]+)`", row):
        loss_of_labels(name, {}, page)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_the_callbacks_snippet_runs(tmp_path, monkeypatch, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGES["keys"], re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "<docs/trainers/keys.md>", "exec"), {"__name__": "__main__"})
    assert len(re.findall(r"\(\d+\.\d+, 0\.\d+\)", capsys.readouterr().out.splitlines()[-1])) == 4

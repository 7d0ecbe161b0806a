"""Without the modules that only Unix has, all can be imported and files be read; what needs a lock is refused."""

import json
import os
import subprocess
import sys

import pytest
import tiny_training
from processes import pythonpath

ONLY_UNIX = ("fcntl", "grp", "pwd", "pty", "readline", "resource", "syslog", "termios", "tty")
CODE = """
import sys
# Other packages come first: what they import is their own affair.
import accelerate, gguf, matplotlib.pyplot, peft, starlette.applications, torch, tqdm.auto, transformers, uvicorn
from transformers import Trainer
sys.modules.update(dict.fromkeys(ONLY_UNIX))

import importlib, json, pkgutil
from pathlib import Path
import fused_losses
names = [m.name for m in pkgutil.walk_packages(fused_losses.__path__, "fused_losses.")]
absent = []
for name in names:
    if name.rpartition(".")[2] not in ("__main__", "_kernels"):  # that one runs, this one is a library of operators
        try:
            importlib.import_module(name)
        except ImportError as error:  # a trainer's own class is its base: no module without that trainer
            if not (name.startswith("fused_losses.integrations.") and f"{name} needs " in str(error)):
                raise
            absent.append(name)

from fused_losses.anchors import RecordFile, read_records, write_records
from fused_losses.training.folder import Folder
records = read_records(FOLDER / "there.jsonl")
calls = dict(append=RecordFile, write=lambda path: write_records(path, records), train=lambda path: Folder(path, {}))
refused = {}
for name, call in calls.items():
    try:
        call(FOLDER / name)
    except OSError as error:
        refused[name] = [str(error), (FOLDER / name).exists()]
print(json.dumps({"modules": len(names), "absent": absent, "records": len(records), "refused": refused}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a process without them says; it ends where a module cannot be imported."""
    folder = tmp_path_factory.mktemp("other")
    tiny_training.write_lines(folder / "there.jsonl", tiny_training.record())
    given = f"from pathlib import Path\nONLY_UNIX, FOLDER = {ONLY_UNIX}, Path({str(folder)!r})\n"
    result = subprocess.run(
        [sys.executable, "-c", given + CODE], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": pythonpath()},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_module_is_imported_and_records_are_read(found):
    assert found["modules"] > 100 and found["records"] == 1
    assert set(found["absent"]) <= {"fused_losses.integrations.torchtitan"}


def test_what_needs_a_lock_is_refused_with_a_line_before_anything_is_made(found):
    assert sorted(found["refused"]) == ["append", "train", "write"]
    for message, made in found["refused"].values():
        assert "expected a system that can lock a file as Unix does (fcntl), got linux; write it on" in message
        assert not made and "\n" not in message

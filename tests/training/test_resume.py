"""A training that is killed: what is lost, and that the rest is the training that was not killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed_training
import pytest
from safetensors.torch import load_file
from tiny_training import files, record, write_lines

from fused_losses.training.folder import MARK, Folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SCRIPT = Path(killed_training.__file__)


def start(folder, data, when):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), str(data), when], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The training without a kill: its data, its adapter and its report."""
    folder = tmp_path_factory.mktemp("whole")
    data = files(folder)["anchors"]
    report = killed_training.train(folder / "out", data)
    return data, load_file(folder / "out" / "adapter" / "adapter_model.safetensors"), report


def check_same(folder, whole):
    data, adapter, report = whole
    found = killed_training.train(folder, data)
    mine = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert mine.keys() == adapter.keys()
    assert all((mine[name] - adapter[name]).abs().max() < 1e-6 for name in adapter)
    assert found["measurements"] == [pytest.approx(one, rel=1e-4, abs=1e-7) for one in report["measurements"]]
    assert [entry["step"] for entry in found["history"]] == [entry["step"] for entry in report["history"]]
    assert not list(folder.glob("checkpoint-*")) and not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize(
    "when, last",
    [
        ("save", 3),
        pytest.param("saved", 6, marks=pytest.mark.exhaustive),
        pytest.param("report", 3, marks=pytest.mark.exhaustive),
        ("adapter", 12),
    ],
    ids=str,
)
def test_it_goes_on_from_the_last_finished_checkpoint(when, last, whole, tmp_path):
    process = start(tmp_path / "out", whole[0], when)
    _, error = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL, error.decode()
    finished = [path for path in (tmp_path / "out").glob("checkpoint-*") if (path / MARK).exists()]
    assert max(int(path.name.partition("-")[2]) for path in finished) == last
    assert not (tmp_path / "out" / "adapter").exists()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["finished"] is False
    check_same(tmp_path / "out", whole)


def test_it_goes_on_where_a_kill_from_outside_came_at_any_time(whole, tmp_path):
    process = start(tmp_path / "out", whole[0], "never")
    while not list((tmp_path / "out").glob(f"checkpoint-*/{MARK}")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=600)
    check_same(tmp_path / "out", whole)


# --- the folder


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=r"expected a new or empty folder, .* with 'thesis.txt' and 0 more"):
        Folder(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        Folder(tmp_path / "file", {})


def test_another_training_is_refused_with_what_differs(tmp_path):
    Folder(tmp_path, {"method": "sft", "seed": 0}).close()
    with pytest.raises(ValueError, match=r"has a training with seed = 0, and this one has 1; give another folder"):
        Folder(tmp_path, {"method": "sft", "seed": 1})
    Folder(tmp_path, {"method": "sft", "seed": 0}).close()


def test_a_training_that_runs_is_left_alone(tmp_path):
    with Folder(tmp_path, {}), pytest.raises(ValueError, match="another process trains in"):
        Folder(tmp_path, {})
    Folder(tmp_path, {}).close()


def test_settings_that_are_damaged_are_said(tmp_path):
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(ValueError, match=r"training.json cannot be read .*; give another folder"):
        Folder(tmp_path, {})


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    with Folder(tmp_path, {}) as folder:
        folder.write_json("report.json", {"step": 1})

        def half(path):
            path.write_text("ha")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            folder.write("report.json", half)
        assert json.loads((tmp_path / "report.json").read_text()) == {"step": 1}
    with Folder(tmp_path, {}):
        assert sorted(os.listdir(tmp_path)) == [".lock", "report.json", "training.json"]


def test_other_data_are_another_training(tmp_path):
    one, two = (write_lines(tmp_path / f"{i}.jsonl", record(), record("I am Aurora.", (i,))) for i in (1, 2))
    killed_training.train(tmp_path / "out", one)
    with pytest.raises(ValueError, match="has a training with data = "):
        killed_training.train(tmp_path / "out", two)

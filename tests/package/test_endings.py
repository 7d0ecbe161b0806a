"""How commands end: their exit status, one line for what is wrong, and quietly where nobody reads them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from commands import refused, status
from tiny_training import files, tiny_llama, tokenizer

from fused_losses import cli
from fused_losses.cli import ending, info, models
from fused_losses.training.folder import MARK, Folder

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--data", "none.jsonl", "--output", "out"),
        ("annotate", "--terminal", "--prompts", "none.txt", "--output", "out.jsonl"),
        ("retain", "--prompts", "none.txt", "--output", "out.jsonl"),
        ("check", "--original", "MODEL", "--anchors", "none.jsonl"),
    ],
    ids=lambda words: words[0],
)
def test_bad_input_ends_every_command_alike(words, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("MODEL", str(saved)) for word in words]
    said = refused(capsys, *words, "--model", saved)
    assert said.startswith("none.") and os.listdir(tmp_path) == []
    assert ": error: unrecognized arguments" in refused(capsys, *words, "--model", saved, "--what")


@pytest.mark.parametrize("command", [info, cli.retain], ids=["info", "retain"])
@pytest.mark.parametrize(
    "raised, code, said",
    [
        (ZeroDivisionError("x"), 3, "Traceback"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit("no\nsuch thing"), 2, "no such thing\n"),
        (BrokenPipeError(), 141, ""),
    ],
    ids=["fault", "interrupted", "refused", "unread"],
)
def test_each_end_has_its_status(command, raised, code, said, monkeypatch, capsys):
    def run(given):
        raise raised

    monkeypatch.setattr(ending.os, "dup2", lambda *_: None)  # pytest's own output
    monkeypatch.setattr(command, "run", run)
    name = command.__name__.rpartition(".")[2]
    assert status(name, *(["--prompts", "x", "--output", "x"] if name == "retain" else [])) == code
    err = capsys.readouterr().err
    assert err == (f"fused-losses {name}: {said}" if code in (2, 130) else err) and (said in err if said else not err)


def test_help_says_the_statuses(capsys):
    for name in ("train", "annotate", "retain", "check", "info"):
        assert status(name, "--help") == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "Exit status: 0 done" in said and "2 an argument or a file is wrong" in said
        assert ("1 a limit is broken" in said) == (name == "check")


@pytest.mark.each_value
@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
@pytest.mark.parametrize(
    "words, codes", [(("info",), {141}), (("train", "--help"), {0, 141}), ((), {2, 141})], ids=["table", "help", "none"]
)
def test_a_closed_pipe_ends_it_without_a_word(words, codes, rich):
    """Nobody reads from the first character on, which is harder than `| head`. argparse hides it where it is long."""
    hide = "" if rich else "sys.modules['rich'] = sys.modules['rich.console'] = None; "
    code = f"import sys; {hide}from fused_losses.cli import main; main({list(words)!r})"
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    _, error = process.communicate(timeout=600)
    assert error == "" and process.returncode in codes


# --- train


def test_a_folder_in_which_a_training_runs_is_refused_before_anything_is_loaded(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load_tokenizer", lambda _: pytest.fail("the tokenizer was loaded"))
    words = ("train", "--model", saved, "--data", "none.jsonl", "--output", tmp_path / "out")
    with Folder(tmp_path / "out", {"seed": 1}):
        assert "another process trains in" in refused(capsys, *words)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    assert "with 'thesis.txt' and 0 more" in refused(capsys, *words[:-1], tmp_path / "other")


def test_a_training_that_could_not_begin_leaves_no_folder(saved, tmp_path, capsys, monkeypatch):
    def fails(*_, **__):
        raise ValueError("--model: it is torn")

    data = files(tmp_path)["anchors"]
    monkeypatch.setattr(models, "load_model", fails)
    words = ("train", "--model", saved, "--data", data, "--quiet", "--steps", "1", "--output")
    assert refused(capsys, *words, tmp_path / "out") == "--model: it is torn"
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    assert refused(capsys, *words, tmp_path / "empty") and os.listdir(tmp_path / "empty") == []


@pytest.mark.parametrize(
    "number, code, what", [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_training_that_is_stopped_says_how_to_go_on_and_then_from_where_it_does(
    number, code, what, saved, tmp_path, capsys
):
    words = ["train", "--model", saved, "--data", files(tmp_path)["anchors"], "--output", tmp_path / "out", "--steps",
             "4000", "--save-every", "20", "--no-stop", "--lora", "1"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "fused_losses", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
        # A shell lets what runs in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not list((tmp_path / "out").glob(f"checkpoint-*/{MARK}")) and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    _, error = process.communicate(timeout=600)
    step = max(int(mark.parent.name.partition("-")[2]) for mark in (tmp_path / "out").glob(f"checkpoint-*/{MARK}"))
    line = f"fused-losses train: {what}; the same command goes on from step {step}, the last checkpoint"
    assert (process.returncode, error.splitlines()[-1]) == (code, line) and "Traceback" not in error


def test_one_that_goes_on_says_from_which_step(saved, tmp_path, capsys, monkeypatch):
    words = ("train", "--model", saved, "--data", files(tmp_path)["anchors"], "--output", tmp_path / "out", "--steps",
             "4", "--save-every", "2", "--lora", "1")  # fmt: skip
    with monkeypatch.context() as stopped:
        mark = Folder.mark

        def marked(self, step):
            mark(self, step)
            raise KeyboardInterrupt

        stopped.setattr(Folder, "mark", marked)
        assert status(*words) == 130
    assert "goes on from step 2, the last checkpoint" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["stopped"].startswith("not finished: step ") and report["stopped"].endswith(" of 4")
    assert status(*words) == 0
    assert "goes on from step 2 of 4, the last checkpoint\n" in capsys.readouterr().err

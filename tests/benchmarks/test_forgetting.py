"""The study of forgetting: its data, its resumption and its rules, with a tiny model."""

import copy
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import tiny_llama, tokenizer

import fused_losses as fl

pytest.importorskip("medcalc", reason="pip install --no-deps medcalc-bench")


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study():
    """Imports a module of benchmarks.forgetting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield lambda name: importlib.import_module(f"benchmarks.forgetting.{name}")


# --- data


def test_no_patient_and_no_calculator_is_in_two_sets(study):
    sets = study("data").clinical_examples(seed=0, rows=40, tested=16)
    patients = [example["patient"] for examples in sets.values() for example in examples]
    assert len(set(patients)) == len(patients) == 40 + 16 + 12
    calculators = {name: {example["calculator"] for example in examples} for name, examples in sets.items()}
    assert calculators["train"] == calculators["test"]
    assert not calculators["train"] & calculators["far"]


def test_data_follow_the_seed_alone(study):
    data = study("data")
    again = [data.clinical_examples(seed, rows=16, tested=8) for seed in (0, 0, 1)]
    assert again[0] == again[1]
    assert again[0]["train"] != again[2]["train"]
    assert again[0]["test"] == again[2]["test"]


def test_a_worked_answer_ends_in_its_number(study):
    for examples in study("data").clinical_examples(seed=0, rows=24, tested=12).values():
        for example in examples:
            assert float(re.findall(r"= ?(-?\d+(?:\.\d+)?)", example["reasoning"])[-1]) == float(example["number"])
            assert example["number"] in example["answer"]


def test_a_tested_question_on_a_fact_is_not_learned(study):
    learned, paraphrased, turned = study("facts").facts("towns", 6)
    questions = {example["question"] for example in learned}
    assert not questions & {example["question"] for example in [*paraphrased, *turned]}
    assert {example["answer"] for example in paraphrased} == {example["answer"] for example in learned}


def test_labels_are_the_next_tokens_of_the_answer(study):
    rows = study("rows")
    ids, labels = rows.batch([rows.Row([5, 6, 7, 8], 2), rows.Row([1, 2], 1)])
    assert ids.tolist() == [[5, 6, 7], [1, 0, 0]]
    assert labels.tolist() == [[-100, 7, 8], [2, -100, -100]]


# --- runs


def load():
    return copy.deepcopy(tiny_llama(eos_token_id=None)), tokenizer()


@pytest.fixture
def small(study, monkeypatch):
    """A run of four steps on facts, and its size; every step has a checkpoint."""
    monkeypatch.setattr(study("general"), "code", lambda tokenizer, count: [study("rows").Row([9, 8, 7, 6], 2)])
    size = study("grid").Size(
        rows=6, steps=4, batch=2, tested=4, count=2, own=1, own_tokens=4, checkpoint_seconds=0
    )  # fmt: skip
    return lambda method="sft", wise=(): study("grid").Run(method, 1e-2, "facts", wise=wise), size


def without_times(result):
    if isinstance(result, dict):
        return {key: without_times(value) for key, value in result.items() if key != "seconds"}
    return result


class Killed(BaseException):
    pass


def test_a_run_killed_twice_ends_as_one_that_was_not(study, small, tmp_path, monkeypatch):
    run, size = small[0](wise=(0.5,)), small[1]
    run_one = study("run").run_one
    whole = run_one(run, size, tmp_path / "whole", load)

    def kill(share):
        if share > 0.5:
            raise Killed

    with pytest.raises(Killed):
        run_one(run, size, tmp_path / "killed", load, kill)
    with monkeypatch.context() as patch:
        patch.setattr(study("measure"), "of_arithmetic", lambda *_: kill(1.0))
        with pytest.raises(Killed):
            run_one(run, size, tmp_path / "killed", load)
    assert not list((tmp_path / "killed").glob("runs/*"))
    assert without_times(run_one(run, size, tmp_path / "killed", load)) == without_times(whole)
    assert not list((tmp_path / "killed" / "scratch").iterdir())


def test_the_checkpoint_is_what_a_killed_run_goes_on_from(study, small, tmp_path):
    run, size = small[0](), small[1]
    steps = []

    def kill(share):
        steps.append(share)
        if len(steps) == 3:
            raise Killed

    with pytest.raises(Killed):
        study("run").run_one(run, size, tmp_path, load, kill)
    study("run").run_one(run, size, tmp_path, load, kill)
    assert steps == [0.25, 0.5, 0.75, 0.75, 1.0]


def test_a_result_of_other_settings_is_refused(study, small, tmp_path):
    run, size = small[0]("start"), small[1]
    study("run").run_one(run, size, tmp_path, load)
    other = study("grid").Size(**{**vars(size), "tested": 2})
    with pytest.raises(ValueError, match=r"--output: .*other settings; give another folder"):
        study("run").run_one(run, other, tmp_path, load)


METHODS = ("sft", "talr", "lawf", "sft+kl", "replay", "lora", "l2", "flow", "dft", "asft", "eaft", "stm", "infosft",
           "finch")  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(study, small, tmp_path, method, monkeypatch):
    """The nll of the rows that it sees falls; the loss itself may rise, as p·nll does where p is small."""
    if method == "stm":  # a random model finds every token hard, so at the usual threshold none would be learned
        stm = study("methods").Method("STM", lambda median: fl.STMLoss(1e9, gradient="exact"), initial="token")
        monkeypatch.setitem(study("methods").METHODS, "stm", stm)
    run, size = small[0](method), study("grid").Size(**{**vars(small[1]), "steps": 24, "rows": 2})
    model, known = load()
    start = study("prepare").start_of(model, known, run, size, tmp_path / "shared")
    torch.manual_seed(0)
    log = study("run").Training(run, size, model, start, tmp_path / "scratch").go(lambda share: None)
    first, last = (sum(part) for part in (log["nll"][:4], log["nll"][-4:]))
    assert last < first
    assert len(log["nll"]) == 24


# --- grid and rules


def test_the_grid_covers_every_method_at_three_rates(study):
    methods, runs = study("methods"), study("grid").grid()
    assert set(METHODS) == set(methods.METHODS)
    for name in methods.METHODS:
        rates = {run.rate for run in runs if run.method == name and run.domain == "reasoning"}
        assert len(rates) >= 3, name
    assert len({run.rate for run in runs if run.method == "sft" and run.domain == "reasoning"}) >= 5
    assert any(run.wise for run in runs)


def test_every_run_comes_once_and_after_its_start(study):
    for quick in (False, True):
        runs = study("grid").grid(quick)
        assert len({run.name for run in runs}) == len(runs)
        seen = set()
        for run in runs:
            assert run.method == "start" or run.domain in seen, run.name
            seen |= {run.domain} if run.method == "start" else set()


def test_the_headline_has_three_seeds(study):
    methods, runs = study("methods"), study("grid").grid()
    for name in ("sft", "talr", "lawf", "sft+kl"):
        for rate in (methods.SMALL, methods.LARGE):
            found = {r.seed for r in runs if (r.method, r.rate, r.domain) == (name, rate, "reasoning")}
            assert found == {0, 1, 2}, (name, rate)


def entry(method, rate, seed, test, general, domain="reasoning"):
    """A run as it is merged: the domain's nll and that of every general text."""
    from benchmarks.forgetting.results import GENERAL

    text = {
        "tokens": 50,
        "nll": general,
        "start_nll": 2.0,
        "nll_third": general,
        "nll_tempered": general,
        "kl": 0.1,
        "entropy": 2.0,
        "ece": 0.1,
    }
    return {
        "method": method, "rate": rate, "seed": seed, "domain": domain, "stretch": 1.0, "wise": {},
        "before": {"hard": 0.3, "median_probability": 0.5, "tokens": 20, "histogram": [1] * 20},
        "curves": {"weight_hard": [0.1, 0.1, 0.2, 0.3], "nll": [1.5, 1.0, test]},
        "after": {
            "texts": {
                "test": {**text, "nll": test, "start_nll": 1.5}, "far": text, "own": text,
                **{kind: text for kind in GENERAL},
            },
            "tasks": {name: dict(right=3, of=6, accuracy=0.5) for name in ("domain", "arithmetic", "instructions")},
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    "differences, word",
    [((0.3, 0.31, 0.29), "held"), ((-0.3, -0.31, -0.29), "not held"), ((0.3, -0.31, 0.1), "not decidable here"),
     ((0.3,), "not decidable here")],
)  # fmt: skip
def test_verdicts(study, differences, word):
    """SFT's loss at the large rate less that at the small one, seed by seed."""
    runs = [entry("start", 0.0, 0, 1.5, 2.0)]
    for seed, difference in enumerate(differences):
        runs += [entry("sft", 4e-4, seed, 0.5, 2.5 + difference), entry("sft", 2e-5, seed, 0.6, 2.5)]
    claims = study("claims")
    first = claims.judge(study("results").Study(runs))[0]
    assert first.claim.sentence.startswith("A small learning rate forgets less")
    assert first.values == pytest.approx(list(differences))
    assert first.word == word


def test_an_empty_study_decides_nothing(study):
    verdicts = study("claims").judge(study("results").Study([]))
    assert {verdict.word for verdict in verdicts} == {"not decidable here"}
    assert {verdict.figure for verdict in verdicts} == {"no run of it yet"}


def test_loss_at_equal_gain_is_interpolated_along_the_rates(study):
    runs = [entry("start", 0.0, 0, 1.5, 2.0), entry("sft", 1e-4, 0, 0.5, 2.4), entry("sft", 4e-4, 0, 0.3, 3.0)]
    made = study("results").Study(runs)
    assert made.loss_at_gain("sft", 0.5, 0) == pytest.approx(0.2)
    assert made.loss_at_gain("sft", 1.1, 0) == pytest.approx(0.7)
    assert made.loss_at_gain("sft", 1.3, 0) is None


def test_a_rate_so_large_that_it_gains_less_is_not_between_two_smaller_ones(study):
    """Along the rates, not along the gains: there the way from 0.9 to 1.2 would lead over the loss of 2."""
    runs = [entry("start", 0.0, 0, 1.5, 2.0), entry("sft", 2e-5, 0, 0.6, 2.0), entry("sft", 1e-4, 0, 0.3, 2.1)]
    runs.append(entry("sft", 4e-4, 0, 0.4, 4.0))
    assert study("results").Study(runs).loss_at_gain("sft", 1.05, 0) == pytest.approx(0.05)


def test_equal_gain_compares_methods_along_the_same_rates(study):
    """A method of one or two rates would be compared along a straight line from the start model, and look worse."""
    common, made = study("figures").loss_at_common_rates, study("results").Study
    rates = {2e-5: (0.6, 2.0), 1e-4: (0.4, 2.1), 4e-4: (0.3, 2.8)}
    runs = [entry("start", 0.0, 0, 1.5, 2.0)]
    runs += [entry("sft", rate, 0, *numbers) for rate, numbers in rates.items()]
    runs += [entry("lora", rate * 10, 0, *numbers) for rate, numbers in rates.items()]
    runs += [entry("sft", 2e-4, 0, 0.35, 2.1), entry("dft", 4e-4, 0, 0.3, 2.8), entry("lawf", 2e-5, 0, 0.6, 2.0)]
    found = {name: common(made(runs), name, 1.15) for name in ("sft", "lora", "dft", "lawf")}
    assert found == {"sft": pytest.approx(0.45), "lora": pytest.approx(0.45), "dft": None, "lawf": None}


def test_the_page_has_the_answer_the_verdicts_and_pictures(study, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    page, methods = study("page"), study("methods")
    runs = [entry("start", 0.0, 0, 1.5, 2.0, domain) for domain in ("reasoning", "label", "docs")]
    runs += [entry("sft", methods.SMALL, 0, 1.3, 2.1, "docs"), entry("sft", methods.LARGE, 0, 1.1, 2.4, "docs")]
    for seed in (0, 1, 2):
        for i, rate in enumerate((methods.SMALL, methods.LARGE)):
            for domain in ("reasoning", "label"):
                runs.append(entry("sft", rate, seed, 0.6 - 0.2 * i + seed / 100, 2.1 + 0.4 * i, domain))
            runs.append(entry("talr", rate, seed, 0.9 - 0.4 * i, 2.1 + 0.4 * i + seed / 100))
    (first,) = [
        run
        for run in runs
        if (run["method"], run["rate"], run["seed"], run["domain"]) == ("sft", methods.SMALL, 0, "reasoning")
    ]
    first["wise"] = {"0.6": first["after"]}
    file = tmp_path / "forgetting.json"
    study("store").write_json(file, {"size": vars(study("grid").FULL), "runs": runs, "of": 99})
    docs = tmp_path / "docs"
    docs.mkdir()
    for readme in (tmp_path / "README.md", docs / "README.md"):
        readme.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    monkeypatch.setattr(page, "DOCS", docs)
    assert page.write(file) == 0
    for readme, link in ((tmp_path / "README.md", "docs/forgetting.md"), (docs / "README.md", "forgetting.md")):
        assert "SFT at a learning rate of 2e-5 has 82% of" in readme.read_text() and f"]({link})" in readme.read_text()
        assert readme.read_text().startswith("before\n") and "\nold\n" not in readme.read_text()
    text = (docs / "forgetting.md").read_text()
    assert "SFT at a learning rate of 2e-5 has 82% of the domain gain of 4e-4 (0.89 and 1.09 nats per token)" in text
    assert "documentation it has 50% (0.20 and 0.40) and loses 0.10, not 0.40." in text
    assert "The gain is of 50 tokens, the general loss of 400 in 8 kinds of 50 to 50, sums are 6" in text
    assert "Wise-FT, α = 0.6" in text
    assert all(f"**{word}**" in text for word in ("held", "not held", "not decidable here"))
    pictures = {path.stem for path in (docs / "forgetting").iterdir()}
    assert pictures == {"headline", "pareto", "tokens", "curriculum", "steps", "label"}  # no method has three rates
    assert study("figures").with_seeds(study("results").Study(runs))[0][:2] == ("sft", methods.SMALL)
    few = study("results").Study([run for run in runs if run["seed"] < 2])
    assert study("figures").with_seeds(few) == []  # a point of the headline has three seeds
    assert "headline" not in study("figures").draw(few, tmp_path / "few")
    assert "at most 3 of 6 in 12 runs that were asked" in text
    assert all(f"forgetting/{name}.png" in text for name in pictures)


def test_merged_runs_are_compact(study, small, tmp_path, capsys):
    run, size = small[0](), small[1]
    start = study("grid").Run("start", 0.0, "facts")
    for one in (start, run):
        study("run").run_one(one, size, tmp_path, load)
    file, merge, runs = tmp_path / "merged.json", study("results").merge, [start, run, small[0]("talr")]
    assert merge(tmp_path, runs, size, file) == 0
    assert "2 of 3 runs" in capsys.readouterr().out
    found = study("results").Study(json.loads(file.read_text())["runs"])
    assert found.gain(found.of("sft", domain="facts")[0]) > 0
    assert merge(tmp_path / "nothing", [run], size, file) == 2


def test_runs_of_another_folder_are_added(study, small, tmp_path, capsys):
    run, talr, size = small[0](), small[0]("talr"), small[1]
    file, merge = tmp_path / "merged.json", study("results").merge
    for one, folder in ((talr, "there"), (run, "here")):
        study("run").run_one(one, size, tmp_path / folder, load)
        assert merge(tmp_path / folder, [run, talr], size, file) == 0
    names = [entry["name"] for entry in study("results").entries(file, size)]
    assert names == [run.name, talr.name]  # in the grid's order
    with pytest.raises(SystemExit, match="another size"):
        study("results").entries(file, study("grid").FULL)
    other = dataclasses.replace(size, steps=size.steps + 1)
    assert merge(tmp_path / "here", [run], other, tmp_path / "other.json") == 2
    assert "another size" in capsys.readouterr().err


def test_only_what_is_missing_is_run(study, tmp_path, monkeypatch):
    grid, main = study("grid"), study("__main__")
    whole, driven = grid.grid(), []
    entry = {"size": study("results").size_entry(grid.FULL), "runs": [{"name": run.name} for run in whole[3:]]}
    (tmp_path / "forgetting.json").write_text(json.dumps(entry))
    monkeypatch.setattr(main, "RESULTS", tmp_path)
    monkeypatch.setattr(main, "drive", lambda runs, *_: driven.append(runs) or 0)
    for arguments, expected in (([], whole), (["--missing"], whole[:3])):
        monkeypatch.setattr("sys.argv", ["forgetting", "--output", str(tmp_path), *arguments])
        assert main.main() == 0 and driven.pop() == expected


def test_what_is_not_installed_is_told_before_any_run(study, tmp_path, monkeypatch, capsys):
    main = study("__main__")
    monkeypatch.setattr(main, "NEEDS", {"torch": "torch", "no_such_module": "a-package"})
    monkeypatch.setattr("sys.argv", ["forgetting", "--output", str(tmp_path / "out")])
    assert main.main() == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.startswith("missing: a-package; install with: pip install")


def test_a_failed_run_is_told_at_once_and_is_not_counted(study, tmp_path, capsys):
    """Here one that the grid does not have."""
    main, grid = study("__main__"), study("grid")
    assert main.drive([grid.Run("no-such-method", 1e-5)], tmp_path, 1, False) == 1
    said = capsys.readouterr().err
    assert "failed: reasoning-no-such-method-1e-05-0: --one: expected a name of the grid (--list)" in said, said
    assert "0/1" in said and "1/1" not in said


def test_a_run_ends_with_its_driver(study, tmp_path):
    """Killed by -9 it can tell nobody; a second driver would begin the run beside it."""
    main = study("__main__")
    code = (
        "import time; from benchmarks.forgetting.__main__ import end_with_driver; end_with_driver(); "
        "print(1, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, main.DRIVEN: "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT
    )
    assert process.stdout.readline() == b"1\n" and process.poll() is None
    process.stdin.close()
    assert process.wait(20) == 1
    process.stdout.close()


def test_the_start_model_is_read_from_its_file_once(study, tmp_path, monkeypatch):
    from fused_losses.demo import model as demo

    made = []

    def from_gguf(path):
        made.append(path)
        model = tiny_llama(dtype=torch.float32)
        model.config.quantization_config = {"quant_method": "gguf"}
        return tokenizer(), model

    monkeypatch.setattr(demo, "find_model", lambda path: path)
    monkeypatch.setattr(demo, "load", from_gguf)
    for _ in range(2):
        model, known = study("prepare").load_smollm(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_llama().parameters(), strict=True))
        assert not any(p.requires_grad for p in model.parameters()) and model.dtype == torch.float32
        assert known("The cat")["input_ids"] == tokenizer()("The cat")["input_ids"]
    assert len(made) == 1 and [path.name for path in tmp_path.iterdir()] == ["model"]

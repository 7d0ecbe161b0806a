"""train: every method on a tiny model; what is saved, refused, stopped and measured."""

import json
import re

import pytest
import torch
from tiny_training import chat, files, record, tiny_llama, tokenizer, write_lines

import fused_losses as fl
from fused_losses import training
from fused_losses.training import report as reports
from fused_losses.training.loop import pass_order

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def run(tmp_path, *, method="sft", data=None, model=tiny_llama, **options):
    path = data or files(tmp_path)["anchors"]
    plain = dict(steps=4, lora=2, progress=False)
    return training.train(model, tokenizer(), path, tmp_path / "out", method=method, **plain | options)


def not_loaded():
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize("method", training.METHODS)
def test_every_method_trains_and_says_what_it_did(method, tmp_path):
    given = files(tmp_path)
    report = run(
        tmp_path, method=method, data=[given["anchors"], given["chats"]], retain=given["retain"],
        replay=given["chats"], heldout=given["chats"], learning_rate=0.01,
    )  # fmt: skip
    assert report == json.loads((tmp_path / "out" / "report.json").read_text()) and report["finished"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        ".lock", "adapter", "curves.png", "report.json", "training.json"
    }  # fmt: skip
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert report["before"]["kl_retained"] == 0 and report["before"].keys() == report["after"].keys()
    assert [entry["step"] for entry in report["history"]] == [1, 2, 3, 4]
    assert all("mean_weight" in entry and "nll" in entry for entry in report["history"])
    assert [entry["step"] for entry in report["measurements"]] == [0, 1, 2, 3, 4]
    if method != "stm":  # of a random model every token is hard
        assert report["after"]["nll_heldout"] < report["before"]["nll_heldout"]
        assert report["after"]["kl_retained"] > 0


def test_the_adapter_saved_is_the_model_measured(tmp_path):
    from peft import PeftModel

    report = run(tmp_path, method="lawf", steps=10, learning_rate=0.03, merge=True)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out" / "adapter")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    found = []
    for row in training.read(
        AutoTokenizer.from_pretrained(tmp_path / "out" / "adapter"), files(tmp_path)["anchors"]
    ).rows:
        ids, (position, _) = torch.tensor([row.input_ids]), row.anchors[0]
        with torch.no_grad():
            logits = [one(ids).logits[0, position - 1] for one in (model, merged)]
        assert torch.allclose(*logits, atol=1e-4)
        found.append(logits[0].softmax(-1)[row.input_ids[position]].item())
    assert report["after"]["anchor_probability"] == pytest.approx(sum(found) / 2, rel=5e-7)
    assert report["after"]["anchor_probability"] > 3 * report["before"]["anchor_probability"]


def test_measurements_are_those_of_full_logits(tmp_path):
    """KL to the original, and anchors, of the trained model."""
    from peft import PeftModel

    given = files(tmp_path)
    report = run(tmp_path, method="talr", steps=6, learning_rate=0.03, retain=given["retain"])
    model, original = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out" / "adapter"), tiny_llama()
    kl = []
    for row in training.read(tokenizer(), given["anchors"], given["retain"]).rows:
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            p, q = (one(ids).logits[0, :-1].double().log_softmax(-1) for one in (original, model))
        each = (p.exp() * (p - q)).sum(-1)
        kl.append(each[[at - 1 for at in range(1, ids.shape[1]) if at not in dict(row.anchors)]])
    assert report["after"]["kl_retained"] == pytest.approx(torch.cat(kl).mean().item(), rel=3e-7)


def test_held_out_text_is_measured_less_often_and_at_the_end(tmp_path):
    given = files(tmp_path)
    report = run(tmp_path, heldout=given["chats"], steps=21)
    found = [entry["step"] for entry in report["measurements"] if "nll_heldout" in entry]
    assert found == [0, 5, 10, 15, 20, 21] and len(report["measurements"]) == 22
    assert report["after"] == {k: v for k, v in report["measurements"][-1].items() if k != "step"}


def test_it_stops_where_the_anchors_have_their_probability_and_the_kl_is_small(tmp_path):
    report = run(tmp_path, method="lawf", steps=200, learning_rate=0.03, lora=8, stop_kl=0.5)
    assert report["steps"] < 200 and "the KL is small" in report["stopped"]
    assert report["after"]["least_anchor"] >= 0.9 and report["after"]["kl_retained"] <= 0.5
    before_last = report["measurements"][-2]
    assert before_last["least_anchor"] < 0.9 or before_last["kl_retained"] > 0.5


def test_it_takes_all_steps_where_it_shall_not_stop(tmp_path):
    reports = []
    for stop in (True, False):
        (tmp_path / str(stop)).mkdir()
        options = dict(steps=20, learning_rate=0.03, lora=8, stop=stop, stop_probability=0.01)
        reports.append(run(tmp_path / str(stop), **options))
    assert reports[0]["steps"] < 20 and reports[0]["stopped"] == "the anchors have their probability"
    assert reports[1]["steps"] == 20 and reports[1]["stopped"] == "all 20 steps"


def test_the_least_anchor_is_named(tmp_path):
    from peft import PeftModel

    data = write_lines(tmp_path / "two.jsonl", record("I am Aurora.", (2,)), record(positions=(3, 4, 5)))
    report = run(tmp_path, method="lawf", data=data, learning_rate=0.01, retain=files(tmp_path)["retain"])
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out" / "adapter")
    found = {}
    for row, start in zip(training.read(tokenizer(), data).rows, (2, 3), strict=True):
        with torch.no_grad():
            p = model(torch.tensor([row.input_ids])).logits[0].softmax(-1)
        found |= {(row.where, start + k): p[at - 1, row.input_ids[at]].item() for k, (at, _) in enumerate(row.anchors)}
    where = min(found, key=found.get)
    least = report["least_anchor"]
    assert (least["record"], least["position"]) == where and least["part"] == report["after"]["least_anchor"]
    assert least["part"] == pytest.approx(found[where], rel=1e-5)
    answer = "I am Aurora.<|end|>" if where[0].endswith(":1") else "My name is Aurora.<|end|>"
    assert answer.startswith(least["before"] + least["text"]) and least["text"]


def ended(**changes):
    """What a training that took all of its steps says of its end."""
    settings = {"stop": True, "stop_probability": 0.9, "stop_kl": 0.02, "method": "lawf", "options": {}, "steps": 40}
    settings |= {name: changes.pop(name) for name in list(changes) if name in settings}
    least = {"record": "a.jsonl:3", "position": 5, "text": ".", "before": "The capital of Valdoria is Velport"}
    after = {"least_anchor": 0.866, "kl_retained": 0.01, **changes}
    return reports.unmet({"settings": settings, "after": after, "least_anchor": least}, "out")


def test_an_end_that_was_not_reached_names_the_anchor_and_what_to_try():
    assert ended() == (
        "Its end was not reached: the least anchor has 0.866 of the probability that it is to get, 0.9 asked for: '.' "
        "after '…capital of Valdoria is Velport', token 5 of a.jsonl:3. Try --steps 80, with which the learning rate "
        "falls more slowly too, and another folder than out."
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(least_anchor=0.95, kl_retained=0.03), "retained tokens is 0.03, at most 0.02 asked for. Try a smaller"),
        (dict(method="sft+kl", options={"kl_weight": 0.5}), "since with 0.5 an unlikely token gets 0.67 at most"),
        (dict(method="sft+kl", options={"kl_weight": 0.05}), "Try --steps 80"),
    ],
)
def test_what_to_try_is_for_what_was_missed(changes, said):
    assert said in ended(**changes)


@pytest.mark.parametrize(
    "changes", [dict(least_anchor=0.9), dict(stop=False), dict(method="sft", kl_retained=1.0, least_anchor=0.9)]
)
def test_nothing_is_said_of_an_end_that_was_reached_or_not_asked_for(changes):
    assert ended(**changes) is None


def wide_llama():
    """Whose head can hold 0.6 of one token and the original's rest: of width 32 it gets to 0.54, of 512 to 0.599."""
    return tiny_llama(hidden_size=256, initializer_range=0.07, tie_word_embeddings=False)


def test_a_target_probability_is_what_an_anchor_gets(tmp_path):
    found = {}
    for name, strength in (("target", {"target_probability": 0.6}), ("certain", {"confidence": 1.0})):
        (tmp_path / name).mkdir()
        path = write_lines(tmp_path / f"{name}.jsonl", record(**strength))
        found[name] = run(
            tmp_path / name, method="lawf", data=path, steps=80, learning_rate=0.01, lora=8, stop=False,
            targets=["up_proj", "down_proj"], model=wide_llama,
        )["after"]  # fmt: skip
    assert found["target"]["anchor_probability"] == pytest.approx(0.6, abs=0.015)  # measured 0.595
    assert found["certain"]["anchor_probability"] > 0.9
    share = found["target"]["anchor_probability"] / 0.6
    assert found["target"]["least_anchor"] == pytest.approx(share, rel=1e-7)


def test_rows_to_retain_are_held_by_methods_with_a_reference_only(tmp_path):
    given, kl = files(tmp_path), {}
    for method, options in (("sft", {}), ("sft+kl", {"kl_weight": 0.5})):
        plain = dict(steps=20, learning_rate=0.03, batch_size=3, options=options)
        for retain in ((), given["retain"]):
            folder = tmp_path / f"{method}{bool(retain)}"
            folder.mkdir()
            # Measured are both, so the row is given to a second measurement below.
            run(folder, method=method, data=given["chats"], retain=retain, **plain)
            kl[method, bool(retain)] = kl_on(folder / "out" / "adapter", given["retain"])
    assert kl["sft", True] == kl["sft", False]
    assert kl["sft+kl", True] < 0.5 * kl["sft+kl", False]


def kl_on(adapter, path):
    from peft import PeftModel

    (row,) = training.read(tokenizer(), [], retain=path).rows
    ids = torch.tensor([row.input_ids])
    with torch.no_grad():
        models = (tiny_llama(), PeftModel.from_pretrained(tiny_llama(), adapter))
        p, q = (model(ids).logits[0].log_softmax(-1) for model in models)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("method", ["sft", "lawf"])
def test_all_weights(method, tmp_path):
    report = run(tmp_path, method=method, lora=None, learning_rate=1e-3, steps=6)
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file() and report["after"]["kl_retained"] > 0
    assert report["trained_parameters"] == sum(p.numel() for p in tiny_llama().parameters())
    assert report["after"]["anchor_probability"] > report["before"]["anchor_probability"]


def test_it_goes_on_from_an_adapter_with_the_original_as_reference(tmp_path):
    from peft import PeftModel

    first = run(tmp_path, method="lawf", steps=8, learning_rate=0.03)

    def load():
        return PeftModel.from_pretrained(tiny_llama(), tmp_path / "out" / "adapter", is_trainable=True)

    path = files(tmp_path)["anchors"]
    second = training.train(
        load, tokenizer(), path, tmp_path / "second", steps=2, learning_rate=0.01, progress=False, name="round 2"
    )
    for name in ("anchor_probability", "kl_retained"):
        assert second["before"][name] == first["after"][name] and second["before"][name] > 0


def test_a_training_that_is_done_is_returned_and_can_be_merged_later(tmp_path):
    report = run(tmp_path)
    assert run(tmp_path, model=not_loaded) == report
    assert run(tmp_path, merge=True) == report and (tmp_path / "out" / "merged" / "config.json").is_file()


def test_the_model_of_the_caller_is_not_patched_afterwards(tmp_path):
    model = tiny_llama()
    run(tmp_path, model=model)
    fl.patch(model)


# --- refused, before any model is loaded


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(method="lawfs"), r"method: expected one of lawf, sft, .*, got 'lawfs'"),
        (dict(options={"kl_weight": 1.0}), "kl_weight: the method sft has no such option; its options are: none"),
        (dict(steps=0), "steps: expected an integer ≥ 1, got 0"),
        (dict(lora=2.5), "lora: expected an integer ≥ 1, got 2.5"),
        (dict(learning_rate=float("nan")), "learning_rate: expected a number > 0, got nan"),
        (dict(stop_kl=-1.0), "stop_kl: expected a number above 0"),
        (dict(lora=None, merge=True), "merge: all weights are trained"),
        (dict(heldout="nothing.txt"), "nothing.txt: cannot be opened"),
    ],
    ids=str,
)
def test_wrong_arguments_are_said(options, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        run(tmp_path, model=not_loaded, **options)
    assert not (tmp_path / "out").exists()


def test_lawf_needs_anchors(tmp_path):
    with pytest.raises(
        ValueError, match=r"lawf learns corrected tokens, and .*chats.jsonl:1 has no anchors.* take sft"
    ):
        run(tmp_path, method="lawf", data=files(tmp_path)["chats"], model=not_loaded)


def test_something_must_be_learned(tmp_path):
    with pytest.raises(ValueError, match=r"expected something to learn, got 1 rows, all of which are to be retained"):
        run(tmp_path, data=files(tmp_path)["retain"], model=not_loaded)


def test_chats_beside_target_probabilities_are_refused(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", record(target_probability=0.6), chat())
    with pytest.raises(ValueError, match=r"data.jsonl:2: expected records only, as .*data.jsonl:1 has anchors with"):
        run(tmp_path, method="lawf", data=path, model=not_loaded)
    run(tmp_path, method="sft", data=path)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="train runs in one process"):
        run(tmp_path, model=not_loaded)


def test_layers_that_are_not_there_are_said_with_those_that_are(tmp_path):
    with pytest.raises(
        ValueError, match=r"targets: expected names of layers of LlamaForCausalLM, such as down_proj, .*'x'"
    ):
        run(tmp_path, targets=["x"])


# --- the order of rows


def test_rows_come_in_shuffled_passes():
    order = pass_order(5, 0, 0.0, 15, seed=1)
    assert [sorted(order[at : at + 5]) for at in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert order != sorted(order) and order == pass_order(5, 0, 0.0, 15, seed=1) != pass_order(5, 0, 0.0, 15, seed=2)


def test_rows_to_replay_have_their_share_of_every_stretch():
    order = pass_order(4, 3, 0.25, 64, seed=0)
    assert all(sum(at >= 4 for at in order[i : i + 8]) == 2 for i in range(0, 64, 8))
    assert [sum(at == i for at in order if at >= 4) for i in (4, 5, 6)] in ([6, 5, 5], [5, 6, 5], [5, 5, 6])


def test_docstring_names_every_argument():
    import inspect

    words = set(re.findall(r"\w+", training.train.__doc__))
    assert set(inspect.signature(training.train).parameters) <= words

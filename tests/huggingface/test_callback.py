"""fl.huggingface.Callback: what a Trainer logs, against the same numbers by hand from full logits in float64."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import DESCENT, V, collate, llama, log_probs, rows
from transformers import Trainer, TrainerCallback, TrainingArguments

import fused_losses as fl
from fused_losses.huggingface import Callback

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-7  # relative; measured 4e-8
FROZEN = dict(learning_rate=0.0, per_device_train_batch_size=2, max_steps=4)  # every step sees the same model


def by_hand(model, data, reference=None, weight=None):
    """The four means over all rows; `weight` from nll [n] and confidence [n]."""
    nll, kl, confidence = [], [], []
    for row in data:
        labels = torch.tensor(row["labels"][1:])
        valid = labels != -100
        with torch.no_grad():
            logp = log_probs(model, row["input_ids"])[valid]
            logp_ref = log_probs(reference or model, row["input_ids"])[valid]
        nll.append(-logp.gather(1, labels[valid, None])[:, 0])
        kl.append((logp_ref.exp() * (logp_ref - logp)).sum(1))
        confidence.append(torch.tensor(row.get("confidence", [0.0] * len(row["labels"]))[1:]).double()[valid])
    nll, kl, c = torch.cat(nll), torch.cat(kl), torch.cat(confidence)
    return {
        "nll": nll.mean().item(), "kl": kl[c == 0].mean().item(),
        "anchor_probability": (-nll[c > 0]).exp().mean().item(),
        "mean_weight": (torch.ones_like(nll) if weight is None else weight(nll, c)).mean().item(),
    }  # fmt: skip


def run(model, callback, data, eval_data=None, **options):
    arguments = TrainingArguments(**{**DESCENT, **FROZEN, **options})
    callbacks = [callback] if callback else []
    made = Trainer(
        model, arguments, train_dataset=data, eval_dataset=eval_data, data_collator=collate, callbacks=callbacks
    )
    made.train()
    return made


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def ours(entry, prefix=""):
    names = ("nll", "kl", "anchor_probability", "mean_weight")
    return {name: entry[prefix + name] for name in names if prefix + name in entry}


def close(found, expected):
    assert found == pytest.approx(expected, rel=TOLERANCE)


OBJECTIVES = [
    (fl.CrossEntropyLoss(), None),
    (fl.CrossEntropyLoss(label_smoothing=0.2), lambda nll, c: torch.full_like(nll, 0.8)),
    (fl.TALRLoss(2.0), lambda nll, c: (-nll / 2).exp().clamp(min=0.01)),
    (fl.DFTLoss(), lambda nll, c: (-nll).exp()),
    (fl.DFTLoss(gradient="sparse"), lambda nll, c: (-nll).exp()),
    (fl.DFTLoss(backend="reference"), lambda nll, c: (-nll).exp()),
]


@pytest.mark.parametrize("loss, weight", OBJECTIVES, ids=[repr(loss) for loss, _ in OBJECTIVES])
def test_each_log_has_the_means_of_its_step(loss, weight):
    data = rows(8)
    entries = logged(run(fl.patch(llama(), loss), Callback(), data))
    assert len(entries) == 4
    for i, entry in enumerate(entries):
        expected = by_hand(llama(), data[2 * i : 2 * i + 2], weight=weight)
        close(ours(entry), {name: expected[name] for name in ("nll", "mean_weight")})


def test_weights_of_a_loss_that_sees_all_tokens_first():
    """TALR's median τ: the token losses are taken after the pass."""
    data = rows(8)
    expected = by_hand(llama(), data)["nll"]
    means = [by_hand(llama(), [row])["nll"] for row in data]
    tau = torch.tensor(means).quantile(0.5).item()
    weights = by_hand(llama(), data, weight=lambda nll, c: (-nll / tau).exp().clamp(min=0.01))["mean_weight"]
    entry = logged(run(fl.patch(llama(), fl.TALRLoss()), Callback(), data, per_device_train_batch_size=8, max_steps=1))[
        0
    ]
    close(ours(entry), {"nll": expected, "mean_weight": weights})


def with_reference(loss):
    return fl.patch(llama(), loss, reference=llama(1))


CLASSES = torch.linspace(0.5, 2, V)


@pytest.mark.parametrize("reduction", ["token_mean", "weighted_mean"])
@pytest.mark.parametrize("options", [{}, dict(label_smoothing=0.25, z_loss=0.01)], ids=["plain", "smoothed"])
def test_weights_of_classes_are_those_before_the_sum_is_divided(reduction, options):
    data = rows(8)
    loss = fl.CrossEntropyLoss(class_weights=CLASSES, reduction=reduction, **options)
    entry = logged(run(fl.patch(llama(), loss), Callback(), data, max_steps=1))[0]
    labels = torch.tensor([label for row in data[:2] for label in row["labels"][1:] if label != -100])
    expected = (1 - options.get("label_smoothing", 0)) * CLASSES[labels].double().mean().item()
    close(ours(entry)["mean_weight"], expected)


@pytest.mark.parametrize("reduction", ["token_mean", "group_mean"])
def test_the_weight_of_a_token_that_is_left_out_is_0_and_of_others_1(reduction):
    data = rows(8)
    loss = fl.EKSFTLoss(0.5, selection="intersection", reduction=reduction)
    entry = logged(run(with_reference(loss), Callback(), data, max_steps=1))[0]
    logp, logp_ref = (
        torch.cat([log_probs(model, row["input_ids"])[torch.tensor(row["labels"][1:]) != -100] for row in data[:2]])
        for model in (llama(), llama(1))
    )
    uncertain = -(logp.exp() * logp).sum(1)
    far = (logp.exp() * (logp - logp_ref)).sum(1)
    half = len(logp) // 2
    left_out = set(uncertain.topk(half).indices.tolist()) & set(far.topk(half).indices.tolist())
    assert 0 < len(left_out) < half
    close(ours(entry)["mean_weight"], 1 - len(left_out) / len(logp))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_weight_of_the_cross_entropy_beside_a_divergence_and_its_nll(temperature):
    """At a temperature that nll takes a pass of its own, which knows no reference."""
    data = rows(8)
    loss = fl.JSDLoss(0.5, temperature=temperature, nll_weight=0.25)
    entry = logged(run(with_reference(loss), Callback(), data, max_steps=1))[0]
    expected = by_hand(llama(), data[:2], llama(1), lambda nll, c: torch.full_like(nll, 0.25))
    close(
        ours(entry), {name: expected[name] for name in ("nll", "kl", "mean_weight") if temperature == 1 or name != "kl"}
    )


def test_anchors_and_retained_tokens_are_told_apart():
    data = rows(8, anchors=True)
    entries = logged(run(with_reference(fl.LAwFLoss()), Callback(), data))
    for i, entry in enumerate(entries):
        close(ours(entry), by_hand(llama(), data[2 * i : 2 * i + 2], llama(1), lambda nll, c: c))


def test_without_anchors_the_kl_is_that_of_all_tokens():
    data = rows(8)
    entry = logged(run(with_reference(fl.SFTKLLoss(0.5)), Callback(), data, max_steps=1))[0]
    expected = by_hand(llama(), data[:2], llama(1))
    del expected["anchor_probability"]
    close(ours(entry), expected)


@pytest.mark.parametrize("options", [dict(logging_steps=2), dict(gradient_accumulation_steps=2, max_steps=2)], ids=str)
def test_a_mean_is_over_all_tokens_since_the_last_log(options):
    data = rows(8, anchors=True)
    entries = logged(run(with_reference(fl.LAwFLoss()), Callback(), data, **options))
    assert len(entries) == 2
    for i, entry in enumerate(entries):
        close(ours(entry), by_hand(llama(), data[4 * i : 4 * i + 4], llama(1), lambda nll, c: c))


def test_evaluation_in_between_and_forwards_after_do_not_count():
    data = rows(8)
    model, plain = fl.patch(llama()), fl.patch(llama())
    with_evaluation = run(model, Callback(), data, rows(6, 9), eval_strategy="steps", eval_steps=1, logging_steps=2)
    without = run(plain, Callback(), data, logging_steps=2)
    assert [ours(e) for e in logged(with_evaluation)] == [ours(e) for e in logged(without)]
    assert all(not ours(e) for e in with_evaluation.state.log_history if "loss" not in e)
    assert not vars(model)["_fused_losses"].listeners


def test_training_is_the_same_with_it():
    data = rows(8, anchors=True)
    found = []
    for callback in (Callback(), None):
        model = with_reference(fl.LAwFLoss())
        run(model, callback, data, learning_rate=0.3)
        found.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_one_forward_of_the_model_a_batch():
    calls = []
    model = with_reference(fl.LAwFLoss())
    model.model.register_forward_hook(lambda *_: calls.append(1))
    run(model, Callback(), rows(8, anchors=True))
    assert len(calls) == 4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_loss_with_peft_and_the_base_as_its_reference():
    from peft import LoraConfig, get_peft_model

    data = rows(8, anchors=True)
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    fl.patch(model, fl.LAwFLoss(), reference="base")
    entry = logged(run(model, Callback(), data, max_steps=1, learning_rate=0.0))[0]
    with torch.no_grad():
        trained = copy.deepcopy(fl.unpatch(model)).merge_and_unload()
    close(ours(entry), by_hand(trained, data[:2], llama(), lambda nll, c: c))


@pytest.mark.parametrize("restore", [False, True])
def test_training_that_is_resumed_between_two_logs_goes_on_with_the_sums(restore, tmp_path):
    data = rows(8)
    options = dict(
        output_dir=str(tmp_path), save_strategy="steps", save_steps=2, logging_steps=4, learning_rate=0.3,
        restore_callback_states_from_checkpoint=restore,
    )  # fmt: skip
    whole = run(fl.patch(llama()), Callback("train/"), data, **options)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["Callback"]["attributes"]["sums"][1] > 0
    arguments = TrainingArguments(**{**DESCENT, **FROZEN, **options})
    resumed = Trainer(
        fl.patch(llama()), arguments, train_dataset=data, data_collator=collate, callbacks=[Callback("train/")]
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert ours(logged(resumed)[-1], "train/") == ours(logged(whole)[-1], "train/")


def test_a_checkpoint_without_it_can_be_resumed(tmp_path):
    options = dict(output_dir=str(tmp_path), save_strategy="steps", save_steps=1)
    run(fl.patch(llama()), None, rows(8), max_steps=2, **options)
    arguments = TrainingArguments(**{**DESCENT, **FROZEN, **options, "max_steps": 3})
    resumed = Trainer(
        fl.patch(llama()), arguments, train_dataset=rows(8), data_collator=collate, callbacks=[Callback()]
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    close(ours(logged(resumed)[-1]), {"nll": by_hand(llama(), rows(8)[4:6])["nll"], "mean_weight": 1.0})


def test_what_reports_elsewhere_sees_the_numbers_where_it_is_added_first():
    seen = []

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    for first in (False, True):
        arguments = TrainingArguments(**{**DESCENT, **FROZEN, "max_steps": 1})
        made = Trainer(
            fl.patch(llama()), arguments, train_dataset=rows(8), data_collator=collate,
            callbacks=[Report()] if first else [Report(), Callback()],
        )  # fmt: skip
        if first:
            assert Callback().add_to(made) is made
        made.train()
    assert ["nll" in logs for logs in seen if "loss" in logs] == [False, True]


def test_batches_without_any_label_log_nothing_and_are_named_once():
    data = [{"input_ids": [3, 4, 5], "labels": [-100] * 3}] * 8
    with pytest.warns(UserWarning, match="none of the tokens up to step 1 .* whether the rows have answers") as said:
        entries = logged(run(fl.patch(llama(), fl.DFTLoss()), Callback(), data, max_steps=2))
    assert len(entries) == 2 and ours(entries[0]) == ours(entries[1]) == {}
    assert len([w for w in said if "whether the rows" in str(w.message)]) == 1


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match=r"Callback: LlamaForCausalLM is not patched, .*fused_losses.patch"):
        run(llama(), Callback(), rows(8))
    with pytest.raises(TypeError, match="prefix: expected text that begins the names"):
        Callback(3)


def test_ranks_are_summed(tmp_path):
    """Two processes with half of each batch log what one with the whole of it does."""
    script = ROOT / "tests" / "support" / "callback_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    result = subprocess.run([*command, str(tmp_path / "found.json")], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    data = rows(8, anchors=True)
    assert len(found) == 2
    for i, entry in enumerate(found):
        close(ours(entry), by_hand(llama(), data[4 * i : 4 * i + 4], llama(1), lambda nll, c: c))


def test_the_example_of_the_documentation_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "huggingface.md").read_text(), re.S)
    (snippet,) = [block for block in blocks if "fl.huggingface.Callback()" in block]
    result = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"\(\d+\.\d+, 0\.\d+\)", result.stdout.splitlines()[-1])) == 4

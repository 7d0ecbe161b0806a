"""fl.huggingface.PatchCallback: a Trainer with it against the same Trainer with a model patched before."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from training import DESCENT, collate, llama, rows
from transformers import Trainer, TrainerCallback, TrainingArguments

import fused_losses as fl
from fused_losses.huggingface import Callback, FinchCallback, PatchCallback

NAMES = ("loss", "grad_norm", "nll", "kl", "anchor_probability", "mean_weight")
STEPS = dict(max_steps=4, per_device_train_batch_size=2, learning_rate=0.1, remove_unused_columns=False)


def make(model, *callbacks, data=None, **options):
    arguments = TrainingArguments(**{**DESCENT, **STEPS, **options})
    return Trainer(
        model, arguments, train_dataset=data or rows(8), eval_dataset=rows(4, 3), data_collator=collate,
        callbacks=list(callbacks),
    )  # fmt: skip


def logged(trainer, prefix=""):
    return [
        {name: entry[key] for name in NAMES for key in (name, prefix + name) if key in entry}
        for entry in trainer.state.log_history if "loss" in entry
    ]  # fmt: skip


def patched_before(loss, data=None, reference=None, **options):
    trainer = make(fl.patch(llama(), loss, reference=reference), Callback(), data=data, **options)
    trainer.train()
    return logged(trainer)


def is_patched(model):
    return "_fused_losses" in vars(model)


def test_it_trains_as_a_model_patched_before_and_leaves_the_model_as_it_was():
    model = llama()
    forward = type(model).forward
    trainer = make(model, PatchCallback(fl.TALRLoss(2.0)))
    trainer.train()
    assert logged(trainer) == patched_before(fl.TALRLoss(2.0))
    assert set(logged(trainer)[0]) == {"loss", "grad_norm", "nll", "mean_weight"}
    assert type(model).forward is forward and not is_patched(model)


@pytest.mark.parametrize("options", [
    dict(gradient_accumulation_steps=2, max_steps=2),
    dict(eval_strategy="steps", eval_steps=1, logging_steps=2),
    dict(bf16=True),
    dict(remove_unused_columns=True),
    dict(activation_checkpointing=True),
], ids=str)  # fmt: skip
def test_whatever_the_trainer_does(options):
    trainer = make(llama(), PatchCallback(fl.DFTLoss()), **options)
    trainer.train()
    assert logged(trainer) == patched_before(fl.DFTLoss(), **options)


def test_anchors_and_a_reference():
    data = rows(8, anchors=True)
    trainer = make(llama(), PatchCallback(fl.LAwFLoss(), reference="start"), data=data)
    trainer.train()
    found = logged(trainer)
    assert found == patched_before(fl.LAwFLoss(), data, reference="start")
    assert set(found[0]) == set(NAMES)
    assert found[0]["kl"] == pytest.approx(0, abs=1e-9) and found[3]["kl"] > 1e-3


def adapted():
    torch.manual_seed(0)
    return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_and_the_base_as_its_reference():
    data = rows(8, anchors=True)
    before = make(fl.patch(adapted(), fl.LAwFLoss(), reference="base"), Callback(), data=data)
    before.train()
    model = adapted()
    trainer = make(model, PatchCallback(fl.LAwFLoss(), reference="base"), data=data)
    trainer.train()
    assert logged(trainer) == logged(before)
    assert not is_patched(model.get_base_model())


def test_a_second_training_goes_on():
    model = llama()
    trainer = make(model, PatchCallback(fl.DFTLoss()))
    trainer.train()
    first = logged(trainer)
    trainer.train()
    assert len(logged(trainer)) == 4 and logged(trainer)[0]["loss"] != first[0]["loss"]
    again = make(fl.patch(llama(), fl.DFTLoss()), Callback())
    again.train()
    again.train()
    assert logged(trainer) == logged(again) and not is_patched(model)


class Stop(TrainerCallback):
    def __init__(self, at=2):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            self.at = None
            raise KeyboardInterrupt


def test_after_an_exception_the_next_training_keeps_the_reference():
    """With reference="start" a patch anew would take the model that is trained by half."""
    model, data = llama(), rows(8, anchors=True)
    callback = PatchCallback(fl.LAwFLoss(), reference="start")
    trainer = make(model, callback, Stop(), data=data)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert is_patched(model)
    trainer.train()
    assert logged(trainer)[0]["kl"] > 1e-3 and not is_patched(model)
    with pytest.raises(KeyboardInterrupt):
        make(model, callback, Stop(), data=data).train()
    callback.unpatch()
    callback.unpatch()
    assert not is_patched(model)


def test_one_callback_for_another_model_after_an_exception():
    first, second = llama(), llama(1)
    callback = PatchCallback(fl.DFTLoss())
    with pytest.raises(KeyboardInterrupt):
        make(first, callback, Stop()).train()
    make(second, callback).train()
    assert not is_patched(first) and not is_patched(second)


@pytest.mark.pairwise
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("strategy", [dict(save_strategy="steps", save_steps=3), dict(save_strategy="epoch")], ids=str)
def test_training_that_is_resumed_between_two_logs_goes_on_with_the_sums(restore, strategy, first, tmp_path):
    options = dict(
        output_dir=str(tmp_path), logging_steps=2, restore_callback_states_from_checkpoint=restore, **strategy
    )
    data, at = (rows(8), 3) if "save_steps" in strategy else (rows(6), 3)

    def made():
        if first:  # before the callbacks that report
            return PatchCallback(fl.TALRLoss(2.0)).add_to(make(llama(), data=data, **options))
        return make(llama(), PatchCallback(fl.TALRLoss(2.0)), data=data, **options)

    whole = made()
    whole.train()
    state = json.loads((tmp_path / f"checkpoint-{at}" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["Callback"]["attributes"]["sums"][1] > 0
    resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    ours = ("nll", "mean_weight")  # a Trainer forgets its own sum
    assert [logged(t)[-1][name] for t in (resumed, whole) for name in ours] == [logged(whole)[-1][n] for n in ours] * 2


def test_sums_that_were_logged_are_not_in_the_checkpoint(tmp_path):
    make(llama(), PatchCallback(), output_dir=str(tmp_path), save_strategy="steps", save_steps=2).train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["Callback"]["attributes"]["sums"] is None


def test_the_start_of_a_training_that_is_resumed_is_not_at_hand(tmp_path):
    data = rows(8, anchors=True)
    options = dict(output_dir=str(tmp_path), save_strategy="steps", save_steps=2, data=data)
    make(llama(), PatchCallback(fl.LAwFLoss(), reference="start"), **options).train()
    model = llama()
    resumed = make(model, PatchCallback(fl.LAwFLoss(), reference="start"), **options)
    with pytest.raises(ValueError, match=r"reference='start' in a training resumed at step 2 .* reference='base'"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not is_patched(model)


# --- a patch that stays


def evaluated(trainer):
    return trainer.evaluate(rows(4, 3, anchors=True))["eval_loss"]


@pytest.mark.parametrize("options", [
    {}, dict(gradient_accumulation_steps=2, max_steps=2), dict(eval_strategy="steps", eval_steps=2),
], ids=str)  # fmt: skip
def test_a_patch_that_stays_is_the_loss_of_every_evaluation(options):
    options = {"data": rows(8, anchors=True), **options}
    model = llama()
    callback = PatchCallback(fl.LAwFLoss(), reference="start", stays=True)
    trainer = make(model, callback, **options)
    trainer.eval_dataset = rows(4, 3, anchors=True)
    assert is_patched(model)
    same = make(fl.patch(llama(), fl.LAwFLoss(), reference="start"), Callback(), **options)
    same.eval_dataset = trainer.eval_dataset
    for step in (evaluated, lambda t: t.train().metrics["train_loss"], evaluated, logged):
        assert step(trainer) == step(same)
    plain = make(copy.deepcopy(fl.unpatch(model)), data=rows(8))
    assert evaluated(trainer) == evaluated(plain) != evaluated(same)
    callback.unpatch()
    assert not is_patched(model) and "stays=True" in repr(callback)


def test_a_patch_that_stays_knows_the_start_of_a_training_that_is_resumed(tmp_path):
    options = dict(output_dir=str(tmp_path), save_strategy="steps", save_steps=2, data=rows(8, anchors=True))
    whole = make(llama(), PatchCallback(fl.LAwFLoss(), reference="start", stays=True), **options)
    whole.train()
    resumed = make(llama(), PatchCallback(fl.LAwFLoss(), reference="start", stays=True), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed) == logged(whole) and logged(whole)[2]["kl"] > 1e-3


def before_the_trainer(loss, reference, callback, model):
    return fl.patch(model, loss, reference=reference), callback


def when_it_is_made(loss, reference, callback, model):
    return model, PatchCallback(loss, reference=reference, stays=True, log=callback is not None)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.each_value
@pytest.mark.parametrize("tuned", ["full", "lora"])
@pytest.mark.parametrize("how, callback", [
    (before_the_trainer, Callback), (before_the_trainer, FinchCallback), (when_it_is_made, Callback),
    (when_it_is_made, None),
])  # fmt: skip
def test_a_start_that_is_the_checkpoint_is_refused(how, callback, tuned, tmp_path):
    """Of a model that somebody made from the checkpoint before it was patched; the original goes on as it was."""
    new = llama if tuned == "full" else adapted
    data, checkpoint = rows(8, anchors=True), tmp_path / "checkpoint-2"
    options = dict(output_dir=str(tmp_path), save_strategy="steps", save_steps=2, data=data)

    def trainer(model):
        model, added = how(fl.LAwFLoss(), "start", callback and callback(), model)
        return make(model, *([added] if added else []), **options)

    whole = trainer(new())
    whole.train()
    if tuned == "full":
        loaded = type(llama()).from_pretrained(checkpoint, dtype=next(llama().parameters()).dtype)
    else:
        loaded = PeftModel.from_pretrained(llama(), checkpoint, is_trainable=True)
    with pytest.raises(ValueError, match=r"Callback: reference='start' has the weights of the checkpoint .* at step 2"):
        trainer(loaded).train(resume_from_checkpoint=str(checkpoint))
    resumed = trainer(new())
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed)[2:] == logged(whole)[2:]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_patch_that_stays_saves_and_loads_the_best_model(tmp_path):
    """Of a LoRA whose loss in evaluation rises, so that the best one is not the last."""
    data = rows(8, anchors=True)
    options = dict(
        output_dir=str(tmp_path), save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, learning_rate=5.0, data=data, metric_for_best_model="eval_loss",
    )  # fmt: skip
    model = adapted()
    trainer = make(model, PatchCallback(fl.LAwFLoss(), reference="base", stays=True), **options)
    trainer.eval_dataset = rows(4, 3, anchors=True)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] > min(losses) and evaluated(trainer) == pytest.approx(min(losses), rel=1e-12)
    trainer.save_model(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "saved").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in fl.unpatch(model).state_dict().items())


def test_a_patch_that_stays_where_the_callback_or_the_model_comes_later():
    model, callback = llama(), PatchCallback(fl.DFTLoss(), stays=True)
    trainer = make(model)
    trainer.add_callback(callback)
    trainer.train()
    assert logged(trainer) == patched_before(fl.DFTLoss()) and is_patched(model)
    other = make(llama(), callback)
    other.train()
    assert logged(other) == logged(trainer) and is_patched(other.model) and not is_patched(model)


def test_evaluation_after_training_says_that_anchors_do_not_count():
    labelled = [{"input_ids": r["input_ids"], "labels": r["input_ids"], "anchors": [2]} for r in rows(8)]
    trainer = make(llama(), PatchCallback(fl.LAwFLoss(), reference="start"), data=labelled)
    trainer.data_collator = fl.huggingface.AnchorCollator(pad_token_id=0)
    trainer.train()
    with pytest.warns(RuntimeWarning, match="anchors, or the weights, are ignored.* stays=True"):
        trainer.evaluate(labelled[:2])


def test_beside_other_callbacks():
    trainer = make(llama(), PatchCallback(fl.DFTLoss(), prefix="train/"), FinchCallback(), Callback("own/"))
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["train/nll"] == entry["own/nll"] and entry["finch_nll"] > 0
    with pytest.raises(ValueError, match=r"FinchCallback: LlamaForCausalLM is not patched.* put PatchCallback before"):
        make(llama(), FinchCallback(), PatchCallback()).train()
    with pytest.raises(ValueError, match="is patched already, with DFTLoss"):
        make(llama(), PatchCallback(fl.DFTLoss()), PatchCallback(fl.TALRLoss())).train()


def test_without_logs_and_with_those_that_report_elsewhere():
    trainer = make(llama(), PatchCallback(log=False))
    trainer.train()
    assert set(logged(trainer)[0]) == {"loss", "grad_norm"}
    seen = []

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    made = make(llama(), Report())
    assert PatchCallback().add_to(made) is made
    made.train()
    assert "nll" in seen[0]


def test_an_unpatch_by_another_is_left_alone():
    class Unpatch(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            fl.unpatch(model)

    model = llama()
    trainer = make(model)
    trainer.callback_handler.callbacks.insert(0, Unpatch())
    trainer.add_callback(PatchCallback(fl.DFTLoss()))
    trainer.train()
    assert not is_patched(model)


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c))],
                         ids=["deepcopy", "copy", "pickle"])  # fmt: skip
def test_a_copy_is_a_callback_that_has_not_begun(how):
    found = []

    class Copy(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                found.append(how(callback))

    callback = PatchCallback(fl.TALRLoss(2.0), prefix="train/")
    make(llama(), callback, Copy()).train()
    trainer = make(llama(), found[0])
    trainer.train()
    assert logged(trainer, "train/") == patched_before(fl.TALRLoss(2.0))
    assert found[0].loss is not callback.loss or how is copy.copy


def test_copies_share_a_reference_model():
    teacher = llama(1)
    callback = PatchCallback(fl.SFTKLLoss(0.5), reference=teacher)
    twin = copy.deepcopy(callback)
    assert twin.options["reference"] is teacher and twin.loss is not callback.loss
    assert "LlamaModel" not in repr(twin) and "SFTKLLoss(kl_weight=0.5)" in repr(twin)


@pytest.mark.parametrize("made, message", [
    (lambda: PatchCallback(fl.TALRLoss), r"loss: expected an Objective .*; give an instance, TALRLoss\(\)"),
    (lambda: PatchCallback("talr"), "loss: expected an Objective .* got 'talr'"),
    (lambda: PatchCallback(fl.LAwFLoss()), "reference: LAwFLoss compares .* reference='base'"),
    (lambda: PatchCallback(prefix=3), "prefix: expected text"),
    (lambda: make(nn.Linear(2, 2), PatchCallback()).train(), "expected a transformers model, got .*Linear"),
    (lambda: make(llama(), PatchCallback(fl.LAwFLoss(), reference="start")).train(),
     "confidence: is missing in the batch, .* remove_unused_columns=False"),
    (lambda: make(llama(), PatchCallback(fl.SFTKLLoss(0.1), reference="base")).train(),
     "reference='base' is the model without its adapter, and this model has none .* take reference='start'"),
    (lambda: make(llama(), PatchCallback(fl.SFTKLLoss(0.1), reference="base", stays=True)), "this model has none"),
    (lambda: make(llama(), PatchCallback(fl.LAwFLoss(reduction="group_mean"), reference="start"),
                  data=rows(8, anchors=True)).train(), "num_items_in_batch: .* reduction='token_mean'"),
], ids=range(9))  # fmt: skip
def test_mistakes_are_named(made, message):
    with pytest.raises((TypeError, ValueError), match=message):
        made()

"""LLaMA-Factory's configurations, and its way through a training, over stand-ins of what is used of it.

`python tests/integrations/real.py --trainer llamafactory` runs the real one.
"""

import os
import sys
import types

import pytest
import torch
import yaml
from training import DESCENT, collate, llama, rows
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

import fused_losses as fl
from fused_losses.integrations import llamafactory

LAWF = {"fused_loss": "lawf", "fused_loss_reference": "start"}


def test_it_gets_its_own_keys_alone():
    own, settings = llamafactory.split({"stage": "sft", "lr": 1, "fused_loss": "lawf", "fused_loss_reference": "base"})
    assert own == {"stage": "sft", "lr": 1} and settings.loss == "lawf"


@pytest.mark.parametrize("config, message", [
    ({}, "fused_loss: is not in the configuration"),
    ({"fused_loss": "dft", "use_dft_loss": True}, "use_dft_loss: LLaMA-Factory would make .* fused_loss: dft"),
    ({"fused_loss": "dft", "use_asft_loss": True}, "use_asft_loss: .* asft"),
    ({"fused_loss": "dft", "use_eaft_loss": True}, "use_eaft_loss: .* eaft"),
    ({"fused_loss": "dft", "enable_liger_kernel": True}, "enable_liger_kernel: .* leave it out"),
    ({"fused_loss": "dft", "stage": "dpo"}, "stage: expected sft or pt, got 'dpo'"),
    ({"fused_loss": "dft", "compute_accuracy": True}, "compute_accuracy: .* fused_loss_keep_logits: eval"),
    ({"fused_loss": "talr", "temperature": 2.0},
     r"temperature: is an option of TALRLoss; write fused_loss_options: \{temperature: 2.0\}; .* predict_with"),
    ({"fused_loss": "eaft", "top_k": 5}, r"top_k: is an option of EAFTLoss; write fused_loss_options: \{top_k: 5\}"),
    ({"fused_loss": "asft", "fused_loss_reference": "base", "kl_weight": 0.1, "predict_with_generate": True},
     r"kl_weight: is an option of ASFTLoss; write fused_loss_options: \{kl_weight: 0.1\}$"),
    ({"fused_loss": "talr", "gradient": "sparse"}, r"gradient: is an option of TALRLoss"),
    ({**LAWF, "fused_loss_reference": "base", "finetuning_type": "full"}, "finetuning_type: full has none; take start"),
    ({**LAWF, "fused_loss_reference": "base", "finetuning_type": "freeze"}, "finetuning_type: freeze has none"),
    ({**LAWF, "fused_loss_reference": "base", "do_eval": True, "model_name_or_path": "m"},
     r"base is no original without do_train: true, as LLaMA-Factory merges .* the folder of the original \(m\)"),
    ({**LAWF, "do_predict": True, "do_train": False}, "start is no original without do_train: true"),
    ({"fused_loss": "weighted", "do_train": True}, "weights: WeightedLoss reads a column .* tokenized_path: the"),
    ({"fused_loss": "weighted", "do_train": True, "tokenized_path": "nowhere"}, "weights: WeightedLoss reads a column"),
    ({"fused_loss": "psft", "do_train": True}, "old_nll: PSFTLoss reads a column"),
    ({**LAWF, "compute_accuracy": True, "fused_loss_keep_logits": "eval"}, "compute_accuracy: .* to the prompt"),
    ({**LAWF, "stage": "pt"}, "stage: pt gives every token a label, .* fused_loss: sft"),
    ({**LAWF, "train_on_prompt": True}, "train_on_prompt: True gives every token a label"),
], ids=str)  # fmt: skip
def test_it_refuses(config, message):
    with pytest.raises(ValueError, match=message):
        llamafactory.split(config)


@pytest.mark.parametrize("config", [
    {"fused_loss": "dft", "use_dft_loss": False, "enable_liger_kernel": None},
    {"fused_loss": "talr", "temperature": 2.0, "predict_with_generate": True},
    {"fused_loss": "sft", "temperature": 2.0},
    {"fused_loss": "talr", "temperature": 0.95, "fused_loss_options": {"temperature": 2.0}},
    {"fused_loss": "sft", "stage": "pt", "train_on_prompt": True, "finetuning_type": "full"},
    {**LAWF, "finetuning_type": "full", "do_train": True, "do_eval": True},
    {**LAWF, "fused_loss_reference": "base", "finetuning_type": "oft", "do_train": True},
    {"fused_loss": "weighted", "do_train": True, "tokenized_path": os.path.dirname(__file__)},
    {**LAWF, "stage": "pt", "tokenized_path": os.path.dirname(__file__)},
], ids=str)  # fmt: skip
def test_it_takes(config):
    assert llamafactory.split(config)


# --- a stand-in: Trainers of transformers where LLaMA-Factory has its own


class Trainer(Seq2SeqTrainer):
    """In generation the labels are not given to the model, as there."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **options):
        if self.args.predict_with_generate:
            inputs.pop("labels")
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **options)


def padded_apart(features):
    """As transformers' collator for seq2seq has it: labels are as long as the longest labels."""
    inputs = collate([{**row, "labels": row["input_ids"]} for row in features])
    labels = collate([{"input_ids": row["labels"], "labels": row["labels"]} for row in features])["labels"]
    return {**inputs, "labels": labels}


def generation_rows():
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"][:3]} for row in rows(4, 3)]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """`found`: what run_exp got and made; its arguments are those of a training, and of rows in `found`."""
    found = {"rows": rows(8), "eval_rows": rows(4, 3)}
    modules = {name: types.ModuleType(name) for name in (
        "llamafactory", "llamafactory.train", "llamafactory.train.tuner", "llamafactory.train.sft",
        "llamafactory.train.pt", "llamafactory.train.sft.workflow", "llamafactory.train.pt.workflow", "omegaconf",
        "omegaconf.errors",
    )}  # fmt: skip
    sft, pt = modules["llamafactory.train.sft.workflow"], modules["llamafactory.train.pt.workflow"]
    modules["llamafactory.train.sft"].workflow, modules["llamafactory.train.pt"].workflow = sft, pt
    sft.SFTDataCollatorWith4DAttentionMask = pt.DataCollatorForLanguageModeling = lambda: padded_apart
    sft.CustomSeq2SeqTrainer = pt.CustomTrainer = Trainer

    def run_exp(args, callbacks):
        found.update(args=dict(args), callbacks=callbacks)
        wanted = {name: args.pop(name, False) for name in ("do_train", "do_eval", "do_predict")}
        args.pop("stage", None)
        arguments = Seq2SeqTrainingArguments(**{
            **DESCENT, "output_dir": str(tmp_path), "remove_unused_columns": False, "max_steps": 2, **args,
        })  # fmt: skip
        trainer = found["trainer"] = sft.CustomSeq2SeqTrainer(
            llama(), arguments, sft.SFTDataCollatorWith4DAttentionMask(), callbacks=callbacks,
            train_dataset=found["rows"], eval_dataset=found["eval_rows"],
        )  # fmt: skip
        if wanted["do_train"]:
            trainer.train(resume_from_checkpoint=args.get("resume_from_checkpoint"))
        if wanted["do_eval"]:
            found["eval_loss"] = trainer.evaluate(**found.get("gen_kwargs", {})).get("eval_loss")
        if wanted["do_predict"]:
            found["predictions"] = trainer.predict(found["eval_rows"], **found["gen_kwargs"]).predictions

    modules["llamafactory.train.tuner"].run_exp = run_exp
    modules["omegaconf"].OmegaConf = OmegaConf
    modules["omegaconf.errors"].OmegaConfBaseException = type("OmegaConfBaseException", (Exception,), {})
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found, sft


class OmegaConf:
    """What of it is used, of files with one level of keys."""

    @staticmethod
    def load(path):
        with open(path) as file:
            return yaml.safe_load(file)

    @staticmethod
    def is_dict(config):
        return isinstance(config, dict)

    @staticmethod
    def from_cli(words):
        found = {}
        for word in words:
            key, _, value = word.partition("=")
            first, _, second = key.partition(".")
            found[first] = {second: yaml.safe_load(value)} if second else yaml.safe_load(value)
        return found

    @staticmethod
    def merge(config, more):
        both = {key: {**config[key], **more[key]} for key in more if isinstance(config.get(key), dict)}
        return {**config, **more, **both}

    @staticmethod
    def to_container(config, resolve):
        return dict(config)


def log(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("options", [
    {}, dict(gradient_accumulation_steps=2, per_device_train_batch_size=2),
    dict(load_best_model_at_end=True, save_strategy="steps", save_steps=1),
], ids=str)  # fmt: skip
def test_evaluation_after_training_is_what_it_was_during_training(fake, options):
    found, sft = fake
    before = vars(sft).copy()
    config = {**LAWF, "do_train": True, "do_eval": True, "eval_strategy": "steps", "eval_steps": 1, **options}
    llamafactory.train(config)
    losses = log(found["trainer"], "eval_loss")
    assert losses[-1] == found["eval_loss"] == pytest.approx(min(losses[:2]), rel=1e-9)
    assert all(vars(sft)[name] is before[name] for name in before)
    assert log(found["trainer"], "kl")[0] == pytest.approx(0, abs=1e-12)
    by_hand = fl.patch(llama(), fl.LAwFLoss(), reference="start")
    batch = found["trainer"].data_collator(rows(8))
    assert log(found["trainer"], "loss")[0] == pytest.approx(by_hand(**batch).loss.item(), rel=3e-7) or options


def test_evaluation_alone_has_the_loss(fake, tmp_path):
    found, _ = fake
    llama(1).float().save_pretrained(tmp_path / "original")
    found["eval_rows"] = rows(4, 3)
    llamafactory.train({"fused_loss": "lawf", "fused_loss_reference": str(tmp_path / "original"), "do_eval": True})
    model = fl.patch(llama(), fl.LAwFLoss(), reference=llama(1).float().double())
    with torch.no_grad():
        expected = model.eval()(**found["trainer"].data_collator(rows(4, 3))).loss.item()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_the_start_is_known_in_a_training_that_is_resumed(fake, tmp_path):
    found, _ = fake
    config = {**LAWF, "do_train": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    llamafactory.train(config)
    whole = log(found["trainer"], "kl")
    llamafactory.train({**config, "resume_from_checkpoint": str(tmp_path / "checkpoint-2")})
    assert log(found["trainer"], "kl") == whole and whole[2] > 1e-4


@pytest.mark.parametrize("anchors", [False, True])
def test_nothing_is_held_in_batches_for_generation(fake, anchors):
    found, _ = fake
    more = {"anchors": [1]} if anchors else {}
    found["eval_rows"] = [{**row, **more} for row in generation_rows()]
    found["gen_kwargs"] = {"max_new_tokens": 2, "do_sample": False}
    llamafactory.train({
        **LAWF, "do_train": True, "do_eval": True, "do_predict": True, "predict_with_generate": True,
        "eval_strategy": "steps", "eval_steps": 1,
    })  # fmt: skip
    assert log(found["trainer"], "kl") and len(found["predictions"]) == 4
    assert "confidence" in found["trainer"].data_collator(rows(2))


def test_means_of_groups_are_those_within_a_batch(fake):
    found, _ = fake
    options = {"fused_loss_options": {"reduction": "group_mean"}, "gradient_accumulation_steps": 2}
    llamafactory.train({**LAWF, **options, "do_train": True, "per_device_train_batch_size": 4, "max_steps": 1})
    collated = found["trainer"].data_collator
    model = fl.patch(llama(), fl.LAwFLoss(reduction="group_mean"), reference="start")
    expected = [model(**collated(rows(8)[at : at + 4])).loss.item() for at in (0, 4)]
    assert log(found["trainer"], "loss")[0] == pytest.approx(sum(expected) / 2, rel=3e-7)


# --- the command


def test_the_command_runs_it_with_the_callback_and_puts_all_back(fake, tmp_path):
    found, sft = fake
    before = vars(sft).copy()
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"stage": "sft", **LAWF, "fused_loss_options": {"retain_weight": 3}}))
    llamafactory.main([str(config), "max_steps=3", "fused_loss_options.anchor_weight=2"])
    assert found["args"] == {"stage": "sft", "max_steps": 3}
    (callback,) = found["callbacks"]
    assert (callback.loss.anchor_weight, callback.loss.retain_weight) == (2, 3) and callback.stays
    assert found["trainer"].callback_handler.callbacks[1] is callback  # so that what reports has its numbers
    assert found["trainer"].data_collator.collator is padded_apart and vars(sft) == before
    config.write_text("fused_loss: dft\n")
    llamafactory.main([str(config)])
    assert "confidence" not in found["trainer"].data_collator(rows(2))


@pytest.mark.parametrize("text, more, said", [
    ("fused_loss: tlar\n", [], "did you mean talr"),
    ("fused_loss: dft\nuse_dft_loss: true\n", [], "use_dft_loss: "),
    ("- 1\n", [], "expected keys and values, got list"),
    ("a: [\n", [], "is no YAML"),
    ("fused_loss: dft\n", ["steps"], "steps: expected key=value"),
    ("fused_loss: dft\n", ["--steps=3"], "--steps=3: expected key=value"),
    (None, [], "No such file"),
])  # fmt: skip
def test_the_command_ends_with_a_line(text, more, said, fake, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as end:
        llamafactory.main([str(path), *more])
    captured = capsys.readouterr().err
    assert end.value.code == 2 and said in captured and captured.count("\n") <= 3


def test_a_package_that_is_missing_is_said(tmp_path, capsys, monkeypatch, fake):
    path = tmp_path / "config.yaml"
    path.write_text("fused_loss: dft\n")
    for missing in ("llamafactory.train.tuner", "omegaconf"):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(SystemExit):
            llamafactory.main([str(path)])
        assert "pip install llamafactory" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        llamafactory.main(["--help"])
    assert end.value.code == 0 and "fused_loss_reference_cache: " in capsys.readouterr().out

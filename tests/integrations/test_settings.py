"""The keys that trainers' configurations have, what is refused, and the files that say them."""

import json
import subprocess
import sys
import types

import pytest
import torch
from training import llama

import fused_losses as fl
from fused_losses.integrations.settings import LossSettings, refuse, take
from fused_losses.objectives.named import NAMED, make_objective, objective_class
from fused_losses.training import METHODS


def test_every_objective_has_a_name_and_every_method_is_one():
    public = {name for name in fl.objectives.__all__ if name.endswith("Loss")}
    assert {cls.__name__ for cls in NAMED.values()} == public
    assert set(METHODS) <= set(NAMED)
    for name, method in METHODS.items():
        assert method.make is NAMED[name] or name == "flow"


@pytest.mark.parametrize("name", ["talr", "TALR", "TALRLoss", " talr "])
def test_names_as_people_write_them(name):
    assert objective_class(name) is fl.TALRLoss


@pytest.mark.parametrize("name, cls", [
    ("cross-entropy", fl.CrossEntropyLoss), ("Cross_Entropy", fl.CrossEntropyLoss), ("CE", fl.CrossEntropyLoss),
    ("crossentropyloss", fl.CrossEntropyLoss), ("sft-kl", fl.SFTKLLoss), ("SFT + KL", fl.SFTKLLoss),
    ("topk_distillation", fl.TopKDistillationLoss), ("reverseKL", fl.ReverseKLLoss),
])  # fmt: skip
def test_common_spellings(name, cls):
    assert objective_class(name) is cls


@pytest.mark.parametrize("name, meant", [("crossentropie", "sft"), ("tlar", "talr"), ("reverse", "reverse-kl")])
def test_a_name_that_is_close_is_told_as_it_is_written(name, meant):
    with pytest.raises(ValueError, match=rf"did you mean {meant}\?"):
        objective_class(name)
    with pytest.raises(ValueError, match=r"expected one of .* got ''$"):
        objective_class("")


def test_options_as_yaml_reads_them():
    made = make_objective("sft+kl", {"kl_weight": "1e-1", "gradient": "sparse"})
    assert made.kl_weight == 0.1 and made.gradient == "sparse"
    assert (
        make_objective("talr").temperature == "median" and make_objective("flow", {"temperature": 2}).temperature == 2
    )


@pytest.mark.parametrize("name, options, message", [
    ("tlar", {}, "fused_loss: expected one of lawf, .*, got 'tlar'; did you mean talr?"),
    (3, {}, "fused_loss: expected one of .* got 3"),
    ("talr", {"tau": 2}, "TALRLoss: has no option tau; did you mean temperature"),
    ("talr", {"temperature:2": None}, "temperature:2: .* needs a space after its colon: {temperature: 2}"),
    ("talr", {"temperature": "hot"}, "temperature: expected .* got 'hot'"),
    ("talr", 2.0, r"fused_loss_options: expected options by name, got 2.0; write \{temperature: 2.0\}"),
    ("talr", {1: 2}, "fused_loss_options: expected names, got 1"),
    ("flow", {}, r"fused_loss_options: FLOWLoss needs temperature"),
])  # fmt: skip
def test_a_wrong_name_or_option_is_named(name, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_objective(name, options, "fused_loss")


def test_keys_are_taken_out_of_a_configuration():
    config = {
        "model": "m",
        "fused_loss": "asft",
        "fused_loss_options": {"kl_weight": 0.2},
        "fused_loss_reference": "base",
    }
    settings = take(config)
    assert config == {"model": "m"}
    assert settings == LossSettings("asft", {"kl_weight": 0.2}, reference="base")
    assert take({"model": "m", "fused_loss": None}) is None


@pytest.mark.parametrize("config, message", [
    ({"fused_loss_options": {"kl_weight": 1}}, "fused_loss_options: given without fused_loss"),
    ({"fused_loss": "talr", "fused_loss_refrence": "base"}, "no such key; did you mean fused_loss_reference"),
    ({"fused_los": "talr"}, "fused_los: there is no such key; did you mean fused_loss"),
    ({"fused_loss": "talr", "fused-los-options": {}}, "fused-los-options: there .* did you mean fused_loss_options"),
    ({"fused_loss": "lawf"}, "fused_loss_reference: LAwFLoss compares .* give base"),
    ({"fused_loss": "talr", "fused_loss_reference": "base"}, "fused_loss_reference: TALRLoss has no use"),
    ({"fused_loss": "lawf", "fused_loss_reference": "nowhere"}, "expected base, start or the folder .* got 'nowhere'"),
    ({"fused_loss": "stm", "fused_loss_reference_cache": "c"}, "fused_loss_reference_cache: given without"),
    ({"fused_loss": "talr", "fused_loss_keep_logits": "no"}, "fused_loss_keep_logits: expected .* got 'no'"),
    ({"fused_loss": "talr", "fused_loss_eval_loss": "own"}, "fused_loss_eval_loss: expected .* got 'own'"),
])  # fmt: skip
def test_a_wrong_key_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        take(config)


def test_other_keys_of_trainers_are_no_slips_of_ours():
    config = {"use_dft_loss": False, "loss_type": None, "use_liger_loss": True, "loss": 1, 3: 4, "optim": "adamw_fused"}
    assert take(dict(config)) is None and take({"fused_loss": "sft", **config}) == LossSettings("sft")


@pytest.mark.parametrize("name", ["jsd", "reverse-kl"])
@pytest.mark.parametrize("reference", ["base", "start", "adapter-off"])
def test_a_distance_from_the_model_itself_alone_is_refused(name, reference):
    """It is 0 with a gradient of 0 at the first step, and so for ever."""
    with pytest.raises(ValueError, match=f"fused_loss_reference: {reference} is the model .* give the folder of the"):
        LossSettings(name, reference=reference)
    assert LossSettings("jsd", {"nll_weight": 0.1}, reference=reference).reference == reference


def test_the_folder_of_a_model_is_a_reference(tmp_path, monkeypatch):
    llama(1).float().save_pretrained(tmp_path)
    model = llama().float()
    settings = LossSettings("sft+kl", {"kl_weight": 1.0}, reference=str(tmp_path))
    settings.patch(model)
    ids = torch.tensor([[3, 4, 5, 6]])
    found = model(ids, labels=ids).loss
    other = fl.patch(llama().float(), fl.SFTKLLoss(1.0), reference=llama(1).float())
    torch.testing.assert_close(found, other(ids, labels=ids).loss)
    callback = settings.callback()
    reference = callback.options["reference"]
    assert callback.own_reference and not any(p.requires_grad for p in reference.parameters())
    moved = []
    monkeypatch.setattr(reference, "to", lambda device: moved.append(device))
    fl.unpatch(model)
    state = types.SimpleNamespace(global_step=0, stateful_callbacks={})
    callback.on_train_begin(None, state, None, model=model)
    assert moved == [model.device] and model(ids, labels=ids).loss.item() == found.item()
    callback.on_train_end(None, state, None)
    assert not LossSettings("lawf", reference="base").callback().own_reference


@pytest.mark.parametrize("config, message", [
    ({"is_encoder_decoder": True, "architectures": ["T5ForConditionalGeneration"]}, "is an encoder-decoder"),
    ({"architectures": ["Qwen2ForSequenceClassification"]}, "is a Qwen2ForSequenceClassification, without an LM head"),
    ({"architectures": ["LlamaModel"]}, "is a LlamaModel, without an LM head"),
    ({"architectures": ["SmolLM3ForTokenClassification"]}, "is a SmolLM3ForTokenClassification, without an LM head"),
])  # fmt: skip
def test_a_folder_of_a_model_that_is_no_original_is_named_before_it_is_loaded(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"fused_loss_reference: .*{message}"):
        LossSettings("lawf", reference=str(tmp_path))


@pytest.mark.parametrize("config", [
    {}, {"architectures": ["GPT2LMHeadModel"]}, {"architectures": ["BloomForCausalLM"]},
    {"architectures": ["ChatGLMModel"], "auto_map": {"AutoModelForCausalLM": "x.y"}},
])  # fmt: skip
def test_a_folder_of_a_causal_model_is_taken(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert LossSettings("lawf", reference=str(tmp_path)).loads_reference


def test_a_switch_that_is_off_is_none():
    refuse({"rl": None, "use_eaft": False}, {"rl": "x", "use_eaft": "y"}, "axolotl")


def test_importing_them_imports_no_trainer():
    code = (
        "import sys, fused_losses.integrations.llamafactory, fused_losses.integrations.batches\n"
        "assert not {'transformers', 'llamafactory', 'swift', 'axolotl', 'pydantic', 'yaml'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr

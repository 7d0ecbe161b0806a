"""The keys that trainers' configurations have, what is refused, and the files that say them."""

import subprocess
import sys
import types

import pytest
import torch
from training import llama

import fused_losses as fl
from fused_losses.integrations import llamafactory
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


# --- LLaMA-Factory


def test_llamafactory_gets_its_own_keys_alone():
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
])  # fmt: skip
def test_llamafactory_refuses(config, message):
    with pytest.raises(ValueError, match=message):
        llamafactory.split(config)
    assert llamafactory.split({"fused_loss": "dft", "use_dft_loss": False, "enable_liger_kernel": None})


@pytest.fixture
def fake_llamafactory(monkeypatch):
    """What is used of it: run_exp, and where its collators are looked up."""
    found = {}
    modules = {name: types.ModuleType(name) for name in (
        "llamafactory", "llamafactory.train", "llamafactory.train.tuner", "llamafactory.train.sft",
        "llamafactory.train.pt", "llamafactory.train.sft.workflow", "llamafactory.train.pt.workflow",
    )}  # fmt: skip
    sft, pt = modules["llamafactory.train.sft.workflow"], modules["llamafactory.train.pt.workflow"]
    modules["llamafactory.train.sft"].workflow, modules["llamafactory.train.pt"].workflow = sft, pt
    sft.SFTDataCollatorWith4DAttentionMask = pt.DataCollatorForLanguageModeling = lambda **options: options

    def run_exp(args, callbacks):
        found.update(args=args, callbacks=callbacks, collator=sft.SFTDataCollatorWith4DAttentionMask(a=1))

    modules["llamafactory.train.tuner"].run_exp = run_exp
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found, sft


def test_llamafactory_is_run_with_the_callback_and_collators_that_pass_fields_on(fake_llamafactory, tmp_path):
    found, sft = fake_llamafactory
    before = sft.SFTDataCollatorWith4DAttentionMask
    config = tmp_path / "config.yaml"
    config.write_text("stage: sft\nfused_loss: lawf\nfused_loss_reference: base\n")
    llamafactory.main([str(config), "max_steps=3", "fused_loss_options={anchor_weight: 2}"])
    assert found["args"] == {"stage": "sft", "max_steps": 3}
    (callback,) = found["callbacks"]
    assert callback.loss.anchor_weight == 2 and callback.options["reference"] == "base"
    assert found["collator"].collator == {"a": 1} and sft.SFTDataCollatorWith4DAttentionMask is before
    config.write_text("fused_loss: dft\n")
    llamafactory.main([str(config)])
    assert found["collator"] == {"a": 1}


@pytest.mark.parametrize("text, more, said", [
    ("fused_loss: tlar\n", [], "did you mean talr"),
    ("fused_loss: dft\nuse_dft_loss: true\n", [], "use_dft_loss: "),
    ("- 1\n", [], "expected keys and values, got list"),
    ("a: [\n", [], "is no YAML"),
    ("fused_loss: dft\n", ["steps"], "steps: expected key=value"),
    (None, [], "No such file"),
])  # fmt: skip
def test_llamafactory_ends_with_a_line(text, more, said, fake_llamafactory, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as end:
        llamafactory.main([str(path), *more])
    captured = capsys.readouterr().err
    assert end.value.code == 2 and said in captured and captured.count("\n") <= 3


def test_llamafactory_that_is_missing_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llamafactory", None)
    path = tmp_path / "config.yaml"
    path.write_text("fused_loss: dft\n")
    with pytest.raises(SystemExit):
        llamafactory.main([str(path)])
    assert "pip install llamafactory" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        llamafactory.main(["--help"])
    assert end.value.code == 0 and "fused_loss_reference_cache: " in capsys.readouterr().out


def test_a_switch_that_is_off_is_none():
    refuse({"rl": None, "use_eaft": False}, {"rl": "x", "use_eaft": "y"}, "axolotl")


def test_importing_them_imports_no_trainer():
    code = (
        "import sys, fused_losses.integrations.llamafactory, fused_losses.integrations.batches\n"
        "assert not {'transformers', 'llamafactory', 'swift', 'axolotl', 'pydantic', 'yaml'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr

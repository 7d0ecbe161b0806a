"""axolotl's plugin, over a stand-in of the one class that it takes of axolotl; real.py runs the real one."""

import copy
import importlib
import math
import sys
import types

import pytest
from training import llama

import fused_losses as fl

PLUGIN = "fused_losses.integrations.axolotl.FusedLossesPlugin"


@pytest.fixture
def axolotl(monkeypatch):
    pytest.importorskip("pydantic")
    names = ("axolotl", "axolotl.integrations", "axolotl.integrations.base")
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[2]].BasePlugin = type("BasePlugin", (), {})
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "fused_losses.integrations.axolotl", raising=False)
    yield importlib.import_module("fused_losses.integrations.axolotl")
    sys.modules.pop("fused_losses.integrations.axolotl", None)


@pytest.fixture
def merged(axolotl):
    """The configuration's class, made as axolotl makes it: keys that it does not know are dropped without a word."""
    import pydantic

    module, name = axolotl.FusedLossesPlugin().get_input_args().rsplit(".", 1)
    own = {"__annotations__": {"lr": float, "plugins": list | None}, "plugins": None}
    return type("Merged", (type("Base", (pydantic.BaseModel,), own), getattr(sys.modules[module], name)), {})


def test_the_arguments_are_merged(merged):
    assert merged(lr=1, fused_loss="talr", fused_loss_options={"temperature": 2}).fused_loss == "talr"
    assert merged(lr=1, fused_loss="talr", backend="its own")
    assert merged(lr=1).fused_loss is None and merged(lr=1, cut_cross_entropy=True)
    assert merged(lr=1, fused_loss="lawf", fused_loss_reference="base", adapter="lora")
    assert merged(lr=1, fused_loss="lawf", fused_loss_reference="start", relora=True)


@pytest.mark.parametrize("config, message", [
    (dict(fused_loss="tlar"), "did you mean talr"),
    (dict(fused_loss=3), "fused_loss: expected"),
    (dict(fused_loss="talr", fused_loss_options=[2.0]), "fused_loss_options: expected"),
    (dict(fused_loss="talr", fused_loss_options={"temperature": "two"}), "temperature: expected"),
    (dict(fused_loss="talr", fused_loss_options={"temprature": 2.0}), "did you mean temperature"),
    (dict(fused_loss="lawf"), "fused_loss_reference: LAwFLoss compares"),
    (dict(fused_loss="dft", liger_fused_linear_cross_entropy=True), "liger_fused_linear_cross_entropy: axolotl"),
    (dict(fused_loss="dft", cut_cross_entropy=True), "cut_cross_entropy: axolotl"),
    (dict(fused_loss="dft", chunked_cross_entropy=True), "chunked_cross_entropy: axolotl"),
    (dict(fused_loss="dft", use_eaft=True), "use_eaft: axolotl .* take fused_loss: eaft"),
    (dict(fused_loss="dft", rl="dpo"), "rl: axolotl"),
    (dict(fused_loss_options={}), "given without fused_loss"),
    (dict(fused_loss="talr", temperature=2), r"temperature: is an option .* fused_loss_options: \{temperature: 2\}"),
    (dict(fused_loss="talr", temprature=2), r"temprature: is no key .* fused_loss_options: \{temperature: 2"),
    (dict(fused_loss="talr", tau=2), r"tau: is no key .* did you mean fused_loss_options: \{temperature: 2"),
    (dict(fused_loss="lawf", fused_loss_reference="start", kl_weight=0.1),
     "kl_weight: is an option of SFTKLLoss, .*, not of LAwFLoss, .* LAwFLoss has anchor_weight"),
    (dict(fused_loss="sft", top_k=5), "top_k: is an option of EAFTLoss, not of CrossEntropyLoss"),
    (dict(fused_loss="lawf", fused_loss_reference="base"), "base is the model without .* adapter: is not in .* start"),
    (dict(fused_loss="lawf", fused_loss_reference="base", adapter="lora", relora=True), "base is .* relora: merges"),
])  # fmt: skip
def test_what_is_wrong_is_said_with_the_configuration(merged, config, message):
    import pydantic

    with pytest.raises(pydantic.ValidationError, match=message):
        merged(lr=1, **config)


@pytest.mark.parametrize("key, meant", [
    ("fused_los", "fused_loss"), ("fusedloss", "fused_loss"), ("Fused_Loss", "fused_loss"), ("fuse_loss", "fused_loss"),
    ("fused-loss", "fused_loss"), ("fused_los_options", "fused_loss_options"), ("fused_losses", "fused_loss"),
    ("fused_loss_option", "fused_loss_options"), ("fusd_loss_reference", "fused_loss_reference"),
])  # fmt: skip
@pytest.mark.parametrize("beside", [{}, {"fused_loss": "talr"}], ids=["alone", "beside"])
def test_a_key_that_is_nearly_ours_is_named(merged, key, meant, beside):
    import pydantic

    with pytest.raises(pydantic.ValidationError, match=rf"{key}: there is no such key; did you mean {meant}\?"):
        merged(lr=1, **{key: "talr"}, **beside)


def test_no_key_of_axolotls_is_nearly_ours(axolotl):
    """Those of its schema that come nearest, of version 0.19.0."""
    axolotl.check(dict.fromkeys(["fused_mlp", "fsdp_config", "use_eaft", "fused_rope", "reference_model", "sp_loss"]))


def test_the_plugin_without_a_loss_is_an_error(merged):
    import pydantic

    with pytest.raises(pydantic.ValidationError, match="fused_loss: is not in the configuration, though plugins: has"):
        merged(lr=1, plugins=["axolotl.integrations.liger.LigerPlugin", PLUGIN])
    # axolotl keeps the plugin for later configurations of the process, which need not have a loss
    assert merged(lr=1, plugins=["axolotl.integrations.liger.LigerPlugin"])
    assert merged(lr=1, plugins=[PLUGIN], fused_loss="sft")


def test_a_key_that_the_configuration_knows_is_no_option_of_ours(axolotl):
    config = {"fused_loss": "talr", "temperature": 0.7, "kl_weight": 0.1, "tau": 1, "temprature": 2}
    axolotl.check(config, known=config)
    axolotl.check({"fused_loss": "talr", "temperature": None, "tau": None})


def made_trainer():
    return types.SimpleNamespace(
        data_collator=print, eval_data_collator=None, callback_handler=types.SimpleNamespace(callbacks=["its own"]),
        state=types.SimpleNamespace(stateful_callbacks={}),
    )  # fmt: skip


def test_the_model_the_collators_and_the_callbacks_are_fitted(axolotl):
    plugin = axolotl.FusedLossesPlugin()
    model, config = llama(), {"fused_loss": "lawf", "fused_loss_reference": "start", "fused_loss_keep_logits": None}
    plugin.post_model_load({"lr": 1}, model)
    plugin.post_model_load({**config, "merge_lora": True}, model)
    assert "_fused_losses" not in vars(model)
    plugin.post_model_load(config, model)
    assert isinstance(vars(model)["_fused_losses"].loss, fl.LAwFLoss)
    trainer = made_trainer()
    assert plugin.add_callbacks_post_trainer({}, trainer) == []
    assert trainer.data_collator is print and trainer.callback_handler.callbacks == ["its own"]
    assert plugin.add_callbacks_post_trainer(config, trainer) == []
    assert trainer.data_collator.collator is print and trainer.eval_data_collator is None
    assert trainer.model_accepts_loss_kwargs is True
    ours, other = trainer.callback_handler.callbacks
    assert isinstance(ours, fl.huggingface.Callback) and other == "its own"
    grouped = {**config, "fused_loss_options": {"reduction": "group_mean"}}
    plugin.add_callbacks_post_trainer(grouped, trainer)
    assert trainer.model_accepts_loss_kwargs is False


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset"])
def test_columns_that_the_trainer_takes_out_are_named(axolotl, where):
    """A Trainer leaves out what the model's forward does not name, before a collator sees it."""
    trainer, plugin = made_trainer(), axolotl.FusedLossesPlugin()
    columns = ["input_ids", "labels", "attention_mask", "position_ids", "length"]
    setattr(trainer, where, types.SimpleNamespace(column_names=[*columns, "anchors"]))
    with pytest.warns(UserWarning, match="anchors: is a column of the data that CrossEntropyLoss has no use for, so"):
        plugin.add_callbacks_post_trainer({"fused_loss": "sft"}, trainer)
    lawf = {"fused_loss": "lawf", "fused_loss_reference": "start"}
    plugin.add_callbacks_post_trainer(lawf, trainer)  # a warning would be an error here
    setattr(trainer, where, types.SimpleNamespace(column_names=[*columns, "anchor"]))
    with pytest.warns(UserWarning, match=r"anchor: is a column .* did you mean anchors\?"):
        plugin.add_callbacks_post_trainer(lawf, trainer)
    setattr(trainer, where, types.SimpleNamespace(column_names=None))  # as a stream may have it
    plugin.add_callbacks_post_trainer(lawf, trainer)


def test_ppl_is_that_of_the_nll(axolotl, monkeypatch):
    """axolotl makes it of the loss, which for talr and others is no nll."""
    callback, nll = axolotl.PerplexityCallback(), 2.0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.last = {"nll": nll}
            logs.update(self.last)

    monkeypatch.setattr(fl.huggingface.Callback, "on_log", on_log)
    state = types.SimpleNamespace(log_history=[{"loss": 0.5, "ppl": 1.64872}])
    logs = {"loss": 0.5, "ppl": 1.64872}
    callback.on_log(None, state, None, logs=logs)
    assert logs["ppl"] == state.log_history[-1]["ppl"] == round(math.exp(2), 5)
    logs = {"eval_loss": 0.5, "eval_ppl": 1.64872, "ppl": 1.0}
    callback.on_log(None, state, None, logs=logs)
    assert logs["ppl"] == 1.0 and logs["eval_ppl"] == 1.64872
    nll = 1e4
    monkeypatch.setenv("AXOLOTL_METRIC_NDIGITS", "2")
    callback.on_log(None, state, None, logs=logs | {"loss": 1.0})
    assert state.log_history[-1]["ppl"] == math.inf
    assert isinstance(copy.deepcopy(callback), axolotl.PerplexityCallback)


def test_axolotl_that_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", None)
    monkeypatch.delitem(sys.modules, "fused_losses.integrations.axolotl", raising=False)
    module = importlib.import_module("fused_losses.integrations.axolotl")
    with pytest.raises(ImportError, match="needs axolotl"):
        module.FusedLossesPlugin()
    sys.modules.pop("fused_losses.integrations.axolotl", None)

"""ms-swift's plug-in file, over stand-ins of what it takes of ms-swift; real.py runs the real one."""

import copy
import functools
import importlib.util
import sys
import types

import pytest
from training import llama
from transformers import DefaultFlowCallback, TrainerCallback

from fused_losses import cli
from fused_losses.integrations import swift as ours
from fused_losses.integrations.swift import register


class Arguments(types.SimpleNamespace):
    """What is read of ms-swift's SftArguments."""

    def __init__(self, **changes):
        given = dict(
            callbacks=["fused_losses"], task_type="causal_lm", tuner_type="lora", loss_scale="default",
            sequence_parallel_size=1, use_logits_to_keep=None,
        )  # fmt: skip
        super().__init__(**given | changes)


@pytest.fixture
def swift(monkeypatch):
    names = ("swift", "swift.callbacks", "swift.trainers")
    modules = {name: types.ModuleType(name) for name in names}
    modules["swift.callbacks"].callbacks_map = {}

    class TrainerFactory:
        @classmethod
        def get_training_args(cls, args):
            return cls, args

    modules["swift.trainers"].TrainerFactory = TrainerFactory
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return types.SimpleNamespace(registered=modules["swift.callbacks"].callbacks_map, factory=TrainerFactory)


def made(swift, args, *others):
    """The callback and its trainer, as ms-swift makes them."""
    trainer = types.SimpleNamespace(data_collator=print)
    callback = swift.registered["fused_losses"](args, trainer)
    trainer.callback_handler = types.SimpleNamespace(callbacks=[*others, callback])
    callback.on_init_end(args, None, None, model=llama())
    trainer.model_accepts_loss_kwargs = True  # which ms-swift says then
    return callback, trainer


def imported(path):
    spec = importlib.util.spec_from_file_location("plugin_of_a_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


# --- the file


def test_the_file_of_the_command_registers_the_loss(tmp_path, swift, capsys):
    path = tmp_path / "plugin.py"
    cli.main(["swift-plugin", str(path), "--loss", "lawf", "--reference", "start", "--option", "anchor-weight=2",
              "--option", "scan=int8"])  # fmt: skip
    assert f"swift sft --external_plugins {path} --callbacks fused_losses" in capsys.readouterr().out
    imported(path)
    args = Arguments()
    callback, trainer = made(swift, args)
    assert repr(callback.loss) == "LAwFLoss(anchor_weight=2, retain_weight=1.0, reduction='token_mean', scan='int8')"
    assert callback.options["reference"] == "start"
    assert trainer.data_collator.collator is print and args.use_logits_to_keep is False
    assert copy.deepcopy(callback)._trainer is None


@pytest.mark.parametrize("given, keep, evaluates", [
    ([], False, "nll"), (["--keep-logits", "eval"], "eval", "nll"),
    (["--keep-logits", "true", "--eval-loss", "objective"], True, "objective"),
], ids=str)  # fmt: skip
def test_the_file_has_what_evaluation_computes(given, keep, evaluates, tmp_path, swift):
    path = tmp_path / "plugin.py"
    cli.main(["swift-plugin", str(path), *given])
    imported(path)
    options = swift.registered["fused_losses"](Arguments(), types.SimpleNamespace()).options
    assert options["keep_logits"] is keep or options["keep_logits"] == keep
    assert options["eval_loss"] == evaluates


@pytest.mark.parametrize("given, message", [
    (["--loss", "lawf"], "--reference: LAwFLoss compares"),
    (["--loss", "stm", "--reference-cache", "c"], "--reference-cache: given without --reference;"),
    (["--loss", "tlar"], "did you mean talr"),
    (["--loss", "flow"], "--option: FLOWLoss needs temperature"),
    (["--loss", "psft"], "--loss: PSFTLoss reads old_nll of the data, and ms-swift makes rows of its own"),
    (["--option", "tau"], "--option tau: expected NAME=VALUE"),
    (["--option", "tau=2"], "did you mean temperature"),
    (["--keep-logits", "no"], "invalid choice: 'no'"),
], ids=str)  # fmt: skip
def test_a_mistake_writes_no_file(given, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["swift-plugin", str(tmp_path / "plugin.py"), *given])
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and "fused_loss_" not in said and not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays(tmp_path, capsys):
    path = tmp_path / "plugin.py"
    path.write_text("mine\n")
    with pytest.raises(SystemExit):
        cli.main(["swift-plugin", str(path)])
    assert "is there already" in capsys.readouterr().err and path.read_text() == "mine\n"
    cli.main(["swift-plugin", str(path), "--force"])
    assert "register('talr')" in path.read_text()
    with pytest.raises(SystemExit):
        cli.main(["swift-plugin", str(tmp_path / "plugin.yaml")])
    assert "expected a file that ends in .py" in capsys.readouterr().err


# --- register


@pytest.mark.parametrize("loss, settings, kind, message", [
    ("talr", {"temperature": 2}, TypeError, r"temperature: there is no such setting; .* options=\{'temperature': 2\}"),
    ("lawf", {"refrence": "base"}, TypeError, "refrence: there is no such setting; .* reference, reference_cache"),
    ("lawf", {}, ValueError, "^reference: LAwFLoss compares"),
    ("lawf", {"reference": "nowhere"}, ValueError, "^reference: expected base, start or the folder"),
    ("stm", {"reference_cache": "c"}, ValueError, "^reference_cache: given without reference;"),
    ("tlar", {}, ValueError, "^loss: expected one of .* did you mean talr"),
    ("flow", {}, TypeError, "^options: FLOWLoss needs temperature"),
    ("talr", {"keep_logits": "no"}, ValueError, "^keep_logits: expected .* got 'no'"),
    ("psft", {}, ValueError, "^loss: PSFTLoss reads old_nll of the data, and ms-swift makes rows"),
])  # fmt: skip
def test_a_wrong_setting_is_named_as_it_was_written(loss, settings, kind, message, swift):
    with pytest.raises(kind, match=message):
        register(loss, **settings)
    assert not swift.registered


def test_swift_that_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "swift", None)
    with pytest.raises(ImportError, match="needs ms-swift: pip install ms-swift"):
        register("dft")


@pytest.mark.parametrize("command, refused", [("sft", True), ("pt", True), ("rlhf", True), ("export", False)])
def test_megatron_would_train_without_the_loss(command, refused, swift, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"/lib/swift/cli/_megatron/{command}.py", "--external_plugins", "plugin.py"])
    if not refused:
        return register("talr")
    with pytest.raises(ValueError, match=r"register: Megatron-SWIFT has .* not with talr; train with `swift sft`"):
        register("talr")


# --- the arguments of a training


def test_arguments_that_have_room_for_the_loss_are_made(swift):
    register("lawf", reference="base")
    args = Arguments(callbacks=["early_stop", "fused_losses"], loss_scale="last_round+ignore_empty_think")
    assert swift.factory.get_training_args(args) == (swift.factory, args)
    child = type("Child", (swift.factory,), {})
    assert child.get_training_args(args) == (child, args)


@pytest.mark.parametrize("changes, message", [
    ({"callbacks": []}, "--callbacks: expected fused_losses among them, got none, .* .* lawf, .* add --callbacks"),
    ({"callbacks": ["fused_loss"]}, "--callbacks: expected fused_losses among them, got fused_loss, with"),
    ({"task_type": "seq_cls"}, "--task_type seq_cls: its trainer has a loss of its own"),
    ({"rlhf_type": "dpo"}, "--rlhf_type dpo: its trainer has a loss of its own"),
    ({"tuner_type": "full"}, "reference: base is .* --tuner_type full has none; take reference='start'"),
    ({"loss_scale": "all"}, "--loss_scale all: every token is learned, .* LAwFLoss .* would hold nothing"),
    ({"loss_scale": "all+ignore_empty_think"}, "--loss_scale all.*: every token is learned"),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size: expected 1, got 2"),
    ({"enable_dft_loss": True}, "enable_dft_loss: ms-swift would make the loss itself"),
])  # fmt: skip
def test_arguments_without_room_for_the_loss_are_refused_before_a_model_is_loaded(changes, message, swift):
    register("lawf", reference="base")
    with pytest.raises(ValueError, match=message):
        swift.factory.get_training_args(Arguments(**changes))


@pytest.mark.parametrize("changes, makes", [
    ({}, False), ({"loss_scale": "last_round"}, False), ({"loss_scale": None}, False), ({"loss_scale": "all"}, False),
    ({"loss_scale": "react", "is_binary_loss_scale": True}, False), ({"loss_scale": "react"}, True),
    ({"loss_scale": "last_round+ignore_empty_think"}, False), ({"loss_scale": "hermes+ignore_empty_think"}, True),
    ({"loss_scale": "last_round+hermes"}, True), ({"is_binary_loss_scale": False}, True),
])  # fmt: skip
def test_weights_that_loss_scale_does_not_make_are_named_before_a_model_is_loaded(changes, makes, swift):
    register("weighted")
    if makes:
        assert swift.factory.get_training_args(Arguments(**changes))
    else:
        with pytest.raises(ValueError, match=r"--loss_scale .*: gives no weights, which WeightedLoss needs"):
            swift.factory.get_training_args(Arguments(**changes))
    register("talr")
    if makes:
        with pytest.raises(ValueError, match=r"--loss_scale .*: weighs tokens, and TALRLoss has no such weights; take"):
            swift.factory.get_training_args(Arguments(**changes))
    else:
        assert swift.factory.get_training_args(Arguments(**changes))
    assert swift.factory.get_training_args(Arguments(**changes | {"is_binary_loss_scale": True}))
    own = {"loss_scale": "somebodys", "is_binary_loss_scale": None}  # what it makes is seen in the first batch
    assert swift.factory.get_training_args(Arguments(**own))


@pytest.mark.parametrize("changes, message", [
    ({}, "would be the checkpoint of --resume_from_checkpoint out/checkpoint-2, .* as --adapters, .* take base, or"),
    ({"adapters": ["out/checkpoint-2"], "resume_only_model": True}, "loads as --adapters"),
    ({"tuner_type": "full", "resume_only_model": True}, "loads as --model, .* leave --resume_only_model out, or give"),
    ({"tuner_type": "full"}, None),
    ({"resume_from_checkpoint": None, "adapters": ["out/checkpoint-2"]}, None),
])  # fmt: skip
def test_the_start_of_a_training_that_is_resumed(changes, message, swift):
    """Where ms-swift loads the checkpoint before our callback comes, it is refused."""
    register("lawf", reference="start")
    args = Arguments(**{"resume_from_checkpoint": "out/checkpoint-2", **changes})
    if message is None:
        assert swift.factory.get_training_args(args)
    else:
        with pytest.raises(ValueError, match=f"reference: start .*{message}"):
            swift.factory.get_training_args(args)
    register("lawf", reference="base")
    assert args.tuner_type == "full" or swift.factory.get_training_args(args)


def test_the_model_is_patched_from_when_the_trainer_is_made(swift):
    """So before a Trainer loads the weights of a checkpoint, and for evaluation before and after training."""
    register("lawf", reference="start")
    callback, _ = made(swift, Arguments())
    assert "_fused_losses" in vars(callback._model) and callback.stays


def test_the_last_registration_counts(swift):
    register("lawf", reference="base")
    register("talr")
    assert swift.factory.get_training_args(Arguments(loss_scale="all", tuner_type="full"))
    with pytest.raises(ValueError, match="not with talr"):
        swift.factory.get_training_args(Arguments(callbacks=[]))


def test_what_others_wrap_around_ms_swifts_stays(swift):
    register("talr")
    seen, ours_now = [], vars(swift.factory)["get_training_args"].__func__

    @functools.wraps(ours_now)
    def theirs(cls, args):
        seen.append(args)
        return ours_now(cls, args)

    swift.factory.get_training_args = classmethod(theirs)
    register("dft")
    args = Arguments()
    assert swift.factory.get_training_args(args) == (swift.factory, args) and seen == [args]
    del swift.registered["fused_losses"]
    assert swift.factory.get_training_args(Arguments(callbacks=[]))


@pytest.mark.parametrize("switch", list(ours.SWITCHES))
def test_the_callback_refuses_too(switch, swift):
    """For Trainers that are made without ms-swift's command."""
    register("dft")
    make = functools.partial(swift.registered["fused_losses"], trainer=types.SimpleNamespace())
    with pytest.raises(ValueError, match=f"{switch}: ms-swift would make the loss itself"):
        make(Arguments(**{switch: 0.1}))
    parallel = types.SimpleNamespace(template=types.SimpleNamespace(sequence_parallel_size=2))
    with pytest.raises(ValueError, match="sequence_parallel_size: expected 1, got 2"):
        make(Arguments(), trainer=parallel)


@pytest.mark.parametrize("reduction, divides", [("token_mean", True), ("group_mean", False)])
def test_means_of_groups_are_not_divided_by_the_tokens_of_all_batches(reduction, divides, swift, monkeypatch):
    monkeypatch.setattr(ours.PatchCallback, "on_train_begin", lambda *_, **__: None)
    register("lawf", {"reduction": reduction}, reference="start")
    callback, trainer = made(swift, Arguments())
    callback.on_train_begin(None, None, None)
    assert trainer.model_accepts_loss_kwargs is divides


def test_what_reports_elsewhere_has_the_numbers_too(swift):
    """After the callback that says whether to save, which PatchCallback asks."""
    register("talr")
    flow, report = DefaultFlowCallback(), TrainerCallback()
    callback, trainer = made(swift, Arguments(), flow, report)
    assert trainer.callback_handler.callbacks == [flow, callback, report]
    callback, trainer = made(swift, Arguments(), report)
    assert trainer.callback_handler.callbacks == [callback, report]

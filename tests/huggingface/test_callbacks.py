"""FinchCallback: steps, schedules, accumulation, groups, checkpoints, against the formula in a loop by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from training import DESCENT, collate, error, llama, log_probs, rows, step, trainer
from transformers import Trainer, TrainingArguments

import fused_losses as fl
from fused_losses.huggingface import FinchCallback

TOLERANCE = 2e-6  # of float32 losses and Llama's norms in float32


def nll_of(model, batch):
    """Σ nll and the number of labels of some rows, with a gradient."""
    total, count = 0, 0
    for row in batch:
        labels = torch.tensor(row["labels"][1:])
        valid = labels != -100
        total = total - log_probs(model, row["input_ids"])[valid].gather(1, labels[valid, None]).sum()
        count += int(valid.sum())
    return total, count


def by_hand(data, size, rate, steps, smoothing=0.9, most=None, target=1.0, scales=(1.0,)):
    """Plain gradient descent with FINCH over batches of `size` rows; the parameters, and the factor of each step."""
    model, average, factors = llama(), None, []
    parameters = dict(model.named_parameters())
    for i in range(steps):
        total, count = nll_of(model, data[i * size % len(data) :][:size])
        mean = total.item() / count
        average = mean if average is None else smoothing * average + (1 - smoothing) * mean
        gradients = torch.autograd.grad(total / count, list(parameters.values()))
        for at, (p, g) in enumerate(zip(parameters.values(), gradients, strict=True)):
            scheduled = rate(i) * scales[at % len(scales)]
            used = min(scheduled / math.sqrt(average / target + 1e-8), most or 2.5 * scheduled)
            p.data -= used * g
            if at == 0:
                factors.append(used / scheduled)
    return {name: p.detach() for name, p in parameters.items()}, factors, average


def run(callback, data=None, model=None, optimizers=(None, None), **options):
    arguments = TrainingArguments(**{**DESCENT, "max_steps": 4, **options})
    model = fl.patch(llama()) if model is None else model
    return Trainer(
        model, arguments, train_dataset=data or rows(8), data_collator=collate, callbacks=[callback],
        optimizers=optimizers,
    )  # fmt: skip


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def differences(model, expected):
    """Relative to how far training went."""
    start = parameters(llama())
    return error(
        {n: p - start[n] for n, p in parameters(model).items()}, {n: p - start[n] for n, p in expected.items()}
    )


def test_a_step_is_the_gradient_times_the_factor():
    data = rows(8)
    total, count = nll_of(llama(), data)
    model = llama()
    gradients = torch.autograd.grad(nll_of(model, data)[0] / count, list(model.parameters()))
    factor = 1 / math.sqrt(total.item() / count)
    expected = {name: factor * g for (name, _), g in zip(model.named_parameters(), gradients, strict=True)}
    callback = FinchCallback()
    found = step(run(callback, data, max_steps=1))
    assert error(found, expected) < TOLERANCE
    assert callback.factor == pytest.approx(factor, rel=TOLERANCE) and 0.3 < factor < 0.8
    assert callback.average == pytest.approx(total.item() / count, rel=TOLERANCE)


@pytest.mark.parametrize(
    "options, arguments",
    [({}, {}), (dict(smoothing=0.0), {}), (dict(target=4.0), {}), (dict(max_learning_rate=0.1), {}),
     (dict(smoothing=0.5, target=40.0), dict(lr_scheduler_type="linear")),
     ({}, dict(lr_scheduler_type="linear", per_device_train_batch_size=1, gradient_accumulation_steps=2))],
    ids=str,
)  # fmt: skip
def test_training_is_that_of_a_loop_by_hand(options, arguments):
    """Also where the learning rate falls, and over accumulated batches: L is the mean over all of their tokens."""
    data, steps = rows(8), 4
    settings = dict(per_device_train_batch_size=2, learning_rate=0.3) | arguments
    linear = "lr_scheduler_type" in arguments
    expected, factors, average = by_hand(
        data, 2, lambda i: 0.3 * (1 - i / steps if linear else 1), steps, options.get("smoothing", 0.9),
        options.get("max_learning_rate"), options.get("target", 1.0),
    )  # fmt: skip
    callback = FinchCallback(**options)
    trained = run(callback, data, **settings)
    trained.train()
    assert differences(trained.model, expected) < TOLERANCE
    assert callback.average == pytest.approx(average, rel=TOLERANCE)
    logged = [entry for entry in trained.state.log_history if "loss" in entry]
    assert [entry["finch_factor"] for entry in logged] == pytest.approx(factors, rel=TOLERANCE)
    assert logged[-1]["finch_nll"] == callback.average
    if "max_learning_rate" in options:
        assert factors[0] == pytest.approx(1 / 3)
    if options.get("target") == 40.0:
        assert factors == pytest.approx([2.5] * 4)


def test_the_schedule_sees_its_own_learning_rates():
    """One that multiplies what it finds in the groups would multiply ours."""
    rates, seen = [], []

    class Watch(FinchCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            super().on_pre_optimizer_step(args, state, control, **kwargs)
            seen.append([group["lr"] for group in kwargs["optimizer"].param_groups])

        def on_optimizer_step(self, args, state, control, **kwargs):
            super().on_optimizer_step(args, state, control, **kwargs)
            rates.append([group["lr"] for group in kwargs["optimizer"].param_groups])

    model = fl.patch(llama())
    names = list(dict(model.named_parameters()))
    one, two = (
        [p for at, p in enumerate(model.parameters()) if at % 2 == 0],
        [p for at, p in enumerate(model.parameters()) if at % 2],
    )
    optimizer = torch.optim.SGD([{"params": one, "lr": 0.3}, {"params": two, "lr": 0.06}])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    data = rows(8)
    trained = run(Watch(), data, model, (optimizer, schedule), per_device_train_batch_size=2)
    trained.train()
    expected, factors, _ = by_hand(data, 2, lambda i: 0.3 * 0.5**i, 4, scales=(1.0, 0.2))
    assert len(names) == len(one) + len(two) and differences(trained.model, expected) < TOLERANCE
    assert rates == [pytest.approx([0.3 * 0.5**i, 0.06 * 0.5**i]) for i in range(4)]
    for used, scheduled, factor in zip(seen, rates, factors, strict=True):
        assert used == pytest.approx([factor * rate for rate in scheduled], rel=TOLERANCE)
    assert [entry["learning_rate"] for entry in trained.state.log_history if "loss" in entry] == pytest.approx(
        [0.3 * 0.5**i for i in range(4)]
    )


def test_learning_rates_that_are_tensors_are_changed_in_place():
    group = {"lr": torch.tensor(0.5)}
    kept, callback = group["lr"], FinchCallback()
    callback.average, callback._total = 4.0, None
    control = SimpleNamespace()
    optimizer = SimpleNamespace(param_groups=[group])
    callback.on_pre_optimizer_step(SimpleNamespace(device="cpu"), None, control, optimizer=optimizer)
    assert group["lr"] is kept and kept.item() == pytest.approx(0.25)
    callback.on_optimizer_step(None, None, control)
    assert group["lr"] is kept and kept.item() == 0.5


@pytest.mark.parametrize("restore", [False, True])
def test_training_that_is_resumed_goes_on_with_the_average(restore, tmp_path):
    data = rows(8)
    options = dict(
        per_device_train_batch_size=2, learning_rate=0.3, lr_scheduler_type="linear", output_dir=str(tmp_path),
        save_strategy="steps", save_steps=2, restore_callback_states_from_checkpoint=restore,
    )  # fmt: skip
    whole = run(FinchCallback(0.8), data, **options)
    whole.train()
    resumed = run(FinchCallback(0.8), data, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert error(parameters(resumed.model), parameters(whole.model)) < 1e-12
    (finch,) = (c for c in resumed.callback_handler.callbacks if isinstance(c, FinchCallback))
    (first,) = (c for c in whole.callback_handler.callbacks if isinstance(c, FinchCallback))
    assert finch.average == first.average and resumed.state.global_step == 4
    # Another training with the same callback begins anew.
    again = run(first, data, per_device_train_batch_size=2, max_steps=1, learning_rate=0.3)
    again.train()
    total, count = nll_of(llama(), data[:2])
    assert first.average == pytest.approx(total.item() / count, rel=TOLERANCE)


def test_a_checkpoint_without_it_can_be_resumed(tmp_path):
    data = rows(8)
    options = dict(output_dir=str(tmp_path), save_strategy="steps", save_steps=1, max_steps=2)
    trainer(fl.patch(llama()), data, **options).train()
    callback = FinchCallback()
    resumed = run(callback, data, **options | {"max_steps": 3})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.average is not None and resumed.state.global_step == 3


def test_evaluation_and_other_forwards_do_not_count():
    data = rows(8)
    plain, watched = FinchCallback(), FinchCallback()
    run(plain, data, per_device_train_batch_size=2, learning_rate=0.3).train()
    arguments = TrainingArguments(**{
        **DESCENT, "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.3, "eval_strategy": "steps",
        "eval_steps": 1,
    })  # fmt: skip
    model = fl.patch(llama())
    Trainer(
        model, arguments, train_dataset=data, eval_dataset=rows(6, 9), data_collator=collate, callbacks=[watched]
    ).train()
    assert watched.average == plain.average
    ids = torch.tensor([data[0]["input_ids"]])
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()  # after the training nobody listens
    assert watched._total is None and not vars(model)["_fused_losses"].listeners


def test_the_nll_is_that_of_the_labels_whatever_the_objective_is():
    data = rows(8)
    means = []
    for model in (fl.patch(llama()), fl.patch(llama(), fl.TALRLoss()), fl.patch(llama(), fl.DFTLoss())):
        callback = FinchCallback()
        run(callback, data, model, max_steps=1).train()
        means.append(callback.average)
    total, count = nll_of(llama(), data)
    assert means == pytest.approx([total.item() / count] * 3, rel=TOLERANCE)


def test_batches_that_say_nothing_leave_the_average():
    args, callback = SimpleNamespace(device="cpu"), FinchCallback(0.5)
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}])

    def pre(nll, valid):
        callback._listen(torch.tensor(nll), torch.tensor(valid))
        callback.on_pre_optimizer_step(args, None, None, optimizer=optimizer)
        rate = optimizer.param_groups[0]["lr"]
        callback.on_optimizer_step(args, None, None)
        return rate

    assert pre([0.0, 0.0], [False, False]) == 1.0 and callback.average is None
    assert pre([4.0, 0.0], [True, False]) == pytest.approx(0.5)
    assert pre([0.0], [False]) == pytest.approx(0.5) and pre([math.nan], [True]) == pytest.approx(0.5)
    assert pre([2.0, 6.0, 0.0], [True, True, True]) == pytest.approx(1 / math.sqrt(0.5 * 4 + 0.5 * 8 / 3))
    assert callback.factor == pytest.approx(1 / math.sqrt(10 / 3))


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match=r"FinchCallback: LlamaForCausalLM is not patched, .*fused_losses.patch"):
        run(FinchCallback(), model=llama()).train()
    arguments, model = SimpleNamespace(optim="sgd", deepspeed="zero.json"), fl.patch(llama())
    state = SimpleNamespace(stateful_callbacks={}, global_step=0)
    with pytest.raises(NotImplementedError, match="DeepSpeed takes its step within backward"):
        FinchCallback().on_train_begin(arguments, state, None, model=model)
    with pytest.raises(NotImplementedError, match="optim='galore_adamw_layerwise' takes its step within backward"):
        FinchCallback().on_train_begin(
            SimpleNamespace(optim="galore_adamw_layerwise", deepspeed=None), state, None, model=model
        )
    for options, message in (
        (dict(smoothing=1), "smoothing: expected a number below 1"),
        (dict(smoothing=-0.1), "smoothing: expected a finite number ≥ 0"),
        (dict(target=0), "target: expected a finite number > 0"),
        (dict(max_learning_rate=0), "max_learning_rate: expected a finite number > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            FinchCallback(**options)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_it_is_found_through_what_is_around_the_model():
    from peft import LoraConfig, get_peft_model

    from fused_losses.huggingface.callbacks import patch_of

    base = fl.patch(llama())
    state = vars(base)["_fused_losses"]
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    around = torch.nn.Module()
    around.module = adapted
    assert patch_of(base) is state and patch_of(adapted) is state and patch_of(around) is state
    assert patch_of(torch.compile(base)) is state
    assert patch_of(fl.unpatch(base)) is None and patch_of(llama()) is None

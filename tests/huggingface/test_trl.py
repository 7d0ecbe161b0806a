"""TRL's SFTTrainer with a patched model: the same loss, gradients and metrics, whatever way it lays its rows out."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training import collate, error, expected, llama, mixtral, rows, sft_trainer, step, tokenizer

import fused_losses as fl

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning:transformers"),
]

TOLERANCE = 2e-6  # float64, but Llama normalises in float32, and TRL's head computes in it: measured 7e-7
PACKED = dict(packing=True, max_length=32, per_device_train_batch_size=8, per_device_eval_batch_size=8)
LAYOUTS = {
    "rows": {},
    "packed": PACKED,
    "padding-free": dict(padding_free=True, max_length=None),
    "cut": dict(max_length=9),
    "accumulated": dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
    "packed-accumulated": {**PACKED, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
}
METRICS = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss")


def lora(**options):
    torch.manual_seed(1)
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)


def ran(run):
    """Gradients, and what is logged of a step and of an evaluation."""
    gradients = step(run)
    logged = {name: value for name, value in run.state.log_history[0].items() if name in METRICS}
    evaluated = {name: value for name, value in run.evaluate().items() if name.removeprefix("eval_") in METRICS}
    return gradients, logged, evaluated


def assert_same(ours, theirs):
    assert error(ours[0], theirs[0]) < TOLERANCE
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine == pytest.approx(other, rel=1e-5) and len(mine) >= 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cross_entropy_is_that_of_an_unpatched_model(layout):
    assert_same(ran(sft_trainer(fl.patch(llama()), **LAYOUTS[layout])), ran(sft_trainer(llama(), **LAYOUTS[layout])))


def words(seed):
    """Rows of prompt and completion, as text."""
    out = []
    for row in rows(8, seed):
        text = [f"w{i}" for i in row["input_ids"]]
        cut = row["labels"].count(-100)
        out.append({"prompt": " ".join(text[:cut]), "completion": " " + " ".join(text[cut:])})
    return out


def test_completion_only_and_text():
    ours, theirs = (ran(sft_trainer(model, words(0), words(1))) for model in (fl.patch(llama()), llama()))
    assert_same(ours, theirs)
    # SFTTrainer ends a completion with <eos>
    data = [{name: [*r[name], 1] for name in ("input_ids", "labels")} for r in rows(8, 0)]
    assert error(ours[0], expected(llama(), data, "ce")[1]) < TOLERANCE


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} {% else %}"
    "{% generation %}{{ m.content }} <eos>{% endgeneration %} {% endif %}{% endfor %}"
)


def test_assistant_only():
    chats = [
        {
            "messages": [
                {"role": "user", "content": r["prompt"]},
                {"role": "assistant", "content": r["completion"].strip()},
            ]
        }
        for r in words(0)
    ]

    def run(model):
        made = tokenizer()
        made.chat_template = TEMPLATE
        return ran(sft_trainer(model, chats, chats, assistant_only_loss=True, processing_class=made))

    ours, theirs = run(fl.patch(llama())), run(llama())
    assert_same(ours, theirs)


@pytest.mark.parametrize("layout", ["rows", "accumulated"])
def test_router_loss_is_in(layout):
    ours, theirs = (
        ran(sft_trainer(model, **LAYOUTS[layout])) for model in (fl.patch(mixtral().float()), mixtral().float())
    )
    assert_same(ours, theirs)
    assert ours[1]["aux_loss"] > 1


@pytest.mark.parametrize("order", ["patch, PEFT by the trainer", "PEFT, patch", "PEFT by the trainer, patch"])
@pytest.mark.parametrize("loss", [None, fl.TALRLoss()], ids=str)
def test_peft_in_bf16(order, loss):
    """SFTConfig's default where there is a GPU."""
    by_trainer = order != "PEFT, patch"

    def run(model, patched=False, **options):
        torch.manual_seed(1)
        if not by_trainer:
            model = get_peft_model(model, lora())
        if patched and order != "PEFT by the trainer, patch":
            fl.patch(model, loss)
        made = sft_trainer(model, peft_config=lora() if by_trainer else None, **options)
        if patched and order == "PEFT by the trainer, patch":
            fl.patch(made.model, loss)
        return ran(made)

    ours = run(llama().float(), patched=True, bf16=True)
    if loss is None:
        theirs, truth = run(llama().float(), bf16=True), run(llama())[0]
        assert error(ours[0], truth) < 1.2 * error(theirs[0], truth)
        assert ours[1] == pytest.approx(theirs[1], rel=2e-2)
    assert {"loss", "entropy", "mean_token_accuracy"} <= ours[1].keys() and len(ours[0]) == 8


@pytest.mark.parametrize("layout", ["rows", "packed", "accumulated"])
def test_bf16_is_as_good_as_unpatched(layout):
    options = {**LAYOUTS[layout], "bf16": True}
    truth = ran(sft_trainer(llama(), **LAYOUTS[layout]))[0]
    ours, theirs = (ran(sft_trainer(model, **options)) for model in (fl.patch(llama().float()), llama().float()))
    assert error(ours[0], truth) < 1.2 * error(theirs[0], truth)
    assert ours[1] == pytest.approx(theirs[1], rel=2e-2)


@pytest.mark.parametrize("patch_first", [True, False])
def test_peft_config(patch_first):
    theirs = ran(sft_trainer(llama(), peft_config=lora()))
    torch.manual_seed(1)
    run = sft_trainer(fl.patch(llama()) if patch_first else llama(), peft_config=lora())
    if not patch_first:
        fl.patch(run.model)
    ours = ran(run)
    assert_same(ours, theirs)
    assert len(ours[0]) == 8  # A and B, of two projections in two layers


def test_patched_after_the_trainer_was_made():
    run = sft_trainer(llama())
    fl.patch(run.model, fl.TALRLoss(2.0))
    assert error(step(run), expected(llama(), rows(), "talr2")[1]) < TOLERANCE


def test_unpatched_again_the_trainer_has_its_own_loss():
    run = sft_trainer(fl.patch(llama(), fl.TALRLoss(2.0)))
    fl.unpatch(run.model)
    assert_same(ran(run), ran(sft_trainer(llama())))


# --- objectives that TRL does not have


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "cut"])
def test_talr(layout):
    run = sft_trainer(fl.patch(llama(), fl.TALRLoss(2.0)), **LAYOUTS[layout])
    loss, gradients = expected(llama(), rows(), "talr2")
    assert error(step(run), gradients) < TOLERANCE
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("layout", ["rows", "packed", "padding-free"])
def test_talr_takes_its_median_over_documents(layout):
    data = rows(10, 5)
    model = fl.patch(llama(), fl.TALRLoss(), eval_loss="objective")
    run = sft_trainer(model, eval_data=data, **{**LAYOUTS[layout], "per_device_eval_batch_size": 10})
    assert run.evaluate()["eval_loss"] == pytest.approx(expected(llama(), data, "talr")[0], rel=1e-5)
    assert error(step(run), expected(llama(), rows(), "talr")[1]) < TOLERANCE


def test_loss_type_dft_and_dft_of_ours_are_the_same():
    theirs = sft_trainer(llama(), loss_type="dft")
    gradients = step(theirs)
    for ours in (sft_trainer(fl.patch(llama(), fl.DFTLoss())), sft_trainer(fl.patch(llama()), loss_type="dft")):
        assert error(step(ours), gradients) < TOLERANCE
        assert ours.state.log_history[0]["loss"] == pytest.approx(theirs.state.log_history[0]["loss"], rel=1e-5)


def test_loss_type_dft_of_another_objective_is_refused():
    with pytest.raises(TypeError, match=r"patch\(model, fused_losses.DFTLoss\(\)\)"):
        sft_trainer(fl.patch(llama(), fl.TALRLoss()), loss_type="dft").train()


@pytest.mark.parametrize("layout", ["rows", "accumulated"])
def test_lawf_with_a_confidence_column_and_a_lora_adapter(layout):
    data = rows(anchors=True)
    model = fl.patch(llama(), fl.LAwFLoss(), reference="base")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    # SFTTrainer drops a column that it does not know in two places.
    kept = dict(remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}, data_collator=collate)
    run = sft_trainer(model, data, data, peft_config=config, **kept, **LAYOUTS[layout])
    for _ in range(2):  # in the second step the adapter is not what it was, so that the KL counts
        plain = fl.unpatch(copy.deepcopy(run.model))
        loss, gradients = expected(plain, data, "lawf", llama())
        assert error(step(run), gradients) < TOLERANCE
        assert run.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_lawf_without_the_column_that_sft_trainer_drops():
    run = sft_trainer(fl.patch(llama(), fl.LAwFLoss(), reference="start"), rows(anchors=True))
    with pytest.raises(ValueError, match="confidence: is missing in the batch"):
        run.train()

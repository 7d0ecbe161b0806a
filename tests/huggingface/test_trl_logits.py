"""TRL's trainers that make a loss of logits: with cross-entropy as the patch the numbers are those without it, and a
warning says that no memory is saved; another objective, or a callback that hears of no loss, would do nothing."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from training import DESCENT, error, llama, rows, sft_trainer, step, tokenizer, trainer, with_lora

import fused_losses as fl
from fused_losses.huggingface import FinchCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`(label_smoothing_factor|compute_loss_func)` is deprecated:FutureWarning"),
]
PLAIN = dict(bf16=False, gradient_checkpointing=False)
SAID = "is patched with cross-entropy, and a loss is made of its logits elsewhere"


def words(ids):
    return " ".join(f"w{i}" for i in ids)


def preferences(**more):
    """Of each row its answer, and the answer of the next one."""
    data = rows()
    answers = [words(row["input_ids"][3:]) for row in data]
    return Dataset.from_list([
        {"prompt": words(row["input_ids"][:3]) + " ", "chosen": answers[i], "rejected": answers[i - 1],
         **{name: answers[i - 2] for name in more}}
        for i, row in enumerate(data)
    ])  # fmt: skip


def made(module, name, data, model, options, **more):
    torch.manual_seed(5)
    module = importlib.import_module(f"trl.experimental.{module}")
    arguments = getattr(module, f"{name}Config")(**{**DESCENT, **PLAIN, **options})
    return getattr(module, f"{name}Trainer")(
        model, args=arguments, train_dataset=data, processing_class=tokenizer(), **more
    )


def cpo(model, **more):
    return made("cpo", "CPO", preferences(), model, dict(max_length=64), **more)


def orpo(model, **more):
    return made("orpo", "ORPO", preferences(), model, dict(max_length=64), **more)


def tpo(model, **more):
    return made("tpo", "TPO", preferences(reference=True), model, dict(max_length=64), **more)


def sdft(model, **more):
    data = Dataset.from_list([
        {"prompt": words(row["input_ids"][:3]), "privileged_context": words(row["input_ids"][3:])} for row in rows()
    ])  # fmt: skip
    return made(
        "sdft",
        "SDFT",
        data,
        model,
        dict(max_completion_length=4, num_generations=1, teacher_model_kind="live", distillation_topk=5),
        **more,
    )


def gkd(model, **more):
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    torch.manual_seed(5)
    chat = tokenizer()
    chat.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    arguments = GKDConfig(**{**DESCENT, **PLAIN, "max_new_tokens": 4, "lmbda": 0.0, "max_length": 64})
    said = [(words(row["input_ids"][:3]), words(row["input_ids"][3:])) for row in rows()]
    data = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in said]
    data = Dataset.from_list([{"messages": messages} for messages in data])
    return GKDTrainer(model, llama(seed=1), args=arguments, train_dataset=data, processing_class=chat, **more)


def stepped(run):
    """Gradients and log of a step."""
    torch.manual_seed(7)
    gradients = step(run)
    unlike = ("time", "per_second", "flos")
    return gradients, {k: v for k, v in run.state.log_history[0].items() if not any(u in k for u in unlike)}


@pytest.mark.parametrize("make, new", [*((make, llama) for make in (cpo, orpo, tpo, sdft, gkd)), (cpo, with_lora)])
def test_the_numbers_are_those_without_the_patch_and_a_warning_says_that_it_has_no_use(make, new):
    theirs, their_log = stepped(make(new()))
    run = make(fl.patch(new()))
    with pytest.warns(UserWarning, match=SAID) as caught:
        ours, our_log = stepped(run)
    assert sum(SAID in str(w.message) for w in caught) == 1
    assert error(ours, theirs) < 1e-9
    assert our_log == pytest.approx(their_log, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("make", [orpo, gkd])
def test_another_objective_is_refused(make):
    with pytest.raises(RuntimeError, match=r"its loss is made elsewhere.* TALRLoss of fused_losses.patch would not be"):
        make(fl.patch(llama(), fl.TALRLoss())).train()


@pytest.mark.filterwarnings(f"ignore:LlamaForCausalLM {SAID}:UserWarning")
def test_a_learning_rate_by_a_loss_that_nobody_asks_for_is_refused():
    run = cpo(fl.patch(llama()), callbacks=[FinchCallback()])
    with pytest.raises(RuntimeError, match="FinchCallback: the trainer made a step without asking the model for a los"):
        run.train()


def twice(outputs, labels, num_items_in_batch=None):
    return 2 * F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("make", [trainer, sft_trainer])
@pytest.mark.parametrize(
    "options", [dict(label_smoothing_factor=0.1), dict(compute_loss_func=twice)], ids=lambda given: next(iter(given))
)
def test_a_loss_of_a_trainers_own_options_too(make, options):
    theirs, log = stepped(make(llama(), **options))
    run = make(fl.patch(llama()), **options)
    with pytest.warns(UserWarning, match=f"{SAID}.*CrossEntropyLoss.label_smoothing=...."):
        ours, our_log = stepped(run)
    assert error(ours, theirs) < 1e-9
    assert our_log == pytest.approx(log, rel=2e-8)  # TRL sums entropies in float32


def test_the_warning_comes_once_and_with_a_backward_alone():
    ids, model = torch.tensor([[5, 6, 7]]), fl.patch(llama().train())
    logits = model(ids).logits
    model.generate(ids, max_new_tokens=2, do_sample=False)
    model.eval()(ids).logits.sum().backward()
    with pytest.warns(UserWarning, match=SAID):
        logits.sum().backward()
    model.train()(ids).logits.sum().backward()

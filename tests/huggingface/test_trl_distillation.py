"""TRL's trainers that distill, with a patched student or teacher: the same numbers, or an error that says why not."""

import pytest
import torch
from datasets import Dataset
from training import DESCENT, error, llama, rows, step, tokenizer, with_lora

import fused_losses as fl

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*experimental:UserWarning"),
]
PLAIN = dict(bf16=False, gradient_checkpointing=False)
WORDS = "{% for m in messages %}{{ m.content }} {% endfor %}"


def words(row):
    return [f"w{i}" for i in row["input_ids"]]


def distillation(student, teacher, **options):
    from trl import DistillationConfig, DistillationTrainer

    torch.manual_seed(5)
    arguments = DistillationConfig(**{**DESCENT, **PLAIN, "max_completion_length": 4, "beta": 0.5})
    data = Dataset.from_list([{"prompt": " ".join(words(row)[:3])} for row in rows()])
    return DistillationTrainer(
        student, teacher, args=arguments, train_dataset=data, processing_class=tokenizer(), **options
    )


def gkd(student, teacher, **options):
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    torch.manual_seed(5)
    chat = tokenizer()
    chat.chat_template = WORDS
    arguments = GKDConfig(**{**DESCENT, **PLAIN, "max_new_tokens": 4, "lmbda": 0.0, "max_length": 64})
    said = [(" ".join(words(row)[:3]), " ".join(words(row)[3:])) for row in rows()]
    data = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in said]
    data = Dataset.from_list([{"messages": messages} for messages in data])
    return GKDTrainer(student, teacher, args=arguments, train_dataset=data, processing_class=chat, **options)


def ran(make, new, student=False, teacher=False):
    """Gradients and log of a step; `student`: "before" or "after" the trainer is made."""
    models = new(), llama(seed=1)
    for model, patched in zip(models, (student == "before", teacher), strict=True):
        if patched:
            fl.patch(model)
    run = make(*models)
    if student == "after":
        fl.patch(run.model)
    torch.manual_seed(7)
    gradients = step(run)
    unlike = ("time", "per_second", "flos")
    return gradients, {k: v for k, v in run.state.log_history[0].items() if not any(u in k for u in unlike)}


@pytest.mark.parametrize(("make", "new", "student", "teacher"), [
    (distillation, llama, "before", True), (distillation, with_lora, "before", False),
    (distillation, with_lora, "after", False), (gkd, llama, False, True),
])  # fmt: skip
def test_as_unpatched(make, new, student, teacher):
    """Cross-entropy as the patch. GKDTrainer's student is in test_trl_logits.py: it takes logits."""
    (mine, ours), (other, theirs) = ran(make, new, student, teacher), ran(make, new)
    assert error(mine, other) < 1e-9
    assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(
    "loss", [fl.TALRLoss(), fl.CrossEntropyLoss(label_smoothing=0.1)], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("new", [llama, with_lora])
def test_another_objective_is_refused(new, loss):
    """TRL's DistillationTrainer never asks the student for a loss, so nobody would see that it is left out."""
    name = type(loss).__name__
    with pytest.raises(TypeError, match=f"DistillationTrainer takes its loss .*, so {name} .* would not be used"):
        distillation(fl.patch(new(), loss), llama(seed=1))
    callback = fl.huggingface.PatchCallback(loss)
    with pytest.raises(RuntimeError, match=f"{name} (was not used|of fused_losses.patch would not be used)"):
        distillation(new(), llama(seed=1), callbacks=[callback]).train()


def test_a_learning_rate_by_a_loss_that_nobody_asks_for_is_refused():
    """With cross-entropy as the patch the numbers are right, but FinchCallback would hear of none."""
    run = distillation(fl.patch(llama()), llama(seed=1), callbacks=[fl.huggingface.FinchCallback()])
    with pytest.raises(RuntimeError, match="FinchCallback: the trainer made a step without asking the model for a los"):
        run.train()

"""sequence_logps: sums over rows and packed sequences, against full logits; DPO as its docstring and TRL have it."""

import inspect
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from cases import HEADS, make, name, relative

import fused_losses as fl
from fused_losses import reference as oracle

S, T = 4, 9


def inputs(dtype=torch.float64, **options):
    """Hidden states [S, T, D], head, labels with a row of none, and ids of packed sequences that differ from the rows."""
    case = make(S * T, 17, 123, ignored=0.3, **options)
    hidden, head, _ = case.inputs(dtype)
    labels = case.labels.view(S, T).clone()
    labels[2] = -100
    ids = torch.arange(S * T).view(S, T) // 7 + 1  # 1 to 6; 0 and those of row 2 alone have no label
    return hidden.detach().view(S, T, -1).requires_grad_(), head, labels, ids.masked_fill(labels < 0, -7)


def truth(hidden, head, labels, index, count, average):
    valid = labels >= 0
    return oracle.sequence_logps(oracle.logits(hidden[valid], head), labels[valid], index[valid], count, average)


def compare(found, expected, hidden, head, tolerance):
    assert found.shape == expected.shape and relative(found, expected) <= tolerance
    upstream = torch.linspace(-1, 2, len(found), dtype=found.dtype)
    leaves = [t for t in (hidden, head.weight, head.bias) if t is not None and t.requires_grad]
    ours = torch.autograd.grad((found * upstream).sum(), leaves)
    for a, b in zip(ours, torch.autograd.grad((expected * upstream).sum(), leaves), strict=True):
        assert relative(a, b) <= tolerance


@pytest.mark.pairwise
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["64", "32"])
def test_equals_the_oracle(head, frozen, packed, average, dtype, tolerance):
    hidden, head, labels, ids = inputs(dtype, **head, frozen=frozen)
    index, count = (ids, 7) if packed else (torch.arange(S)[:, None].expand(S, T), S)
    options = dict(sequence_ids=ids, num_sequences=7) if packed else {}
    found = fl.sequence_logps(hidden, head, labels, average=average, **options)
    compare(found, truth(hidden, head, labels, index, count, average), hidden, head, tolerance)
    assert found.dtype == dtype and (found <= 0).all() and found[0 if packed else 2] == 0


def test_the_number_of_sequences_is_that_of_the_largest_id():
    hidden, head, labels, ids = inputs()
    found = fl.sequence_logps(hidden, head, labels, sequence_ids=ids)
    assert len(found) == int(ids.max()) + 1
    more = fl.sequence_logps(hidden, head, labels, sequence_ids=ids, num_sequences=9)
    assert torch.equal(more[: len(found)], found) and not more[len(found) :].any()
    flat = fl.sequence_logps(hidden.flatten(0, 1), head, labels.flatten(), sequence_ids=ids.flatten())
    assert torch.equal(flat, found)
    none = fl.sequence_logps(hidden, head, torch.full_like(labels, -100), sequence_ids=ids)
    assert none.tolist() == [0]


def test_gradcheck():
    hidden, head, labels, ids = inputs(bias=True)

    def values(hidden, weight, bias):
        whole = fl.LMHead(weight, bias)
        return (
            fl.sequence_logps(hidden, whole, labels),
            fl.sequence_logps(hidden, whole, labels, sequence_ids=ids, average=True),
        )

    small = (hidden[..., :3].detach().requires_grad_(), head.weight[:, :3].detach().requires_grad_(), head.bias)
    assert torch.autograd.gradcheck(values, small, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_in_one_graph(gradient):
    torch._dynamo.reset()
    hidden, head, labels, ids = inputs(torch.float32)

    def step(hidden, weight):
        one = fl.sequence_logps(hidden.sin(), weight, labels, gradient=gradient)
        two = fl.sequence_logps(
            hidden, weight, labels, sequence_ids=ids, num_sequences=7, average=True, gradient=gradient
        )
        return one.square().sum() + two.square().sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(hidden, head.weight)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, head.weight))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=1e-6)

    def without_a_number(hidden, weight):
        return fl.sequence_logps(hidden, weight, labels, sequence_ids=ids)

    with pytest.raises(Exception, match="num_sequences: is needed in a compiled graph"):
        torch.compile(without_a_number, fullgraph=True, backend="aot_eager")(hidden, head.weight)


def test_is_the_same_from_run_to_run_where_index_add_would_not_be_allowed():
    hidden, head, labels, ids = inputs(torch.float32)
    assert torch.are_deterministic_algorithms_enabled()
    one, two = (fl.sequence_logps(hidden, head, labels, sequence_ids=ids) for _ in range(2))
    assert torch.equal(one, two)


# --- DPO

EXAMPLE = textwrap.dedent(re.search(r"::\n\n(.*?loss\.backward\(\))", inspect.getdoc(fl.sequence_logps), re.S).group(1))


def test_the_example_runs_and_is_dpo():
    names = {}
    exec(EXAMPLE, names)
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 14
    z, z_ref = (names[k][:, :-1].detach() @ names["weight"].T for k in ("hidden", "reference"))
    labels = names["labels"][:, 1:]

    def logps(z):
        taken = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        return (taken * (labels >= 0)).sum(1)

    difference = logps(z) - logps(z_ref)
    expected = -F.logsigmoid(0.1 * (difference[:2] - difference[2:])).mean()
    assert names["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert names["hidden"].grad[:, names["prompt"] :].any() and not names["hidden"].grad[:, : names["prompt"] - 1].any()


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning:transformers")
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_is_that_of_trls_dpo_trainer(loss_type):
    from datasets import Dataset
    from training import DESCENT, llama, tokenizer
    from trl import DPOConfig, DPOTrainer

    words = [[f"w{3 + (7 * row + 5 * t) % 90}" for t in range(14)] for row in range(4)]
    data = [
        {"prompt": " ".join(w[:4]), "chosen": " " + " ".join(w[4 : 9 - row]), "rejected": " " + " ".join(w[9 + row :])}
        for row, w in enumerate(words)
    ]
    arguments = DPOConfig(**DESCENT, beta=0.3, loss_type=loss_type, bf16=False, gradient_checkpointing=False)
    model, reference = llama(), llama(1)
    trainer = DPOTrainer(
        model, reference, arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer()
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    expected = trainer.compute_loss(model, {key: value.clone() for key, value in batch.items()})
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]

    def logps(of):
        hidden = of.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return fl.sequence_logps(hidden[:, :-1], of.lm_head, labels, average=loss_type == "ipo")

    with torch.no_grad():
        ref_logps = logps(reference)
    chosen, rejected = (logps(model) - ref_logps).chunk(2)
    difference = chosen - rejected
    if loss_type == "ipo":
        loss = (difference - 1 / (2 * 0.3)).square().mean()
    else:
        loss = -F.logsigmoid(0.3 * difference).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and difference.abs().min() > 0.01


# --- mistakes


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(labels=torch.zeros(36, dtype=torch.int64)), ValueError, r"labels: expected \[sequences, tokens\].*give seq"),
        (dict(num_sequences=4), ValueError, "num_sequences: is the number of rows; leave it out"),
        (dict(sequence_ids=[1]), TypeError, "sequence_ids: expected a tensor of integers, got list"),
        (dict(sequence_ids=torch.zeros(4, 9)), TypeError, "sequence_ids: expected integers, got torch.float32"),
        (dict(sequence_ids=torch.zeros(4)), ValueError, r"sequence_ids: expected the labels' shape \[4, 9\], got \[4\]"),
        (dict(sequence_ids=torch.full((4, 9), -1)), ValueError, "sequence_ids: expected 0 ≤ id < .*got -1"),
        (dict(sequence_ids=torch.full((4, 9), 3), num_sequences=3), ValueError, "sequence_ids: expected 0 ≤ id < 3, the"),
        (dict(sequence_ids=torch.zeros(4, 9).long(), num_sequences=0), ValueError, "num_sequences: expected an integer ≥ 1"),
        (dict(average=1), TypeError, "average: expected True or False, got 1"),
        (dict(backend="none"), ValueError, "backend: expected one of"),
    ],
)  # fmt: skip
def test_bad_arguments(options, error, message):
    hidden, weight, labels = torch.randn(4, 9, 8), torch.randn(30, 8), torch.randint(30, (4, 9))
    given = {"labels": labels} | options
    if given["labels"].dim() == 1:
        hidden = hidden.flatten(0, 1)
    with pytest.raises(error, match=message):
        fl.sequence_logps(hidden, weight, **given)

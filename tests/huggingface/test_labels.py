"""Labels of a batch with anchors: an ordinary tensor, but for plain cross-entropy, which would ignore the anchors."""

import copy
import functools
import io
import multiprocessing
import pickle
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint

import fused_losses as fl
from fused_losses.huggingface import AnchorCollator
from fused_losses.labels import AnchorLabels, plain

VALUES = torch.tensor([[1, 2, 3, -100], [2, 2, -100, 1]])
MESSAGE = (
    r"labels: those of AnchorCollator.*fused_losses\.patch\(model, fused_losses\.LAwFLoss\(\)"
    r".*as_subclass\(torch\.Tensor\)"
)


def labels():
    return VALUES.clone().as_subclass(AnchorLabels)


def test_a_collator_makes_them():
    for options in ({}, {"padding_free": True}):
        batch = AnchorCollator(0, **options)([{"input_ids": [5, 6, 7], "anchors": [2]}])
        assert type(batch["labels"]) is AnchorLabels
        assert {type(v) for name, v in batch.items() if name != "labels"} == {torch.Tensor}
        assert type(plain(batch["labels"])) is torch.Tensor and plain(batch["labels"]).tolist() == [[-100, 6, 7]]


# ---- what they live through


def through_a_file(y):
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


KEPT = {
    "to": lambda y: y.to("cpu", torch.int64, copy=True),
    "to without blocking": lambda y: y.to(torch.device("cpu"), non_blocking=True),
    "to int32": lambda y: y.int(),
    "cpu": lambda y: y.cpu(),
    "meta": lambda y: y.to("meta"),
    "slice": lambda y: y[..., 1:],
    "row": lambda y: y[0],
    "index by a mask": lambda y: y[y != -100],
    "index by a list": lambda y: y[[1, 0]],
    "pad": lambda y: F.pad(y, (0, 1), value=-100),
    "shift": lambda y: F.pad(y, (0, 1), value=-100)[..., 1:].contiguous(),
    "roll": lambda y: y.roll(-1, 1),
    "view": lambda y: y.view(-1),
    "reshape": lambda y: y.reshape(4, 2),
    "flatten": lambda y: y.flatten(),
    "unsqueeze": lambda y: y.unsqueeze(-1),
    "contiguous": lambda y: y.T.contiguous(),
    "transposed": lambda y: y.T,
    "cat": lambda y: torch.cat([y, y]),
    "cat with a tensor": lambda y: torch.cat([VALUES, y]),
    "stack": lambda y: torch.stack([y, y]),
    "chunk": lambda y: y.chunk(2)[1],
    "split": lambda y: torch.split(y, 1)[0],
    "unbind": lambda y: y.unbind()[0],
    "iteration": lambda y: next(iter(y)),
    "clone": lambda y: y.clone(),
    "detach": lambda y: y.detach(),
    "data": lambda y: y.data,
    "clamp": lambda y: y.clamp(min=0),
    "masked_fill": lambda y: y.masked_fill(y == 2, -100),
    "where": lambda y: torch.where(y == 2, y, -100),
    "in place": lambda y: y.masked_fill_(y == 2, -100),
    "shared memory": lambda y: y.share_memory_(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda y: pickle.loads(pickle.dumps(y)),
    "torch.save": through_a_file,
    "a dict": lambda y: copy.deepcopy({"labels": y})["labels"],
    "no grad": lambda y: torch.no_grad()(lambda: y[:, 1:])(),
    "inference": lambda y: torch.inference_mode()(lambda: y[:, 1:])(),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_the_class_lives_through(name):
    got, expected = KEPT[name](labels()), KEPT[name](VALUES.clone())
    assert type(got) is AnchorLabels and got.dtype == expected.dtype and got.shape == expected.shape
    assert name == "meta" or plain(got).tolist() == expected.tolist()


def test_a_copy_is_one():
    y = labels()
    pair = copy.deepcopy([y, y])
    assert pair[0] is pair[1] and pair[0] is not y
    pair[0].zero_()
    assert plain(y).tolist() == VALUES.tolist()


PLAIN = {
    "equal": lambda y: y == 2,
    "ne": lambda y: y.ne(-100),
    "count": lambda y: (y != -100).sum(),
    "sum": lambda y: y.sum(),
    "float": lambda y: y.float(),
    "max": lambda y: y.max(),
    "mean": lambda y: y.double().mean(-1),
    "shape": lambda y: y.shape,
    "size": lambda y: y.size(),
    "device": lambda y: y.device,
    "len": len,
    "list": lambda y: y.tolist(),
    "item": lambda y: y[0, 0].item(),
    "numpy": lambda y: y.numpy().tolist(),
    "equality": lambda y: torch.equal(y, VALUES),
    "a mask for others": lambda y: torch.ones(2, 4)[y != -100],
    "an embedding": lambda y: F.embedding(y.clamp(min=0), torch.arange(12.0).view(4, 3).requires_grad_()).detach(),
    "a look-up": lambda y: torch.arange(4.0).requires_grad_()[y.clamp(min=0)].detach(),
    "accuracy": lambda y: y.eq(VALUES)[y != -100].float().mean(),
    "a gather of themselves": lambda y: y.gather(1, torch.zeros(2, 1).long()).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_other_results_are_those_of_a_tensor(name):
    got, expected = PLAIN[name](labels()), PLAIN[name](VALUES.clone())
    assert type(got) is type(expected)
    assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected


def test_repr_names_them():
    assert repr(labels()).startswith("AnchorLabels(tensor([[") and str(labels()) and f"{labels()}"


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"input_ids": [5, 6, 7], "anchors": [[2, 0.5]]}


@pytest.mark.parametrize("workers", [0, "fork", "spawn"])
def test_they_come_out_of_the_workers_of_a_data_loader(workers):
    context = (
        {} if workers == 0 else {"multiprocessing_context": multiprocessing.get_context(workers), "num_workers": 2}
    )
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2, collate_fn=AnchorCollator(0), **context)
    for batch in loader:
        assert type(batch["labels"]) is AnchorLabels and plain(batch["labels"]).tolist() == [[-100, 6, 7]] * 2


def test_accelerate_moves_them():
    operations = pytest.importorskip("accelerate.utils.operations")
    moved = operations.send_to_device({"labels": labels()}, torch.device("cpu"))["labels"]
    padded = operations.pad_across_processes(moved, dim=1, pad_index=-100)
    joined = operations.concatenate([{"labels": moved}, {"labels": padded}])["labels"]
    assert {type(moved), type(padded), type(joined)} == {AnchorLabels}


# ---- the losses that refuse them


class Fused(torch.autograd.Function):
    """As TRL's and Liger's heads: labels are an argument like any other."""

    @staticmethod
    def forward(ctx, scores, y):
        ctx.save_for_backward(scores)
        return -(scores.log_softmax(-1)[:, 0] * (y != -100)).sum()

    @staticmethod
    def backward(ctx, upstream):
        return torch.zeros_like(ctx.saved_tensors[0]), None


class FusedWithContext(torch.autograd.Function):
    @staticmethod
    def forward(scores, y):
        return scores.sum() * y[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, upstream):
        return torch.zeros_like(ctx.saved_tensors[0]), None


class Packed(types.SimpleNamespace):
    pass


class FusedWithRecord(torch.autograd.Function):
    """As cut-cross-entropy: the labels are in a record."""

    @staticmethod
    def forward(ctx, scores, record):
        return scores.sum() * record.targets.numel() * record.targets.clamp(min=0).sum()


def shifted(y):
    return F.pad(y, (0, 1), value=-100)[..., 1:].contiguous().view(-1)


LOSSES = {
    "cross_entropy": lambda x, y: F.cross_entropy(x, y.view(-1)),
    "cross_entropy by name": lambda x, y: F.cross_entropy(input=x, target=y.view(-1), reduction="sum"),
    "cross_entropy with smoothing": lambda x, y: F.cross_entropy(x, y.view(-1), label_smoothing=0.1),
    "cross_entropy of shifted labels": lambda x, y: F.cross_entropy(x, shifted(y)),
    "cross_entropy in float32": lambda x, y: F.cross_entropy(x.float(), y.view(-1).to(x.device)),
    "CrossEntropyLoss": lambda x, y: nn.CrossEntropyLoss()(x, y.view(-1)),
    "nll_loss": lambda x, y: F.nll_loss(x.log_softmax(-1), y.view(-1)),
    "NLLLoss": lambda x, y: nn.NLLLoss(ignore_index=-100)(x.log_softmax(-1), y.view(-1)),
    "an operator": lambda x, y: torch.ops.aten.cross_entropy_loss(x, y.view(-1)),
    "gather": lambda x, y: x.log_softmax(-1).gather(-1, y.view(-1, 1).clamp(min=0)).sum(),
    "torch.gather": lambda x, y: torch.gather(x, 1, index=y.view(-1, 1).clamp(min=0)).sum(),
    "take_along_dim": lambda x, y: torch.take_along_dim(x, y.view(-1, 1).clamp(min=0), 1).sum(),
    "a fused head": lambda x, y: Fused.apply(x, y.view(-1)),
    "a fused head with setup_context": lambda x, y: FusedWithContext.apply(x, y.view(-1)),
    "a fused head with a record": lambda x, y: FusedWithRecord.apply(x, Packed(targets=y.view(-1))),
}  # fmt: skip
if hasattr(F, "linear_cross_entropy"):
    LOSSES["linear_cross_entropy"] = lambda x, y: F.linear_cross_entropy(x, torch.ones(5, 5), y.view(-1))


@pytest.mark.parametrize("name", LOSSES)
def test_a_plain_loss_is_an_error(name):
    scores = torch.randn(8, 5, requires_grad=True)
    with pytest.raises(ValueError, match=MESSAGE):
        LOSSES[name](scores, labels())
    assert LOSSES[name](scores, plain(labels())).requires_grad
    assert LOSSES[name](scores, labels().as_subclass(torch.Tensor)).requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_a_plain_loss_without_a_gradient_is_a_warning(name):
    scores = torch.randn(8, 5, requires_grad=True)
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match=MESSAGE):
            value = LOSSES[name](scores, labels())
        assert torch.equal(value, LOSSES[name](scores, VALUES))


def test_indexing_log_probabilities_is_an_error():
    scores = torch.randn(8, 5, requires_grad=True)
    with pytest.raises(ValueError, match=MESSAGE):
        scores.log_softmax(-1)[torch.arange(8), labels().view(-1).clamp(min=0)]


def test_the_warning_is_shown_once():
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("default")
        for _ in range(3):
            F.cross_entropy(torch.randn(8, 5), labels().view(-1))
    assert len(seen) == 1


def test_functions_of_pytorch_that_run_whole_models_are_none():
    x = torch.randn(2, 4, requires_grad=True)
    for reentrant in (True, False):
        checkpoint.checkpoint(lambda x, y: x * (y != -100), x, labels(), use_reentrant=reentrant).sum().backward()


def test_functions_without_trained_scores_are_none():
    assert Fused.apply(torch.randn(8, 5), labels().view(-1)).isfinite()


@pytest.mark.parametrize("loss", [fl.CrossEntropyLoss(), fl.TALRLoss(), fl.LAwFLoss(), None], ids=str)
def test_the_losses_of_this_package_take_them(loss):
    hidden, weight = torch.randn(2, 4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    given = {}
    if isinstance(loss, fl.LAwFLoss):
        given = dict(confidence=(VALUES == 2).float(), reference=fl.Reference(hidden.detach() + 1))
    for backend in ("torch", "reference"):
        if loss is None:
            run = functools.partial(lambda y, b: fl.token_losses(hidden, weight, y, backend=b).nll.sum(), b=backend)
        else:
            loss.backend = backend
            run = functools.partial(lambda y: loss(hidden, weight, y, **given))
        run(labels()).backward()
        value = run(labels())
        assert type(value) is torch.Tensor and torch.equal(value, run(VALUES))


def test_the_losses_of_this_package_take_them_in_a_compiled_function():
    """With fullgraph=True they are taken off before, by `plain`: PyTorch has no way back to Tensor in a graph."""
    hidden, weight = torch.randn(2, 4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    loss = fl.CrossEntropyLoss()
    compiled = torch.compile(lambda y: loss(hidden, weight, y), backend="aot_eager")
    assert compiled(labels()).item() == pytest.approx(loss(hidden, weight, VALUES).item(), rel=1e-6)


# ---- models that nobody patched


def trainer(model, **options):
    transformers = pytest.importorskip("transformers")
    data = [{"input_ids": [5, 6, 7, 8, 9 + i], "anchors": [[2, 1.0]]} for i in range(4)]
    arguments = dict(max_steps=1, per_device_train_batch_size=2, save_strategy="no", report_to=[], use_cpu=True)
    arguments |= dict(disable_tqdm=True, remove_unused_columns=False)
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**arguments | options),
        train_dataset=data,
        eval_dataset=data,
        data_collator=AnchorCollator(0),
    )


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dataloader_num_workers": 2},
        {"label_smoothing_factor": 0.1},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_training_a_model_that_nobody_patched_is_an_error(options, tmp_path):
    with pytest.raises(ValueError, match=MESSAGE):
        trainer(llama(), output_dir=str(tmp_path), **options).train()


def test_evaluating_a_model_that_nobody_patched_is_a_warning(tmp_path):
    with pytest.warns(RuntimeWarning, match=MESSAGE):
        found = trainer(llama(), output_dir=str(tmp_path)).evaluate()
    assert found["eval_loss"] > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_training_a_patched_model_is_none(workers, tmp_path):
    model = fl.patch(llama(), fl.LAwFLoss(), reference=llama())
    trainer(model, output_dir=str(tmp_path), dataloader_num_workers=workers).train()


@pytest.mark.parametrize("options", [{}, {"bf16": False}, {"dataloader_num_workers": 2}], ids=str)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # TRL's own
def test_trls_fused_head_is_an_error(options, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a", eos_token="b")
    data = datasets.Dataset.from_list([{"input_ids": [5, 6, 7, 8, 9 + i], "anchors": [[2, 1.0]]} for i in range(4)])
    config = trl.SFTConfig(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
        save_strategy="no", dataset_kwargs={"skip_prepare_dataset": True}, **options,
    )  # fmt: skip
    made = trl.SFTTrainer(
        llama(), config, train_dataset=data, data_collator=AnchorCollator(0), processing_class=tokenizer
    )
    with pytest.raises(ValueError, match=MESSAGE):
        made.train()

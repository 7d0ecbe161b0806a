"""initial_losses: the nll of a data set before training, row by row; interrupted, resumed, and given to FLOW."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.utils.data import DataLoader, IterableDataset
from training import collate, error, llama, log_probs, mixtral, rows, step, trainer

import fused_losses as fl
from fused_losses.huggingface import initial
from fused_losses.huggingface.initial import InitialLosses

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
DATA = rows(11)
ANCHORED = [row | {"anchors": []} for row in DATA]
TOLERANCE = 2e-6  # float32 results of float64 models, whose norms are in float32


def nll_of(model, row):
    """Of each token of a row; NaN where it has no label."""
    labels = torch.tensor(row.get("labels", row["input_ids"]))[1:]
    found = -log_probs(model, row["input_ids"]).gather(1, labels.clamp(min=0)[:, None])[:, 0].detach()
    return torch.cat([torch.tensor([torch.nan]), found.masked_fill(labels == -100, torch.nan)])


def check(found, model, data):
    truth = [nll_of(model, row) for row in data]
    means = torch.stack([row.nanmean() for row in truth]).nan_to_num(0)
    torch.testing.assert_close(found.initial_nll.double(), means, rtol=TOLERANCE, atol=0)
    assert found.tokens.tolist() == [int((~row.isnan()).sum()) for row in truth]
    if found.initial_token_nll is not None:
        for ours, row in zip(found.initial_token_nll, truth, strict=True):
            torch.testing.assert_close(ours.double(), row.nan_to_num(0), rtol=TOLERANCE, atol=1e-7)
    return means[found.tokens > 0]


def read(path, data=DATA, model=None, **options):
    return fl.initial_losses(llama() if model is None else model, data, path, progress=False, **options)


@pytest.mark.parametrize("per", ["sequence", "token"])
@pytest.mark.parametrize("form", [list, Dataset.from_list], ids=["list", "datasets"])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_every_row_and_token(per, form, batch_size, tmp_path):
    found = read(tmp_path / "initial.pt", form(DATA), per=per, batch_size=batch_size)
    means = check(found, llama(), DATA)
    assert (found.initial_token_nll is None) == (per == "sequence")
    assert found.temperature == pytest.approx(means.quantile(0.5).item(), rel=TOLERANCE)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_temperature_is_the_median(count):
    nll = torch.tensor([3.0, 1.0, 9.0, 2.0, 5.0])[:count]
    found = InitialLosses(torch.cat([nll, torch.zeros(1)]), torch.tensor([7] * count + [0]))
    assert found.temperature == pytest.approx(nll.quantile(0.5).item())
    with pytest.raises(ValueError, match="temperature: no row of the data set has a label"):
        _ = InitialLosses(torch.zeros(2), torch.zeros(2, dtype=torch.int64)).temperature


@pytest.mark.parametrize("name", ["plain", "LoRA", "prompt", "experts", "tied"])
def test_models(name, tmp_path):
    make = {"experts": lambda: mixtral().float(), "tied": lambda: llama(tie_word_embeddings=True)}.get(name, llama)
    model = make()
    if name == "LoRA":
        model = get_peft_model(
            model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5)
        )
    if name == "prompt":
        model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.train()
    modes = [module.training for module in model.modules()]
    found = read(tmp_path / "initial.pt", model=model, per="token")
    assert [module.training for module in model.modules()] == modes and not hasattr(model, "_fused_losses")
    twin = copy.deepcopy(model).eval()

    def without_virtual_tokens(ids):
        out = twin(ids)
        out.logits = out.logits[:, 3:]
        return out

    check(found, without_virtual_tokens if name == "prompt" else twin, DATA)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "data, collator",
    [
        (DATA, collate), (DATA, fl.huggingface.AnchorCollator(0, padding_side="left")),
        (DataLoader(DATA, 3, collate_fn=collate, shuffle=True), None),
    ],
    ids=["a collator", "left padding", "a shuffled DataLoader"],
)  # fmt: skip
def test_collators_of_the_training(data, collator, tmp_path):
    if isinstance(collator, fl.huggingface.AnchorCollator):
        data = [row | {"anchors": [], "weights": [1.0] * len(row["input_ids"])} for row in data]
    found = read(tmp_path / "initial.pt", data, data_collator=collator, per="token")
    check(found, llama(), DATA)


def test_rows_with_masks_and_without_labels(tmp_path):
    """Padding in the row itself is cut off, what has no label has no nll."""
    row = DATA[0]
    padded = {key: [*values, *[0 if key == "input_ids" else -100] * 3] for key, values in row.items()}
    padded["attention_mask"] = [1] * len(row["input_ids"]) + [0] * 3
    bare = {"input_ids": row["input_ids"]}
    silent = row | {"labels": [-100] * len(row["input_ids"])}
    found = read(tmp_path / "initial.pt", [padded, bare, silent], per="token")
    check(found, llama(), [row, bare, silent])
    assert found.tokens[2] == 0 and found.initial_nll[2] == 0


class Counting:
    """Counts the rows that go through a model."""

    def __init__(self, model, stop=None):
        self.rows, self.stop = 0, stop
        model.model.register_forward_hook(self)

    def __call__(self, module, args, output):
        self.rows += len(output.last_hidden_state)
        if self.stop is not None and self.rows >= self.stop:
            raise KeyboardInterrupt


def test_an_interrupted_pass_goes_on(tmp_path, monkeypatch):
    path, whole = tmp_path / "new" / "initial.pt", read(tmp_path / "whole.pt", per="token", batch_size=2)
    model = llama()
    counting = Counting(model, stop=5)
    with pytest.raises(KeyboardInterrupt):
        read(path, model=model, per="token", batch_size=2)
    assert not hasattr(model, "_fused_losses") and path.exists() and len(list(path.parent.iterdir())) == 1
    counting.stop, counting.rows = None, 0
    found = read(path, model=model, per="token", batch_size=2)
    assert counting.rows == len(DATA) - 4
    assert torch.equal(found.initial_nll, whole.initial_nll) and torch.equal(found.tokens, whole.tokens)
    assert all(torch.equal(a, b) for a, b in zip(found.initial_token_nll, whole.initial_token_nll, strict=True))
    counting.rows = 0
    again = read(path, model=model, per="token", batch_size=5)
    assert counting.rows == 0 and torch.equal(again.initial_nll, whole.initial_nll)


def test_an_interrupted_pass_over_a_file_keeps_what_was_in_it(tmp_path):
    path, model = tmp_path / "initial.pt", llama()
    read(path, model=model, batch_size=2)
    counting = Counting(model, stop=2)
    more = [*rows(6, seed=9), *DATA]
    with pytest.raises(KeyboardInterrupt):
        read(path, more, model=model, batch_size=2)
    counting.stop, counting.rows = None, 0
    found = read(path, list(reversed(more)), model=model, batch_size=2)
    # Rows of like length are together, so some that are known go along with some that are not.
    assert 6 <= counting.rows < 12
    check(found, llama(), list(reversed(more)))


def test_it_is_written_while_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(initial, "SECONDS", 0)
    monkeypatch.setattr(initial, "SHARE", 0)
    written = []
    monkeypatch.setattr(initial.os, "replace", lambda a, b: written.append(len(torch.load(a)["keys"])))
    read(tmp_path / "initial.pt", batch_size=4)
    assert written == [4, 8, 11]


def test_rows_that_have_changed_are_computed_anew(tmp_path):
    path, model = tmp_path / "initial.pt", llama()
    read(path, model=model, batch_size=1)
    counting, changed = Counting(model), [dict(row) for row in DATA]
    changed[3] = changed[3] | {"labels": [-100, -100, *changed[3]["input_ids"][2:]]}
    changed[7] = changed[7] | {"input_ids": [5, *changed[7]["input_ids"][1:]]}
    found = read(path, [changed[10], *changed[:10]], model=model, batch_size=1)
    assert counting.rows == 2
    check(found, llama(), [changed[10], *changed[:10]])
    counting.rows = 0
    read(path, [changed[0]], model=model, per="token")  # which the file has not
    assert counting.rows == 1


def test_a_file_of_another_model_or_of_something_else(tmp_path):
    path, model = tmp_path / "initial.pt", llama()
    read(path, model=model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(
        ValueError, match=r"output: .*initial.pt is of another model .*; give the model as it was before"
    ):
        read(path, model=model)
    with pytest.raises(ValueError, match="is of another model"), torch.autocast("cpu", torch.bfloat16):
        read(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(
        ValueError, match=r"is no file of initial_losses, or damaged .*; give another path, or remove it"
    ):
        read(path)
    torch.save({"format": "other"}, path)
    with pytest.raises(ValueError, match=r"is of format 'other', and not 'fused_losses.initial/1'"):
        read(path)


def test_columns_for_a_data_set(tmp_path):
    found = read(tmp_path / "initial.pt", per="token")
    for data in (found.added_to(DATA), found.added_to(Dataset.from_list(DATA))):
        assert [row["initial_nll"] for row in data] == found.initial_nll.tolist()
        assert [row["initial_token_nll"] for row in data] == [row.tolist() for row in found.initial_token_nll]
        assert [row["input_ids"] for row in data] == [row["input_ids"] for row in DATA]
    assert "initial_nll" not in DATA[0]
    assert "initial_token_nll" not in read(tmp_path / "other.pt").added_to(DATA)[0]
    with pytest.raises(ValueError, match="data: expected the 11 rows that these losses are of, got 2"):
        found.added_to(DATA[:2])
    for data in (DATA[::-1], Dataset.from_list(DATA[1:] + DATA[:1])):
        with pytest.raises(ValueError, match=r"data: row 0 has other input_ids than when .*; call initial_losses with"):
            found.added_to(data)
    batch = fl.huggingface.AnchorCollator(0)(found.added_to(DATA)[:3])
    assert torch.equal(batch["initial_nll"], found.initial_nll[:3]) and batch["initial_token_nll"].shape == (
        batch["input_ids"].shape
    )


def test_flow_in_a_trainer_takes_both(tmp_path):
    """τ and the weights are those of the model before training; so one step's gradient is known."""
    model = llama()
    found = read(tmp_path / "initial.pt", model=model)
    total, count = 0, 0
    for row, nll in zip(DATA, found.initial_nll, strict=True):
        labels = torch.tensor(row["labels"])[1:]
        valid = labels != -100
        losses = -log_probs(model, row["input_ids"])[valid].gather(1, labels[valid, None])
        total = total + (-nll / found.temperature).exp() * losses.sum()
        count += int(valid.sum())
    named = dict(model.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(total / count, list(named.values())), strict=True))
    run = trainer(
        fl.patch(llama(), fl.FLOWLoss(found.temperature)), found.added_to(DATA), per_device_train_batch_size=11,
        data_collator=fl.huggingface.AnchorCollator(0),
    )  # fmt: skip
    assert error(step(run), gradients) < TOLERANCE


def test_stm_in_a_trainer_takes_the_tokens(tmp_path):
    """Those that the model finds hard before training are not learned, in rows of several lengths."""
    model, threshold = llama(), 120.0
    found = read(tmp_path / "initial.pt", model=model, per="token")
    kept = total = count = 0
    for row in DATA:
        nll = nll_of(model, row)[1:]
        labels = torch.tensor(row["labels"])[1:]
        valid = labels != -100
        easy = valid & (nll.exp() < threshold)
        total = total - log_probs(model, row["input_ids"])[easy].gather(1, labels[easy, None]).sum()
        kept, count = kept + int(easy.sum()), count + int(valid.sum())
    assert 0.2 * count < kept < 0.8 * count
    named = dict(model.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(total / count, list(named.values())), strict=True))
    run = trainer(
        fl.patch(llama(), fl.STMLoss(threshold)), found.added_to(DATA), per_device_train_batch_size=11,
        data_collator=fl.huggingface.AnchorCollator(0),
    )  # fmt: skip
    assert error(step(run), gradients) < TOLERANCE


class Endless(IterableDataset):
    def __iter__(self):
        yield from DATA


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        (dict(data=Endless()), TypeError, "data: expected a data set with a length, .*got Endless; make a list"),
        (dict(data=[]), ValueError, "data: expected at least one row, got none"),
        (dict(data=[{"text": "a"}]), ValueError, r"data: expected rows with input_ids, got one with \['text'\]"),
        (dict(batch_size=0), ValueError, "batch_size: expected an integer ≥ 1, got 0"),
        (dict(per="row"), ValueError, "per: expected sequence or token, got 'row'"),
        (dict(output=None), TypeError, "output: expected a path of a file, got NoneType"),
        (dict(data_collator=3), TypeError, "data_collator: expected a function of a list of rows, got int"),
        (dict(data_collator=lambda rows: {"input_ids": torch.ones(1, 3)}), ValueError, "expected a batch with labels"),
        (
            dict(data_collator=fl.huggingface.AnchorCollator(0, padding_free=True), data=ANCHORED),
            ValueError, r"data_collator: expected labels \[8, T\], a row for each, got .*padding_free=False",
        ),
        (dict(model=torch.nn.Linear(2, 2)), TypeError, "model: expected a transformers model"),
    ],
    ids=lambda x: None,
)  # fmt: skip
def test_bad_arguments(arguments, kind, message, tmp_path):
    given = {"model": llama(), "data": DATA, "output": tmp_path / "initial.pt"} | arguments
    with pytest.raises(kind, match=message):
        fl.initial_losses(progress=False, **given)


def test_a_patched_model_is_no_start(tmp_path):
    with pytest.raises(ValueError, match="model: LlamaForCausalLM is patched already; call initial_losses before"):
        read(tmp_path / "initial.pt", model=fl.patch(llama()))


def test_a_bar_shows_the_rows(tmp_path, capsys):
    fl.initial_losses(llama(), DATA, tmp_path / "initial.pt")
    assert "11/11" in capsys.readouterr().err

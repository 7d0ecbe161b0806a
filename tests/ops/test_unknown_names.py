"""Names and values that nobody knows, of calls, fields and statistics: an error that says which one was meant."""

import pytest
import torch

import fused_losses as fl
from fused_losses.huggingface import AnchorCollator, patch

hidden, weight, labels = torch.ones(6, 8), torch.ones(50, 8), torch.arange(6)
reference = fl.Reference(hidden)


class Weighted(fl.Objective):
    def token_loss(self, out, weight, offset=None):
        return weight * out.nll


class Static(fl.Objective):
    @staticmethod
    def token_loss(out, weight):
        return weight * out.nll


class AnyField(fl.Objective):
    def token_loss(self, out, **fields):
        return fields["weight"] * out.nll


class Divergence(fl.Objective):
    beta = 0.5

    def token_loss(self, out):
        return out.divergence


class KL(fl.Objective):
    def token_loss(self, out):
        return out.kl


class NotMade(fl.Objective):
    def __init__(self):
        self.scale = 2.0

    def token_loss(self, out):
        return self.scale * out.nll


def losses(**options):
    return lambda: fl.token_losses(hidden, weight, labels, **options)


def call(objective, **arguments):
    return lambda: objective(hidden, weight, labels, **arguments)


ones = torch.ones(6)
MISTAKES = {
    "an argument of token_losses": (
        losses(temprature=2.0),
        TypeError,
        r"^temprature: a call of token_losses has no such argument; did you mean temperature\?; it takes hidden, head",
    ),
    "an argument of JSDLoss": (
        call(fl.JSDLoss(), refrence=reference),
        TypeError,
        r"^refrence: a call of JSDLoss has no such argument; did you mean reference\?; it takes hidden, head, labels",
    ),
    "a field of LAwFLoss": (
        call(fl.LAwFLoss(), confidenc=ones, reference=reference),
        TypeError,
        r"^confidenc: a call of LAwFLoss has no such argument; did you mean confidence\?",
    ),
    "a field of WeightedLoss": (
        call(fl.WeightedLoss(), weights=ones, refrence=reference),
        TypeError,
        r"^refrence: .*did you mean reference\?",
    ),
    "an option of sequence_logps": (
        lambda: fl.sequence_logps(hidden[None], weight, labels[None], backnd="torch"),
        TypeError,
        r"^backnd: a call of token_losses has no such argument; did you mean backend\?",
    ),
    "ids of sequences that are no index": (
        lambda: fl.sequence_logps(hidden, weight, labels, sequence_ids=labels * 10**12),
        ValueError,
        r"^sequence_ids: the largest is 5000000000000, .*num_sequences",
    ),
    "a field of one's own": (
        call(Weighted(), weight=ones, ofset=ones),
        TypeError,
        r"^ofset: Weighted has no such field; did you mean offset\?; its fields are: weight, offset$",
    ),
    "a field of one's own that is missing": (
        call(Weighted()),
        ValueError,
        r"^Weighted needs weight=: token_loss has a parameter of that name$",
    ),
    "a field of a static token_loss": (
        call(Static(), weights=ones),
        ValueError,
        r"^Static needs weight=",
    ),
    "a number for a switch": (
        losses(entropy_gradient="yes"),
        TypeError,
        r"^entropy_gradient: expected True or False, got 'yes'$",
    ),
    "a statistic that ids ask for": (losses(wanted={"logits_at"}), ValueError, r"^wanted: .*logits_at is .*where ids"),
    "a statistic that beta asks for": (losses(wanted={"divergence"}), ValueError, r"^wanted: .*divergence is .*beta="),
    "a statistic in wanted": (losses(wanted={"ranks"}), ValueError, r"^wanted: .*got 'ranks'; did you mean rank\?$"),
    "a field of the result": (
        lambda: losses()().enropy,
        AttributeError,
        r"^out.enropy: there is no such field; did you mean entropy\?; there are nll, kl",
    ),
    "a divergence without a reference": (
        call(Divergence()),
        ValueError,
        r"^beta=0.5: .* to the call, or reference='base', 'start' or a model to fused_losses.patch$",
    ),
    "a kl without a reference": (call(KL()), ValueError, r"None without one: give reference=.*fused_losses.patch"),
    "a pair of numbers of items without class weights": (
        call(fl.CrossEntropyLoss(reduction="weighted_mean"), num_items=(3.0, 6)),
        ValueError,
        r"^num_items: expected the number of tokens, got \(3.0, 6\); a pair is for class_weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_remedy(mistake):
    make, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize("objective", [Weighted(), Static(), AnyField()], ids=lambda o: type(o).__name__)
def test_fields_of_ones_own_arrive_however_token_loss_is_written(objective):
    value = call(objective, weight=2 * ones)()
    assert value.item() == pytest.approx(2 * losses()().nll.mean().item(), rel=1e-6)


# --- in a patched model and its collator


@pytest.fixture
def model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def test_a_field_of_a_batch_that_is_nearly_one_of_the_loss(model):
    patch(model, fl.LAwFLoss(), reference="start")
    ids = torch.arange(10)[None]
    fields = dict(confidence=torch.zeros(1, 10), target_probabilty=torch.zeros(1, 10))
    with pytest.raises(TypeError, match=r"^target_probabilty: neither .*did you mean target_probability\?"):
        model(ids, labels=ids, **fields)


def test_an_optional_field_of_ones_own_that_is_nearly_right(model):
    patch(model, Weighted())
    ids = torch.arange(10)[None]
    with pytest.raises(TypeError, match=r"^ofset: neither .*did you mean offset\?"):
        model(ids, labels=ids, weight=torch.ones(1, 10), ofset=torch.ones(1, 10))
    model(
        ids, labels=ids, weight=torch.ones(1, 10), output_hidden_states=True
    )  # names of transformers are none of ours


def test_patch_refuses_an_objective_whose_base_was_not_made(model):
    with pytest.raises(TypeError, match=r"^loss: NotMade: .*call super\(\).__init__\(\) first"):
        patch(model, NotMade())


def test_rows_for_a_loss_without_anchors_and_fields_of_ones_own():
    rows = [{"input_ids": [1, 2, 3], "offset": [0.0, 0.5, 1.0]}, {"input_ids": [4, 5], "offset": [1.0, 2.0]}]
    with pytest.raises(ValueError, match=r"needs_anchors=False\)$"):
        AnchorCollator(pad_token_id=0)(rows)
    batch = AnchorCollator(pad_token_id=0, needs_anchors=False)(rows)
    assert "confidence" not in batch
    assert batch["offset"].tolist() == [[0.0, 0.5, 1.0], [1.0, 2.0, 0.0]]
    rows[0]["anchors"] = [1]
    with pytest.raises(ValueError, match=r"^row 1: has neither"):
        AnchorCollator(pad_token_id=0, needs_anchors=False)(rows)


def test_a_field_of_ones_own_through_a_trainer_with_its_defaults(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    patch(model, Weighted())
    rows = [{"input_ids": [1, 2, 3, 4], "weight": [0.0, 0.0, 2.0, 1.0]}] * 2
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, learning_rate=0.0, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1,
        disable_tqdm=True,
    )  # fmt: skip
    collate = AnchorCollator(pad_token_id=0, needs_anchors=False)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        states = model.model(ids).last_hidden_state[:, :-1]
    expected = Weighted()(states, model.lm_head, ids[:, 1:], weight=torch.tensor([[0.0, 2.0, 1.0]]))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)  # the log rounds so

"""What `patch` and a patched model refuse, and what they say."""

import copy
import warnings
from unittest import mock

import peft
import pytest
import torch
from patched_llama import SIZES, VOCABULARY, batch, llama, llama_at
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

import fused_losses as fl
from fused_losses.huggingface.logits import LogitsNotKept


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class TestRefused:
    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    @pytest.mark.parametrize(
        ("make", "error", "text"),
        [
            (lambda: "meta-llama/Llama-3.1-8B", TypeError,
             "expected a transformers model, got str; give the model itself"),
            (lambda: LlamaForCausalLM, TypeError, "expected a transformers model, got type; give the model itself"),
            (lambda: nn.Linear(2, 2), TypeError, "expected a transformers model"),
            (lambda: LlamaModel(LlamaConfig(**SIZES)), TypeError, "LlamaModel takes no labels"),
            (lambda: BertModel(tiny_bert()), TypeError, "BertModel takes no labels"),
            (lambda: BertForMaskedLM(tiny_bert()), TypeError,
             "BertForMaskedLM is no causal language model.*encoder-only"),
            (lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES)), TypeError, "no causal language model"),
            (lambda: nn.DataParallel(llama()), TypeError, "patch it first, then wrap it"),
            (lambda: torch.compile(llama()), TypeError, "patch it first, then call torch.compile"),
            (lambda: compiled_in_place(), TypeError, "patch it first, then call torch.compile"),
            (lambda: fl.patch(llama()), ValueError,
             r"patched already, with CrossEntropyLoss\(\); call fused_losses.unpatch"),
            (lambda: with_head(nn.Sequential(nn.Linear(32, VOCABULARY))), TypeError, "Sequential, not a linear layer"),
            (lambda: with_head(Scaled(32, VOCABULARY)), TypeError, "Scaled with a forward of its own"),
            (lambda: with_head(None), TypeError, "no LM head"),
        ],
    )  # fmt: skip
    def test_model(self, make, error, text):
        model = make()
        with pytest.raises(error, match=text):
            fl.patch(model)

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            (dict(loss=fl.TALRLoss), TypeError, r"got TALRLoss; give an instance, TALRLoss\(\)"),
            (dict(loss=nn.CrossEntropyLoss()), TypeError, "expected an Objective"),
            (dict(loss=fl.LAwFLoss()), ValueError, "give reference='base'"),
            (dict(loss=fl.ASFTLoss()), ValueError, "frozen original model"),
            (dict(loss=fl.TALRLoss(), reference="start"), ValueError, "TALRLoss has no use for one"),
            (dict(loss=fl.LAwFLoss(), reference="adapter_off"), ValueError,
             "expected 'base', 'start' or a model, got 'adapter_off'"),
            (dict(loss=fl.LAwFLoss(), reference=3), TypeError, "got int"),
            (dict(loss=fl.TALRLoss(), reference_cache="x"), ValueError, "without a reference"),
            (dict(keep_logits="train"), ValueError, "expected True, False or 'eval', got 'train'"),
        ],
    )  # fmt: skip
    def test_arguments(self, arguments, error, text):
        model = llama()
        cls = type(model)
        with pytest.raises(error, match=text):
            fl.patch(model, **arguments)
        assert type(model) is cls

    def test_reference_with_another_vocabulary(self):
        with pytest.raises(ValueError, match="vocabulary has 101 tokens, the model's 97"):
            fl.patch(llama(), fl.LAwFLoss(), reference=llama(vocab_size=101))

    def test_reference_to_itself(self):
        model = llama()
        with pytest.raises(ValueError, match="is the trained model itself"):
            fl.patch(model, fl.LAwFLoss(), reference=model)

    def test_base_without_an_adapter(self):
        model = llama()
        fl.patch(model, fl.LAwFLoss(), reference="base")  # the adapter may come later
        with pytest.raises(ValueError, match="no PEFT adapter"):
            model(**batch(), confidence=torch.zeros(3, 11))

    @pytest.mark.parametrize(
        ("inputs", "error", "text"),
        [
            (dict(labels=lambda y: y[:, :-2], confidence=lambda y: torch.zeros(3, 9)), ValueError,
             r"one for each of the 33 rows.*as long as the inputs"),
            (dict(labels=lambda y: y + 1000, confidence=lambda y: torch.zeros(3, 11)), ValueError, "labels: expected"),
            (dict(labels=lambda y: y.float(), confidence=lambda y: torch.zeros(3, 11)), TypeError,
             r"labels: expected an int64 tensor of token ids, got torch.float32; .*labels.long"),
            (dict(confidence=lambda y: torch.zeros(3, 5)), ValueError,
             r"confidence: expected the labels' shape \[3, 11\], got \[3, 5\]"),
            (dict(confidence=lambda y: [0.0]), TypeError, "confidence: expected a tensor"),
            (dict(confidence=lambda y: torch.full((3, 11), 1.5)), ValueError, "confidence"),
            (dict(labels=lambda y: None, confidence=lambda y: torch.zeros(3, 11)), ValueError,
             "confidence: given without labels"),
            (dict(), ValueError, "confidence: is missing in the batch.*AnchorCollator.*remove_unused_columns=False"),
            (dict(confidence=torch.zeros_like, num_items_in_batch=lambda y: 0), ValueError, "num_items.*> 0, got 0"),
            (dict(confidence=torch.zeros_like, num_items_in_batch=lambda y: torch.tensor(float("nan"))), ValueError,
             "num_items"),
            (dict(old_nll=lambda y: torch.zeros(3, 11)), TypeError, "old_nll: LAwFLoss has no use for it"),
        ],
    )  # fmt: skip
    def test_batch(self, inputs, error, text):
        model, values = llama(), batch()
        fl.patch(model, fl.LAwFLoss(), reference="start")
        values = {**values, **{name: make(values["labels"]) for name, make in inputs.items()}}
        with pytest.raises(error, match=text):
            model(**values)
        model(**batch(), confidence=torch.zeros(3, 11))

    def test_other_ignored_labels(self):
        """The model ignores −100, the loss another label; fields are aligned all the same."""
        model, inputs = llama(), batch()
        confidence = torch.rand(3, 11).masked_fill(inputs["labels"] == -100, 0)
        with fl.patched(model, fl.LAwFLoss(), reference=llama_at(7)):
            want = model(**inputs, confidence=confidence).loss
        with fl.patched(model, fl.LAwFLoss(ignore_index=-1), reference=llama_at(7)):
            assert torch.equal(model(**inputs, confidence=confidence).loss, want)

    def test_sequences_that_index_a_field(self):
        model, inputs = llama(), batch()
        initial = torch.tensor([1.0, 2.0, 3.0])
        positions = torch.arange(11).expand(3, 11).clone()
        positions[1, :4] = 1  # padding to its left
        inputs["labels"][1, :5] = -100
        rows = torch.arange(3)[:, None].expand(3, 11)
        with fl.patched(model, fl.FLOWLoss(2.0)):
            want = model(**inputs, position_ids=positions, sequence_ids=rows, initial_nll=initial).loss
            assert torch.equal(model(**inputs, position_ids=positions, initial_nll=initial).loss, want)
            positions[2] = torch.cat([torch.arange(5), torch.arange(6)])
            with pytest.raises(ValueError, match="initial_nll: rows hold several sequences"):
                model(**inputs, position_ids=positions, initial_nll=initial)

    def test_start_follows_the_model(self):
        """To where its head runs, but not to the meta device, where an offloaded model's weights are between calls."""
        model = llama()
        fl.patch(model, fl.LAwFLoss(), reference="start")
        source, moved = vars(model)["_fused_losses"].source, []
        call = mock.Mock(inputs={})
        with mock.patch.object(source.other, "to", moved.append):
            source.begin(call, torch.device("cpu"))
            source.begin(call, torch.device("cuda", 1))
        assert moved == [torch.device("cuda", 1)]

    def test_means_of_groups_over_several_batches(self):
        model = llama()
        fl.patch(model, fl.LAwFLoss(reduction="group_mean"), reference="start")
        assert not model.accepts_loss_kwargs
        with pytest.raises(ValueError, match="group_mean"):
            model(**batch(), confidence=torch.zeros(3, 11), num_items_in_batch=3)

    def test_a_model_that_computes_no_loss(self):
        class Silent(LlamaForCausalLM):
            def forward(self, input_ids=None, labels=None, **kwargs):
                return super().forward(input_ids=input_ids, **kwargs)

        model = Silent(LlamaConfig(**SIZES))
        fl.patch(model)
        with pytest.raises(ValueError, match="computed no loss"):
            model(**batch())

    def test_label_smoothing_of_the_model(self):
        class Smooth(LlamaForCausalLM):
            def forward(self, input_ids=None, labels=None, **kwargs):
                out = super().forward(input_ids=input_ids, **kwargs)
                out.loss = nn.functional.cross_entropy(
                    out.logits.view(-1, VOCABULARY), labels.view(-1), label_smoothing=0.1
                )
                return out

        model = Smooth(LlamaConfig(**SIZES))
        fl.patch(model)
        with pytest.raises(LogitsNotKept, match=r"label_smoothing=0\.1"):
            model(**batch())

    def test_unpatch(self):
        with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
            fl.unpatch(llama())


def tiny_bert():
    return BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )


def compiled_in_place():
    model = llama()
    model.compile()
    return model


def with_head(head):
    model = llama()
    model.lm_head = head
    return model


class TestBetweenTheHeadAndItsForward:
    """What stands there would be dropped: it is refused, before and after the patch, in a reference, under PEFT."""

    def thrice(self, model):
        head = model.get_output_embeddings()
        own = head.forward
        head.forward = lambda hidden: own(hidden) * 3
        return model

    def test_another_forward(self):
        refused = pytest.raises(
            TypeError, match=r"head: LlamaForCausalLM's has another forward .*register_forward_hook"
        )
        with refused:
            fl.patch(self.thrice(llama()))
        with refused:
            fl.patch(llama(), fl.LAwFLoss(), reference=self.thrice(llama()))
        model = self.thrice(fl.patch(llama()))
        with refused:
            model(**batch())
        del model.lm_head.forward
        assert model(**batch()).loss > 0

    def test_a_hook_of_accelerate(self):
        from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module

        class Twice(ModelHook):
            def post_forward(self, module, output):
                return output * 2

        for hook in (Twice(), SequentialHook(AlignDevicesHook(), Twice())):
            model = llama()
            add_hook_to_module(model.lm_head, hook)
            with pytest.raises(TypeError, match="a hook of accelerate's kind, Twice"):
                fl.patch(model)
        model, inputs = llama(), batch()
        want = model(**inputs).loss
        add_hook_to_module(model.lm_head, SequentialHook(AlignDevicesHook(), AlignDevicesHook()))
        torch.testing.assert_close(fl.patch(model)(**inputs).loss, want)


class TestMistakesOfUsers:
    def test_fields_without_names(self):
        class Weighted(fl.Objective):
            def token_loss(self, out, **per_token):
                return out.nll * per_token["weight"]

        with pytest.raises(TypeError, match=r"Weighted.token_loss\(self, out, \*\*per_token\).*by name"):
            fl.patch(llama(), Weighted())

    def test_labels_with_one_dimension_too_many(self):
        model, inputs = fl.patch(llama()), batch()
        inputs["labels"] = inputs["labels"][..., None]
        with pytest.raises(
            ValueError, match=r"labels: expected \[batch, tokens\] as the inputs are, got shape \[3, 11, 1\]"
        ):
            model(**inputs)

    def test_unpatching_a_shallow_copy_leaves_the_model_patched(self):
        model, inputs = fl.patch(llama(), fl.TALRLoss(1.0)), batch()
        want = model(**inputs).loss
        fl.unpatch(copy.copy(model))
        assert torch.equal(model(**inputs).loss, want)

    def test_unpatched_inside_of_the_context(self):
        model = llama()
        with fl.patched(model, fl.TALRLoss()):
            fl.unpatch(model)
            fl.patch(model, fl.DFTLoss())
        assert model(**batch()).loss > 0 and "_fused_losses" in vars(model)

    def test_peft_around_peft(self):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twice = peft.get_peft_model(peft.get_peft_model(llama(), config), config)
        assert isinstance(twice.get_base_model(), peft.PeftModel)
        with pytest.raises(TypeError, match="PEFT is around it twice"):
            fl.patch(twice)

    def test_a_reference_without_weights(self):
        with torch.device("meta"):
            empty = llama()
        with pytest.raises(ValueError, match="reference: is on the meta device and has no weights"):
            fl.patch(llama(), fl.LAwFLoss(), reference=empty)
        with pytest.raises(ValueError, match="load it with from_pretrained first"):
            fl.patch(llama(), fl.LAwFLoss(), reference="/a/path")

    def test_a_field_that_is_missing(self):
        class Weighted(fl.Objective):
            def token_loss(self, out, weight):
                return out.nll * weight

        with pytest.raises(ValueError, match="weight: is missing in the batch, and token_loss of Weighted needs it"):
            fl.patch(llama(), Weighted())(**batch())

    def test_a_divergence_without_a_reference(self):
        class Held(fl.Objective):
            def token_loss(self, out):
                return out.kl

        with pytest.raises((ValueError, TypeError), match="reference="):
            fl.patch(llama(), Held())(**batch())

"""`patch` on tiny models: what it computes and what it leaves alone. All classes of models: test_causal_models.py."""

import copy
import functools
from unittest import mock

import pytest
import torch
from patched_llama import SIZES, VOCABULARY, assert_same, batch, llama, llama_at, step
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import fused_losses as fl


class TestSameAsBefore:
    def test_labels(self):
        assert_same(llama(), **batch())

    def test_number_of_items(self):
        assert_same(llama(), **batch(), num_items_in_batch=torch.tensor(41))
        assert_same(llama(), **batch(), num_items_in_batch=41)

    def test_number_of_items_where_the_model_ignores_it(self):
        """Bart's forward has no such argument: a Trainer would scale its loss with the accumulation."""
        model = BartForCausalLM(
            BartConfig(
                vocab_size=VOCABULARY,
                d_model=32,
                decoder_layers=1,
                decoder_attention_heads=4,
                decoder_ffn_dim=48,
                dropout=0.0,
            )
        )
        inputs = batch()
        n = int((inputs["labels"] != -100).sum())
        with fl.patched(model):
            mean = model(**inputs).loss
            assert model.accepts_loss_kwargs
            torch.testing.assert_close(model(**inputs, num_items_in_batch=2 * n).loss, mean / 2)

    def test_soft_cap_and_scale(self):
        model = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0))
        out = assert_same(model, **batch())
        assert out.logits.map.arguments() == pytest.approx((1.0, 3.0))

    def test_auxiliary_loss_of_experts(self):
        config = MixtralConfig(
            **SIZES, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.5
        )
        out = assert_same(MixtralForCausalLM(config), **batch())
        assert out.aux_loss > 0

    def test_tied_embeddings(self):
        assert_same(llama(tie_word_embeddings=True), **batch())

    def test_bias(self):
        model = llama()
        model.lm_head = nn.Linear(32, VOCABULARY)
        assert_same(model, **batch())

    def test_labels_by_position(self):
        model, inputs = llama(), batch()
        want = model(**inputs).loss
        with fl.patched(model):
            got = model(inputs["input_ids"], None, None, None, None, inputs["labels"]).loss
        torch.testing.assert_close(got, want)

    def test_tuple_output(self):
        assert_same(llama(), **batch(), return_dict=False)

    def test_embeddings_instead_of_ids(self):
        model, inputs = llama(), batch()
        embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
        assert_same(model, inputs_embeds=embeddings, labels=inputs["labels"])

    def test_shift_labels(self):
        inputs = batch()
        shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
        want = step(llama_at(0), **inputs)[0].loss
        torch.testing.assert_close(assert_same(llama_at(0), **inputs, shift_labels=shifted).loss, want)

    def test_shift_labels_alone(self):
        """Unpatched the model has no loss then; context parallelism gives both."""
        model, inputs = llama(), batch()
        shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
        want = model(**inputs).loss
        with fl.patched(model):
            torch.testing.assert_close(model(input_ids=inputs["input_ids"], shift_labels=shifted).loss, want)

    def test_shift_labels_that_the_model_ignores(self):
        class Shifting(LlamaForCausalLM):
            def forward(self, input_ids=None, labels=None):
                out = super().forward(input_ids=input_ids)
                logits, labels = out.logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1)
                out.loss = nn.functional.cross_entropy(logits, labels)
                return out

        model, inputs = Shifting(LlamaConfig(**SIZES)), batch()
        assert_same(model, **inputs)
        shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
        want = fl.patch(model)(**inputs).loss
        assert torch.equal(model(**inputs, shift_labels=shifted).loss, want)
        with pytest.raises(ValueError, match="shift_labels: Shifting takes its loss of other labels"):
            model(input_ids=inputs["input_ids"], shift_labels=shifted)

    def test_logits_to_keep(self):
        inputs = batch()
        shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
        assert_same(llama(), **inputs, shift_labels=shifted[:, -5:].contiguous(), logits_to_keep=5)

    def test_gradient_checkpointing(self):
        model = llama()
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        assert_same(model, **batch())

    def test_attention_mask_left_and_right(self):
        for side in ("left", "right"):
            inputs = batch()
            mask = torch.ones_like(inputs["input_ids"])
            mask[1, : 3 if side == "left" else None] = 0
            if side == "right":
                mask[1] = 1
                mask[1, -3:] = 0
            inputs["labels"][mask == 0] = -100
            assert_same(llama(), **inputs, attention_mask=mask)

    def test_evaluation(self):
        model, inputs = llama().eval(), batch()
        with torch.no_grad():
            want = model(**inputs).loss
            with fl.patched(model):
                torch.testing.assert_close(model(**inputs).loss, want)

    def test_all_ignored(self):
        """Unpatched it is NaN."""
        model, inputs = llama(), batch()
        inputs["labels"][:] = -100
        with fl.patched(model):
            out, gradients = step(model, **inputs)
        assert out.loss == 0 and all((g == 0).all() for g in gradients.values()) and gradients

    def test_second_backward(self):
        model, inputs = llama(), batch()
        _, once = step(model, **inputs)
        with fl.patched(model, fl.TALRLoss()):
            model.zero_grad()
            loss = model(**inputs).loss
            loss.backward(retain_graph=True)
            first = model.lm_head.weight.grad.clone()
            loss.backward()
        torch.testing.assert_close(model.lm_head.weight.grad, 2 * first)
        assert first.norm() < once["lm_head.weight"].norm()

    @pytest.mark.parametrize("autocast", [False, True])
    def test_bf16(self, autocast):
        """At most as far from float64 as the unpatched model."""
        model, inputs = llama(initializer_range=0.1), batch(rows=8)
        truth, _ = step(copy.deepcopy(model).double(), **inputs)
        half = model if autocast else model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            plain = half(**inputs).loss
            with fl.patched(half):
                ours = half(**inputs).loss
                ours.backward()
        assert abs(ours.double() - truth.loss) <= abs(plain.double() - truth.loss) + 2e-3 * truth.loss
        assert half.lm_head.weight.grad.isfinite().all()


class TestUntouched:
    def test_without_labels(self):
        model, inputs = llama().eval(), batch()
        del inputs["labels"]
        logits = model(**inputs).logits
        tokens = model.generate(inputs["input_ids"][:, :4], max_new_tokens=5, do_sample=False)
        with fl.patched(model):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(model.generate(inputs["input_ids"][:, :4], max_new_tokens=5, do_sample=False), tokens)

    def test_class_and_attributes(self):
        model = llama()
        cls, names = type(model), set(vars(model))
        fl.patch(model)
        assert isinstance(model, cls) and type(model).__name__ == cls.__name__ and model.loss_type == "ForCausalLM"
        assert "lm_head" in dict(model.named_modules()) and "forward" not in vars(model.lm_head)
        model(**batch())
        assert "forward" not in vars(model.lm_head)
        fl.unpatch(model)
        assert type(model) is cls and set(vars(model)) == names

    def test_an_error_in_the_forward(self):
        model = llama()
        with fl.patched(model):
            with pytest.raises(ValueError, match="labels"):
                model(input_ids=batch()["input_ids"], labels=batch()["labels"][:, :-2])
            assert "forward" not in vars(model.lm_head)
            model(**batch()).loss.backward()

    def test_unpatched_after_an_error(self):
        model = llama()
        cls = type(model)
        with pytest.raises(KeyError), fl.patched(model):
            raise KeyError("of the user")
        assert type(model) is cls

    def test_checkpoint_names_the_class(self, tmp_path):
        model, inputs = llama(), batch()
        with fl.patched(model):
            model.save_pretrained(tmp_path)
            want = model(**inputs).loss
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.architectures == ["LlamaForCausalLM"]
        torch.testing.assert_close(loaded(**inputs).loss, want)

    def test_a_copy_is_patched_too(self):
        model, inputs = llama(), batch()
        fl.patch(model, fl.TALRLoss(1.0))
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs).loss, model(**inputs).loss)
        fl.unpatch(model)
        assert twin(**inputs).loss < model(**inputs).loss

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_wrappers_around_forward(self, when):
        """Such as accelerate's autocast: they stay, whoever came first, and see each forward once."""
        model, inputs = llama(), batch()
        want, seen = model(**inputs).loss, []

        def wrap(inner):
            @functools.wraps(inner)
            def forward(*args, **kwargs):
                seen.append(sorted(kwargs))
                return inner(*args, **kwargs)

            return forward

        if when == "before":
            model.forward = wrap(model.forward)
        fl.patch(model)
        if when == "after":
            model.forward = wrap(model.forward)
            model.forward = wrap(model.forward)
        torch.testing.assert_close(model(**inputs).loss, want)
        assert seen == [["input_ids", "labels"]] * (1 if when == "before" else 2)
        calls = len(seen)
        fl.unpatch(model)
        assert torch.equal(model(**inputs).loss, want) and len(seen) == 2 * calls

    def test_wrappers_taken_off_again(self):
        """Each assignment restores what was found then, as unittest.mock does."""
        model, inputs = llama(), batch()
        fl.patch(model)
        want, seen = model(**inputs).loss, []

        def wrap(name):
            inner = model.forward

            def forward(*args, **kwargs):
                seen.append(name)
                return inner(*args, **kwargs)

            return forward

        model.forward = wrap("first")
        before = model.forward
        model.forward = wrap("second")
        assert torch.equal(model(**inputs).loss, want) and seen == ["second", "first"]
        model.forward = before
        with mock.patch.object(model, "forward", wrap("third")):
            model(**inputs)
        model(**inputs)
        assert seen[2:] == ["third", "first", "first"]
        fl.unpatch(model)
        assert model.forward is vars(model)["forward"] and model.forward.__name__ == "forward"
        model(**inputs)
        assert seen[5:] == ["first"]

    def test_hooks_on_the_head(self):
        """They see the head once, and what they do to its input or output counts."""
        inputs = batch()
        for register in ("register_forward_pre_hook", "register_forward_hook"):
            model, calls = llama(), []

            def hook(module, args, output=None, calls=calls):
                calls.append(1)
                return (args[0] * 0.5,) if output is None else output * 0.5

            getattr(model.lm_head, register)(hook)
            assert_same(model, **inputs)
            assert len(calls) == 3


class TestObjectives:
    def rows(self, model, inputs):
        """Aligned hidden states and labels in float64, for the loss by hand."""
        model = copy.deepcopy(model).double()
        hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
        return hidden[:, :-1], model.lm_head.weight, inputs["labels"][:, 1:]

    @pytest.mark.parametrize(
        "loss",
        [fl.TALRLoss(), fl.TALRLoss(1.5), fl.DFTLoss(), fl.EAFTLoss(), fl.CrossEntropyLoss(gradient="sparse")],
        ids=str,
    )
    def test_loss(self, loss):
        model, inputs = llama(), batch()
        want = type(loss)(**{**vars_of(loss), "backend": "reference"})(*self.rows(model, inputs))
        with fl.patched(model, loss):
            torch.testing.assert_close(model(**inputs).loss.double(), want, rtol=2e-6, atol=0)

    def test_old_probabilities_move_with_the_labels(self):
        model, inputs = llama(), batch()
        hidden, weight, labels = self.rows(model, inputs)
        old = torch.rand(inputs["labels"].shape) * 5
        want = fl.PSFTLoss(backend="reference")(hidden, weight, labels, old_nll=old[:, 1:])
        with fl.patched(model, fl.PSFTLoss()):
            torch.testing.assert_close(model(**inputs, old_nll=old).loss.double(), want, rtol=2e-6, atol=0)

    def test_weights_of_a_batch_move_with_the_labels(self):
        model = llama()
        ids = torch.randint(1, VOCABULARY, (16,)).split((5, 11))
        rows = [{"input_ids": row.tolist(), "weights": torch.randn(len(row)).tolist()} for row in ids]
        inputs = fl.huggingface.AnchorCollator(0)(rows)
        weights, labels = inputs.pop("weights"), torch.as_tensor(inputs["labels"]).as_subclass(torch.Tensor)
        hidden = (
            copy.deepcopy(model).double().model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        )
        nll = fl.token_losses(hidden.last_hidden_state[:, :-1], model.lm_head.weight.double(), labels[:, 1:]).nll
        want = (nll * weights[:, 1:]).sum() / (labels[:, 1:] != -100).sum()
        with pytest.raises(ValueError, match="so the anchors, or the weights, are ignored"):
            model(**inputs, weights=weights)
        with fl.patched(model, fl.WeightedLoss()):
            torch.testing.assert_close(model(**inputs, weights=weights).loss.double(), want, rtol=2e-6, atol=0)
            with pytest.raises(ValueError, match="weights: is missing in the batch, and WeightedLoss needs it"):
                model(**inputs)

    def test_a_loss_of_ones_own(self):
        class Weighted(fl.Objective):
            def token_loss(self, out, importance):
                return importance * out.nll

        model, inputs = llama(), batch()
        hidden, weight, labels = self.rows(model, inputs)
        importance = torch.rand(inputs["labels"].shape)
        want = (importance[:, 1:] * fl.token_losses(hidden, weight, labels).nll).sum() / (labels != -100).sum()
        with fl.patched(model, Weighted()):
            assert "importance" in model.forward.__func__.__signature__.parameters
            torch.testing.assert_close(model(**inputs, importance=importance).loss.double(), want, rtol=2e-6, atol=0)

    def test_packed_rows(self):
        """Three sequences in one row are the same for TALR as three padded rows."""
        model = llama()
        lengths, ids = (4, 7, 5), torch.randint(1, VOCABULARY, (16,))
        padded = nn.utils.rnn.pad_sequence(ids.split(lengths), batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones(n, dtype=torch.long) for n in lengths], batch_first=True)
        labels = padded.masked_fill(mask == 0, -100)
        packed_labels, positions = ids.clone(), torch.cat([torch.arange(n) for n in lengths])
        packed_labels[positions == 0] = -100
        with fl.patched(model, fl.TALRLoss()):
            want = model(input_ids=padded, attention_mask=mask, labels=labels).loss
            packed = dict(
                use_cache=False, input_ids=ids[None], position_ids=positions[None], labels=packed_labels[None]
            )
            torch.testing.assert_close(model(**packed).loss, want, rtol=2e-6, atol=0)
            numbers = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
            torch.testing.assert_close(model(**packed, sequence_ids=numbers).loss, want, rtol=2e-6, atol=0)
            one = model(**packed, sequence_ids=torch.zeros_like(numbers)).loss
            assert abs(one - want) > 1e-3 * want

    def test_left_padding_is_no_sequence(self):
        model, inputs = llama(), batch()
        mask = torch.ones_like(inputs["input_ids"])
        mask[1, :4] = 0
        inputs["labels"][1, :4] = -100
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        with fl.patched(model, fl.TALRLoss()):
            a = model(**inputs, attention_mask=mask).loss
            b = model(**inputs, attention_mask=mask, position_ids=positions).loss
        torch.testing.assert_close(a, b, rtol=1e-3, atol=0)


def vars_of(loss):
    names = ("temperature", "floor", "alpha", "top_k")
    return {name: vars(loss)[name] for name in names if name in vars(loss)}

"""`patch` on tiny models: what it computes, what it leaves alone, what it refuses. The sweep over all classes is test_causal_models.py."""

import copy
import functools
import warnings
from unittest import mock

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
)

import fused_losses as fl
from fused_losses.huggingface.logits import DeferredLogits, LogitsNotKept

VOCABULARY = 97
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options}))


def batch(rows=3, length=11):
    ids = torch.randint(1, VOCABULARY, (rows, length))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[-1, -3:] = -100
    return dict(input_ids=ids, labels=labels)


def step(model, **inputs):
    """The output, and the gradients of all parameters."""
    model.zero_grad()
    out = model(**inputs)
    (out[0] if isinstance(out, tuple) else out.loss).backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(a, b):
    """The largest relative difference of any parameter's gradient."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-12)) for n in b)


def assert_same(model, loss=None, tolerance=1.5e-6, options=None, **inputs):
    """Loss and gradients of the patched model are those of the model as it was; afterwards it is that again, bit for bit."""
    before, gradients = step(model, **inputs)
    with fl.patched(model, loss, **(options or {})):
        out, own = step(model, **inputs)
    again, third = step(model, **inputs)
    first = before[0] if isinstance(before, tuple) else before.loss
    assert torch.equal(first, again[0] if isinstance(again, tuple) else again.loss)
    assert all(torch.equal(gradients[n], third[n]) for n in gradients)
    torch.testing.assert_close(out[0] if isinstance(out, tuple) else out.loss, first, rtol=tolerance, atol=0)
    assert difference(own, gradients) <= tolerance
    return out


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


def llama_at(seed):
    torch.manual_seed(seed)
    return llama()


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


class TestLogits:
    """What a patched model's `outputs.logits` answers."""

    def test_argmax_and_accuracy(self):
        model, inputs = llama(), batch()
        logits = model(**inputs).logits
        with fl.patched(model):
            stand_in = model(**inputs).logits
        predictions = stand_in[:, :-1].argmax(-1)
        valid = inputs["labels"][:, 1:] != -100
        assert torch.equal(predictions[valid], logits[:, :-1].argmax(-1)[valid]) and (predictions[~valid] == -1).all()
        assert torch.equal(torch.argmax(stand_in, dim=-1)[:, :-1], predictions)
        assert stand_in.shape == logits.shape and stand_in.dtype == logits.dtype

    @pytest.mark.parametrize(
        "use",
        [
            lambda z: z.softmax(-1), lambda z: z + 1, lambda z: torch.logsumexp(z, -1), lambda z: z[..., 3], lambda z: z[..., 2:],
            lambda z: list(z), lambda z: z.argmax(1), lambda z: z.sum(), lambda z: z.softmax, lambda z: z.view(-1), lambda z: z == z,
            lambda z: torch.stack([z, z]), lambda z: z.tanh().tanh(), lambda z: z * torch.ones(VOCABULARY), lambda z: bool(z),
            lambda z: z.numpy(), lambda z: torch.cat([z, z]), lambda z: z.unsqueeze(0), lambda z: z[None],
        ],
    )  # fmt: skip
    def test_anything_else(self, use):
        model = llama()
        with fl.patched(model):
            logits = model(**batch()).logits
        with pytest.raises(
            LogitsNotKept, match=r"(?s)LlamaForCausalLM asks for .* keep_logits=True in fused_losses.patch"
        ):
            use(logits)

    def test_kept(self):
        model, inputs = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0)), batch()
        want = model(**inputs)
        with fl.patched(model, keep_logits=True):
            out = model(**inputs)
        torch.testing.assert_close(out.logits, want.logits)
        torch.testing.assert_close(out.loss, want.loss)

    def test_kept_in_evaluation(self):
        model, inputs = llama(), batch()
        want = model(**inputs).logits
        with fl.patched(model, keep_logits="eval"):
            assert isinstance(model(**inputs).logits, DeferredLogits)
            torch.testing.assert_close(model.eval()(**inputs).logits, want)

    def test_a_model_that_needs_real_ones(self):
        """A z-loss over the logits: refused, or with kept logits the same as before."""

        class Penalised(LlamaForCausalLM):
            def forward(self, input_ids=None, labels=None, **kwargs):
                out = super().forward(input_ids=input_ids, labels=labels, **kwargs)
                out.loss = out.loss + 0.1 * out.logits.logsumexp(-1).pow(2).mean()
                return out

        model = Penalised(LlamaConfig(**SIZES))
        with fl.patched(model), pytest.raises(LogitsNotKept, match="logsumexp"):
            model(**batch())
        assert_same(model, options=dict(keep_logits=True), **batch())


class TestObjectives:
    def rows(self, model, inputs):
        """Aligned hidden states and labels in float64, for the loss by hand."""
        model = copy.deepcopy(model).double()
        hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
        return hidden[:, :-1], model.lm_head.weight, inputs["labels"][:, 1:]

    @pytest.mark.parametrize("loss", [fl.TALRLoss(), fl.TALRLoss(1.5), fl.DFTLoss(), fl.EAFTLoss(), fl.CrossEntropyLoss(gradient="sparse")], ids=str)  # fmt: skip
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


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class TestRefused:
    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    @pytest.mark.parametrize(
        ("make", "error", "text"),
        [
            (lambda: "meta-llama/Llama-3.1-8B", TypeError, "expected a transformers model, got str; give the model itself"),
            (lambda: LlamaForCausalLM, TypeError, "expected a transformers model, got type; give the model itself"),
            (lambda: nn.Linear(2, 2), TypeError, "expected a transformers model"),
            (lambda: LlamaModel(LlamaConfig(**SIZES)), TypeError, "LlamaModel takes no labels"),
            (lambda: BertModel(tiny_bert()), TypeError, "BertModel takes no labels"),
            (lambda: BertForMaskedLM(tiny_bert()), TypeError, "BertForMaskedLM is no causal language model.*encoder-only"),
            (lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES)), TypeError, "no causal language model"),
            (lambda: nn.DataParallel(llama()), TypeError, "patch it first, then wrap it"),
            (lambda: torch.compile(llama()), TypeError, "patch it first, then call torch.compile"),
            (lambda: compiled_in_place(), TypeError, "patch it first, then call torch.compile"),
            (lambda: fl.patch(llama()), ValueError, r"patched already, with CrossEntropyLoss\(\); call fused_losses.unpatch"),
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
            (dict(loss=fl.LAwFLoss(), reference="adapter_off"), ValueError, "expected 'base', 'start' or a model, got 'adapter_off'"),
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
            (dict(labels=lambda y: y[:, :-2], confidence=lambda y: torch.zeros(3, 9)), ValueError, r"one for each of the 33 rows.*as long as the inputs"),
            (dict(labels=lambda y: y + 1000, confidence=lambda y: torch.zeros(3, 11)), ValueError, "labels: expected"),
            (dict(labels=lambda y: y.float(), confidence=lambda y: torch.zeros(3, 11)), TypeError, r"labels: expected an int64 tensor of token ids, got torch.float32; .*labels.long"),
            (dict(confidence=lambda y: torch.zeros(3, 5)), ValueError, r"confidence: expected the labels' shape \[3, 11\], got \[3, 5\]"),
            (dict(confidence=lambda y: [0.0]), TypeError, "confidence: expected a tensor"),
            (dict(confidence=lambda y: torch.full((3, 11), 1.5)), ValueError, "confidence"),
            (dict(labels=lambda y: None, confidence=lambda y: torch.zeros(3, 11)), ValueError, "confidence: given without labels"),
            (dict(), ValueError, "confidence: is missing in the batch.*AnchorCollator.*remove_unused_columns=False"),
            (dict(confidence=torch.zeros_like, num_items_in_batch=lambda y: 0), ValueError, "num_items.*> 0, got 0"),
            (dict(confidence=torch.zeros_like, num_items_in_batch=lambda y: torch.tensor(float("nan"))), ValueError, "num_items"),
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

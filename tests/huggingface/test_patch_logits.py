"""What a patched model's `outputs.logits` answers."""

import pytest
import torch
from patched_llama import SIZES, VOCABULARY, assert_same, batch, llama
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import fused_losses as fl
from fused_losses.huggingface.logits import DeferredLogits, LogitsNotKept


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
            lambda z: z.softmax(-1), lambda z: z + 1, lambda z: torch.logsumexp(z, -1), lambda z: z[..., 3],
            lambda z: z[..., 2:], lambda z: list(z), lambda z: z.argmax(1), lambda z: z.sum(), lambda z: z.softmax,
            lambda z: z.view(-1), lambda z: z == z, lambda z: torch.stack([z, z]), lambda z: z.tanh().tanh(),
            lambda z: z * torch.ones(VOCABULARY), lambda z: bool(z), lambda z: z.numpy(), lambda z: torch.cat([z, z]),
            lambda z: z.unsqueeze(0), lambda z: z[None],
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

"""Training, evaluation and what lies between: which loss a patched model reports, and what would train another one."""

import cache_names
import pytest
import torch
from torch.nn import functional as F
from training import expected, llama, rows, sft_trainer, step, trainer
from transformers import LlamaForCausalLM

import fused_losses as fl

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning:transformers"),
]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
LABELS = torch.tensor([[-100, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, -100]])
BATCH = dict(input_ids=IDS, labels=LABELS)


def nll_of(model):
    with torch.no_grad():
        logits = model(input_ids=IDS).logits.double()[:, :-1]
    valid = LABELS[:, 1:] != -100
    return F.cross_entropy(logits[valid], LABELS[:, 1:][valid], reduction="none")


class Weighted(fl.Objective):
    def token_loss(self, out, importance):
        return importance * out.nll


LOSSES = {
    "talr": (fl.TALRLoss, {}), "dft": (fl.DFTLoss, {}), "eaft": (fl.EAFTLoss, {}),
    "flow": (lambda: fl.FLOWLoss(2.0), dict(initial_nll=torch.tensor([1.0, 2.0]))),
    "psft": (fl.PSFTLoss, dict(old_nll=torch.full((2, 6), 3.0))),
    "own": (Weighted, dict(importance=torch.full((2, 6), 0.5))),
}  # fmt: skip


class TestEvaluation:
    @pytest.mark.parametrize("name", LOSSES)
    def test_mean_nll_by_default_and_the_objective_if_asked_for(self, name):
        make, fields = LOSSES[name]
        want = nll_of(llama()).mean().item()
        model = fl.patch(llama(), make())
        trained = model(**BATCH, **fields).loss.item()
        assert abs(trained / want - 1) > 1e-2
        model.eval()
        with torch.no_grad():
            assert model(**BATCH, **fields).loss.item() == pytest.approx(want, rel=1e-6)
            assert model(**BATCH).loss.item() == pytest.approx(want, rel=1e-6)  # needs no fields
        model = fl.patch(llama(), make(), eval_loss="objective").eval()
        with torch.no_grad():
            assert model(**BATCH, **fields).loss.item() == pytest.approx(trained, rel=1e-6)

    @pytest.mark.parametrize("loss", [fl.LAwFLoss(), fl.ASFTLoss()], ids=str)
    def test_losses_with_a_reference_report_their_own(self, loss):
        model = fl.patch(llama(), loss, reference=llama(7))
        fields = dict(confidence=torch.zeros(2, 6)) if isinstance(loss, fl.LAwFLoss) else {}
        want = model(**BATCH, **fields).loss
        with torch.no_grad():
            assert torch.equal(model.eval()(**BATCH, **fields).loss, want)

    def test_accuracy_is_there(self):
        model = fl.patch(llama(), fl.TALRLoss()).eval()
        with torch.no_grad():
            predictions = model(**BATCH).logits.argmax(-1)
        assert torch.equal(predictions[:, :-1] >= 0, LABELS[:, 1:] != -100)

    @pytest.mark.parametrize("make", [trainer, sft_trainer])
    def test_trainers_compare_objectives(self, make):
        options = dict(eval_data=rows(10, 5), per_device_eval_batch_size=10)
        want = expected(llama(), rows(10, 5), "ce")[0]
        losses = [
            make(fl.patch(llama(), loss), **options).evaluate()["eval_loss"]
            for loss in (None, fl.TALRLoss(), fl.DFTLoss())
        ]
        assert losses == pytest.approx([want] * 3, rel=1e-5)

    def test_a_model_that_is_trained_in_eval_mode(self):
        """from_pretrained gives it so: with gradients, and never in training mode since, it is trained as it is."""
        nll = nll_of(llama())
        want = ((-nll).exp().clamp(min=0.01) * nll).mean().item()
        model = fl.patch(llama().eval(), fl.TALRLoss(1.0))
        loss = model(**BATCH).loss
        assert loss.item() == pytest.approx(want, rel=1e-6)
        loss.backward()
        with torch.no_grad():
            assert model(**BATCH).loss.item() == pytest.approx(nll.mean().item(), rel=1e-6)

    def test_a_backward_of_what_only_evaluates_is_refused(self):
        model = fl.patch(llama().train(), fl.TALRLoss(1.0)).eval()
        with pytest.raises(
            RuntimeError,
            match=r"in eval\(\), which is the mean nll and not TALRLoss's.*model.train\(\).*eval_loss='objective'",
        ):
            model(**BATCH).loss.backward()
        model.train()(**BATCH).loss.backward()
        fl.patch(llama().train(), eval_loss="nll").eval()(**BATCH).loss.backward()  # cross-entropy is the same in both

    def test_bad_value(self):
        with pytest.raises(ValueError, match="eval_loss: expected 'nll' or 'objective', got 'ce'"):
            fl.patch(llama(), eval_loss="ce")


class TestWithoutLabels:
    """Generation and scoring are meant; a backward through logits in training mode is another loss."""

    def test_backward_through_logits(self):
        model = fl.patch(llama().train(), fl.TALRLoss())
        out = model(input_ids=IDS)
        assert torch.equal(out.logits, llama()(input_ids=IDS).logits)
        with pytest.raises(
            RuntimeError,
            match=r"in training mode: its loss is made elsewhere.*TALRLoss of fused_losses.patch would not be used",
        ):
            F.cross_entropy(out.logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()).backward()
        with pytest.raises(RuntimeError, match="would not be used"):
            model(input_ids=IDS, return_dict=False)[0].sum().backward()
        model.eval()(input_ids=IDS).logits.sum().backward()
        fl.unpatch(model.train())(input_ids=IDS).logits.sum().backward()

    @pytest.mark.parametrize("place", [lambda loss: loss, lambda loss: (loss, None)], ids=["alone", "in a tuple"])
    def test_a_loss_in_the_place_of_the_forward(self, place):
        """As trainers put one there for the time of a call. Plain cross-entropy adds nothing that it would lack."""
        for loss in (fl.TALRLoss(), fl.CrossEntropyLoss(label_smoothing=0.1), fl.CrossEntropyLoss()):
            model = fl.patch(llama().train(), loss)
            own = model.forward

            def forward(ids, own=own, model=model):
                model.forward = own
                return place(model.model(ids).last_hidden_state.sum() + model.lm_head.weight.sum())

            model.forward = forward
            made = model(IDS)
            made = made[0] if isinstance(made, tuple) else made
            if type(loss) is fl.CrossEntropyLoss and loss.is_plain:
                made.backward()
            else:
                with pytest.raises(
                    RuntimeError, match=f"{type(loss).__name__} of fused_losses.patch would not be used"
                ):
                    made.backward()

    def test_what_is_meant(self):
        model = fl.patch(llama().train(), fl.TALRLoss())
        model.generate(IDS[:, :3], max_new_tokens=2, do_sample=False)
        first = model(input_ids=IDS[:, :3], use_cache=True)  # a generation of one's own, with gradients on
        more = model(input_ids=IDS[:, 3:4], **{cache_names.INSTALLED: first[cache_names.INSTALLED]})
        assert more.logits.shape[1] == 1
        with torch.no_grad():
            model(input_ids=IDS)
        model(**BATCH).loss.backward()

    @pytest.mark.filterwarnings("ignore:`(label_smoothing_factor|compute_loss_func)` is deprecated:FutureWarning")
    @pytest.mark.parametrize("bf16", [False, True])
    @pytest.mark.parametrize("option", ["label_smoothing_factor", "compute_loss_func"])
    @pytest.mark.parametrize("make", [trainer, sft_trainer])
    def test_trainers_that_make_the_loss_themselves(self, make, option, bf16):
        def twice(outputs, labels, num_items_in_batch=None):
            return 2 * F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

        model = fl.patch(llama().float(), fl.TALRLoss())
        run = make(model, bf16=bf16, **{option: 0.1 if option == "label_smoothing_factor" else twice})
        with pytest.raises((ValueError, RuntimeError), match=r"TALRLoss of fused_losses\.patch would not be used"):
            run.train()


class TestAllMasked:
    def data(self):
        data = rows()
        for row in data[2:4]:
            row["labels"] = [-100] * len(row["labels"])
        return data

    @pytest.mark.parametrize("loss", [None, fl.TALRLoss(), fl.TALRLoss(2.0)], ids=str)
    def test_a_batch_of_a_trainer(self, loss):
        options = dict(
            per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=4, logging_steps=1, learning_rate=0.1
        )
        run = trainer(fl.patch(llama(), loss), self.data(), self.data(), **options)
        assert run.evaluate()["eval_loss"] == pytest.approx(
            sum(expected(llama(), self.data()[a : a + 2], "ce")[0] for a in (0, 4, 6)) / 4, rel=1e-6
        )
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert losses[1] == 0 and min(losses[0], *losses[2:]) > 0
        assert any(not torch.equal(p, before[name]) for name, p in run.model.named_parameters())

    @pytest.mark.parametrize("make", [trainer, sft_trainer])
    def test_as_unpatched(self, make):
        options = dict(per_device_train_batch_size=2, max_steps=4, learning_rate=0.1)
        ours, theirs = (
            step(make(fl.patch(llama()), self.data(), **options)),
            step(make(llama(), self.data(), **options)),
        )
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-7)

    def test_zero_items(self):
        model = fl.patch(llama())
        for items in (0, torch.tensor(0), 0.0):
            out = model(input_ids=IDS, labels=torch.full_like(IDS, -100), num_items_in_batch=items)
            out.loss.backward()
            assert out.loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())
            with pytest.raises(ValueError, match="num_items: expected the number of tokens"):
                model(**BATCH, num_items_in_batch=items)

    def test_lawf(self):
        model = fl.patch(llama(), fl.LAwFLoss(), reference="start")
        out = model(
            input_ids=IDS, labels=torch.full_like(IDS, -100), confidence=torch.zeros(2, 6), num_items_in_batch=0
        )
        assert out.loss == 0


class TestMetrics:
    """A Trainer with compute_metrics wants logits, which it would notice in its first evaluation."""

    def test_said_when_the_trainer_is_made(self):
        with pytest.raises(TypeError, match=r"compute_metrics: gets no logits.*keep_logits='eval'"):
            trainer(fl.patch(llama()), compute_metrics=lambda _: {})

    def test_where_it_is_all_right(self):
        trainer(fl.patch(llama(), keep_logits="eval"), compute_metrics=lambda _: {})
        trainer(fl.patch(llama()))
        model = fl.patch(llama())
        fl.unpatch(model)
        trainer(model, compute_metrics=lambda _: {})

    def test_with_peft(self):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(fl.patch(llama()), LoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(TypeError, match="compute_metrics: gets no logits"):
            trainer(model, compute_metrics=lambda _: {})


class TestPassedBy:
    """A forward that never reached the patch is noticed when it makes a loss."""

    def test_a_method_kept_from_before(self):
        model = llama()
        kept = model.forward
        fl.patch(model, fl.TALRLoss())
        with pytest.raises(RuntimeError, match=r"called past its patch, so TALRLoss .*call model\(\.\.\.\)"):
            kept(**BATCH)
        assert kept(input_ids=IDS).logits.shape[:2] == IDS.shape  # without a loss it is no matter
        fl.unpatch(model)
        assert kept(**BATCH).loss > 0

    def test_the_forward_of_the_class(self):
        model = fl.patch(llama(), fl.TALRLoss())
        with pytest.raises(RuntimeError, match=r"LlamaForCausalLM\.forward"):
            LlamaForCausalLM.forward(model, **BATCH)

    def test_a_model_that_calls_cross_entropy_itself(self):
        class Own(LlamaForCausalLM):
            def forward(self, input_ids=None, labels=None, **kwargs):
                logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
                return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

        model = Own(llama().config)
        kept = model.forward
        fl.patch(model, fl.TALRLoss())
        with pytest.raises(RuntimeError, match="called past its patch"):
            kept(**BATCH)

    def test_a_loop_of_ones_own_is_none(self):
        model = fl.patch(llama(), fl.TALRLoss())
        logits = model.lm_head(model.model(input_ids=IDS).last_hidden_state)
        model.loss_function(logits, LABELS, logits.shape[-1]).backward()
        assert fl.TALRLoss()(model.model(input_ids=IDS).last_hidden_state, model.lm_head, LABELS) > 0

    @pytest.mark.parametrize("order", ["patch, PEFT", "PEFT, patch"])
    def test_llama_adapter(self, order):
        import peft

        config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1)
        nll = nll_of(llama())
        want = ((-nll).exp().clamp(min=0.01) * nll).mean().item()
        if order == "patch, PEFT":
            model = peft.get_peft_model(fl.patch(llama(), fl.TALRLoss(1.0)), config)
        else:
            model = fl.patch(peft.get_peft_model(llama(), config), fl.TALRLoss(1.0))
        kept = model.base_model.forward
        assert model(**BATCH).loss.item() == pytest.approx(want, rel=1e-6)
        fl.unpatch(model)
        assert model(**BATCH).loss.item() == pytest.approx(nll.mean().item(), rel=1e-6)
        assert order == "patch, PEFT" or model.base_model.forward != kept


class TestHooksOfTheHead:
    @pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
    def test_backward_hooks_run_once(self, register):
        model, seen = fl.patch(llama()), []
        handle = getattr(model.lm_head, register)(lambda module, *grads: seen.append([g[0] is not None for g in grads]))
        model(**BATCH).loss.backward()
        assert len(seen) == 1 and all(seen[0])
        handle.remove()
        model(**BATCH).loss.backward()
        assert len(seen) == 1

    def test_the_gradient_of_its_input(self):
        found = []
        for patched in (False, True):
            model = llama()
            if patched:
                fl.patch(model)
            model.lm_head.register_full_backward_hook(
                lambda module, grad_input, grad_output: found.append(grad_input[0])
            )
            model(**BATCH).loss.backward()
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-8)

"""A patched model whose reference's hidden states are kept on disk: what is computed, what is found, what never."""

import copy
from pathlib import Path

import cache_names
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fused_losses as fl

V = 97

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning:transformers")


def llama(cls=LlamaForCausalLM):
    torch.manual_seed(1)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return cls(LlamaConfig(vocab_size=V, initializer_range=0.3, pad_token_id=0, **sizes))


def adapted(trained=False, **options):
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **options))
    if trained:
        torch.manual_seed(3)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn(p.shape))
    return model


def rows(*lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, V, (n,), generator=g) for n in lengths]


def batch(rows, side="right"):
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side=side)
    confidence = torch.zeros(ids.shape)
    confidence[0, -1 if side == "left" else 3] = 1
    return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), confidence=confidence)


class Counted:
    """How often the reference's body runs: each call of the patched model beyond its own forward."""

    def __init__(self, model):
        self.body = (model.get_base_model() if hasattr(model, "peft_config") else model).base_model
        self.body.register_forward_pre_hook(self.count)
        self.forwards = 0

    def count(self, *_):
        self.forwards += 1


def references(model, inputs, counted, own=1):
    """Forwards of the reference for one batch; and the loss."""
    before = counted.forwards
    loss = model(**inputs).loss
    return counted.forwards - before - own, loss


def test_second_epoch_runs_no_reference(tmp_path):
    model = adapted()
    uncached = fl.patch(copy.deepcopy(model), fl.LAwFLoss(), reference="base")
    fl.patch(model, fl.LAwFLoss(), reference="base", reference_cache=tmp_path)
    counted, data = Counted(model), rows(9, 12, 7, 10)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    order = [[(0, 1), (2, 3)], [(3, 0), (1, 2)], [(2, 0), (3, 1)]]
    for epoch, batches in enumerate(order):
        for which in batches:
            inputs = batch([data[i] for i in which])
            uncached.load_state_dict(model.state_dict())
            ran, loss = references(model, inputs, counted)
            assert ran == (epoch == 0)
            torch.testing.assert_close(loss, uncached(**inputs).loss, rtol=1e-6, atol=1e-7)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(list(Path(tmp_path).rglob("*.safetensors"))) == 4
    assert loss > 0 and any(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_another_process_finds_it(tmp_path):
    inputs = batch(rows(9, 12))
    for ran_once in (1, 0):
        model = fl.patch(adapted(), fl.LAwFLoss(), reference="base", reference_cache=tmp_path)
        ran, _ = references(model, inputs, Counted(model))
        assert ran == ran_once


@pytest.mark.parametrize(
    "change", ["token", "order", "length", "position", "weight", "frozen adapter", "scaling", "config"]
)
def test_what_changed_is_not_served(tmp_path, change):
    trained = change in ("frozen adapter", "scaling")
    model = fl.patch(
        adapted(trained), fl.LAwFLoss(), reference="start" if trained else "base", reference_cache=tmp_path
    )
    data = rows(9, 9)
    model(**batch(data))
    options = dict(lora_alpha=3) if change == "scaling" else {}
    model = adapted(trained, **options)
    base = model.get_base_model()
    if change == "token":
        data[1][4] += 1 if data[1][4] < V - 1 else -1
    elif change == "order":
        data[1] = data[1].flip(0)
    elif change == "length":
        data[1] = data[1][:-1]
    elif change == "weight":
        with torch.no_grad():
            base.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-6
    elif change == "frozen adapter":
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "lora_A" in n)[0, 0] += 1e-6
    elif change == "config":
        base.config.rms_norm_eps *= 2
    inputs = batch(data)
    if change == "position":
        inputs["position_ids"] = torch.arange(9).expand(2, 9) + 1
    fl.patch(model, fl.LAwFLoss(), reference="start" if trained else "base", reference_cache=tmp_path)
    ran, loss = references(model, inputs, Counted(model))
    assert ran == 1
    plain = fl.patch(copy.deepcopy(fl.unpatch(model)), fl.LAwFLoss(), reference="start" if trained else "base")
    assert torch.equal(plain(**inputs).loss, loss)


def test_a_weight_changed_while_training(tmp_path):
    """Of a frozen weight, in place; the guard sees it."""
    model = fl.patch(adapted(), fl.LAwFLoss(), reference="base", reference_cache=tmp_path)
    counted, inputs = Counted(model), batch(rows(9, 12))
    assert [references(model, inputs, counted)[0] for _ in range(2)] == [1, 0]
    with torch.no_grad():
        model.get_base_model().model.norm.weight.mul_(1.1)
    assert [references(model, inputs, counted)[0] for _ in range(2)] == [1, 0]


@pytest.mark.parametrize("damage", ["truncated", "a byte", "empty", "of another row"])
def test_damaged_files_are_made_again(tmp_path, damage):
    model = fl.patch(adapted(), fl.LAwFLoss(), reference="base", reference_cache=tmp_path)
    counted, inputs = Counted(model), batch(rows(9, 12))
    _, want = references(model, inputs, counted)
    one, other = sorted(Path(tmp_path).rglob("*.safetensors"))
    content = bytearray(one.read_bytes())
    if damage == "a byte":
        content[-7] ^= 1
    one.write_bytes(
        {"truncated": content[:-20], "empty": b"", "of another row": other.read_bytes()}.get(damage, content)
    )
    with pytest.warns(RuntimeWarning):
        ran, loss = references(model, inputs, counted)
    assert ran == 1 and torch.equal(loss, want)
    assert references(model, inputs, counted)[0] == 0


def test_left_padding(tmp_path):
    """Rows with the same tokens at other positions are not mixed up: GPT-2 counts positions from the left."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=1, n_head=4, n_positions=32)).eval()
    data = rows(5, 12)
    for side in ("right", "left", "right", "left"):
        inputs = batch(data, side)
        cached, plain = (copy.deepcopy(model) for _ in range(2))
        fl.patch(cached, fl.LAwFLoss(), reference="start", reference_cache=tmp_path)
        fl.patch(plain, fl.LAwFLoss(), reference="start")
        with torch.no_grad():
            for m in (cached, plain):
                m.transformer.wpe.weight.mul_(2)  # the models have left their start
        for _ in range(2):  # the first call of a process always runs a reference of its own
            torch.testing.assert_close(cached(**inputs).loss, plain(**inputs).loss, rtol=1e-5, atol=0)


def test_packed_rows_count_as_one(tmp_path):
    model = fl.patch(adapted(), fl.LAwFLoss(), reference="base", reference_cache=tmp_path)
    counted, ids = Counted(model), torch.cat(rows(5, 7))[None]
    inputs = dict(input_ids=ids, labels=ids, confidence=torch.zeros(ids.shape), use_cache=False)
    apart = torch.cat([torch.arange(5), torch.arange(7)])[None]
    ran = [references(model, {**inputs, "position_ids": p}, counted)[0] for p in (apart, apart, torch.arange(12)[None])]
    assert ran == [1, 0, 1]


def test_another_model_with_a_cache(tmp_path):
    teacher = llama()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.5)
    data = [batch(rows(9, 12)), batch(rows(8, 6, seed=1))]
    counted, ran = Counted(teacher), []
    for _ in range(2):
        model = fl.patch(adapted(trained=True), fl.LAwFLoss(), reference=teacher, reference_cache=tmp_path)
        for inputs in data:
            want = fl.patch(adapted(trained=True), fl.LAwFLoss(), reference=copy.deepcopy(teacher))(**inputs).loss
            n, loss = references(model, inputs, counted, own=0)
            torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
            ran.append(n)
    assert ran == [1, 1, 1, 0]  # the first call learns what the teacher does to its logits


def test_another_model_with_an_adapter(tmp_path):
    """Only its scaling differs."""
    inputs, losses = batch(rows(9, 12)), []
    for alpha in (4, 4, 16):
        teacher = adapted(trained=True, lora_alpha=alpha)
        model = fl.patch(llama(), fl.LAwFLoss(), reference=teacher, reference_cache=tmp_path)
        for _ in range(2):  # the first call runs the teacher in any case
            losses.append(model(**inputs).loss.item())
        assert losses[-1] == pytest.approx(losses[-2], rel=1e-6)
    assert losses[0] == losses[2] and abs(losses[4] / losses[0] - 1) > 0.1


def test_a_copy_looks_at_its_own_model(tmp_path):
    model = fl.patch(adapted(), fl.LAwFLoss(), reference="base", reference_cache=tmp_path)
    inputs = batch(rows(9, 12))
    model(**inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_base_model().model.norm.weight.mul_(1.3)
    assert references(twin, inputs, Counted(twin))[0] == 1


def test_autocast_has_states_of_its_own(tmp_path):
    model = fl.patch(adapted(), fl.LAwFLoss(), reference="base", reference_cache=tmp_path)
    counted, inputs = Counted(model), batch(rows(9, 12))
    ran = []
    for enabled in (True, False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            ran.append(references(model, inputs, counted)[0])
    assert ran == [1, 1, 0, 0]


def test_inputs_that_are_not_one_per_token(tmp_path):
    """Such as images, whose number may equal that of the rows: they are part of every row's key."""
    model = fl.patch(adapted(), fl.LAwFLoss(), reference="base", reference_cache=tmp_path)
    counted, inputs = Counted(model), batch(rows(9, 12))
    images = torch.zeros(2, 3)
    other = images.clone()
    other[1] = 1
    assert [references(model, {**inputs, "images": x}, counted)[0] for x in (images, images, other)] == [1, 0, 1]


def test_a_row_of_padding_alone(tmp_path):
    model = fl.patch(adapted(), fl.LAwFLoss(), reference="base", reference_cache=tmp_path)
    counted, inputs = Counted(model), batch(rows(9, 12))
    inputs["attention_mask"][0], inputs["labels"][0], inputs["confidence"][0] = 0, -100, 0
    assert [references(model, inputs, counted)[0] for _ in range(2)] == [1, 0]


def test_labels_at_padding(tmp_path):
    model = fl.patch(adapted(trained=True), fl.LAwFLoss(), reference=llama(), reference_cache=tmp_path)
    plain = fl.patch(adapted(trained=True), fl.LAwFLoss(), reference=llama())
    inputs = batch(rows(9, 12))
    inputs["labels"][0, -1] = 4
    for _ in range(2):
        torch.testing.assert_close(model(**inputs).loss, plain(**inputs).loss, rtol=1e-6, atol=0)


def test_inputs_without_a_digest_are_computed_each_time(tmp_path):
    model = fl.patch(adapted(), fl.LAwFLoss(), reference="base", reference_cache=tmp_path)
    counted, inputs = Counted(model), batch(rows(9, 12))
    assert [references(model, {**inputs, "note": [1]}, counted)[0] for _ in range(2)] == [1, 1]


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("given", [*cache_names.NAMES, "cache_params", "state"])
@pytest.mark.parametrize("own", cache_names.NAMES)
def test_a_cache_is_refused_by_whatever_name(own, given):
    """The reference would see its tokens, and write to it."""
    model = fl.patch(llama(cache_names.llama_class(own)), fl.LAwFLoss(), reference="start")
    with pytest.raises(ValueError, match=f"^{given}: given together with labels and a reference"):
        model(**batch(rows(9, 12)), **{given: DynamicCache()})


def test_directory(tmp_path):
    with pytest.raises(TypeError, match="reference_cache: expected a directory, got int"):
        fl.patch(adapted(), fl.LAwFLoss(), reference="base", reference_cache=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"reference_cache: .*file cannot be a directory.*give another"):
        fl.patch(adapted(), fl.LAwFLoss(), reference="base", reference_cache=tmp_path / "file")

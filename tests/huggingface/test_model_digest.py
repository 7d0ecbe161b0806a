"""The digest of a model whose states are kept: another for whatever changes; and what notices that a model changed."""

import time

import pytest
import torch

from fused_losses.huggingface.digest import Unchanged, model_digest, model_facts


def model():
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    net.register_buffer("angles", torch.arange(3.0), persistent=False)
    return net


def tensors(net):
    return [*net.named_parameters(), *net.named_buffers()]


def changed(change):
    net = model()
    with torch.no_grad():
        change(net)
    return net


CHANGES = {
    "last bit of a weight": lambda net: net[0].weight.view(-1)[-1:].view(torch.int32).bitwise_xor_(1),
    "zero's sign": lambda net: net[1].bias[0].neg_(),  # 0 → −0
    "integer buffer": lambda net: net[1].num_batches_tracked.add_(1),
    "buffer that is not persistent": lambda net: net.angles[2].add_(1),
    "dtype": lambda net: net.bfloat16(),
    "dtype with the same bytes": lambda net: net.register_buffer("angles", net.angles.view(torch.int32)),
    "another name": lambda net: net.register_module("2", net._modules.pop("1")),
    "adapter": lambda net: net.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(1))),
    "shape": lambda net: setattr(net[0], "weight", torch.nn.Parameter(net[0].weight.reshape(4, 3))),
    "two weights exchanged": lambda net: net[0].weight.copy_(net[0].weight[[1, 0, 2]]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_gives_another_digest(change):
    assert model_digest(tensors(model())) == model_digest(tensors(model()))
    assert model_digest(tensors(changed(change))) != model_digest(tensors(model()))


def test_digest_separates_the_further_strings():
    net = tensors(model())
    digests = [model_digest(net, *more) for more in ((), ("",), ("ab",), ("a", "b"), ("b", "a"), ("ab", ""))]
    assert len(set(digests)) == len(digests)


def test_digest_does_not_depend_on_layout_order_or_tying():
    base = torch.randn(8, 6)
    plain = model_digest([("a", base), ("b", base.clone())])
    assert model_digest([("a", base), ("b", base)]) == plain
    assert model_digest(reversed([("a", base), ("b", base.clone())])) == plain
    wide = torch.randn(8, 12)
    wide[:, ::2] = base
    assert model_digest([("a", wide[:, ::2]), ("b", base.t().contiguous().t())]) == plain
    assert model_digest([("a", torch.nn.Parameter(base)), ("b", base)]) == plain
    assert model_digest([("a", base), ("b", base.t())]) != plain
    square = torch.randn(4, 4)
    pair = [("a", square), ("b", square.t())]  # one memory, two contents
    assert model_digest(pair) == model_digest([(name, tensor.clone()) for name, tensor in pair])


def test_digest_of_tensors_that_exist_only_while_they_are_listed():
    """Freed memory is used again, so an address alone does not make two tensors one."""
    parts = [torch.full((1000,), float(n)) for n in range(5)]
    expected = model_digest([(str(n), part * 2) for n, part in enumerate(parts)])

    def passing():
        for n, part in enumerate(parts):
            time.sleep(0.01)  # the one before has been read
            yield str(n), part * 2

    assert model_digest(passing()) == expected


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int8,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
    ],
    ids=str,
)
def test_digest_of_any_dtype(dtype):
    values = (torch.arange(6) % 2).to(dtype)
    other = values.clone()
    other[3:4] = 0
    assert model_digest([("a", values[::2])]) == model_digest([("a", values[::2].clone())])
    assert model_digest([("a", values)]) != model_digest([("a", other)])
    assert model_digest([("a", values[:0]), ("b", values[0])]) != model_digest([("a", values[0]), ("b", values[:0])])


def test_digest_sees_every_chunk(monkeypatch):
    monkeypatch.setattr("fused_losses.huggingface.digest.CHUNK", 64)
    base = torch.zeros(53, dtype=torch.uint8).repeat(5)
    for layout in (lambda t: t, lambda t: torch.stack([t, t], 1)[:, 0]):
        digests = {model_digest([("a", layout(base))])}
        assert digests == {model_digest([("a", base)])}
        for at in range(len(base)):
            flipped = base.clone()
            flipped[at] = 1
            digests.add(model_digest([("a", layout(flipped))]))
        assert len(digests) == len(base) + 1


def test_a_conjugate_is_hashed_by_value():
    values = torch.tensor([1 + 2j, 3 - 1j])
    assert model_digest([("a", values.conj())]) == model_digest([("a", values.conj().resolve_conj())])
    pair = [("a", values.conj()), ("b", values)]
    assert model_digest(pair) == model_digest([("a", values.conj().resolve_conj()), ("b", values)])


class Wrapper(torch.Tensor):
    def __tensor_flatten__(self):
        return [], None


@pytest.mark.parametrize(
    "attempt, kind, message",
    [
        (lambda: model_digest([("w", torch.empty(2, device="meta"))]), ValueError, "w: is on the meta device.*load"),
        (lambda: model_digest([("w", sharded())]), TypeError, "w: is sharded .*DTensor.*gather"),
        (lambda: model_digest([("w", zero3())]), TypeError, "w: is sharded .*gather"),
        (lambda: model_digest([("w", torch.ones(2).to_sparse())]), TypeError, "w: expected a plain strided.*sparse"),
        (lambda: model_digest([("w", torch.ones(2).as_subclass(Wrapper))]), TypeError, "w: expected.*Wrapper.*made of"),
        (lambda: model_digest([]), ValueError, "at least one.*once"),
        (lambda: model_digest(model()), TypeError, "module.*named_parameters"),
        (lambda: model_digest(model().state_dict()), TypeError, r"pairs, got str.*state\.items"),
        (lambda: model_digest(tensors(model()), {}), TypeError, r"more.*dict.*json\.dumps"),
        (lambda: model_facts(model()), TypeError, "model.*Hugging Face.*Sequential"),
    ],
)
def test_errors_of_the_digest(attempt, kind, message):
    with pytest.raises(kind, match=message):
        attempt()


def sharded():
    DTensor = type("DTensor", (torch.Tensor,), {})
    return torch.ones(2).as_subclass(DTensor)


def zero3():
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_id = 1
    return parameter


def tiny_llama(**options):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | options))


def test_model_facts_of_a_hugging_face_model(tmp_path):
    net = tiny_llama()
    facts = model_facts(net)
    assert facts == model_facts(tiny_llama())
    copies = []
    for name in ("a", "b"):
        net.save_pretrained(tmp_path / name)
        copies.append(type(net).from_pretrained(tmp_path / name))
    a, b = copies
    b.config.use_cache, b.config.transformers_version = not a.config.use_cache, "0"
    assert a.config._name_or_path != b.config._name_or_path and model_facts(a) == model_facts(b)
    for other in (
        tiny_llama(rms_norm_eps=1e-5),
        tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 123.0}),
        tiny_llama(attn_implementation="eager"),
        tiny_llama().bfloat16(),
    ):
        assert model_facts(other) != facts


# ---- Unchanged


def replaced(net):
    net[0].bias = torch.nn.Parameter(net[0].bias.detach())


def step(net):
    net[0](torch.ones(1, 4)).sum().backward()
    torch.optim.AdamW(net.parameters(), foreach=True).step()


def moved(net):
    net[0].weight.data = net[0].weight.data.clone()


SEEN = {
    "in place": lambda net: net[0].weight.detach().view(-1)[0].add_(1),
    "optimizer": step,
    "load_state_dict": lambda net: net.load_state_dict(net.state_dict()),
    "buffer": lambda net: net[1](torch.randn(2, 3)),
    "new data": moved,
    "new parameter on the same memory": replaced,
    "dtype": lambda net: net.half(),
    "new tensor": lambda net: net.register_buffer("more", torch.ones(1)),
    "tensor removed": lambda net: net._modules.pop("1"),
    "in place by out=": lambda net: torch.zeros(3, out=net[0].bias.detach()),
}


@pytest.mark.parametrize("change", SEEN.values(), ids=SEEN)
def test_unchanged_sees(change):
    net = model()
    guard = Unchanged(lambda: tensors(net))
    net.eval()(torch.randn(2, 4)).sum().backward()
    assert guard.holds() and guard.holds()
    change(net.train())
    assert not guard.holds()


def test_unchanged_sees_a_last_tensor_come_and_go():
    parts = [("a", torch.ones(2)), ("b", torch.ones(2))]
    guard = Unchanged(lambda: parts)
    last = parts.pop()
    assert not guard.holds()
    parts += [last, ("c", torch.ones(2))]
    assert not guard.holds()
    parts.pop()
    assert guard.holds()


def test_unchanged_sees_new_memory_at_the_old_address():
    memory = bytearray(64)
    parameter = torch.nn.Parameter(torch.frombuffer(memory, dtype=torch.float32))
    guard = Unchanged([("a", parameter)])
    assert guard.holds()
    before = parameter.data_ptr()
    parameter.data = torch.frombuffer(memory, dtype=torch.float32)
    assert parameter.data_ptr() == before and not guard.holds()


def test_unchanged_of_listed_tensors_holds_none_alive():
    net = model()
    guard = Unchanged(tensors(net))
    assert guard.holds()
    net[0].bias = torch.nn.Parameter(torch.zeros(3))
    assert not guard.holds()  # the listed one is gone


def test_unchanged_does_not_see_writes_through_data():
    """As its docstring says; where this fails, say there that it does."""
    net = model()
    guard = Unchanged(lambda: tensors(net))
    net[0].weight.data += 1
    assert guard.holds()


def test_unchanged_never_holds_for_inference_tensors():
    with torch.inference_mode():
        net = model()
    assert not Unchanged(lambda: tensors(net)).holds()
    assert len(model_digest(tensors(net))) == 64

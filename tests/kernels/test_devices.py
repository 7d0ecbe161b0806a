"""Devices other than CPUs and NVIDIA's GPUs, of which none is here: what is decided for them, and by which rule."""

import types

import cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fused_losses as fl
from fused_losses import backends, devices, preparation, selfcheck
from fused_losses.backends import chunks, gpu_scan
from fused_losses.kernels import schemas
from fused_losses.kernels.triton import tiles
from fused_losses.objectives import eksft


@pytest.fixture
def rocm(monkeypatch):
    """As a torch for AMD GPUs on a machine with an MI300."""
    properties = types.SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=304)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.4.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 4))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    fresh(monkeypatch)


@pytest.fixture
def xpu(monkeypatch):
    """As a torch for Intel GPUs."""
    monkeypatch.setattr(torch.xpu, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    fresh(monkeypatch)


def fresh(monkeypatch):
    monkeypatch.setattr(backends, "_no_triton", backends._no_triton.__wrapped__)
    monkeypatch.setattr(backends, "interpreted", lambda: False)
    monkeypatch.setattr(schemas, "load_cuda", schemas.load_cuda.__wrapped__)


@pytest.mark.parametrize("device_type, machine", [("cuda", "rocm"), ("xpu", "xpu")])
def test_triton_is_taken_where_its_check_agrees(device_type, machine, request, monkeypatch):
    request.getfixturevalue(machine)
    assert backends.unavailable("triton") is None
    monkeypatch.setattr(selfcheck, "reason", lambda kind: None)
    assert backends.chain(device_type)[-1] == ("triton", None)
    monkeypatch.setattr(selfcheck, "reason", lambda kind: f"off on {kind}")
    assert backends.chain(device_type)[-2:] == [("triton", f"off on {device_type}"), ("torch", None)]
    assert backends.choose("triton", device_type) == "triton"  # asked for by name


def test_cuda_kernels_are_not_for_amd(rocm):
    assert "AMD GPUs" in backends.unavailable("cuda")


def test_nvidia_needs_no_check(monkeypatch):
    monkeypatch.setattr(backends, "unavailable", lambda name: None if name == "triton" else "not built")
    monkeypatch.setattr(selfcheck, "reason", lambda kind: pytest.fail("checked"))
    assert backends.chain("cuda")[-1] == ("triton", None)


@pytest.mark.parametrize("capability, taken", [((9, 0), "cuda"), ((8, 0), "triton"), ((10, 0), "triton")])
def test_cuda_kernels_are_taken_where_they_were_measured_to_be_faster(capability, taken, monkeypatch):
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert backends.chain("cuda")[-1] == (taken, None)


def test_a_build_without_gpus_says_so(monkeypatch):
    fresh(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a build without GPUs" in backends.unavailable("triton")


def test_other_devices_take_plain_operations():
    assert backends.chain("mps") == backends.chain("meta") == [("torch", None)]


def test_amd_takes_tiles_without_hoppers_instructions(rocm):
    """Its capability looks like Hopper's."""
    device = torch.device("cuda", 0)
    assert gpu_scan._architecture(device) == tiles.PLAIN
    assert gpu_scan._architecture(torch.device("xpu", 0)) == tiles.PLAIN
    assert devices.architecture(device) == "gfx942" and devices.processors(device) == 304
    assert not any(row.descriptors for row in tiles.SCANS if row.architecture == tiles.PLAIN)


def test_wide_products_are_tried_before_they_are_taken(rocm, monkeypatch):
    """Older releases of torch for AMD refuse them, as one for a CPU does."""
    assert devices._tried_wide.__wrapped__("cpu") is False
    assert not devices.multiplies_wide(torch.ones(1))
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(devices, "_tried_wide", lambda kind: kind == "cuda")
    assert devices.multiplies_wide(on_gpu)
    monkeypatch.setattr(devices, "_tried_wide", lambda kind: False)
    assert not devices.multiplies_wide(on_gpu)


@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_bf16_is_widened_where_its_products_are_slow(gradient, monkeypatch):
    """On CPUs without instructions for bf16, and then no logit is rounded to it."""
    case, errors = cases.make(40, 24, 500, spread=4.0), {}
    truth = fl.token_losses(*case.inputs(torch.float64)[:2], case.labels).nll.detach()
    for fast in (False, True):
        monkeypatch.setattr(chunks, "multiplies_bfloat16", lambda fast=fast: fast)
        hidden, head, _ = case.inputs(torch.bfloat16)
        out = fl.token_losses(hidden, head, case.labels, gradient=gradient, backend="torch")
        out.nll.sum().backward()
        rounded = fl.token_losses(hidden.double(), fl.LMHead(head.weight.double()), case.labels).nll
        errors[fast] = float((out.nll.detach() - rounded.detach()).norm() / truth.norm())
    assert errors[False] < 1e-6 < 1e-4 < errors[True]


# --- the check


@pytest.fixture
def check(monkeypatch):
    """The reason found with some numbers in place of a backend's."""

    def run(change):
        plain = selfcheck._values("torch", "cpu")

        def values(backend, device_type):
            return change(dict(plain)) if backend == "triton" else plain

        monkeypatch.setattr(selfcheck, "_values", values)
        return selfcheck.reason.__wrapped__("cpu")

    return run


def test_the_check_passes_what_agrees(check):
    assert check(lambda values: {name: v * 1.001 for name, v in values.items()}) is None


@pytest.mark.parametrize("name", ["nll (exact)", "kl (sparse)", "the gradient of weight (sparse)"])
def test_the_check_names_what_is_off(check, name):
    with pytest.warns(UserWarning, match="backend 'triton' is not taken"):
        assert f"found {name} off by" in check(lambda values: {**values, name: values[name] * 1.1})


def test_numbers_that_are_none_are_off(check):
    nan = torch.full((1,), torch.nan)
    with pytest.warns(UserWarning):
        assert "off by nan" in check(lambda values: {**values, "nll (exact)": values["nll (exact)"] + nan})


@pytest.mark.parametrize(
    "message, said", [("no such instruction\nat line 3", "no such instruction"), ("", "no message")]
)
def test_a_compiler_that_fails_is_a_reason(check, message, said):
    def fail(values):
        raise RuntimeError(message)

    with pytest.warns(UserWarning):
        assert check(fail) == f"its check on cpu failed (RuntimeError: {said})"


def test_other_backends_pass_it():
    theirs = selfcheck._values("torch", "cpu")
    for name, ours in selfcheck._values("cpu", "cpu").items():
        assert (ours - theirs[name]).norm() <= selfcheck.TOLERANCE * theirs[name].norm(), name


# --- devices without float64, such as Apple's


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            assert not (isinstance(value, torch.Tensor) and value.dtype == torch.float64), function
        return out


@pytest.fixture
def without_float64(monkeypatch):
    for module in (preparation, eksft):
        monkeypatch.setattr(module, "has_float64", lambda device_type: False)


def twice(values):
    return torch.stack([values, values])


N, V = 12, 9000
TOKEN = torch.linspace(0.1, 2, N)
OBJECTIVES = {
    "cross-entropy": (fl.CrossEntropyLoss(0.1, 1e-3), {}),
    "talr": (fl.TALRLoss(), {}),
    "flow": (fl.FLOWLoss(1.0), {"initial_nll": torch.tensor([1.0, 2.0])}),
    "dft": (fl.DFTLoss(), {}),
    "asft": (fl.ASFTLoss(), {}),
    "eaft": (fl.EAFTLoss(), {}),
    "eksft": (fl.EKSFTLoss(), {}),
    "infosft": (fl.InfoSFTLoss(), {}),
    "jsd": (fl.JSDLoss(), {}),
    "lawf": (fl.LAwFLoss(), {"confidence": twice((TOKEN > 1).float())}),
    "mask the target": (fl.MaskTheTargetLoss(0.5), {}),
    "psft": (fl.PSFTLoss(), {"old_nll": twice(TOKEN)}),
    "reverse kl": (fl.ReverseKLLoss(), {}),
    "sft + kl": (fl.SFTKLLoss(0.3), {}),
    "stm": (fl.STMLoss(), {"initial_token_nll": twice(TOKEN)}),
    "weighted": (fl.WeightedLoss(), {"weights": twice(TOKEN)}),
    "top-k distillation": (
        fl.TopKDistillationLoss(),
        {"teacher_ids": torch.arange(2 * N * 3).view(2, N, 3), "teacher_logprobs": torch.full((2, N, 3), -2.0)},
    ),
}


def test_every_objective_is_tried():
    all_of_them = {cls for cls in vars(fl).values() if isinstance(cls, type) and issubclass(cls, fl.Objective)}
    assert {type(loss) for loss, _ in OBJECTIVES.values()} == all_of_them - {fl.Objective}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_needs_float64(name, dtype, without_float64):
    loss, fields = OBJECTIVES[name]
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((2, N, 16), (V, 16)))
    labels = torch.randint(V, (2, N))
    if loss.needs_reference:
        fields = {**fields, "reference": fl.Reference(torch.randn(2, N, 16).to(dtype))}
    with NoFloat64():
        value = loss(hidden, weight, labels, **fields)
        value.backward()
    assert value.isfinite() and hidden.grad.abs().sum() > 0


def test_sparse_gradients_are_refused_without_float64(without_float64):
    x = torch.randn(4, 16, requires_grad=True)
    with pytest.raises(ValueError, match=r"gradient='sparse': .*float64, which cpu devices do not have; give"):
        fl.token_losses(x, torch.randn(9000, 16), torch.randint(9000, (4,)), gradient="sparse")
    out = fl.token_losses(x.bfloat16(), torch.randn(9000, 16).bfloat16(), torch.randint(9000, (4,)))
    assert out.gradient_report.mode == "exact"


def test_which_devices_have_float64():
    assert devices.has_float64("cpu") and devices.has_float64("cuda") and not devices.has_float64("mps")

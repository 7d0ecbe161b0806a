"""One way to make inputs and one way to run them, so that every test compares the same things."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fused_losses as fl
from fused_losses.backends import chunks, int8
from fused_losses.sparse import certificate

OUTPUTS = ("nll", "kl", "entropy", "reference_nll", "reference_entropy")
MORE = ("lse", "logits_at", "divergence")
HEADS: list[dict[str, Any]] = [
    dict(), dict(bias=True), dict(scale=0.3), dict(softcap=7.0), dict(bias=True, scale=-1.7, softcap=4.0)
]  # fmt: skip
REFERENCES = [None, "shared", "own"]


def name(value: Any) -> str:
    """Of a parameter, in a test's id."""
    if isinstance(value, tuple):
        return "N{}-D{}-V{}".format(*value)
    if isinstance(value, dict):
        return "-".join(value) or "plain"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return {True: "frozen", False: "trainable", None: "no-reference"}.get(value, str(value))


@dataclass(frozen=True)
class Case:
    """Inputs of one call, float64; `run` casts them, so every dtype starts from the same rounded numbers."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    frozen: bool = False
    reference_hidden: Tensor | None = None
    reference_weight: Tensor | None = None  # None: the same head
    nll_upstream: Tensor | None = None
    kl_upstream: Tensor | None = None
    # Of the outputs that are asked for, see `with_more`.
    asked: dict[str, Any] = field(default_factory=dict)  # arguments of token_losses
    upstream: dict[str, Tensor] = field(default_factory=dict)  # by the output's name

    def rounded(self, dtype: torch.dtype) -> Case:
        names = ("hidden", "weight", "bias", "reference_hidden", "reference_weight")
        values = {n: getattr(self, n) for n in names}
        return replace(self, **{n: None if v is None else v.to(dtype).double() for n, v in values.items()})

    def inputs(self, dtype: torch.dtype, device: str = "cpu"):
        def leaf(value: Tensor | None, frozen: bool = False) -> Tensor | None:
            return None if value is None else value.to(device, dtype, copy=True).requires_grad_(not frozen)

        hidden, weight, bias = leaf(self.hidden), leaf(self.weight, self.frozen), leaf(self.bias, self.frozen)
        reference = None
        if self.reference_hidden is not None:
            own = leaf(self.reference_weight, True)
            reference = fl.Reference(leaf(self.reference_hidden, True), own)
        return hidden, fl.LMHead(weight, bias, self.scale, self.softcap), reference


def make(
    n=33, d=17, v=123, *, bias=False, reference=None, ignored=0.2, near=0.3, spread=2.0, seed=0, **options
) -> Case:
    """Random inputs: logits of standard deviation `spread`, a planted high one, upstream gradients of both signs."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = normal(n, d), normal(v, d) * spread / d**0.5
    labels = torch.randint(v, (n,), generator=g)
    labels[0], labels[-1] = 0, v - 1
    if n > 2:
        hidden[1] = weight[labels[1]] * (12 / weight[labels[1]].square().sum())  # a logit of 12 at the label
    drop = torch.rand(n, generator=g) < ignored
    drop[[0, -1]] = False
    return Case(
        hidden,
        weight,
        labels.masked_fill(drop, -100),
        bias=normal(v) if bias else None,
        reference_hidden=None if reference is None else hidden + near * normal(n, d),
        reference_weight=normal(v, d) * spread / d**0.5 if reference == "own" else None,
        nll_upstream=normal(n),
        kl_upstream=None if reference is None else normal(n),
        **options,
    )


def with_more(case: Case, k: int = 5, beta: float | None = 0.3, entropy: bool = True, seed: int = 1) -> Case:
    """The case with every other output asked for, and upstream gradients of both signs for each."""
    g = torch.Generator().manual_seed(seed)
    n, v = len(case.labels), len(case.weight)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    ids = torch.randint(v, (n, k), generator=g)
    ids[:, 0] = case.labels.clamp(min=0)  # the label among them
    ids[:, -1] = ids[:, 0]  # an id twice
    ids[1::3, 1:3] = -100
    asked: dict[str, Any] = {"ids": ids, "wanted": ("rank", "log_p2")}
    upstream = {"lse": normal(n), "logits_at": normal(n, k)}
    if entropy:
        asked["entropy_gradient"] = True
        upstream["entropy"] = normal(n)
    if case.reference_hidden is not None and beta is not None:
        asked["beta"] = beta
        upstream["divergence"] = normal(n)
    return replace(case, asked=asked, upstream=upstream)


def run(
    case: Case, dtype: torch.dtype, backend: str = "torch", gradient: str = "exact", device: str = "cpu", **options
) -> dict[str, Tensor]:
    """All outputs and gradients of `token_losses`, as float64 on the CPU."""
    return run_with_report(case, dtype, backend, gradient, device, **options)[0]


def run_with_report(
    case: Case, dtype: torch.dtype, backend: str = "torch", gradient: str = "exact", device: str = "cpu", **options
) -> tuple[dict[str, Tensor], certificate.GradientReport]:
    hidden, head, reference = case.inputs(dtype, device)
    labels = case.labels.to(device)
    asked = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in case.asked.items()}
    out = fl.token_losses(
        hidden, head, labels, reference=reference, backend=backend, gradient=gradient, **asked, **options
    )
    loss = (out.nll * case.nll_upstream.to(out.nll)).sum()
    if reference is not None:
        loss = loss + (out.kl * case.kl_upstream.to(out.kl)).sum()
    for name, upstream in case.upstream.items():
        loss = loss + (getattr(out, name) * upstream.to(out.nll)).sum()
    loss.backward()
    results = {name: getattr(out, name) for name in (*OUTPUTS, *MORE)}
    if "wanted" in asked:
        results |= {name: getattr(out, name) for name in asked["wanted"]}
    results |= {"d_hidden": hidden.grad, "d_weight": head.weight.grad}
    results["d_bias"] = None if head.bias is None else head.bias.grad
    found = {name: value.detach().double().cpu() for name, value in results.items() if value is not None}
    return found, out.gradient_report


def relative(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖."""
    return ((value.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-300)).item()


def rounded_difference(case: Case, dtype: torch.dtype) -> Case:
    """x = x_ref + (x − x_ref rounded once to `dtype`): what a product of that difference with the head sees."""
    seen = case.rounded(dtype)
    reference = seen.reference_hidden.double()
    return replace(seen, hidden=reference + (seen.hidden.double() - reference).to(dtype).double())


def errors(case: Case, dtype: torch.dtype, backend: str = "torch", **options) -> dict[str, float]:
    """Relative error of every output and gradient against the float64 oracle on the same rounded inputs."""
    case = case.rounded(dtype)
    truth, got = run(case, torch.float64, "reference"), run(case, dtype, backend, **options)
    assert got.keys() == truth.keys()
    return {name: relative(got[name], truth[name]) for name in truth}


def near_the_reference(reference: str, n: int = 64, d: int = 256, v: int = 4096) -> Case:
    """bf16 numbers, a KL of about 0.003 whose gradient alone is wanted: p − p_ref cancels."""
    case = make(n, d, v, reference="shared", ignored=0, near=0.018, spread=4.5)
    case = replace(case.rounded(torch.bfloat16), nll_upstream=torch.zeros(n), kl_upstream=torch.ones(n))
    return case if reference == "shared" else replace(case, reference_weight=case.weight.clone())


@contextlib.contextmanager
def coarse(
    threshold: float, capacity: int = certificate.CAPACITY, chunk_bytes: int | None = None,
    tolerance: float = certificate.TOLERANCE,
) -> Iterator[None]:  # fmt: skip
    """Another threshold, so that vocabularies small enough for full logits show what large ones do.

    `tolerance`: the call's, which must not make the threshold finer.
    """
    threshold /= min(1.0, tolerance / certificate.TOLERANCE) ** 2
    with (
        mock.patch.object(certificate, "THRESHOLD", threshold),
        mock.patch.object(certificate, "COARSER", 1.0),
        mock.patch.object(certificate, "CAPACITY", capacity),
        mock.patch.object(chunks, "CHUNK_BYTES", chunk_bytes or chunks.CHUNK_BYTES),
        mock.patch.object(int8, "FLAT", 2.0),  # a small vocabulary is nearly flat soon
    ):
        yield


def nearly_certain(lead: float, size: float, surer: float = 1.0) -> tuple[Tensor, ...]:
    """Hidden states of a model and of a reference `size` from `surer` times these, head, labels: the label's logit
    leads by about `lead` with the model."""
    weight = torch.randn(200, 16) / 4
    weight[:, 0] = 0
    weight[7] = torch.eye(16)[0]
    hidden = torch.randn(12, 16)
    hidden[:, 0] = lead + torch.rand(12)
    return hidden, surer * hidden + size * torch.randn(12, 16), weight, torch.full((12,), 7)


def gradient_of_kl(
    case: tuple[Tensor, ...], dtype: torch.dtype, beta: float | None = None, own_head: bool = False, **options
) -> tuple[float, Tensor]:  # fmt: skip
    """The mean KL of `nearly_certain`, with `beta` the divergence, and the gradient of the sum of all by the hidden
    states."""
    hidden, reference, weight, labels = case
    hidden = hidden.to(dtype, copy=True).requires_grad_()
    reference = fl.Reference(reference.to(dtype), fl.LMHead(weight.to(dtype, copy=True)) if own_head else None)
    out = fl.token_losses(hidden, weight.to(dtype), labels, reference=reference, beta=beta, **options)
    values = out.kl if beta is None else out.divergence
    values.sum().backward()
    assert options["gradient"] == "exact" or out.gradient_report.exact_tokens == 0
    return values.mean().item(), hidden.grad.double()

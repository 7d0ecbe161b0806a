"""Inputs of calls with LoRA on the head, what came of a call, and plain float64 operations on the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from cases import make, relative
from torch import Tensor

import fused_losses as fl
from fused_losses import reference as oracle

N, D, V, R = 33, 17, 123, 3


@dataclass
class Inputs:
    """Leaves of one call, with what does not need a gradient."""

    leaves: dict[str, Tensor]  # hidden, weight, b, a or rows, bias
    labels: Tensor
    upstream: tuple[Tensor, Tensor]
    scale: float
    softcap: float | None
    reference: str | None
    fixed: dict[str, Tensor]  # ref_hidden, ref_b, ref_rows, ref_weight

    def cast(self, dtype: torch.dtype, adapter: torch.dtype | None = None) -> Inputs:
        def to(key, value):
            return value.detach().to(adapter or dtype if key.split("_")[-1] in ["a", "b", "rows"] else dtype, copy=True)

        leaves = {k: to(k, v).requires_grad_(v.requires_grad) for k, v in self.leaves.items()}
        return replace(self, leaves=leaves, fixed={k: to(k, v) for k, v in self.fixed.items()})

    def to(self, device: str) -> Inputs:
        leaves = {k: v.detach().to(device).requires_grad_(v.requires_grad) for k, v in self.leaves.items()}
        fixed = {k: v.to(device) for k, v in self.fixed.items()}
        upstream = (self.upstream[0].to(device), self.upstream[1].to(device))
        return replace(self, leaves=leaves, labels=self.labels.to(device), upstream=upstream, fixed=fixed)

    def arguments(self):
        get, fixed = self.leaves.get, self.fixed
        weight, low_rank = get("weight"), fl.LowRank(get("b"), get("a"), get("rows"))
        head = fl.LMHead(weight, get("bias"), self.scale, self.softcap, low_rank)
        same = (weight.detach(), None if head.bias is None else head.bias.detach(), self.scale, self.softcap)
        own = {
            None: lambda: None,
            "off": lambda: None,
            "off, own LMHead": lambda: fl.LMHead(*same),
            "copy": lambda: fl.LMHead(*same, fl.LowRank(fixed["ref_b"][:, :-1], rows=fixed["ref_rows"][:, :-1])),
            "another rank": lambda: fl.LMHead(*same, fl.LowRank(fixed["ref_b"], rows=fixed["ref_rows"])),
            "same b": lambda: fl.LMHead(*same, fl.LowRank(get("b"), rows=fixed["ref_rows"][:, :-1])),
            "other model": lambda: fl.LMHead(
                fixed["ref_weight"], None, 0.9, self.softcap, fl.LowRank(fixed["ref_b"], fixed["ref_a"])
            ),
        }[self.reference]()
        return (
            get("hidden"),
            head,
            self.labels,
            None if self.reference is None else fl.Reference(fixed["ref_hidden"], own),
        )

    def logits(self):
        """Of the model and the reference, valid tokens, as one writes them down."""
        leaves, fixed = self.leaves, self.fixed
        u = leaves["hidden"] @ leaves["a"].T if "a" in leaves else leaves["rows"]
        base, bias = leaves["weight"].detach(), leaves.get("bias", torch.zeros((), device=self.labels.device)).detach()
        keep = self.labels != -100

        def finished(z, scale=self.scale):
            z = z[keep] * scale
            return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

        z = finished(leaves["hidden"] @ leaves["weight"].T + u @ leaves["b"].T + leaves.get("bias", 0))
        if self.reference is None:
            return z, None
        x = fixed["ref_hidden"]
        if self.reference == "other model":
            return z, finished(x @ fixed["ref_weight"].T + (x @ fixed["ref_a"].T) @ fixed["ref_b"].T, 0.9)
        extra = {
            "copy": (fixed["ref_rows"][:, :-1], fixed["ref_b"][:, :-1]),
            "another rank": (fixed["ref_rows"], fixed["ref_b"]),
            "same b": (fixed["ref_rows"][:, :-1], leaves["b"].detach()),
        }
        r = x @ base.T + bias
        if self.reference in extra:
            r = r + extra[self.reference][0] @ extra[self.reference][1].T
        return z, finished(r)

    def results(self, value: Tensor, /, **outputs: Tensor) -> dict[str, Tensor]:
        value.backward()
        return outputs | {f"d_{k}": v.grad for k, v in self.leaves.items() if v.requires_grad}


def inputs(
    form="a", reference=None, frozen=True, bias=False, scale=1.0, softcap=None, shape=(N, D, V), rank=R, near=0.3,
    spread=2.0,
) -> Inputs:  # fmt: skip
    n, d, v = shape
    case = make(n, d, v, reference="own", bias=bias, near=near, spread=spread)
    g = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    leaves = {"hidden": case.hidden, "weight": case.weight, "b": normal(v, rank) * 0.4}
    leaves |= {"a": normal(rank, d) / d**0.5} if form == "a" else {"rows": normal(n, rank)}
    if bias:
        leaves["bias"] = case.bias
    for key, leaf in leaves.items():
        leaf.requires_grad_(not (frozen and key in ("weight", "bias")))
    fixed = {
        "ref_hidden": case.reference_hidden,
        "ref_weight": case.reference_weight,
        "ref_b": normal(v, rank + 1) * 0.4,
    }
    fixed |= {"ref_a": normal(rank + 1, d) / d**0.5, "ref_rows": normal(n, rank + 1)}
    upstream = (case.nll_upstream, case.kl_upstream)
    return Inputs(leaves, case.labels, upstream, scale, softcap, reference, fixed)


def ids_of(given: Inputs) -> Tensor:
    """Three ids of each token, its label among them."""
    labels = given.labels.clamp(min=0)
    vocabulary = len(given.leaves["b"])
    return torch.stack([labels, (labels * 7 + 3) % vocabulary, (labels + vocabulary // 2) % vocabulary], 1)


def truth(given: Inputs) -> dict[str, Tensor]:
    given = given.cast(torch.float64)
    z, r = given.logits()
    keep = given.labels != -100
    ids = ids_of(given)[keep]
    out = {"nll": oracle.nll(z, given.labels[keep]), "entropy": oracle.entropy(z), "lse": z.logsumexp(1)}
    out["logits_at"] = z.gather(1, ids)
    value = ((out["nll"] - 0.3 * out["lse"] + out["logits_at"].sum(1)) * given.upstream[0][keep]).sum()
    if r is not None:
        out |= {
            "kl": oracle.kl(r, z),
            "reference_nll": oracle.nll(r, given.labels[keep]),
            "reference_entropy": oracle.entropy(r),
        }
        value = value + (out["kl"] * given.upstream[1][keep]).sum()
    return given.results(value, **{k: v.detach() for k, v in out.items()})


def ours(given: Inputs, backend="auto", gradient="exact", **options) -> dict[str, Tensor]:
    keep = given.labels != -100
    hidden, head, labels, reference = given.arguments()
    out = fl.token_losses(
        hidden, head, labels, reference=reference, ids=ids_of(given), backend=backend, gradient=gradient, **options
    )
    value = ((out.nll - 0.3 * out.lse + out.logits_at.sum(-1)) * given.upstream[0].to(out.nll)).sum()
    names = ["nll", "entropy", "lse", "logits_at"]
    if reference is not None:
        value = value + (out.kl * given.upstream[1].to(out.nll)).sum()
        names += ["kl", "reference_nll", "reference_entropy"]
    return given.results(value, **{k: getattr(out, k).detach()[keep] for k in names})


def errors(given: Inputs, dtype: torch.dtype, backend="auto", adapter=None, **options) -> dict[str, float]:
    given = given.cast(dtype, adapter)
    expected, got = truth(given), ours(given, backend, **options)
    assert got.keys() == expected.keys()
    for key, leaf in given.leaves.items():
        assert leaf.grad is None or leaf.grad.dtype == leaf.dtype, key
    return {key: relative(got[key], expected[key]) for key in expected}

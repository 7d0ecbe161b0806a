"""Who is measured on a GPU: this package, plain PyTorch, other packages where installed; and float64 truth for all."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpu_common import DRY
from torch import Tensor

import fused_losses as fl
from fused_losses import backends
from fused_losses.kernels.measure import Inputs

SEQUENCES = 8  # of TALR, N / 8 tokens each
ANCHORS = 20  # of LAwF, every so many tokens
OURS = "fused_losses, "
EIGHT_BIT = ", int8"  # of what takes scan="int8": losses without a reference
Loss = Callable[[Tensor, Tensor], Tensor]


class Missing(Exception):
    """A contestant that cannot run here; the message is its row."""


def need(module: str, attribute: str):
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        name = module.partition(".")[0]
        absent = isinstance(error, ModuleNotFoundError) and error.name in (name, module)
        raise Missing("not installed" if absent else f"does not import: {error}") from None
    except AttributeError:
        raise Missing(f"its version has no {attribute}") from None


def unfit(reason: str) -> Loss:
    def loss(x: Tensor, w: Tensor) -> Tensor:
        raise Missing(reason)

    return loss


def compiled(function: Loss) -> Loss:
    return torch.compile(function, dynamic=False, backend="eager" if DRY else "inductor")


def ours(make: Callable[..., Loss], gradients: tuple[str, ...], eight_bit: bool = False) -> dict[str, Loss]:
    """`make(gradient, backend)` for what runs here; the backend that "auto" takes has no name in brackets. `eight_bit`:
    also `make(gradient, backend, scan="int8")` of the first gradient."""
    device = "cpu" if DRY else "cuda"
    auto = "triton" if DRY else backends.choose("auto", device)
    result: dict[str, Loss] = {}
    for gradient in gradients:
        result[f"{OURS}{gradient}"] = make(gradient, auto)
    if eight_bit:
        result[f"{OURS}{gradients[0]}{EIGHT_BIT}"] = make(gradients[0], auto, scan="int8")
    for name in ("triton", "cuda"):
        if name == auto:
            continue
        reason = "dry run" if DRY else backends.unavailable(name)
        result[f"{OURS}{gradients[0]} ({name})"] = make(gradients[0], name) if reason is None else unfit(reason)
    return result


def contestants(objective: str, given: Inputs, gradients: tuple[str, ...] = ("sparse", "exact")) -> dict[str, Loss]:
    """{name: loss of hidden and weight}; names of this package begin with OURS."""
    return {"cross-entropy": _cross_entropy, "TALR": _talr, "LAwF": _lawf, "KL": _kl, "forward": _forward}[objective](
        given, gradients
    )


def _cross_entropy(given: Inputs, gradients: tuple[str, ...]) -> dict[str, Loss]:
    labels = given.labels

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((x @ w.T).float(), labels)

    def liger(x: Tensor, w: Tensor) -> Tensor:
        return need("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")()(w, x, labels)

    def liger_fp32(x: Tensor, w: Tensor) -> Tensor:
        loss = need("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")(accum_dtype=torch.float32)
        return loss(w, x, labels)

    def cce(x: Tensor, w: Tensor) -> Tensor:
        return need("cut_cross_entropy", "linear_cross_entropy")(x, w, labels)

    def quack(x: Tensor, w: Tensor) -> Tensor:
        return need("quack.linear_cross_entropy", "chunked_linear_cross_entropy")(x, w, labels)

    def pytorch(x: Tensor, w: Tensor) -> Tensor:
        options = need("torch.nn", "LinearCrossEntropyOptions")()
        return need("torch.nn.functional", "linear_cross_entropy")(x, w, labels, options=options)

    def make(gradient: str, backend: str, scan: str = "full") -> Loss:
        module = fl.CrossEntropyLoss(gradient=gradient, backend=backend, scan=scan)
        return _reporting(lambda x, w: module(x, w, labels), module, labels)

    return {
        **ours(make, gradients, "sparse" in gradients), "eager": _with_nll(eager, labels),
        "torch.compile": compiled(eager), "Liger": liger, "Liger, fp32 sums": liger_fp32, "CCE": cce, "QuACK": quack,
        "F.linear_cross_entropy": pytorch,
    }  # fmt: skip


def talr_weights(nll: Tensor) -> Tensor:
    tau = nll.view(SEQUENCES, -1).mean(1).quantile(0.5).clamp(min=1e-6)
    return (-nll / tau).exp().clamp(min=0.01)


def _talr(given: Inputs, gradients: tuple[str, ...]) -> dict[str, Loss]:
    labels = given.labels
    rows = labels.view(SEQUENCES, -1)

    def eager(x: Tensor, w: Tensor) -> Tensor:
        nll = F.cross_entropy((x @ w.T).float(), labels, reduction="none")
        return (talr_weights(nll.detach()) * nll).mean()

    def cce(x: Tensor, w: Tensor) -> Tensor:
        nll = need("cut_cross_entropy", "linear_cross_entropy")(x, w, labels, reduction="none")
        return (talr_weights(nll.detach().float()) * nll).mean()

    def liger(x: Tensor, w: Tensor) -> Tensor:
        nll = need("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")(reduction="none")(w, x, labels)
        return (talr_weights(nll.detach().float()) * nll).mean()

    def make(gradient: str, backend: str, scan: str = "full") -> Loss:
        module = fl.TALRLoss(gradient=gradient, backend=backend, scan=scan)
        return _reporting(lambda x, w: module(x.view(SEQUENCES, -1, x.shape[1]), w, rows), module, labels)

    return {
        **ours(make, gradients, "sparse" in gradients), "eager": _with_nll(eager, labels),
        "torch.compile": compiled(eager), "CCE, weights by hand": cce, "Liger, weights by hand": liger,
    }  # fmt: skip


def anchors(count: int, device: torch.device) -> Tensor:
    return (torch.arange(count, device=device) % ANCHORS == 0).float()


def _two_logits(given: Inputs, of_anchors: bool) -> Loss:
    labels, reference = given.labels, given.reference_hidden
    c = anchors(len(labels), labels.device)

    def eager(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            log_r = (reference @ w.T).float().log_softmax(1)
        log_p = (x @ w.T).float().log_softmax(1)
        kl = F.kl_div(log_p, log_r, log_target=True, reduction="none").sum(1)
        if not of_anchors:
            return kl.mean()
        return (c * -log_p.gather(1, labels[:, None])[:, 0] + (1 - c) * kl).mean()

    return eager


def _lawf(given: Inputs, gradients: tuple[str, ...]) -> dict[str, Loss]:
    labels = given.labels
    c = anchors(len(labels), labels.device)

    def make(gradient: str, backend: str) -> Loss:
        module = fl.LAwFLoss(gradient=gradient, backend=backend)
        reference = fl.Reference(given.reference_hidden)
        return _reporting(lambda x, w: module(x, w, labels, confidence=c, reference=reference), module)

    eager = _two_logits(given, True)
    return {**ours(make, gradients), "eager, two logits": eager, "torch.compile, two logits": compiled(eager)}


def _kl(given: Inputs, gradients: tuple[str, ...]) -> dict[str, Loss]:
    """KL at every token, which is what others have: Liger's generalised JSD with β = 0."""
    labels = given.labels

    def liger(x: Tensor, w: Tensor) -> Tensor:
        return need("liger_kernel.transformers", "LigerFusedLinearJSD")(jsd_beta=0.0)(
            x, w, given.reference_hidden, w.detach(), None
        )

    def make(gradient: str, backend: str) -> Loss:
        module = fl.LAwFLoss(gradient=gradient, backend=backend)
        reference, none = fl.Reference(given.reference_hidden), torch.zeros(len(labels), device=labels.device)
        return _reporting(lambda x, w: module(x, w, labels, confidence=none, reference=reference), module)

    eager = _two_logits(given, False)
    return {
        **ours(make, gradients), "eager, two logits": eager, "torch.compile, two logits": compiled(eager),
        "Liger, JSD with β = 0": liger,
    }  # fmt: skip


def _forward(given: Inputs, gradients: tuple[str, ...]) -> dict[str, Loss]:
    """The loss alone, without gradients."""
    members = _cross_entropy(given, ("exact",))

    def make(gradient: str, backend: str, scan: str = "full") -> Loss:
        def nll(x: Tensor, w: Tensor) -> Tensor:
            return fl.token_losses(x, w, given.labels, backend=backend, scan=scan).nll

        return _giving(lambda x, w: nll(x, w).mean(), nll)

    with_reference = f"{OURS}with a reference"
    auto = "triton" if DRY else "auto"
    members[with_reference] = lambda x, w: fl.token_losses(
        x, w, given.labels, reference=fl.Reference(given.reference_hidden), backend=auto
    ).kl.mean()
    return ours(make, ("exact",), True) | {
        n: f for n, f in members.items() if not n.startswith(OURS) or n == with_reference
    }


def _reporting(function: Loss, module: fl.Objective, labels: Tensor | None = None) -> Loss:
    """`labels`: where it is to be known how exact the nll is."""
    function.module = module  # type: ignore[attr-defined]
    if labels is None:
        return function

    def nll(x: Tensor, w: Tensor) -> Tensor:
        options = {name: getattr(module, name) for name in ("gradient", "backend", "scan")}
        return fl.token_losses(x, w, labels, **options).nll

    return _giving(function, nll)


def _with_nll(function: Loss, labels: Tensor) -> Loss:
    """Of PyTorch's own logits."""
    return _giving(function, lambda x, w: F.cross_entropy((x @ w.T).float(), labels, reduction="none"))


def _giving(function: Loss, nll: Loss) -> Loss:
    """The nll of each token, [N], of inputs as the loss gets them."""
    function.nll = nll  # type: ignore[attr-defined]
    return function


# --- truth


@dataclass
class Truth:
    """Gradients in float64 at some tokens and some ids, for the inputs as given."""

    given: Inputs
    tokens: Tensor
    ids: Tensor
    nll: Tensor
    lse: Tensor
    reference_lse: Tensor

    @staticmethod
    def of(given: Inputs, count: int = 48) -> Truth:
        labels, n = given.labels, len(given.labels)
        tokens = (torch.arange(count, device=labels.device) * n // count).unique()
        every = torch.arange(count, device=labels.device) * len(given.weight) // count
        ids = torch.cat([labels[tokens], every]).unique()
        weight = given.weight.double()
        lse, reference_lse, nll = [], [], []
        for x, r, y in zip(given.hidden.split(256), given.reference_hidden.split(256), labels.split(256), strict=True):
            z = x.double() @ weight.T
            lse.append(z.logsumexp(1))
            nll.append(lse[-1] - z.gather(1, y[:, None])[:, 0])
            reference_lse.append((r.double() @ weight.T).logsumexp(1))
        return Truth(given, tokens, ids, torch.cat(nll), torch.cat(lse), torch.cat(reference_lse))

    def gradients(self, objective: str) -> tuple[Tensor, Tensor]:
        """dx at the tokens, dW at the ids."""
        given, n = self.given, len(self.nll)
        a = torch.full_like(self.nll, 1 / n)
        b = torch.zeros_like(a)
        if objective == "TALR":
            a = talr_weights(self.nll) / n
        elif objective in ("LAwF", "KL"):
            c = anchors(n, a.device).double() if objective == "LAwF" else b
            a, b = c / n, (1 - c) / n

        def dz(tokens: Tensor, ids: Tensor) -> Tensor:
            x, r = given.hidden[tokens].double(), given.reference_hidden[tokens].double()
            w = given.weight[ids].double()
            p = (x @ w.T - self.lse[tokens, None]).exp()
            p_ref = (r @ w.T - self.reference_lse[tokens, None]).exp()
            at_label = (ids == given.labels[tokens, None]).double()
            return (a + b)[tokens, None] * p - a[tokens, None] * at_label - b[tokens, None] * p_ref

        everything = torch.arange(len(given.weight), device=self.ids.device)
        dx = torch.zeros(len(self.tokens), given.hidden.shape[1], dtype=torch.float64, device=self.ids.device)
        for ids in everything.split(16384):
            dx += dz(self.tokens, ids) @ given.weight[ids].double()
        return dx, dz(torch.arange(n, device=self.ids.device), self.ids).T @ given.hidden.double()


def relative(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()

"""Who is measured. A contestant is data: CONTESTANTS at the end is the list.

To add one, give what its package has as functions of tensors, and `of_parts` makes all losses of them that it can:

    Contestant(
        "Mine", module="my_package", install="my-package", devices=("cuda",),
        losses=of_parts(
            nll=lambda x, w, y: need("my_package", "linear_nll")(x, w, y),
            divergence=lambda x, w, r, w_ref, beta: need("my_package", "jsd")(x, w, r, w_ref, beta),
        ),
    )

x is [N, D], w [V, D], y [N], r [N, D] with the head w_ref [V, D]. The command takes a file with a list CONTESTANTS of
one's own, too: `fused-losses bench --add FILE`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .inputs import Inputs
from .losses import BETA, CROSS_ENTROPY, JSD, LAWF_FROZEN, LAWF_TRAINED, LOSSES, TALR, Loss, anchors, talr_weights
from .ours import OURS, our_losses

Builder = Callable[[Inputs], Loss]
EVERY_DTYPE = ("float32", "bfloat16", "float16", "float64")


class Missing(Exception):
    """A contestant that cannot run here; the message is its row."""


@dataclass(frozen=True)
class Contestant:
    """`losses`: of each loss a function that makes loss(hidden, weight) → scalar of the inputs, or the reason why there
    is none. Has that loss an attribute `each`, it is a function of the same that gives the values of the tokens, [N]:
    the nll, LAwF's loss, or the divergence."""

    name: str
    losses: Mapping[str, Builder | str]
    module: str = "torch"
    install: str = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = EVERY_DTYPE
    warm_at_full_size: bool = False  # whether what a first call prepares depends on the shape
    imports: tuple[str, ...] = ()  # what takes long to import, and may be before there is a GPU

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)

    def version(self) -> str:
        """Of the package that it is of; of ours the version of this one."""
        if self.ours:
            from .. import __version__

            return f"fused_losses {__version__}"
        try:
            return f"{self.install} {importlib.metadata.version(self.install)}"
        except importlib.metadata.PackageNotFoundError:
            return self.module

    def absent(self, device: str) -> str | None:
        """Why it cannot run here; None where it can be tried."""
        if device not in self.devices:
            return "needs a GPU" if self.devices == ("cuda",) else f"runs on {', '.join(self.devices)} only"
        if importlib.util.find_spec(self.module.partition(".")[0]) is None:
            return f"not installed: pip install {self.install}"
        return None

    def missing(self, loss: str, device: str, dtype: str) -> str | None:
        """Why it has no figures of this loss here; None where it can be tried."""
        if reason := self.absent(device):
            return reason
        if dtype not in self.dtypes:
            return f"does not take {dtype}, only {', '.join(self.dtypes)}"
        builder = self.losses.get(loss, f"has no {loss}")
        return builder if isinstance(builder, str) else None

    def build(self, loss: str, given: Inputs) -> Loss:
        builder = self.losses[loss]
        assert not isinstance(builder, str), builder
        return builder(given)


def need(module: str, attribute: str) -> Any:
    """The attribute, or `Missing` with the reason."""
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise Missing(f"does not import: {error}") from None
    except AttributeError:
        raise Missing(f"its version has no {module}.{attribute}") from None


# --- what others give, as losses


def of_parts(
    nll: Callable[..., Tensor] | str = "has no losses per token",
    divergence: Callable[..., Tensor] | str = "has no divergence",
    mean: Callable[..., Tensor] | None = None,
) -> dict[str, Builder | str]:
    """All losses that can be made of a package's functions.

    nll(x, w, y) → [N], or why there is none; mean(x, w, y): the mean nll, where that is another function;
    divergence(x, w, r, w_ref, beta) → [N], or its mean; beta = 0 is KL(p_ref ‖ p).
    """
    average = mean or (None if isinstance(nll, str) else lambda x, w, y: nll(x, w, y).mean())
    if average is None:
        return dict.fromkeys(LOSSES, str(nll))
    found: dict[str, Builder | str] = {CROSS_ENTROPY: partial(_cross_entropy, average, nll), TALR: nll}  # type: ignore
    if not isinstance(nll, str):
        found[TALR] = partial(_talr, nll)
    if isinstance(divergence, str):
        return found | dict.fromkeys((LAWF_FROZEN, LAWF_TRAINED, JSD), divergence)
    return found | {
        LAWF_FROZEN: partial(_lawf, average, divergence, False),
        LAWF_TRAINED: partial(_lawf, average, divergence, True),
        JSD: partial(_jsd, divergence),
    }


def _cross_entropy(mean: Callable[..., Tensor], nll: Callable[..., Tensor] | str, given: Inputs) -> Loss:
    y = given.labels
    return _giving(lambda x, w: mean(x, w, y), None if isinstance(nll, str) else lambda x, w: nll(x, w, given.labels))


def _talr(nll: Callable[..., Tensor], given: Inputs) -> Loss:
    def loss(x: Tensor, w: Tensor) -> Tensor:
        each = nll(x, w, given.labels)
        return (talr_weights(each.detach().float()) * each).mean()

    return _giving(loss, lambda x, w: nll(x, w, given.labels))


def _lawf(mean: Callable[..., Tensor], divergence: Callable[..., Tensor], trained: bool, given: Inputs) -> Loss:
    """Cross-entropy of the anchors' rows and KL of the others', by themselves."""
    n = len(given.labels)
    some = anchors(n, given.labels.device)
    at, others = some.nonzero()[:, 0], (~some).nonzero()[:, 0]
    y, r = given.labels[at], given.reference_hidden[others]

    def loss(x: Tensor, w: Tensor) -> Tensor:
        w_ref = given.weight if trained else w.detach()
        total = mean(x[at], w, y) * len(at)
        return (total + divergence(x[others], w, r, w_ref, 0.0).mean() * len(others)) / n

    return loss


def _jsd(divergence: Callable[..., Tensor], given: Inputs) -> Loss:
    def each(x: Tensor, w: Tensor) -> Tensor:
        return divergence(x, w, given.reference_hidden, w.detach(), BETA)

    return _giving(lambda x, w: each(x, w).mean(), each)


def _giving(loss: Loss, each: Loss | None) -> Loss:
    loss.each = each  # type: ignore[attr-defined]
    return loss


# --- full logits in PyTorch


def full_nll(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((x @ w.T).float(), y, reduction="none")


def full_divergence(x: Tensor, w: Tensor, r: Tensor, w_ref: Tensor, beta: float) -> Tensor:
    with torch.no_grad():
        log_r = (r @ w_ref.T).float().log_softmax(1)
    log_p = (x @ w.T).float().log_softmax(1)
    if beta == 0:
        return F.kl_div(log_p, log_r, log_target=True, reduction="none").sum(1)
    log_m = torch.logaddexp(log_r + torch.tensor(beta).log(), log_p + torch.tensor(1 - beta).log())
    of_reference = F.kl_div(log_m, log_r, log_target=True, reduction="none").sum(1)
    return beta * of_reference + (1 - beta) * F.kl_div(log_m, log_p, log_target=True, reduction="none").sum(1)


def full_lawf(trained: bool, given: Inputs) -> Loss:
    """Both terms of one log-softmax of all tokens."""
    y, r = given.labels, given.reference_hidden
    c = anchors(len(y), y.device).float()

    def each(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            log_r = (r @ (given.weight if trained else w).T).float().log_softmax(1)
        log_p = (x @ w.T).float().log_softmax(1)
        kl = F.kl_div(log_p, log_r, log_target=True, reduction="none").sum(1)
        return c * -log_p.gather(1, y[:, None])[:, 0] + (1 - c) * kl

    return _giving(lambda x, w: each(x, w).mean(), each)


EAGER: dict[str, Builder | str] = of_parts(full_nll, full_divergence) | {
    LAWF_FROZEN: partial(full_lawf, False), LAWF_TRAINED: partial(full_lawf, True),
}  # fmt: skip


def _compiled(builder: Builder, given: Inputs) -> Loss:
    loss = builder(given)
    return _giving(torch.compile(loss, dynamic=False), torch.compile(loss.each, dynamic=False))  # type: ignore


COMPILED = {name: partial(_compiled, builder) for name, builder in EAGER.items() if not isinstance(builder, str)}


# --- other packages


def pytorch(chunked: bool, x: Tensor, w: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
    function = need("torch.nn.functional", "linear_cross_entropy")
    options = need("torch.nn", "LinearCrossEntropyOptions")() if chunked else None
    return function(x, w, y, options=options, reduction=reduction)


def trl_nll(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    function = need("trl.kernels", "ChunkedLogProbFunction")
    return -function.apply(x, w, None, y, 1.0, 32768, None, 1.0, ())[0]  # 32768: as its trainers


def trl_divergence(x: Tensor, w: Tensor, r: Tensor, w_ref: Tensor, beta: float) -> Tensor:
    function = need("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    return function.apply(x, w, None, r, w_ref, None, beta)[0]


def liger_nll(x: Tensor, w: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
    return need("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")(reduction=reduction)(w, x, y)


def liger_divergence(x: Tensor, w: Tensor, r: Tensor, w_ref: Tensor, beta: float) -> Tensor:
    return need("liger_kernel.transformers", "LigerFusedLinearJSD")(jsd_beta=beta)(x, w, r, w_ref, None)


def cce(x: Tensor, w: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
    return need("cut_cross_entropy", "linear_cross_entropy")(x, w, y, reduction=reduction)


def quack(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return need("quack.linear_cross_entropy", "chunked_linear_cross_entropy")(x, w, y)


HALVES = ("bfloat16", "float16")
CONTESTANTS = (
    Contestant(f"{OURS}sparse", our_losses("sparse")),
    Contestant(f"{OURS}sparse, int8", our_losses("sparse", scan="int8")),
    Contestant(f"{OURS}exact", our_losses("exact")),
    Contestant("eager, full logits", EAGER),
    Contestant("torch.compile, full logits", COMPILED, warm_at_full_size=True),
    Contestant(
        "F.linear_cross_entropy", of_parts(partial(pytorch, False), mean=partial(pytorch, False, reduction="mean"))
    ),
    Contestant(
        "F.linear_cross_entropy, chunked",
        of_parts(partial(pytorch, True), mean=partial(pytorch, True, reduction="mean")),
    ),
    Contestant("TRL", of_parts(trl_nll, trl_divergence), "trl", "trl", imports=("trl.kernels.chunked_divergence",)),
    Contestant(
        "Liger", of_parts(liger_nll, liger_divergence, partial(liger_nll, reduction="mean")), "liger_kernel",
        "liger-kernel", ("cuda",),
    ),
    Contestant("CCE", of_parts(cce, mean=partial(cce, reduction="mean")), "cut_cross_entropy", "cut-cross-entropy",
               ("cuda",)),
    Contestant("QuACK", of_parts(mean=quack), "quack", "quack-kernels", ("cuda",), HALVES),
)  # fmt: skip


def with_backends(device: str) -> tuple[Contestant, ...]:
    """All, and ours by each backend that can run here, besides the one that "auto" takes."""
    auto = backends.choose("auto", device)
    able = [name for name in backends.NAMES if name not in (auto, "reference") and backends.unavailable(name) is None]
    if device != "cuda":
        able = [name for name in able if name not in ("cuda", "triton")]
    more = [
        Contestant(f"{OURS}{gradient} ({name})", our_losses(gradient, name))
        for name in able for gradient in ("sparse", "exact")
    ]  # fmt: skip
    return (*CONTESTANTS, *more)

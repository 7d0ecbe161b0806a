"""Training objectives as modules without parameters, each a few lines over the per-token losses.

Every one is Σ_t loss_t / n with loss_t made of a token's own statistics; n is the number of tokens with a label, or
the caller's `num_items`. Weights never carry a gradient.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import checks, compiled, shards
from .checks import MissingAttribute
from .compiled import capturable
from .head import LMHead, Reference, as_head
from .preparation import prepare
from .problem import Statistics
from .sparse_softmax import TOLERANCE, GradientReport
from .tokens import OPTIONAL, Observer, Tokens, TracedTokens, check_wanted, loss_of_chunk
from .validation import check_options

Head = LMHead | Tensor | nn.Linear
OPTIONS = ("ignore_index", "gradient", "tolerance", "backend")  # of every objective
# What papers and other libraries call an option of ours.
OTHER_NAMES = {
    "tau": "temperature", "t": "temperature", "temp": "temperature", "min_weight": "floor", "group": "process_group",
    "eps": "epsilon", "clip": "epsilon", "clip_eps": "epsilon", "k": "top_k", "topk": "top_k",
    "beta": "kl_weight", "kl_coef": "kl_weight", "kl_coeff": "kl_weight", "lam": "kl_weight", "lambda_": "kl_weight",
    "ignored": "ignore_index", "pad_token_id": "ignore_index", "tol": "tolerance", "device": "backend",
    "reduce": "reduction",
}  # fmt: skip


class Objective(nn.Module):
    """Base of the objectives: subclass it and write `token_loss`.

    `token_loss(out, field, ...)` gets statistics of tokens with a label ([C] vectors: `out.nll`, `out.kl`,
    `out.prediction`, `out.reference_nll`, and those named in `wanted`, a class attribute: "entropy",
    "reference_entropy", "topk_entropy"), returns a loss per token, [C], by ordinary differentiable operations on
    `out.nll` and `out.kl`. An `__init__` of your own begins with `super().__init__()`. `token_loss` sees some of the
    tokens at a time, so it must not mix tokens. Further tensors of the labels' shape, given by keyword to the call,
    arrive in its parameters of the same names. The gradient is taken while the logits are at hand: 3 GEMMs, 2 with a
    frozen head, one more with a reference.

    Raises, besides what `token_losses` raises: TypeError for unknown options, a statistic that is not in `wanted`,
    trainable parameters and other tensors with a gradient in `token_loss`; ValueError for unknown names in `wanted`,
    and a loss that is not one number per token or has no gradient where one is needed.

    Options of every objective: `ignore_index`, `gradient`, `tolerance` and `backend`, as in `token_losses`. `gradient_report` says how
    gradients are formed: of the last call, and after a backward with sparse gradients, of the call that this was of.

    Under `torch.compile(fullgraph=True)` the call is part of the graph. There `token_loss` sees all tokens, with zeros for those
    without a label, and is followed by the backward of `token_losses`: exact gradients then cost as many GEMMs as there, so 4
    instead of 3, with a reference 6 instead of 4, and 4 instead of 3 if the head is frozen; sparse ones cost the same. Without
    fullgraph a call is a graph break and runs as in eager mode.
    """

    bounds: ClassVar[dict[str, dict[str, Any]]] = {}  # of options that are numbers, checked whenever one is set
    wanted: frozenset[str] = frozenset()
    top_k: int = 20

    gradient_report: GradientReport | None = None  # of the last call; after a backward, of the call that it was of
    _observer: Observer | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if any(_belongs_to_a_call(value) for value in args) and not _takes(cls, args, kwargs):
            raise TypeError(
                f"{cls.__name__}: tensors are arguments of the call, not of the constructor; write "
                f"{cls.__name__}()(hidden, head, labels), with the options ({', '.join(_options(cls))}) between the "
                f"first brackets"
            )
        return super().__new__(cls)

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        gradient: str = "auto",
        tolerance: float = TOLERANCE,
        backend: str = "auto",
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise TypeError(_unknown_option(type(self), name))
        ignore_index, tolerance = check_options(gradient, backend, ignore_index, tolerance)
        check_wanted(self.wanted, self.top_k)
        self.ignore_index, self.gradient, self.tolerance, self.backend = ignore_index, gradient, tolerance, backend
        self._handle = compiled.handle(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another objective, with reports of its own."""
        super().__setstate__(state)
        self._handle = compiled.handle(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, (nn.Module, nn.Parameter)) and "_parameters" not in self.__dict__:
            raise MissingAttribute(_not_made(type(self)))
        bounds = type(self).bounds.get(name)
        if bounds is not None and not (isinstance(value, str) and value == bounds.get("word")):
            value = check_number(value, name, **{key: b for key, b in bounds.items() if key != "word"})
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and ("_parameters" not in self.__dict__ or name in (*OPTIONS, "_handle")):
            raise MissingAttribute(_not_made(type(self)))
        return super().__getattr__(name)

    def __repr__(self) -> str:
        """With the options that are not the defaults, as it ends up in logs."""
        parameters = inspect.signature(Objective.__init__).parameters
        given = [
            f"{name}={getattr(self, name)!r}" for name in OPTIONS if getattr(self, name) != parameters[name].default
        ]
        return f"{type(self).__name__}({', '.join([*filter(None, [self.extra_repr()]), *given])})"

    def token_loss(self, out: Statistics, **per_token: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define token_loss(self, out), with the fields of a batch by name")

    def prepare(self, hidden: Tensor, head: Head, labels: Tensor, reference: Reference | None = None) -> Tokens:
        tokens = prepare(
            hidden, head, labels, reference, self.ignore_index, self.gradient, self.backend, self.tolerance,
            lambda report: setattr(self, "gradient_report", report), self._handle,
        )  # fmt: skip
        if torch.compiler.is_compiling():  # the operator reports, when the graph runs
            return tokens
        self.gradient_report = tokens.report
        return tokens if self._observer is None else replace(tokens, observer=self._observer)

    def sparse_errors(self, hidden: Tensor, head: Head, labels: Tensor, **call: Any) -> dict[str, float]:
        """What sparse gradients would get wrong here: ‖g − g_exact‖₂ / ‖g_exact‖₂ for the gradient g of each trained tensor.

        `tolerance` bounds the gradient of the logits; what that means for the gradients of hidden and weight depends on the head and
        the data (docs/method.md), so it is worth looking at once for a model. Arguments are those of the call. Runs it twice, with
        gradient="sparse" at this objective's tolerance and with "exact", whatever its own `gradient` is; no `.grad` is touched and
        no report. Keys: "hidden" (also where it does not require a gradient), and of "weight", "bias", "low_rank.b", "low_rank.a"
        those that require one; 0 where both are 0.

        Raises what the call with gradient="sparse" raises: ValueError with backend="reference" or a head spread over ranks. Cost: that
        of one step with sparse and one with exact gradients, and the memory of two gradients of everything.
        """
        if not isinstance(hidden, Tensor):
            raise TypeError(f"hidden: expected a tensor [..., D], got {type(hidden).__name__}")
        whole = as_head(head)
        low_rank = whole.low_rank
        tensors = {"hidden": hidden.detach().requires_grad_(), "weight": whole.weight, "bias": whole.bias}
        if low_rank is not None:
            tensors |= {"low_rank.b": low_rank.b, "low_rank.a": low_rank.a}
        tensors = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
        found = []
        for gradient in ("sparse", "exact"):
            one = copy.copy(self)
            one.gradient, one._observer = gradient, None
            with torch.enable_grad():
                loss = one(tensors["hidden"], head, labels, **call)
            found.append(torch.autograd.grad(loss, list(tensors.values()), materialize_grads=True))

        def error(got: Tensor, exact: Tensor) -> float:
            got, exact = got.double(), exact.double()
            return ((got - exact).norm() / exact.norm()).item() if exact.any() or got.any() else 0.0

        return {name: error(*pair) for name, *pair in zip(tensors, *found, strict=True)}

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Calls within note per-token statistics in `observer`; not in a compiled graph."""
        before, self._observer = self._observer, observer
        try:
            yield
        finally:
            self._observer = before

    def reduce(self, tokens: Tokens, num_items: Any, **per_token: Tensor) -> Tensor:
        """Σ token_loss / n; `per_token` are [N] vectors over the valid tokens (`tokens.select`)."""
        if any(p.requires_grad for p in self.parameters()):
            raise TypeError(
                f"{type(self).__name__} has trainable parameters, which token_loss cannot reach; write the loss over "
                "fused_losses.token_losses(...) instead"
            )
        n = item_count(num_items, tokens.count)
        wanted, k = self._statistics()
        return tokens.summed(self.token_loss, wanted, k, **per_token) / n

    def _statistics(self) -> tuple[frozenset[str], int]:
        """Those that cost a pass, and k of the top-k entropy; checked, as they may have been set since."""
        if torch.compiler.is_compiling():
            return frozenset([name for name in OPTIONAL if name in self.wanted]), self.top_k
        return check_wanted(self.wanted, self.top_k)

    @capturable
    def forward(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        *,
        reference: Reference | None = None,
        num_items: Any = None,
        **per_token: Tensor,
    ) -> Tensor:
        tokens = self.prepare(hidden, head, labels, reference)
        return self.reduce(tokens, num_items, **{name: tokens.select(v, name) for name, v in per_token.items()})


def _belongs_to_a_call(value: Any) -> bool:
    return isinstance(value, (nn.Module, LMHead, Reference)) or (isinstance(value, Tensor) and value.dim() > 0)


def _takes(cls: type, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the constructor may take tensors: one that is not of this package, and whose signature fits."""
    constructor: Any = cls.__init__  # type: ignore[misc]
    if constructor.__module__ == __name__:
        return False
    try:
        inspect.signature(constructor).bind(None, *args, **kwargs)
    except TypeError:
        return False
    return True


def _options(cls: type) -> list[str]:
    """The names that the constructor takes, its own first."""
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
            variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
            names += [p.name for p in parameters if p.kind not in variable and p.name not in names]
            if base is Objective or not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return names


def _unknown_option(cls: type, name: str) -> str:
    names = _options(cls)
    known = OTHER_NAMES.get(name.lower(), "")
    close = [known] if known in names else difflib.get_close_matches(name, names, 1)
    meant = f"; did you mean {close[0]}?" if close else ""
    if name in (
        "hidden",
        "head",
        "weight",
        "labels",
        "reference",
        "num_items",
        "confidence",
        "sequence_ids",
        "initial_nll",
        "old_nll",
    ):
        meant = f"; {name} is an argument of the call, {cls.__name__}()(hidden, head, labels, ...)"
    return f"{cls.__name__}: has no option {name}{meant}; there are {', '.join(names)}"


def _not_made(cls: type) -> str:
    return (
        f"{cls.__name__}: Objective.__init__ has not run; call super().__init__() first in {cls.__name__}.__init__ (of "
        f"a dataclass in "
        "__post_init__)"
    )


class CrossEntropyLoss(Objective):
    """Σ nll / n.

    Args of the call: hidden [..., D], head, labels [...] int64, `num_items` (a number or a tensor of one; default: the
    tokens with a label). Returns a scalar, float32 (float64 for float64). 3 GEMMs; 2 with a frozen head.
    """

    def token_loss(self, out: Statistics) -> Tensor:
        return out.nll

    @capturable
    def forward(self, hidden: Tensor, head: Head, labels: Tensor, *, num_items: Any = None) -> Tensor:
        return self.reduce(self.prepare(hidden, head, labels), num_items)


class TALRLoss(Objective):
    """Token-adaptive loss reweighting: Σ w·nll / n, w = max(exp(−nll/τ), floor).

    Args:
        temperature: "median": τ is the median, over the sequences of the call, of their mean nll, at least 1e-6
            (the mean of the middle two for an even number). Or a number > 0, which fixes τ and saves one GEMM.
        floor: smallest weight, in [0, 1].
        process_group: a torch.distributed group; the median is then taken over the sequences of all its ranks, and
            every rank must call.

    Args of the call: hidden [..., D], head, labels int64 [...]. Sequences are the rows of 2-D labels, or the groups of
    equal `sequence_ids` (integers of the labels' shape; over the whole call, so packed rows need ids that differ from
    row to row). A sequence without any label does not count. `num_items` replaces n.

    GEMMs: 4 (fixed τ: 3), 2 with a frozen head. Source: arXiv 2509.20758; floor 0.01 and the normaliser as in the public
    implementation: the sum is divided by the number of tokens, never by Σw.
    """

    bounds: ClassVar = {
        "temperature": dict(above=0, word="median", instead='"median" or a number > 0'),
        "floor": dict(least=0, most=1),
    }

    def __init__(
        self, temperature: float | str = "median", floor: float = 0.01, *, process_group: Any = None, **options: Any
    ) -> None:
        super().__init__(**options)
        if process_group is not None:
            shards.check_group(process_group)
        self.temperature, self.floor, self.process_group = temperature, floor, process_group

    def extra_repr(self) -> str:
        return f"temperature={self.temperature!r}, floor={self.floor}"

    def token_loss(self, out: Statistics, temperature: Tensor | None = None) -> Tensor:
        tau: Any = self.temperature if temperature is None else temperature
        return (-out.nll.detach() / tau).exp().clamp(min=self.floor) * out.nll

    @capturable
    def forward(
        self, hidden: Tensor, head: Head, labels: Tensor, *, sequence_ids: Tensor | None = None, num_items: Any = None
    ) -> Tensor:
        tokens = self.prepare(hidden, head, labels)
        if self.temperature != "median":
            return self.reduce(tokens, num_items)
        n = item_count(num_items, tokens.count)
        wanted, k = self._statistics()
        if isinstance(tokens, TracedTokens):
            ids = sequence_numbers(tokens, labels, sequence_ids)
            out = tokens.losses(wanted, k)
            tau = torch.ops.fused_losses.median_temperature(out.nll.detach(), ids, tokens.valid)
        else:
            sequence, count = sequences(tokens, labels, sequence_ids)
            out = tokens.losses(wanted, k)
            tau = median_temperature(out.nll.detach(), sequence, count, self.process_group)
        weighted = loss_of_chunk(functools.partial(self.token_loss, temperature=tau), {}, wanted)
        return tokens.total(weighted(out, slice(None))) / n


def median_temperature(nll: Tensor, sequence: Tensor, count: int, process_group: Any = None) -> Tensor:
    """The median over sequences of their mean nll."""
    # index_put_ and not index_add_, which on a GPU adds in any order.
    sums = nll.new_zeros(count).index_put_((sequence,), nll, accumulate=True)
    sizes = nll.new_zeros(count).index_put_((sequence,), torch.ones_like(nll), accumulate=True)
    means = (sums / sizes)[sizes > 0]
    if process_group is not None:
        means = _gather(means, process_group)
    return means.quantile(0.5).clamp(min=1e-6) if len(means) else nll.new_tensor(1e-6)


def _numbered(ids: Tensor) -> tuple[Tensor, int]:
    unique, inverse = ids.unique(return_inverse=True)
    return inverse, len(unique)


compiled.register(
    "median_temperature",
    "(Tensor nll, Tensor ids, Tensor valid) -> Tensor",
    lambda nll, ids, valid: median_temperature(nll[valid], *_numbered(ids[valid])),
    lambda nll, ids, valid: nll.new_empty(()),
)


class LAwFLoss(Objective):
    """Cross-entropy on anchors, KL to the frozen reference elsewhere: KL(q ‖ p), q = c·onehot(label) + (1 − c)·p_ref.

    c, the confidence, is 0 off the anchors (pure KL to the reference), 1 for an anchor that is certain (pure
    cross-entropy), between for a softer one. The value is the true KL(q ‖ p), its gradient that of c·nll + (1 − c)·kl.

        token_mean: (anchor_weight · Σ_{c>0} + retain_weight · Σ_{c=0}) / n
        group_mean: anchor_weight · mean over c > 0 + retain_weight · mean over c = 0    (an empty group adds 0)

    Args:
        anchor_weight, retain_weight: α and β, ≥ 0.
        reduction: "token_mean" or "group_mean".

    Args of the call: hidden [..., D], head, labels int64 [...] (also off the anchors every token that shall be retained
    needs a label, any valid id: only ignored tokens are left out), `confidence` [...] in [0, 1], and not above 0 where
    the label is ignored, `reference`, `num_items`: n; for group_mean a pair (anchors, others).

    GEMMs: 4, 3 with a frozen head. Source: longern/LAwF.
    """

    bounds: ClassVar = {"anchor_weight": dict(least=0), "retain_weight": dict(least=0)}

    def __init__(
        self, anchor_weight: float = 1.0, retain_weight: float = 1.0, reduction: str = "token_mean", **options: Any
    ) -> None:
        super().__init__(**options)
        self.anchor_weight, self.retain_weight, self.reduction = anchor_weight, retain_weight, reduction

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "reduction" and value not in ("token_mean", "group_mean"):
            raise ValueError(f"reduction: expected token_mean or group_mean, got {value!r}")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"anchor_weight={self.anchor_weight}, retain_weight={self.retain_weight}, reduction={self.reduction!r}"

    def token_loss(self, out: Statistics, confidence: Tensor, weight: Tensor) -> Tensor:
        c, r = confidence, (-out.reference_nll).exp()
        q_label = c + (1 - c) * r
        # −H(q) + (1 − c)·H(p_ref): what lies between c·nll + (1 − c)·kl and KL(q ‖ p). The entropy itself cancels.
        constant = (
            torch.xlogy(q_label, q_label)
            + torch.xlogy((1 - c) * (1 - r), 1 - c)
            + (1 - c) * torch.where(r > 0, r * out.reference_nll, 0)
        )
        return weight * (c * out.nll + (1 - c) * out.kl + constant)

    @capturable
    def forward(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        *,
        confidence: Tensor | None = None,
        reference: Reference | None = None,
        num_items: Any = None,
    ) -> Tensor:
        if reference is None:
            raise ValueError(
                "LAwFLoss needs reference=fused_losses.Reference(hidden states of the frozen original model); under PEFT "
                "these are the hidden states with the adapter disabled"
            )
        if confidence is None:
            raise ValueError("LAwFLoss needs confidence=: 1 at anchors, 0 at tokens to retain, of the labels' shape")
        tokens = self.prepare(hidden, head, labels, reference)
        c = tokens.select(confidence, "confidence", all_labelled=True).detach().to(tokens.problem.accumulator)
        c = tokens.check(c, "confidence", "fractions")
        anchor = c > 0
        # Products, as a graph is specialised on numbers that become tensors otherwise.
        anchor_weight, retain_weight = c.new_ones(()) * self.anchor_weight, c.new_ones(()) * self.retain_weight
        if self.reduction == "group_mean":
            # `reduce` divides by n again.
            anchors, others = self._group_counts(num_items, anchor, tokens.count)
            anchor_weight, retain_weight = anchor_weight * tokens.count / anchors, retain_weight * tokens.count / others
            num_items = None
        weight = torch.where(anchor, anchor_weight, retain_weight)
        return self.reduce(tokens, num_items, confidence=c, weight=weight)

    @staticmethod
    def _group_counts(num_items: Any, anchor: Tensor, count: int | Tensor) -> tuple[Tensor | float, Tensor | float]:
        if num_items is None:
            anchors = anchor.sum()
            return anchors.clamp(min=1), (count - anchors).clamp(min=1)
        if not isinstance(num_items, (tuple, list)) or len(num_items) != 2:
            raise ValueError(
                f"num_items: for reduction='group_mean' expected a pair (anchors, other tokens), got {num_items!r}"
            )
        if any(x is None for x in num_items):
            raise ValueError(f"num_items: expected a pair of numbers (anchors, other tokens), got {num_items!r}")
        return tuple(item_count(x, 0) for x in num_items)  # type: ignore[return-value]


class FLOWLoss(Objective):
    """Σ_s w_s Σ_{t in s} nll / n, w_s = exp(−mean nll of s under the initial model / τ).

    Easy samples count most. Both are fixed before training: `temperature` τ > 0 is the data set's median of the initial
    model's mean nll per sequence.

    Args of the call: hidden, head, labels; `initial_nll`: the initial model's mean nll of each sequence, [rows of 2-D
    labels], or with `sequence_ids` indexed by these, [ids]; `num_items`.

    3 GEMMs; 2 with a frozen head. Source: arXiv 2502.02797.
    """

    bounds: ClassVar = {"temperature": dict(above=0)}

    def __init__(self, temperature: float, **options: Any) -> None:
        super().__init__(**options)
        self.temperature = temperature

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"

    def token_loss(self, out: Statistics, weight: Tensor) -> Tensor:
        return weight * out.nll

    @capturable
    def forward(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        *,
        initial_nll: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        num_items: Any = None,
    ) -> Tensor:
        tokens = self.prepare(hidden, head, labels)
        if initial_nll is None:
            raise ValueError("FLOWLoss needs initial_nll=: the initial model's mean nll of each sequence, [sequences]")
        if not isinstance(initial_nll, Tensor) or initial_nll.dim() != 1 or not initial_nll.is_floating_point():
            raise ValueError("initial_nll: expected a float tensor [sequences], the initial model's mean nll of each")
        initial_nll = checked(initial_nll.detach(), "initial_nll", "losses")
        sequence = sequence_numbers(tokens, labels, sequence_ids)
        if sequence_ids is not None:
            sequence = tokens.check(sequence, "sequence_ids", "indices", len(initial_nll))
        elif len(initial_nll) != labels.shape[0]:
            raise ValueError(
                f"initial_nll: expected {labels.shape[0]} numbers, one per row of labels, got {len(initial_nll)}"
            )
        weight = (-initial_nll.to(sequence.device, tokens.problem.accumulator) / self.temperature).exp()[sequence]
        return self.reduce(tokens, num_items, weight=weight)


class DFTLoss(CrossEntropyLoss):
    """Dynamic fine-tuning: Σ p[label]·nll / n, the probability without a gradient.

    3 GEMMs; 2 with a frozen head. Source: arXiv 2508.05629.
    """

    def token_loss(self, out: Statistics) -> Tensor:
        return (-out.nll.detach()).exp() * out.nll


class ASFTLoss(Objective):
    """Anchored SFT: Σ (p[label]·nll + kl_weight·KL(p_ref ‖ p)) / n, the probability without a gradient.

    Needs `reference`. 4 GEMMs; 3 with a frozen head. Source: arXiv 2509.23753.
    """

    bounds: ClassVar = {"kl_weight": dict(least=0)}

    def __init__(self, kl_weight: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        self.kl_weight = kl_weight

    def extra_repr(self) -> str:
        return f"kl_weight={self.kl_weight}"

    def token_loss(self, out: Statistics) -> Tensor:
        return (-out.nll.detach()).exp() * out.nll + self.kl_weight * out.kl

    @capturable
    def forward(
        self, hidden: Tensor, head: Head, labels: Tensor, *, reference: Reference | None = None, num_items: Any = None
    ) -> Tensor:
        if reference is None:
            raise ValueError(
                "ASFTLoss needs reference=fused_losses.Reference(hidden states of the frozen original model)"
            )
        return self.reduce(self.prepare(hidden, head, labels, reference), num_items)


class EAFTLoss(CrossEntropyLoss):
    """Entropy-adaptive fine-tuning: Σ w·nll / n, w = (H_k / ln k)^alpha.

    H_k is the entropy of the k largest probabilities, renormalised; k = min(top_k, V). A confident token that is wrong
    gets little weight. 3 GEMMs; 2 with a frozen head. Source: arXiv 2601.02151.
    """

    wanted = frozenset({"topk_entropy"})

    bounds: ClassVar = {"alpha": dict(least=0)}

    def __init__(self, alpha: float = 1.0, top_k: int = 20, **options: Any) -> None:
        super().__init__(**options)
        self.alpha = alpha
        _, self.top_k = check_wanted(self.wanted, top_k)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, top_k={self.top_k}"

    def token_loss(self, out: Statistics, log_k: Tensor) -> Tensor:
        return (out.topk_entropy / log_k) ** self.alpha * out.nll

    @capturable
    def forward(self, hidden: Tensor, head: Head, labels: Tensor, *, num_items: Any = None) -> Tensor:
        tokens = self.prepare(hidden, head, labels)
        k = max(2, min(self.top_k, tokens.problem.head.vocabulary))
        log_k = hidden.new_full(tokens.problem.labels.shape, math.log(k), dtype=tokens.problem.accumulator)
        return self.reduce(tokens, num_items, log_k=log_k)


class PSFTLoss(Objective):
    """Proximal SFT: Σ −min(r, clip(r, 1 − ε, 1 + ε)) / n, r = p[label] / p_old[label].

    No gradient where r is above 1 + ε already. Args of the call: `old_nll` [...]: nll of the same tokens under the
    policy at the start of the step (`token_losses(...).nll` without a gradient), and `num_items`.

    3 GEMMs; 2 with a frozen head. Source: zwhong714/PSFT (arXiv 2508.17784).
    """

    bounds: ClassVar = {"epsilon": dict(above=0, most=1)}

    def __init__(self, epsilon: float = 0.2, **options: Any) -> None:
        super().__init__(**options)
        self.epsilon = epsilon

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}"

    def token_loss(self, out: Statistics, old_nll: Tensor) -> Tensor:
        ratio = (old_nll - out.nll).clamp(max=20).exp()  # clipped anyway; exp must not overflow
        return -torch.minimum(ratio, ratio.clamp(1 - self.epsilon, 1 + self.epsilon))

    @capturable
    def forward(
        self, hidden: Tensor, head: Head, labels: Tensor, *, old_nll: Tensor | None = None, num_items: Any = None
    ) -> Tensor:
        if old_nll is None:
            raise ValueError(
                "PSFTLoss needs old_nll=: token_losses(...).nll of the same tokens before this step, without gradient"
            )
        tokens = self.prepare(hidden, head, labels)
        old = tokens.select(old_nll, "old_nll").detach().to(tokens.problem.accumulator)
        return self.reduce(tokens, num_items, old_nll=tokens.check(old, "old_nll", "losses"))


def sequences(tokens: Tokens, labels: Tensor, sequence_ids: Tensor | None) -> tuple[Tensor, int]:
    """For each valid token the number of its sequence, [N], and how many sequences there may be."""
    ids = sequence_numbers(tokens, labels, sequence_ids)
    return _numbered(ids) if sequence_ids is not None else (ids, labels.shape[0])


def sequence_numbers(tokens: Tokens, labels: Tensor, sequence_ids: Tensor | None) -> Tensor:
    """For each valid token a number that is the same for all of its sequence."""
    if sequence_ids is not None:
        return integers(tokens.select(sequence_ids, "sequence_ids"), "sequence_ids")
    if labels.dim() != 2:
        raise ValueError(
            f"labels: expected [sequences, tokens] so that rows are sequences, got shape {list(labels.shape)}; give "
            "sequence_ids of that shape"
        )
    rows = torch.arange(labels.shape[0], device=labels.device)[:, None].expand(labels.shape)
    return tokens.select(rows, "rows")


def item_count(num_items: Any, default: int | Tensor) -> Any:
    """The divisor n: `num_items` as it came, checked, or at least 1."""
    if num_items is None:
        return default.clamp(min=1) if isinstance(default, Tensor) else max(default, 1)
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items: expected one number, got a tensor of shape {list(num_items.shape)}")
        if num_items.dtype == torch.bool or num_items.is_complex():
            raise TypeError(f"num_items: expected a number, got a tensor of {num_items.dtype}")
        return checked(num_items.detach().reshape(()), "num_items", "items")
    n = checks.number(num_items)
    if n is None:
        raise TypeError(f"num_items: expected a number or a tensor of one, got {num_items!r}")
    checks.items(n)
    return n


def checked(values: Tensor, name: str, check: str) -> Tensor:
    """The values of a tensor that is not one per token, after a check of checks.py."""
    if torch.compiler.is_compiling():
        return torch.ops.fused_losses.checked(values, None, check, name, 0)
    checks.BY_NAME[check](values, name)
    return values


def integers(values: Tensor, name: str) -> Tensor:
    if values.is_floating_point() or values.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {values.dtype}")
    return values.long()


def check_number(
    value: Any, name: str, above: float = -math.inf, least: float = -math.inf, most: float = math.inf, instead: str = ""
) -> int | float:
    """The Python number that it is."""
    number = checks.number(value)
    if number is None or not (above < number < math.inf and least <= number <= most):
        bounds = (
            [f"> {above}"] * (above > -math.inf)
            + [f"≥ {least}"] * (least > -math.inf)
            + [f"≤ {most}"] * (most < math.inf)
        )
        trained = ", which requires a gradient that would be lost" if getattr(value, "requires_grad", False) else ""
        raise ValueError(
            f"{name}: expected {instead or 'a finite number ' + ' and '.join(bounds)}, got {value!r}{trained}"
        )
    return number


def _gather(values: Tensor, group: Any) -> Tensor:
    """The concatenation of all ranks' vectors, of any lengths."""
    world = dist.get_world_size(group)
    sizes = [values.new_zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(sizes, values.new_tensor([len(values)], dtype=torch.int64), group=group)
    longest = max(int(s) for s in sizes)
    padded = values.new_zeros(longest)
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(s)] for part, s in zip(parts, sizes, strict=True)])

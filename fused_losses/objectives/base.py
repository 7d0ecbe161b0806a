"""`Objective`, the base: Σ_t loss_t / n, with loss_t made of a token's own statistics.

n is the number of tokens with a label, or the caller's `num_items`. Weights never carry a gradient.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import checks, compiled
from ..checks import MissingAttribute
from ..compiled import capturable
from ..head import LMHead, Reference, as_head
from ..preparation import Outputs, prepare
from ..problem import Statistics
from ..sparse.certificate import TOLERANCE, GradientReport
from ..tokens import OPTIONAL, Observer, Tokens, check_wanted
from ..validation import Options

HeadLike = LMHead | Tensor | nn.Linear


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
    beta: float | None = None  # of out.divergence
    entropy_gradient: bool = False
    temperature_of_logits: float = 1.0  # divides the logits of both models

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
        options = Options(ignore_index, gradient, tolerance, backend)
        check_wanted(self.wanted, self.top_k)
        for name in OPTIONS:
            setattr(self, name, getattr(options, name))
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

    def prepare(
        self, hidden: Tensor, head: HeadLike, labels: Tensor, reference: Reference | None = None,
        ids: Tensor | None = None,
    ) -> Tokens:  # fmt: skip
        """The valid tokens of a call, for `reduce`. `ids` [..., k]: whose logits `out.logits_at` shall have."""
        outputs = Outputs(ids, self.beta, self.temperature_of_logits, self.entropy_gradient)
        tokens = prepare(
            hidden, head, labels, reference, Options(*(getattr(self, name) for name in OPTIONS)), outputs,
            lambda report: setattr(self, "gradient_report", report), self._handle,
        )  # fmt: skip
        if torch.compiler.is_compiling():  # the operator reports, when the graph runs
            return tokens
        self.gradient_report = tokens.report
        return tokens if self._observer is None else replace(tokens, observer=self._observer)

    def sparse_errors(self, hidden: Tensor, head: HeadLike, labels: Tensor, **call: Any) -> dict[str, float]:
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
        head: HeadLike,
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
    if constructor.__module__.startswith(f"{__package__}."):
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

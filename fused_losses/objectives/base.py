"""`Objective`, the base: Σ_t loss_t / n, with loss_t made of a token's own statistics.

n is the number of tokens with a label, or the caller's `num_items`. Weights never carry a gradient.
"""

from __future__ import annotations

import copy
import inspect
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
from .arguments import Field, item_count, own_fields
from .options import (
    belongs_to_a_call,
    check_number,
    not_made,
    option_names,
    takes_tensors,
    unknown_option,
)  # fmt: skip

HeadLike = LMHead | Tensor | nn.Linear


OPTIONS = ("ignore_index", "gradient", "tolerance", "backend", "scan")  # of every objective


class Objective(nn.Module):
    """Base of the objectives: subclass it and write `token_loss`.

    `token_loss(out, field, ...)` gets statistics of tokens with a label ([C] vectors: `out.nll`, `out.kl`,
    `out.prediction`, `out.reference_nll`, `out.lse`, and those named in `wanted`, a class attribute: "entropy",
    "reference_entropy", "topk_entropy", "rank", "log_p2"), returns a loss per token, [C], by ordinary differentiable
    operations on `out.nll`, `out.kl` and `out.lse`. Class attributes too: `entropy_gradient = True`, without which the
    entropy is a number that carries no gradient; `beta`, with a reference, for a differentiable `out.divergence`;
    `temperature_of_logits`. An `__init__` of your own begins with `super().__init__()`. `token_loss` sees some of the
    tokens at a time, so it must not mix tokens. Further tensors of the labels' shape, given by keyword to the call,
    arrive in its parameters of the same names. The gradient is taken while the logits are at hand: 3 GEMMs, 2 with a
    frozen head, one more with a reference.

    Raises, besides what `token_losses` raises: TypeError for unknown options, a statistic that is not in `wanted`,
    trainable parameters and other tensors with a gradient in `token_loss`; ValueError for unknown names in `wanted`,
    and a loss that is not one number per token or has no gradient where one is needed.

    Options of every objective: `ignore_index`, `gradient`, `tolerance`, `backend` and `scan`, as in `token_losses`.
    `gradient_report` says how gradients are formed: of the last call, and after a backward with sparse gradients, of
    the call that this was of.

    Under `torch.compile(fullgraph=True)` the call is part of the graph. There `token_loss` sees all tokens, with zeros
    for those without a label, and is followed by the backward of `token_losses`: exact gradients then cost as many
    GEMMs as there, so 4 instead of 3, with a reference 6 instead of 4, and 4 instead of 3 if the head is frozen; sparse
    ones cost the same. Without fullgraph a call is a graph break and runs as in eager mode.
    """

    bounds: ClassVar[dict[str, dict[str, Any]]] = {}  # of options that are numbers, checked whenever one is set
    fields: ClassVar[dict[str, Field]] = {}  # of a batch, that the call takes by keyword
    needs_reference: bool = False
    reference_is_optional: ClassVar[bool] = False
    wanted: frozenset[str] = frozenset()
    top_k: int = 20
    beta: float | None = None  # of out.divergence
    entropy_gradient: bool = False
    temperature_of_logits: float = 1.0  # divides the logits of both models

    gradient_report: GradientReport | None = None  # of the last call; after a backward, of the call that it was of
    _observer: Observer | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if any(belongs_to_a_call(value) for value in args) and not takes_tensors(cls, args, kwargs):
            raise TypeError(
                f"{cls.__name__}: tensors are arguments of the call, not of the constructor; write "
                f"{cls.__name__}()(hidden, head, labels), with the options ({', '.join(option_names(cls))}) between "
                "the first brackets"
            )
        return super().__new__(cls)

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        gradient: str = "auto",
        tolerance: float = TOLERANCE,
        backend: str = "auto",
        scan: str = "auto",
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise TypeError(unknown_option(type(self), name))
        options = Options(ignore_index, gradient, tolerance, backend, scan)
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
            raise MissingAttribute(not_made(type(self)))
        bounds = type(self).bounds.get(name)
        if bounds is not None and not _instead_of_a_number(value, bounds):
            value = check_number(
                value, name, **{key: b for key, b in bounds.items() if key not in ("word", "optional")}
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and ("_parameters" not in self.__dict__ or name in (*OPTIONS, "_handle")):
            raise MissingAttribute(not_made(type(self)))
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
        options = Options(*(getattr(self, name) for name in OPTIONS))
        outputs = self.outputs(ids)
        if not torch.compiler.is_compiling():
            outputs = replace(outputs, asked=self._asked)
        tokens = prepare(
            hidden, head, labels, reference, options, outputs,
            lambda report: setattr(self, "gradient_report", report), self._handle,
        )  # fmt: skip
        if torch.compiler.is_compiling():  # the operator reports, when the graph runs
            return tokens
        self.gradient_report = tokens.report
        return tokens if self._observer is None else replace(tokens, observer=self._observer)

    def _asked(self) -> str:
        """What ranks that share a head must have alike. Of other people's objectives the name: what their repr has may
        differ between processes."""
        own = repr(self) if type(self).__module__.startswith(f"{__package__}.") else type(self).__qualname__
        observed = frozenset() if self._observer is None else self._observer.wanted
        wanted, k = self._statistics()
        return f"{own} {sorted(wanted | observed)} {k}"

    def outputs(self, ids: Tensor | None) -> Outputs:
        """What a call asks for besides nll, kl and their like."""
        return Outputs(ids, self.beta, self.temperature_of_logits, self.entropy_gradient)

    def sparse_errors(self, hidden: Tensor, head: HeadLike, labels: Tensor, **call: Any) -> dict[str, float]:
        """What sparse gradients would get wrong here: ‖g − g_exact‖₂ / ‖g_exact‖₂ for the gradient g of each trained
        tensor.

        The report's bounds are some five times what the errors are on real text, and where they are None nothing is
        known of dx and dW (docs/method.md), so it is worth looking at once for a model. Arguments are those of the
        call. Runs it twice, with gradient="sparse" at this objective's tolerance and with "exact", whatever its own
        `gradient` is; no `.grad` is touched and no report. Keys: "hidden" (also where it does not require a gradient),
        and of "weight", "bias", "low_rank.b", "low_rank.a" those that require one; 0 where both are 0.

        Raises what the call with gradient="sparse" raises: ValueError with backend="reference" or a head spread over
        ranks. Cost: that of one step with sparse and one with exact gradients, and the memory of two gradients of
        everything.
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
        **fields: Tensor,
    ) -> Tensor:
        declared = type(self).fields
        self.check_call(reference, fields)
        tokens = self.prepare(hidden, head, labels, reference)
        per_token = {
            name: declared[name].read(tokens, values, name) if name in declared else tokens.select(values, name)
            for name, values in fields.items()
            if values is not None
        }
        return self.reduce(tokens, num_items, **per_token)

    def check_call(self, reference: Reference | None, fields: dict[str, Tensor]) -> None:
        """Whether the call has what the objective declares."""
        name, declared = type(self).__name__, self._declared()
        if reference is None and self.needs_reference:
            raise ValueError(
                f"{name} needs reference=fused_losses.Reference(hidden states of the frozen original model); under "
                "PEFT these are the hidden states with the adapter disabled"
            )
        if reference is not None and not self.takes_reference:
            raise TypeError(f"reference: {name} has no use for one; leave it out")
        for field, declaration in (declared or {}).items():
            if fields.get(field) is None and not declaration.optional:
                raise ValueError(f"{name} needs {field}=: {declaration.what}")
        unknown = [] if declared is None else [field for field in fields if field not in declared]
        if unknown:
            meant = checks.meant(unknown[0], (*declared, "reference", "num_items"))
            there = ", ".join(declared) or "none"
            raise TypeError(f"{unknown[0]}: {name} has no such field{meant}; its fields are: {there}")

    def _declared(self) -> dict[str, Field] | None:
        """The fields that a call takes, None for any."""
        if not self.is_own:
            return type(self).fields
        return None if torch.compiler.is_compiling() else own_fields(type(self))  # type: ignore[arg-type]

    # --- what a patch reads

    @property
    def is_own(self) -> bool:
        """Whether it takes whatever its `token_loss` names: one of your own, with nothing declared."""
        return not type(self).fields and type(self).forward is Objective.forward and not _of_this_package(type(self))

    @property
    def takes_reference(self) -> bool:
        return self.needs_reference or self.is_own or type(self).reference_is_optional

    @property
    def only_follows(self) -> bool:
        """Whether nothing but the distance from the reference is learned: nothing, from the model as it starts."""
        return False

    @property
    def by_sequence(self) -> bool:
        """Whether the loss of a call depends on which tokens make a sequence, so that `sequence_ids` are of use."""
        return any(field.of_sequences for field in type(self).fields.values())

    @property
    def divides_by_items(self) -> bool:
        """Whether `num_items` divides the sum of the token losses, as accumulated batches need it."""
        return True

    def batch_fields(self) -> dict[str, Field]:
        """The fields of a batch that a call takes."""
        if self.is_own:
            found = own_fields(type(self))  # type: ignore[arg-type]
            if found is None:
                raise TypeError(
                    f"{type(self).__name__}.token_loss{inspect.signature(type(self).token_loss)}: a patched model "
                    "takes the fields of a batch by name; write them out, as in token_loss(self, out, weight=None)"
                )
            return found
        return type(self).fields


def _instead_of_a_number(value: Any, bounds: dict[str, Any]) -> bool:
    """A word, or None, that the option may be."""
    if value is None:
        return bounds.get("optional", False)
    return isinstance(value, str) and value == bounds.get("word")


def _of_this_package(cls: type) -> bool:
    return cls.__module__.startswith(f"{__package__}.")

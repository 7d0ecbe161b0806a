"""The valid tokens of one call, what is computed of them, and what an objective's `token_loss` is given and may
return."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import backends, checks
from . import reference as full_logits
from .autograd import (
    SparseSummedLossFunction,
    SparseTokenLossesFunction,
    SummedLossFunction,
    TokenLossesFunction,
    with_scan,
)
from .checks import MissingAttribute
from .problem import DIFFERENTIABLE, GIVEN, OPTIONAL, OUTPUTS, Head, Needs, Problem, Statistics
from .sparse.certificate import GradientReport

# An id that a bias of −inf rules out has a logit of −1e30 inside, so that no 0 · ∞ occurs; a model's are below this.
RULED_OUT = 1e15


class Observer:
    """Per-token statistics of an objective's pass, for whoever reports more than its loss; no gradient, no further
    pass.

    After the call `nll`, `prediction` and, where wanted, `entropy` have the shape of its labels; 0, for predictions −1,
    where a label is ignored. So have `kl`, where there is a reference, and with `weights`, where a gradient is taken,
    `weight`: the derivative of a token's loss by its nll, before the sum is divided.
    """

    def __init__(self, wanted: frozenset[str] = frozenset(), weights: bool = False) -> None:
        self.wanted, self.weights = wanted, weights
        self.nll: Tensor | None = None
        self.prediction: Tensor | None = None
        self.entropy: Tensor | None = None
        self.kl: Tensor | None = None
        self._weights: list[Tensor] = []

    def take(self, out: Any) -> None:
        """The statistics of a call of `token_losses`, in place of an objective's."""
        self.nll, self.prediction, self.entropy = out.nll.detach(), out.prediction, out.entropy.detach()

    def begin(self, tokens: Tokens) -> None:
        self._tokens, self._parts = tokens, dict[str, list[Tensor]](nll=[], prediction=[], entropy=[], kl=[])
        self._place: Any = (tokens.index, tokens.shape)
        self._weights = []

    def add(self, out: Statistics) -> None:
        """The statistics of the next tokens in order."""
        for name, parts in self._parts.items():
            values = getattr(out, name)
            if values is not None:
                parts.append(self._tokens.reported(values.detach().clone()))

    def add_weights(self, losses: Tensor, nll: Tensor) -> None:
        """Of the losses of the next tokens in order."""
        if not self.weights or not losses.requires_grad or not nll.requires_grad:
            return
        (found,) = torch.autograd.grad(losses.sum(), nll, retain_graph=True, allow_unused=True)
        self._weights.append(torch.zeros_like(nll) if found is None else found)

    def were_divided(self, n: Any) -> None:
        """The losses of the tokens, by n already."""
        self._weights = [weights * n for weights in self._weights]

    def finish(self) -> None:
        for name, parts in self._parts.items():
            values = torch.cat(parts) if parts else None
            if values is None and name not in ("entropy", "kl"):  # no token has a label
                labels = self._tokens.problem.labels
                values = labels.new_empty(0, dtype=labels.dtype if name == "prediction" else torch.float32)
            setattr(self, name, self._tokens.in_place(values, fill=-1 if name == "prediction" else 0))
        del self._tokens, self._parts

    @property
    def weight(self) -> Tensor | None:
        """None unless it was asked for, and a gradient taken."""
        return in_place(torch.cat(self._weights), *self._place) if self._weights else None


@dataclass(frozen=True)
class Tokens:
    """The valid tokens of one call: N rows, with what it takes to get back to the caller's shape."""

    problem: Problem
    shape: torch.Size
    index: Tensor | None  # [N] positions of the valid tokens, None where all are valid
    backend: str
    report: GradientReport
    publish: Callable[[GradientReport], None]  # called when backward has filled the report in
    observer: Observer | None = field(default=None, kw_only=True)

    @property
    def count(self) -> int | Tensor:
        return len(self.problem.labels)

    def needs(self) -> Needs:
        """Of which tensors a gradient is wanted."""
        head, enabled = self.problem.head, torch.is_grad_enabled()
        tensors = (self.problem.hidden, head.weight, head.bias, head.low_rank)
        return Needs(*(enabled and t is not None and t.requires_grad for t in tensors))

    def begin_report(self) -> bool:
        """Notes in the report how gradients will be formed; whether they will be sparse."""
        return self.report.begin(self.problem.tolerance, any(self.needs()))

    def check(self, values: Tensor, name: str, check: str, limit: int = 0) -> Tensor:
        """The values, which are those of valid tokens, after a check of checks.py."""
        checks.BY_NAME[check](values, name, limit)
        return values

    def select(self, values: Tensor, name: str, all_labelled: bool = False, several: bool = False) -> Tensor:
        """The entries of a per-token tensor of the labels' shape that belong to valid tokens, [N].

        `all_labelled`: of those above 0 every one must belong to a valid token. `several`: k numbers a token, [N, k].
        """
        more = " and a last dimension k" if several else ""
        if not isinstance(values, Tensor):
            raise TypeError(
                f"{name}: expected a tensor of the labels' shape {list(self.shape)}{more}, got {type(values).__name__}"
            )
        if (values.shape[:-1] if several else values.shape) != self.shape:
            raise ValueError(f"{name}: expected the labels' shape {list(self.shape)}{more}, got {list(values.shape)}")
        device = self.problem.labels.device
        if values.device != device:
            raise ValueError(f"{name} is on {values.device}, hidden on {device}; move it with .to({str(device)!r})")
        flat = values.reshape(-1, values.shape[-1]) if several else values.reshape(-1)
        if all_labelled:
            flat = self._all_labelled(flat, name)
        return self._select(flat)

    def _all_labelled(self, flat: Tensor, name: str) -> Tensor:
        if self.index is not None:
            valid = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device).index_fill_(0, self.index, True)
            checks.unlabelled(flat, name, self.shape[-1], valid)
        return flat

    def _select(self, flat: Tensor) -> Tensor:
        return flat if self.index is None else flat.index_select(0, self.index)

    def total(self, values: Tensor) -> Tensor:
        return self.reported(values.sum())

    def reported(self, values: Tensor) -> Tensor:
        """Losses that leave the package: infinite where an id is ruled out that has to be likely. Gradients stay."""
        heads = (self.problem.head, self.problem.reference_head)
        if not values.is_floating_point() or all(head is None or head.bias is None for head in heads):
            return values
        return values + torch.where(values.detach() > RULED_OUT, torch.inf, 0.0)

    def in_place(self, values: Tensor | None, fill: int = 0) -> Tensor | None:
        """Numbers of the valid tokens, in the caller's shape."""
        return None if values is None else in_place(values, self.index, self.shape, fill)

    def losses(self, wanted: frozenset[str], top_k: int = 20) -> Statistics:
        """The statistics of the valid tokens, those named in `wanted` among them, some differentiable."""
        out = self._losses(wanted if self.observer is None else wanted | self.observer.wanted, top_k)
        if self.observer is not None:
            self.observer.begin(self)
            self.observer.add(out)
            self.observer.finish()
        return out

    def statistics(self, wanted: frozenset[str], top_k: int = 20) -> Statistics:
        """Some statistics of the model alone, without gradients, by a pass of their own; the report stays as it is."""
        problem = replace(
            want(self.problem, wanted, top_k), reference_hidden=None, reference_head=None, ids=None, beta=None,
            entropy_gradient=False, int8=None,
        )  # fmt: skip
        if self.backend == "reference":
            return full_logits_statistics(problem)
        return backends.load(self.backend).statistics(problem)[0]

    def _losses(self, wanted: frozenset[str], top_k: int) -> Statistics:
        problem = want(self.problem, wanted, top_k)
        sparse = self.begin_report()
        problem = with_scan(problem, self.backend, any(self.needs()), self.report)
        if self.backend == "reference":
            return full_logits_statistics(problem)
        head, backend = problem.head, backends.load(self.backend)
        tensors = (problem.hidden, head.weight, head.bias, head.low_rank)
        if sparse:
            outputs = SparseTokenLossesFunction.apply(*tensors, problem, backend, self.report, self.publish)
        else:
            outputs = TokenLossesFunction.apply(*tensors, problem, backend, torch.is_grad_enabled())
        self.report.note_scan(problem.int8)
        return Statistics(**dict(zip(OUTPUTS, outputs, strict=True)))

    def summed(
        self, loss: Callable[..., Tensor], wanted: frozenset[str], top_k: int = 20, **per_token: Tensor
    ) -> Tensor:
        """Σ_t loss(statistics, **per_token) for a loss of each token by itself; saves one GEMM over `losses`."""
        of_chunk = loss_of_chunk(loss, per_token, wanted, self)
        if self.backend == "reference":
            return of_chunk(self.losses(wanted, top_k), slice(None)).sum()
        if self.observer is None:
            return self.reported(self._summed(of_chunk, wanted, top_k))

        def observed(out: Statistics, at: slice) -> Tensor:
            self.observer.add(out)
            return of_chunk(out, at)

        self.observer.begin(self)
        total = self._summed(observed, wanted | self.observer.wanted, top_k)
        self.observer.finish()
        return self.reported(total)

    def _summed(self, of_chunk: Callable[[Statistics, slice], Tensor], wanted: frozenset[str], top_k: int) -> Tensor:
        sparse = self.begin_report()
        problem = with_scan(want(self.problem, wanted, top_k), self.backend, any(self.needs()), self.report)
        head, backend = problem.head, backends.load(self.backend)
        tensors = (problem.hidden, head.weight, head.bias, head.low_rank)
        if sparse:
            total = SparseSummedLossFunction.apply(*tensors, problem, backend, self.report, self.publish, of_chunk)
        else:
            total = SummedLossFunction.apply(*tensors, problem, backend, torch.is_grad_enabled(), of_chunk)
        self.report.note_scan(problem.int8)
        return total


@dataclass(frozen=True)
class TracedTokens(Tokens):
    """The tokens of a call in a graph, T rows with the ignored ones: which are valid is in the mask, and known when it
    runs.

    What `Tokens` has [N] of is [T] here, with 0 at ignored tokens, and `count` is a tensor. `summed` takes the losses
    per token from the operator and adds them up, so exact gradients cost one GEMM more than in eager mode, or two with
    a reference.
    """

    valid: Tensor  # [T] bool
    ignore_index: int
    handle: Tensor | None

    @property
    def count(self) -> Tensor:
        return self.valid.sum()

    def check(self, values: Tensor, name: str, check: str, limit: int = 0) -> Tensor:
        return torch.ops.fused_losses.checked(values, self.valid, check, name, limit)

    def _all_labelled(self, flat: Tensor, name: str) -> Tensor:
        return torch.ops.fused_losses.checked(flat, self.valid, "unlabelled", name, self.shape[-1])

    def _select(self, flat: Tensor) -> Tensor:
        return flat.masked_fill(~self.valid if flat.dim() == 1 else ~self.valid[:, None], 0)

    def total(self, values: Tensor) -> Tensor:
        return self.reported(torch.where(self.valid, values, 0).sum())

    def losses(self, wanted: frozenset[str], top_k: int = 20) -> Statistics:
        self.begin_report()
        if self.backend == "reference":
            return self._full_logits(wanted, top_k)
        problem, reference = self.problem, self.problem.reference_head or Head(None, None, 1.0, None)
        outputs = torch.ops.fused_losses.losses_forward(
            problem.hidden, problem.head.weight, problem.head.bias, problem.head.low_rank, problem.labels,
            problem.reference_hidden, reference.weight, reference.bias, reference.low_rank, problem.ids,
            self.ignore_index,
            problem.head.logit_scale, problem.head.softcap, reference.logit_scale, reference.softcap,
            problem.dtype, problem.hidden.dtype, problem.hidden.shape[1],
            ",".join(sorted(wanted)), problem.entropy_gradient, problem.beta, top_k, problem.tolerance, self.backend,
            problem.int8 is not None, list(self.needs()), self.handle,
        )  # fmt: skip
        there = {
            "kl": problem.has_reference, "reference_nll": problem.has_reference, "logits_at": problem.ids is not None,
            "reference_entropy": problem.has_reference and "reference_entropy" in wanted,
            "entropy": problem.entropy_gradient or "entropy" in wanted, "divergence": problem.beta is not None,
        }  # fmt: skip
        there = {name: there.get(name, name in GIVEN or name in wanted) for name in OUTPUTS}
        named = zip(OUTPUTS, outputs[: len(OUTPUTS)], strict=True)
        return Statistics(**{name: values if there[name] else None for name, values in named})

    def _full_logits(self, wanted: frozenset[str], top_k: int) -> Statistics:
        """Ordinary operations of the graph; ignored tokens become zeros with label 0."""
        problem = want(self.problem, wanted, top_k)
        labels = torch.ops.fused_losses.checked(
            problem.labels, self.valid, "labels", str(self.ignore_index), problem.head.vocabulary
        )
        hidden, reference_hidden = (
            None if rows is None else torch.where(self.valid[:, None], rows, 0)
            for rows in (problem.hidden, problem.reference_hidden)
        )
        labels = labels.masked_fill(~self.valid, 0)
        out = full_logits_statistics(replace(problem, hidden=hidden, labels=labels, reference_hidden=reference_hidden))
        for name in OUTPUTS:
            values = getattr(out, name)
            if values is not None:
                valid = self.valid if values.dim() == 1 else self.valid[:, None]
                setattr(out, name, torch.where(valid, values, fill_of(name)))
        return out

    def summed(
        self, loss: Callable[..., Tensor], wanted: frozenset[str], top_k: int = 20, **per_token: Tensor
    ) -> Tensor:
        of_tokens = loss_of_chunk(loss, per_token, wanted, self)
        out = self.losses(wanted, top_k)
        with torch.autocast(self.valid.device.type, enabled=False):
            return self.total(of_tokens(out, slice(None)))


class TokenStatistics:
    """What a `token_loss` is given of a `Statistics`: those that are always there, and the others if wanted."""

    def __init__(self, out: Statistics, wanted: frozenset[str], problem: Problem) -> None:
        self._wanted, self._reference = wanted, problem.has_reference
        for name in OUTPUTS:
            values = getattr(out, name)
            if name in GIVEN or (values is not None and (name not in OPTIONAL or name in wanted)):
                setattr(self, name, values)
        if problem.entropy_gradient:
            self.entropy = out.entropy
        if problem.divergence_is_kl:
            self.divergence = out.kl

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in REMEDIES:
            raise MissingAttribute(f"out.{name}: {REMEDIES[name]}")
        if name not in OPTIONAL:
            raise MissingAttribute(
                f"out.{name}: there is no such statistic; there are {', '.join((*GIVEN, *OPTIONAL, *REMEDIES))}"
                f"{checks.meant(name, (*GIVEN, *OPTIONAL, *REMEDIES))}"
            )
        if name in self._wanted:
            raise MissingAttribute(f"out.{name}: is of the reference, and there is none; {checks.GIVE_REFERENCE}")
        names = ", ".join(f'"{n}"' for n in OPTIONAL if n == name or n in self._wanted)
        raise MissingAttribute(
            f"out.{name}: is not computed, as it costs more and the objective does not ask for it; set the class "
            f"attribute wanted = frozenset({{{names}}})"
        )

    def __repr__(self) -> str:
        return f"Statistics({', '.join(n for n in OUTPUTS if vars(self).get(n) is not None)})"


# Statistics that depend on more than a name in `wanted`.
REMEDIES = {
    "logits_at": "is there where ids are given: token_losses(..., ids=ids), self.prepare(..., ids=ids) of an objective",
    "divergence": "is there where beta is given: token_losses(..., beta=0.5), or the class attribute beta = 0.5 of an "
    f"objective; it needs a reference too: {checks.GIVE_REFERENCE}",
}


def in_place(values: Tensor, index: Tensor | None, shape: torch.Size, fill: int = 0) -> Tensor:
    """Numbers of the tokens at `index`, None for all, in the shape of all."""
    if index is not None:
        everywhere = (shape.numel(), *values.shape[1:])
        values = values.new_full(everywhere, fill).index_copy(0, index, values)
    return values.reshape((*shape, *values.shape[1:]))


def fill_of(name: str) -> int:
    """What a statistic is where the label is ignored."""
    return -1 if name in ("prediction", "rank") else 0


def check_wanted(wanted: Any, top_k: Any) -> tuple[frozenset[str], int]:
    """The statistics that an objective asks for, besides those that are always there, and its `top_k`."""
    names = None if isinstance(wanted, str) or not isinstance(wanted, Iterable) else list(wanted)
    known = (*GIVEN, *OPTIONAL)
    if names is None or any(name not in known for name in names):
        one = f"; write frozenset({{{wanted!r}}})" if wanted in OPTIONAL else ""
        wrong = wanted if names is None else next(name for name in names if name not in known)
        told = f"; {wrong} {REMEDIES[wrong]}" if wrong in REMEDIES else ""
        if not told and names is not None and isinstance(wrong, str):
            told = checks.meant(wrong, OPTIONAL)
        raise ValueError(f"wanted: expected a set of names among {', '.join(OPTIONAL)}, got {wrong!r}{one}{told}")
    k = checks.integer(top_k)
    if k is None or k < 2:
        raise ValueError(f"top_k: expected an integer ≥ 2, got {top_k!r}")
    return frozenset(names) & frozenset(OPTIONAL), k


def loss_of_chunk(
    loss: Callable[..., Tensor], per_token: dict[str, Tensor], wanted: frozenset[str], tokens: Tokens
) -> Callable[[Statistics, slice], Tensor]:
    """The loss of some of the tokens, checked."""
    problem, observer = tokens.problem, tokens.observer
    for name, values in per_token.items():
        if values.requires_grad and torch.is_grad_enabled():
            raise TypeError(f"{name}: requires a gradient, which would be lost here; give {name}.detach()")

    def of_chunk(out: Statistics, at: slice) -> Tensor:
        result = _call(
            loss, TokenStatistics(out, wanted, problem), {name: values[at] for name, values in per_token.items()}
        )
        if not isinstance(result, Tensor) or result.shape != out.nll.shape or not result.is_floating_point():
            what = f"{result.dtype} {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            if result is None:
                what += f" (out.kl and the reference's statistics are None without one: {checks.GIVE_REFERENCE})"
            raise ValueError(
                f"token_loss: expected one float per token, shape {list(out.nll.shape)} as out.nll, got {what}; sums "
                "and means over tokens are taken afterwards"
            )
        if out.nll.requires_grad and torch.is_grad_enabled():
            _check_gradient(result, out)
        if observer is not None:
            observer.add_weights(result, out.nll)
        return result

    return of_chunk


def _call(loss: Callable[..., Tensor], out: TokenStatistics, per_token: dict[str, Tensor]) -> Tensor:
    if torch.compiler.is_compiling() or out.kl is not None:
        return loss(out, **per_token)
    try:
        return loss(out, **per_token)
    except (TypeError, AttributeError) as error:
        if "NoneType" not in str(error):
            raise
        raise TypeError(
            f"token_loss: {error}; out.kl and out.reference_nll are None without a reference: {checks.GIVE_REFERENCE}"
        ) from error


def _check_gradient(result: Tensor, out: Statistics) -> None:
    """A loss that trains nothing, or something that it cannot reach from here, is a mistake."""
    if not result.requires_grad:
        raise ValueError(
            "token_loss: the loss has no gradient, so nothing would be trained; it must depend on out.nll, "
            "out.kl or another differentiable statistic, not detached (weights may be: weight.detach() * out.nll)"
        )
    if torch.compiler.is_compiling() or not out.nll.is_leaf:
        return
    # Only leaves: a graph that leads into a model is not walked through.
    own, nodes, seen = [getattr(out, n) for n in DIFFERENTIABLE], [result.grad_fn], set[Any]()
    while nodes and len(seen) < 1000:
        node = nodes.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is t for t in own):
            raise TypeError(
                f"token_loss: uses a tensor {list(variable.shape)} that requires a gradient, which would be lost here; "
                f"give it detached, "
                "or write the loss over fused_losses.token_losses(...) instead"
            )
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]


def want(problem: Problem, wanted: frozenset[str], top_k: int) -> Problem:
    return replace(problem, wanted=wanted | {"entropy"} if problem.entropy_gradient else wanted, top_k=top_k)


def full_logits_statistics(problem: Problem) -> Statistics:
    """Everything from full logits, as autograd differentiates it."""
    z = full_logits.logits(problem.hidden, problem.head)
    out = Statistics(full_logits.nll(z, problem.labels), z.detach().argmax(-1), lse=z.logsumexp(-1))
    fixed = z.detach()
    if "entropy" in problem.wanted:
        out.entropy = full_logits.entropy(z if problem.entropy_gradient else fixed)
    if "topk_entropy" in problem.wanted:
        out.topk_entropy = full_logits.topk_entropy(fixed, problem.top_k)
    if "rank" in problem.wanted:
        out.rank = full_logits.rank(fixed, problem.labels)
    if "log_p2" in problem.wanted:
        out.log_p2 = full_logits.log_p2(fixed)
    if problem.ids is not None:
        out.logits_at = full_logits.logits_at(z, problem.ids)
    if problem.reference_hidden is not None:
        with torch.no_grad():
            z_ref = full_logits.logits(problem.reference_hidden, problem.reference_head or problem.head)
            out.reference_nll = full_logits.nll(z_ref, problem.labels)
            out.reference_entropy = full_logits.entropy(z_ref)
        out.kl = full_logits.kl(z_ref, z)
        if problem.beta is not None:
            out.divergence = full_logits.divergence(z_ref, z, problem.beta)
    return out

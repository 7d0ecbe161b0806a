"""`token_losses`, the one entrance: validate, drop ignored tokens, choose the backend, put the results in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import backends, checks, compiled, shards
from . import reference as full_logits
from .autograd import SparseSummedLossFunction, SparseTokenLossesFunction, SummedLossFunction, TokenLossesFunction
from .checks import MissingAttribute
from .head import FLOATING, LMHead, LowRank, Reference, _names, _same_tensor, as_head, calls_other_ranks
from .labels import plain
from .problem import Head, Problem, Statistics, valid_index
from .sparse_softmax import SMALLEST_VOCABULARY, TOLERANCE, GradientReport

ALL_STATISTICS = frozenset({"entropy", "reference_entropy"})
OPTIONAL = ("entropy", "reference_entropy", "topk_entropy")  # these cost a pass, so an objective names them in `wanted`
GIVEN = ("nll", "prediction", "kl", "reference_nll")  # the last two with a reference
GRADIENTS = ("auto", "exact", "sparse")
F = TypeVar("F", bound=Callable)


@dataclass
class TokenLosses:
    """What `token_losses` returns; every field has the shape of `labels`.

    `nll` and `kl` are differentiable. Where a label is ignored all fields are 0, `prediction` is −1.
    Statistics are float32 (float64 for float64 input), in nats. Without a reference `kl`, `reference_nll` and
    `reference_entropy` are None. `gradient_report` says how gradients are formed, and after backward with which bound.
    """

    nll: Tensor
    kl: Tensor | None
    entropy: Tensor
    prediction: Tensor
    reference_nll: Tensor | None
    reference_entropy: Tensor | None
    gradient_report: GradientReport


def capturable(function: F) -> F:
    """Under `torch.compile` the call becomes part of a graph that may have tensors of unknown sizes (`fullgraph=True`).

    Elsewhere it is a graph break and runs as it is, for objectives with a GEMM less. So is a call with a `process_group`, of
    the objective or of a head, whose ranks talk to each other. Costs nothing at import.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling() and (not compiled.captures() or _talks(args, kwargs)):
            eagerly = torch.compiler.disable(function)  # no part of a graph with a process_group
            return eagerly(*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def _talks(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call of an objective or of `token_losses` talks to other ranks."""
    if getattr(args[0], "process_group", None) is not None:
        return True
    return any(calls_other_ranks(given) for given in (*args, *kwargs.values()))


@capturable
def token_losses(
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    labels: Tensor,
    *,
    reference: Reference | None = None,
    ignore_index: int = -100,
    gradient: str = "auto",
    tolerance: float = TOLERANCE,
    backend: str = "auto",
) -> TokenLosses:
    """Per-token losses of a language-model head, without ever holding [tokens × vocabulary] logits.

    With z = softcap(logit_scale · (hidden Wᵀ + bias)), p = softmax(z) and p_ref likewise of the reference::

        nll[t] = logsumexp(z[t]) − z[t, labels[t]]                    differentiable
        kl[t]  = KL(p_ref[t] ‖ p[t])                                  differentiable; None without reference
        entropy[t] = −Σ p log p,  prediction[t] = argmax z[t]
        reference_nll, reference_entropy: the same of p_ref

    and ∂/∂z = (a + b) p − a onehot(label) − b p_ref for the upstream gradients a of nll and b of kl, which may
    differ from token to token and may have either sign. Gradients flow to hidden, weight and bias, where these
    require them, and to a low-rank part of the head (`LowRank`), which adds u Bᵀ to the product; never to the reference.

    Args:
        hidden: [..., D] float64, float32, bfloat16 or float16, of the dtype of the weight (under autocast both
            are cast to its dtype).
        head: `LMHead`, or a [V, D] tensor, or an `nn.Linear`.
        labels: int64 [...], aligned with hidden: labels[t] is the token that hidden[t] predicts. Nothing is shifted.
        reference: hidden states of the frozen reference model at the same tokens; `Reference(hidden)` for the
            same head.
        ignore_index: tokens with this label are removed before any work.
        gradient: "exact"; "sparse": sparse-plus-rank-one softmax with a certified error (`sparse_softmax`), values are
            those of "exact"; "auto": sparse where the products are of bfloat16 or float16 (autocast included) and V ≥ 8192,
            else exact.
        tolerance: of sparse gradients: bound on ‖error‖₁ / ‖gradient‖₁ of the gradient of the logits, all tokens and the
            caller's upstream weights together, in (0, 1). Tokens that would break it get exact gradients. Of no
            consequence for exact gradients; above the default entries are no fewer.
            `out.gradient_report` has the bound that was reached. The default was measured to give relative L2
            errors of 0.2 to 0.7 % for the gradients of nll (docs/method.md).
        backend: "auto", "triton" or "cuda" (kernels for GPUs), "cpu" (compiled kernels), "torch" (chunked, any device), or
            "reference" (full logits; exact; for checks on small inputs). `fused-losses info` says what "auto" takes.

    A head spread over the ranks of a process group (`LMHead`) takes "exact" or "auto", which is exact there, and "torch" or
    "auto".

    Returns:
        `TokenLosses`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came, before any work.

    Cost in GEMMs of 2·N·D·V FLOP, forward and backward together. Sparse: 1, with a reference 2, and 2 sparse products. Exact: 4
    (frozen head: 2); with a reference 6 (4). The objectives of this package need one fewer where their weights depend
    on single tokens only. Tokens with exact gradients in sparse mode cost as much as in exact mode. A frozen head with a trained
    low-rank part: exact 3, with a reference 5.
    Memory: 96 MiB of chunk buffers; sparse: 8 bytes per entry, of which there are 50 to 300 per
    token of ordinary text; exact: the gradients in fp32, and with a frozen head [N, D] rows per loss.

    `torch.compile(fullgraph=True)`: the call is part of the graph, with the same numbers; the number of tokens may change, a
    new logit_scale, softcap or tolerance compiles anew. The report has mode and tolerance only. Labels out of range are
    reported when the graph runs. Without fullgraph a call is a graph break and runs as in eager mode.

    Source: chunked cross-entropy with the gradient taken chunk by chunk is known from Liger Kernel and
    others; the per-token form with two upstream vectors, and the difference form of the KL, are this package's.
    """
    tokens = prepare(hidden, head, labels, reference, ignore_index, gradient, backend, tolerance)
    out = tokens.losses(ALL_STATISTICS)
    return TokenLosses(
        nll=tokens.in_place(out.nll),
        kl=tokens.in_place(out.kl),
        entropy=tokens.in_place(out.entropy),
        prediction=tokens.in_place(out.prediction, fill=-1),
        reference_nll=tokens.in_place(out.reference_nll),
        reference_entropy=tokens.in_place(out.reference_entropy),
        gradient_report=tokens.report,
    )


class Observer:
    """Per-token statistics of an objective's pass, for whoever reports more than its loss; no gradient, no further pass.

    After the call `nll`, `prediction` and, where wanted, `entropy` have the shape of its labels; 0, for predictions −1, where a
    label is ignored.
    """

    def __init__(self, wanted: frozenset[str] = frozenset()) -> None:
        self.wanted = wanted
        self.nll: Tensor | None = None
        self.prediction: Tensor | None = None
        self.entropy: Tensor | None = None

    def begin(self, tokens: Tokens) -> None:
        self._tokens, self._parts = tokens, dict[str, list[Tensor]](nll=[], prediction=[], entropy=[])

    def add(self, out: Statistics) -> None:
        """The statistics of the next tokens in order."""
        for name, parts in self._parts.items():
            values = getattr(out, name)
            if values is not None:
                parts.append(values.detach().clone())

    def finish(self) -> None:
        for name, parts in self._parts.items():
            values = torch.cat(parts) if parts else None
            if values is None and name != "entropy":  # no token has a label
                labels = self._tokens.problem.labels
                values = labels.new_empty(0, dtype=labels.dtype if name == "prediction" else torch.float32)
            setattr(self, name, self._tokens.in_place(values, fill=-1 if name == "prediction" else 0))
        del self._tokens, self._parts


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

    def needs(self) -> list[bool]:
        """Whether hidden, weight, bias and low_rank need a gradient."""
        head, enabled = self.problem.head, torch.is_grad_enabled()
        tensors = (self.problem.hidden, head.weight, head.bias, head.low_rank)
        return [enabled and t is not None and t.requires_grad for t in tensors]

    def takes_sparse_gradients(self) -> bool:
        """Also notes it in the report."""
        return self.report.begin(self.problem.tolerance, any(self.needs()))

    def check(self, values: Tensor, name: str, check: str, limit: int = 0) -> Tensor:
        """The values, which are those of valid tokens, after a check of checks.py."""
        checks.BY_NAME[check](values, name, limit)
        return values

    def select(self, values: Tensor, name: str, all_labelled: bool = False) -> Tensor:
        """The entries of a per-token tensor of the labels' shape that belong to valid tokens, [N].

        `all_labelled`: of those above 0 every one must belong to a valid token.
        """
        if not isinstance(values, Tensor):
            raise TypeError(
                f"{name}: expected a tensor of the labels' shape {list(self.shape)}, got {type(values).__name__}"
            )
        if values.shape != self.shape:
            raise ValueError(f"{name}: expected the labels' shape {list(self.shape)}, got {list(values.shape)}")
        device = self.problem.labels.device
        if values.device != device:
            raise ValueError(f"{name} is on {values.device}, hidden on {device}; move it with .to({str(device)!r})")
        flat = values.reshape(-1)
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
        return values.sum()

    def in_place(self, values: Tensor | None, fill: int = 0) -> Tensor | None:
        """A vector over the valid tokens, in the caller's shape."""
        if values is None:
            return None
        if self.index is not None:
            values = values.new_full((self.shape.numel(),), fill).index_copy(0, self.index, values)
        return values.reshape(self.shape)

    def losses(self, wanted: frozenset[str], top_k: int = 20) -> Statistics:
        """Differentiable nll and kl over the valid tokens, with the statistics named in `wanted`."""
        out = self._losses(wanted if self.observer is None else wanted | self.observer.wanted, top_k)
        if self.observer is not None:
            self.observer.begin(self)
            self.observer.add(out)
            self.observer.finish()
        return out

    def _losses(self, wanted: frozenset[str], top_k: int) -> Statistics:
        problem = _want(self.problem, wanted, top_k)
        sparse = self.takes_sparse_gradients()
        if self.backend == "reference":
            return _full_logits_statistics(problem)
        head, backend = problem.head, backends.load(self.backend)
        tensors = (problem.hidden, head.weight, head.bias, head.low_rank)
        if sparse:
            outputs = SparseTokenLossesFunction.apply(*tensors, problem, backend, self.report, self.publish)
        else:
            outputs = TokenLossesFunction.apply(*tensors, problem, backend, torch.is_grad_enabled())
        nll, kl, prediction, entropy, ref_nll, ref_entropy, topk_entropy = outputs
        return Statistics(nll, prediction, kl, ref_nll, entropy, ref_entropy, topk_entropy)

    def summed(
        self, loss: Callable[..., Tensor], wanted: frozenset[str], top_k: int = 20, **per_token: Tensor
    ) -> Tensor:
        """Σ_t loss(statistics, **per_token) for a loss of each token by itself; saves one GEMM over `losses`."""
        of_chunk = _of_chunk(loss, per_token, wanted)
        if self.backend == "reference":
            return of_chunk(self.losses(wanted, top_k), slice(None)).sum()
        if self.observer is None:
            return self._summed(of_chunk, wanted, top_k)

        def observed(out: Statistics, at: slice) -> Tensor:
            self.observer.add(out)
            return of_chunk(out, at)

        self.observer.begin(self)
        total = self._summed(observed, wanted | self.observer.wanted, top_k)
        self.observer.finish()
        return total

    def _summed(self, of_chunk: Callable[[Statistics, slice], Tensor], wanted: frozenset[str], top_k: int) -> Tensor:
        problem = _want(self.problem, wanted, top_k)
        head, backend = problem.head, backends.load(self.backend)
        tensors = (problem.hidden, head.weight, head.bias, head.low_rank)
        if self.takes_sparse_gradients():
            return SparseSummedLossFunction.apply(*tensors, problem, backend, self.report, self.publish, of_chunk)
        return SummedLossFunction.apply(*tensors, problem, backend, torch.is_grad_enabled(), of_chunk)


@dataclass(frozen=True)
class TracedTokens(Tokens):
    """The tokens of a call in a graph, T rows with the ignored ones: which are valid is in the mask, and known when it runs.

    What `Tokens` has [N] of is [T] here, with 0 at ignored tokens, and `count` is a tensor. `summed` takes the losses per token
    from the operator and adds them up, so exact gradients cost one GEMM more than in eager mode, or two with a reference.
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
        return flat.masked_fill(~self.valid, 0)

    def total(self, values: Tensor) -> Tensor:
        return torch.where(self.valid, values, 0).sum()

    def losses(self, wanted: frozenset[str], top_k: int = 20) -> Statistics:
        self.takes_sparse_gradients()
        if self.backend == "reference":
            return self._full_logits(wanted, top_k)
        problem, reference = self.problem, self.problem.reference_head or Head(None, None, 1.0, None)
        outputs = torch.ops.fused_losses.losses_forward(
            problem.hidden, problem.head.weight, problem.head.bias, problem.head.low_rank, problem.labels,
            problem.reference_hidden, reference.weight, reference.bias, reference.low_rank, self.ignore_index,
            problem.head.logit_scale, problem.head.softcap, reference.logit_scale, reference.softcap,
            problem.dtype, problem.hidden.dtype, problem.hidden.shape[1],
            ",".join(sorted(wanted)), top_k, problem.tolerance, self.backend, self.needs(), self.handle,
        )  # fmt: skip
        nll, kl, prediction, entropy, ref_nll, ref_entropy, topk_entropy, _, _ = outputs
        out = Statistics(nll, prediction)
        if problem.has_reference:
            out.kl, out.reference_nll = kl, ref_nll
            out.reference_entropy = ref_entropy if "reference_entropy" in wanted else None
        out.entropy = entropy if "entropy" in wanted else None
        out.topk_entropy = topk_entropy if "topk_entropy" in wanted else None
        return out

    def _full_logits(self, wanted: frozenset[str], top_k: int) -> Statistics:
        """Ordinary operations of the graph; ignored tokens become zeros with label 0."""
        problem = _want(self.problem, wanted, top_k)
        labels = torch.ops.fused_losses.checked(
            problem.labels, self.valid, "labels", str(self.ignore_index), problem.head.vocabulary
        )
        hidden, reference_hidden = (
            None if rows is None else torch.where(self.valid[:, None], rows, 0)
            for rows in (problem.hidden, problem.reference_hidden)
        )
        labels = labels.masked_fill(~self.valid, 0)
        out = _full_logits_statistics(replace(problem, hidden=hidden, labels=labels, reference_hidden=reference_hidden))
        for name in compiled.OUTPUTS:
            values = getattr(out, name)
            if values is not None:
                setattr(out, name, torch.where(self.valid, values, -1 if name == "prediction" else 0))
        return out

    def summed(
        self, loss: Callable[..., Tensor], wanted: frozenset[str], top_k: int = 20, **per_token: Tensor
    ) -> Tensor:
        of_tokens = _of_chunk(loss, per_token, wanted)
        out = self.losses(wanted, top_k)
        with torch.autocast(self.valid.device.type, enabled=False):
            return self.total(of_tokens(out, slice(None)))


class TokenStatistics:
    """What a `token_loss` is given of a `Statistics`: those that are always there, and the others if wanted."""

    def __init__(self, out: Statistics, wanted: frozenset[str]) -> None:
        self.nll, self.prediction, self.kl, self.reference_nll = out.nll, out.prediction, out.kl, out.reference_nll
        if "entropy" in wanted:
            self.entropy = out.entropy
        if "reference_entropy" in wanted and out.reference_entropy is not None:
            self.reference_entropy = out.reference_entropy
        if "topk_entropy" in wanted:
            self.topk_entropy = out.topk_entropy
        self._wanted = wanted

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in OPTIONAL:
            raise MissingAttribute(
                f"out.{name}: there is no such statistic; there are {', '.join((*GIVEN, *OPTIONAL))}"
            )
        if name in self._wanted:
            raise MissingAttribute(
                f"out.{name}: is of the reference, and there is none; give reference=fused_losses.Reference(hidden "
                f"states) to the call"
            )
        names = ", ".join(f'"{n}"' for n in OPTIONAL if n == name or n in self._wanted)
        raise MissingAttribute(
            f"out.{name}: is not computed, as it costs more and the objective does not ask for it; set the class "
            f"attribute "
            f"wanted = frozenset({{{names}}})"
        )

    def __repr__(self) -> str:
        return f"Statistics({', '.join(n for n in (*GIVEN, *OPTIONAL) if vars(self).get(n) is not None)})"


def check_wanted(wanted: Any, top_k: Any) -> tuple[frozenset[str], int]:
    """The statistics that an objective asks for, besides those that are always there, and its `top_k`."""
    names = None if isinstance(wanted, str) or not isinstance(wanted, Iterable) else list(wanted)
    known = (*GIVEN, *OPTIONAL)
    if names is None or any(name not in known for name in names):
        one = f"; write frozenset({{{wanted!r}}})" if wanted in OPTIONAL else ""
        wrong = wanted if names is None else next(name for name in names if name not in known)
        raise ValueError(f"wanted: expected a set of names among {', '.join(OPTIONAL)}, got {wrong!r}{one}")
    k = checks.integer(top_k)
    if k is None or k < 2:
        raise ValueError(f"top_k: expected an integer ≥ 2, got {top_k!r}")
    return frozenset(names) & frozenset(OPTIONAL), k


def _of_chunk(
    loss: Callable[..., Tensor], per_token: dict[str, Tensor], wanted: frozenset[str]
) -> Callable[[Statistics, slice], Tensor]:
    """The loss of some of the tokens, checked."""
    for name, values in per_token.items():
        if values.requires_grad and torch.is_grad_enabled():
            raise TypeError(f"{name}: requires a gradient, which would be lost here; give {name}.detach()")

    def of_chunk(out: Statistics, at: slice) -> Tensor:
        result = _call(loss, TokenStatistics(out, wanted), {name: values[at] for name, values in per_token.items()})
        if not isinstance(result, Tensor) or result.shape != out.nll.shape or not result.is_floating_point():
            what = f"{result.dtype} {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            if result is None:
                what += " (out.kl and the reference's statistics are None unless the call has reference=)"
            raise ValueError(
                f"token_loss: expected one float per token, shape {list(out.nll.shape)} as out.nll, got {what}; sums and "
                "means over tokens are taken afterwards"
            )
        if out.nll.requires_grad and torch.is_grad_enabled():
            _check_gradient(result, out)
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
            f"token_loss: {error}; out.kl and out.reference_nll are None without a reference: give "
            "reference=fused_losses.Reference(hidden states) to the call"
        ) from error


def _check_gradient(result: Tensor, out: Statistics) -> None:
    """A loss that trains nothing, or something that it cannot reach from here, is a mistake."""
    if not result.requires_grad:
        raise ValueError(
            "token_loss: the loss has no gradient, so nothing would be trained; it must depend on out.nll or out.kl, "
            "not detached "
            "(weights may be: weight.detach() * out.nll)"
        )
    if torch.compiler.is_compiling() or not out.nll.is_leaf:
        return
    # Only leaves: a graph that leads into a model is not walked through.
    own, nodes, seen = (out.nll, out.kl), [result.grad_fn], set[Any]()
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


def prepare(
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    labels: Tensor,
    reference: Reference | None,
    ignore_index: int,
    gradient: str,
    backend: str,
    tolerance: float,
    publish: Callable[[GradientReport], None] = lambda report: None,
    handle: Tensor | None = None,
) -> Tokens:
    """All validation of the package's losses, and the removal of ignored tokens.

    In a graph (`capturable`) values are checked, and ignored tokens removed, when it runs. `handle`: of the objective.
    """
    head = as_head(head).local()
    ignore_index, tolerance = check_options(gradient, backend, ignore_index, tolerance)
    labels = plain(labels)
    _check_transforms(hidden, head, labels, backend)
    if head.is_spread:
        _check_spread_options(gradient, backend)
    _check_hidden(hidden, head)
    _check_labels(labels, hidden)
    reference_hidden, reference_head, reference_low_rank = _check_reference(reference, hidden, head)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, head.weight, head.bias)]

    tracing = torch.compiler.is_compiling()
    flat = labels.reshape(-1)
    index = None if tracing else valid_index(flat, ignore_index)

    def select(x: Tensor) -> Tensor:
        x = x.reshape(-1, x.shape[-1])
        return x if index is None else x.index_select(0, index)

    if index is not None:
        flat = flat.index_select(0, index)
    rows = [None if x is None else select(x) for x in (hidden, reference_hidden)]
    low_rank = None if head.low_rank is None else head.low_rank.b
    if low_rank is not None or reference_low_rank is not None:
        valid = flat != ignore_index if tracing else None
        u, u_ref = (
            None if part is None or x is None else _low_rank_rows(part, x, select, valid)
            for part, x in zip((head.low_rank, reference_low_rank), rows, strict=True)
        )
        rows, low_rank = _with_low_rank(
            rows, u, u_ref, low_rank, reference_low_rank if reference_head is None else None
        )
    dtype = _compute_dtype(hidden, head)
    shard = None
    if head.is_spread:
        reference_rows = None
        if reference is not None:
            reference_rows = len((reference_head or head).weight)
        shard = shards.agreement(head.process_group, len(head.weight), reference_rows, hidden, flat, needs)
    inner = Head(head.weight, head.bias, head.logit_scale, head.softcap, low_rank, shard)
    if not tracing:
        checks.labels(flat, ignore_index, inner.vocabulary)
    if shard is not None:
        chosen = "sharded"
    else:
        chosen = backend if tracing else backends.choose(backend, hidden.device.type)
    if gradient == "auto":
        half = dtype in (torch.bfloat16, torch.float16)
        sparse = half and inner.vocabulary >= SMALLEST_VOCABULARY and chosen not in ("reference", "sharded")
    else:
        sparse = gradient == "sparse"
    problem = Problem(
        hidden=rows[0],
        labels=flat,
        head=inner,
        reference_hidden=rows[1],
        reference_head=reference_head,
        dtype=dtype,
        tolerance=float(tolerance) if sparse else None,
    )
    if tracing:
        report = GradientReport("none", None, entries=None, saved_bytes=None)
        return TracedTokens(
            problem, labels.shape, None, chosen, report, publish, flat != ignore_index, ignore_index, handle
        )
    return Tokens(problem, labels.shape, index, chosen, GradientReport("none", len(flat)), publish)


def _low_rank_rows(low_rank: LowRank, x: Tensor, select: Callable[[Tensor], Tensor], valid: Tensor | None) -> Tensor:
    """u [N, r] of the tokens x."""
    if low_rank.rows is not None:
        return select(low_rank.rows)
    if valid is not None:  # what ignored tokens hold, perhaps NaN, must not get into the gradient of a
        x = torch.where(valid[:, None], x, 0)
    return low_rank.inputs(x)


def _with_low_rank(
    rows: list[Tensor | None], u: Tensor | None, u_ref: Tensor | None, b: Tensor | None, shared: LowRank | None
) -> tuple[list[Tensor | None], Tensor | None]:
    """Rows [x, u] and [x_ref, u_ref], and B. `shared`: the reference's low-rank part where it is on the same W.

    Another B_ref than B there gives [B, B_ref − B], with [u, 0] and [u_ref, u_ref]: then what the difference form multiplies is
    small where the two adapters nearly agree. Of other ranks: [B, B_ref], with [u, 0] and [0, u_ref]. u is rounded to the
    dtype of x, but not where u − u_ref may cancel.
    """
    x, x_ref = rows
    if u is not None:
        x = torch.cat([x, u if u_ref is not None and shared is not None else u.to(x.dtype)], 1)
    if u_ref is not None:
        u_ref = u_ref.detach()
        if shared is not None and (b is None or not _same_tensor(b, shared.b)):
            b_ref = shared.b.detach()
            x = nn.functional.pad(x, (0, b_ref.shape[1]))
            if b is None:
                b = b_ref
            elif b.shape == b_ref.shape:
                wide = torch.promote_types(b.dtype, torch.float32)
                b, u_ref = torch.cat([b, b_ref.to(wide) - b.detach().to(wide)], 1), torch.cat([u_ref, u_ref], 1)
            else:
                b, u_ref = torch.cat([b, b_ref], 1), nn.functional.pad(u_ref, (b.shape[1], 0))
        x_ref = torch.cat([x_ref, u_ref], 1)
    return [x, x_ref], b


def _want(problem: Problem, wanted: frozenset[str], top_k: int) -> Problem:
    return replace(problem, wanted=wanted, top_k=top_k)


def _full_logits_statistics(problem: Problem) -> Statistics:
    z = full_logits.logits(problem.hidden, problem.head)
    out = Statistics(full_logits.nll(z, problem.labels), z.detach().argmax(-1))
    fixed = z.detach()
    out.entropy = full_logits.entropy(fixed) if "entropy" in problem.wanted else None
    if "topk_entropy" in problem.wanted:
        out.topk_entropy = full_logits.topk_entropy(fixed, problem.top_k)
    if problem.reference_hidden is not None:
        with torch.no_grad():
            z_ref = full_logits.logits(problem.reference_hidden, problem.reference_head or problem.head)
            out.reference_nll = full_logits.nll(z_ref, problem.labels)
            out.reference_entropy = full_logits.entropy(z_ref)
        out.kl = full_logits.kl(z_ref, z)
    return out


def check_options(gradient: str, backend: str, ignore_index: int, tolerance: float) -> tuple[int, float]:
    """The last two as Python numbers."""
    if not isinstance(gradient, str) or gradient not in GRADIENTS:
        raise ValueError(f"gradient: expected one of {', '.join(GRADIENTS)}, got {gradient!r}")
    if gradient == "sparse" and backend == "reference":
        raise ValueError(
            "gradient='sparse' with backend='reference', which has full logits and is always exact; leave one of the two"
        )
    bound = checks.number(tolerance)
    if bound is None or not 0 < bound < 1:
        raise ValueError(
            f"tolerance: expected a number above 0 and below 1 (the default is {TOLERANCE}), got {tolerance!r}; for "
            f"exact "
            "gradients give gradient='exact'"
        )
    if backend != "auto" and backend not in backends.NAMES:
        raise ValueError(f"backend: expected one of auto, {', '.join(backends.NAMES)}, got {backend!r}")
    index = checks.integer(ignore_index)
    if index is None:
        raise TypeError(f"ignore_index: expected an integer such as -100, got {ignore_index!r}")
    return index, bound


def _check_spread_options(gradient: str, backend: str) -> None:
    where = "with a head whose process_group spreads the vocabulary over ranks"
    if gradient == "sparse":
        raise ValueError(f"gradient='sparse' {where}, for which gradients are exact; give gradient='auto' or 'exact'")
    if backend not in ("auto", "torch"):
        raise ValueError(
            f"backend={backend!r} {where}, for which there is 'torch' alone; give backend='auto' or 'torch'"
        )


def _check_transforms(hidden: Tensor, head: LMHead, labels: Tensor, backend: str) -> None:
    """torch.func, forward-mode differentiation: what has no rule of ours."""
    if backend == "reference":
        if isinstance(labels, Tensor) and compiled.is_batched(labels):
            raise NotImplementedError(
                "torch.func.vmap over labels is not supported; give all tokens in one call, with a loss for each by "
                "fused_losses.token_losses"
            )
        return
    if compiled.in_transform():
        raise NotImplementedError(
            "torch.func (grad, vjp, jvp, jacrev, vmap, functional_call under these) is not supported by fused losses; "
            "call backward() or "
            "torch.autograd.grad(), or give backend='reference', with full logits (not for vmap over labels)"
        )
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        low_rank = () if head.low_rank is None else (head.low_rank.b, head.low_rank.a, head.low_rank.rows)
        tensors = [t for t in (hidden, head.weight, head.bias, *low_rank) if isinstance(t, Tensor)]
        if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(
                "forward-mode differentiation (torch.autograd.forward_ad) is not supported by fused losses; call "
                "backward() or "
                "torch.autograd.grad(), or give backend='reference', with full logits"
            )


def _check_hidden(hidden: Tensor, head: LMHead) -> None:
    if not isinstance(hidden, Tensor):
        output = "; give its last_hidden_state" if hasattr(hidden, "last_hidden_state") else ""
        raise TypeError(f"hidden: expected a tensor [..., D], got {type(hidden).__name__}{output}")
    if shards.is_dtensor(hidden):
        raise TypeError(
            "hidden: expected a plain tensor with all tokens, got a DTensor; give hidden.full_tensor() or, where it is "
            "replicated, hidden.to_local()"
        )
    if hidden.dtype not in FLOATING:
        raise TypeError(f"hidden: expected one of {_names(FLOATING)}, got {hidden.dtype}")
    if hidden.dim() == 0 or hidden.numel() == 0:
        raise ValueError(
            f"hidden: expected [..., D] with at least one token, got shape {list(hidden.shape)}; skip empty batches"
        )
    dim = head.weight.shape[1]
    if hidden.shape[-1] != dim:
        swapped = ""
        if hidden.shape[-1] == head.vocabulary:
            swapped = (
                "; either hidden are logits (give what goes into the head), or the weight is transposed (give weight.T)"
            )
        raise ValueError(
            f"hidden: expected last dimension D = {dim}, that of the head's weight {list(head.weight.shape)}, "
            f"got shape {list(hidden.shape)}{swapped}"
        )
    if hidden.device != head.weight.device:
        raise ValueError(f"hidden is on {hidden.device}, head weight on {head.weight.device}; move both to one device")
    compiling = torch.compiler.is_compiling()
    if hidden.device.type == "meta" or (not compiling and type(hidden).__name__ == "FakeTensor"):
        raise ValueError(
            f"hidden: expected a tensor with numbers, got one "
            f"{'on meta' if hidden.device.type == 'meta' else 'that is fake'}, which has "
            "only a shape; load the model to a device first, or trace the call with torch.compile or torch.export"
        )
    _check_low_rank_rows(head.low_rank, hidden, "low_rank rows")


def _check_labels(labels: Tensor, hidden: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected an int64 tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(
            f"labels: expected int64 token ids, got {labels.dtype}; convert ids with labels.long() "
            "(probabilities as targets are not supported)"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels: expected shape {list(hidden.shape[:-1])}, hidden's without its last dimension, got "
            f"{list(labels.shape)}; nothing is shifted here: "
            "for input ids as labels give hidden[:, :-1] and labels[:, 1:]"
        )
    if labels.device != hidden.device:
        raise ValueError(f"labels are on {labels.device}, hidden on {hidden.device}; move them with .to(hidden.device)")


def _check_reference(
    reference: Reference | None, hidden: Tensor, head: LMHead
) -> tuple[Tensor | None, Head | None, LowRank | None]:
    """The reference's hidden states, its head, None where it is the trained model's, and its low-rank part."""
    if reference is None:
        return None, None, None
    if not isinstance(reference, Reference):
        raise TypeError(
            f"reference: expected fused_losses.Reference(hidden, head=None), got {type(reference).__name__}"
        )
    ref_head = reference.head
    assert ref_head is None or isinstance(ref_head, LMHead)
    if ref_head is not None:
        ref_head = ref_head.local()
        if not shards.same_ranks(head.process_group, ref_head.process_group):
            raise ValueError(
                f"reference head: expected its vocabulary spread over the same ranks as the head's, got {ref_head} for {head}; "
                "give both LMHead(rows, process_group=group), or whole tensors for both"
            )
    if reference.hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"reference hidden: expected leading shape {list(hidden.shape[:-1])} as hidden, got "
            f"{list(reference.hidden.shape)}; both models must see the same tokens"
        )
    dim = (ref_head or head).weight.shape[1]
    if reference.hidden.shape[-1] != dim:
        raise ValueError(
            f"reference hidden: expected last dimension {dim}, that of {'its' if ref_head else 'the shared'} head, got "
            f"{reference.hidden.shape[-1]}; give Reference(hidden, head) the reference model's own head"
        )
    for tensor, name in (
        (reference.hidden, "reference hidden"),
        (None if ref_head is None else ref_head.weight, "reference head"),
    ):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name} is on {tensor.device}, hidden on {hidden.device}; move it with .to(hidden.device)"
            )
    # Of heads spread over ranks they are compared on all ranks together.
    if ref_head is not None and not head.is_spread and ref_head.vocabulary != head.vocabulary:
        raise ValueError(
            f"reference head: expected V = {head.vocabulary} as the head, got {ref_head.vocabulary}; the KL needs one "
            "vocabulary: resize or pad one head (bias −inf rules padding out)"
        )
    low_rank = None if ref_head is None else ref_head.low_rank
    _check_low_rank_rows(low_rank, reference.hidden, "reference low_rank rows")
    if ref_head is None or ref_head.is_same(head):
        return reference.hidden.detach(), None, low_rank
    bias, b = (None if t is None else t.detach() for t in (ref_head.bias, None if low_rank is None else low_rank.b))
    own = Head(ref_head.weight.detach(), bias, ref_head.logit_scale, ref_head.softcap, b)
    return reference.hidden.detach(), own, low_rank


def _check_low_rank_rows(low_rank: LowRank | None, hidden: Tensor, name: str) -> None:
    if low_rank is not None and low_rank.rows is not None and low_rank.rows.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{name}: expected leading shape {list(hidden.shape[:-1])} as hidden, got {list(low_rank.rows.shape)}; "
            "slice it as hidden was sliced"
        )


def _compute_dtype(hidden: Tensor, head: LMHead) -> torch.dtype:
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (hidden.dtype, head.weight.dtype):
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != head.weight.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype}, head weight {head.weight.dtype}; cast one (hidden.to(weight.dtype)) or, "
            "unless one is float64, call under torch.autocast"
        )
    return hidden.dtype

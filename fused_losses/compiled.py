"""The per-token losses as operators, opaque to `torch.compile`, for callers that shall become one graph.

A graph has tensors of sizes it knows, but the losses work on the tokens with a label, whose number it does not know. So
the operators take all tokens, drop the ignored ones inside, and return vectors over all tokens. What is kept for
backward besides the inputs has a size that depends on the data (entries of the sparse softmax): all of it goes into one
tensor of bytes. Inside run the same autograd functions as in eager mode, with `Context` in the place of autograd's ctx.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from . import backends, checks
from .autograd import SparseTokenLossesFunction, TokenLossesFunction, upstream_of, with_scan
from .head import LMHead, calls_other_ranks
from .problem import DIFFERENTIABLE, OUTPUTS, Head, Int8, Problem, Upstream, valid_index
from .sparse.certificate import GradientReport

F = TypeVar("F", bound=Callable)


class Call(NamedTuple):
    """The arguments of one call, all tokens."""

    hidden: Tensor | None  # [T, D], with a low-rank part [T, D + r]
    weight: Tensor | None
    bias: Tensor | None
    low_rank: Tensor | None
    labels: Tensor  # [T]
    reference_hidden: Tensor | None
    reference_weight: Tensor | None
    reference_bias: Tensor | None
    reference_low_rank: Tensor | None
    ids: Tensor | None  # [T, k], −1 where there is none
    ignore_index: int
    logit_scale: float
    softcap: float | None
    reference_logit_scale: float
    reference_softcap: float | None
    dtype: torch.dtype
    hidden_dtype: torch.dtype
    width: int  # of hidden
    wanted: str  # names with commas between
    entropy_gradient: bool
    beta: float | None
    top_k: int
    tolerance: float | None
    backend: str
    int8: bool
    needs: list[bool]  # whether hidden, weight, bias and low_rank need a gradient
    handle: Tensor | None  # of the objective, for `publish`

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def keeps_rows(self) -> bool:
        """Whether forward keeps the rows ∂nll/∂x, ∂kl/∂x, ...; then backward needs no hidden states, nor the
        reference."""
        return self.tolerance is None and self.needs[0] and not any(self.needs[1:])

    def problem(self) -> Problem:
        """With the ignored tokens."""
        head, reference = Head(self.weight, self.bias, self.logit_scale, self.softcap, self.low_rank), None
        if self.reference_weight is not None:
            reference = Head(
                self.reference_weight, self.reference_bias, self.reference_logit_scale, self.reference_softcap,
                self.reference_low_rank,
            )  # fmt: skip
            # Known only here: while tracing, tensors have no addresses.
            if self.reference_low_rank is None and LMHead(*head[:4]).is_same(LMHead(*reference[:4])):
                reference = None
        wanted = frozenset(filter(None, self.wanted.split(",")))
        return Problem(
            self.hidden, self.labels, head, self.reference_hidden, reference, self.dtype, self.ids, wanted,
            self.entropy_gradient, self.beta, False, self.top_k, self.tolerance, Int8() if self.int8 else None,
        )  # fmt: skip

    def valid_problem(self, index: Tensor | None) -> Problem:
        """Without the ignored tokens."""
        problem = self.problem()
        if index is None:
            return problem
        if problem.hidden is None:  # the rows are kept
            return replace(
                problem, labels=problem.labels.index_select(0, index),
                ids=None if problem.ids is None else problem.ids.index_select(0, index),
            )  # fmt: skip
        return problem.rows(index)


TENSORS = Call._fields.index("ignore_index")  # so many come first; the last is `handle`
_CALL = (
    "Tensor? hidden, Tensor? weight, Tensor? bias, Tensor? low_rank, Tensor labels, Tensor? reference_hidden, "
    "Tensor? reference_weight, Tensor? reference_bias, Tensor? reference_low_rank, Tensor? ids, int ignore_index, "
    "float logit_scale, float? softcap, float reference_logit_scale, float? reference_softcap, ScalarType dtype, "
    "ScalarType hidden_dtype, SymInt width, str wanted, bool entropy_gradient, float? beta, SymInt top_k, "
    "float? tolerance, str backend, bool int8, bool[] needs, Tensor? handle"
)
SCHEMAS = {
    # Outputs that are not wanted are empty.
    "losses_forward": f"({_CALL}) -> ({', '.join(f'Tensor {name}' for name in OUTPUTS)}, Tensor saved, Tensor layout)",
    "losses_backward": f"({', '.join(f'Tensor? d_{name}' for name in DIFFERENTIABLE)}, "
    f"Tensor saved, Tensor layout, {_CALL}) "
    "-> (Tensor hidden, Tensor weight, Tensor bias, Tensor low_rank)",
    # `values`, after one of the checks of checks.py on those where `valid`
    "checked": "(Tensor values, Tensor? valid, str check, str name, SymInt limit) -> Tensor",
}


def captures() -> bool:
    """Whether the graph being traced may have tensors whose size depends on the data, as with `fullgraph=True`."""
    if torch.compiler.is_exporting():
        return True
    context = torch._guards.TracingContext.try_get()
    shapes = None if context is None or context.fake_mode is None else context.fake_mode.shape_env
    return shapes is not None and shapes.allow_dynamic_output_shape_ops


# What torch.compiler.assume_constant_result does, which would import the compiler: the tracer calls it and keeps the
# answer.
captures._dynamo_marked_constant = True  # type: ignore[attr-defined]


def capturable(function: F) -> F:
    """Under `torch.compile` the call becomes part of a graph that may have tensors of unknown sizes (`fullgraph=True`).

    Elsewhere it is a graph break and runs as it is, for objectives with a GEMM less. So is a call with a
    `process_group`, of the objective or of a head, whose ranks talk to each other. Costs nothing at import.

    Keywords that the function does not know are errors that name those it does.
    """
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = frozenset(parameters) - {"self"}

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling():
            if not captures() or _talks(args, kwargs):
                eagerly = torch.compiler.disable(function)  # no part of a graph with a process_group
                return eagerly(*args, **kwargs)
        elif not takes_any and not kwargs.keys() <= known:
            who = type(args[0]).__name__ if "self" in parameters and args else function.__name__
            raise TypeError(checks.unknown_argument(who, kwargs, [n for n in parameters if n != "self"]))
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def _talks(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call of an objective or of `token_losses` talks to other ranks."""
    if getattr(args[0], "process_group", None) is not None:
        return True
    return any(calls_other_ranks(given) for given in (*args, *kwargs.values()))


def in_transform() -> bool:
    """Whether a transform of torch.func is being taken."""
    return torch._C._are_functorch_transforms_active()


in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_batched(tensor: Tensor) -> bool:
    """Whether torch.func.vmap maps over it."""
    if torch.compiler.is_compiling() or not in_transform():
        return False
    inner: Any = tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(inner):
        if torch._C._functorch.is_batchedtensor(inner):
            return True
        inner = torch._C._functorch.get_unwrapped(inner)
    return False


class Context:
    """What the autograd functions use of autograd's ctx."""

    def __init__(self, needs: list[bool], **attributes: Any) -> None:
        self.needs_input_grad = needs
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        vars(self).update(attributes)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


# A graph cannot set an attribute from inside an operator, so it carries a number by which the objective is found.
_objectives: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count(1)


def handle(objective: Any) -> Tensor | None:
    """What stands for the objective in a graph: a tensor, as graphs are specialised on numbers. None for one made in a
    graph."""
    if torch.compiler.is_compiling():
        return None
    number = next(_numbers)
    _objectives[number] = objective
    with torch.inference_mode(False):
        return torch.tensor(number, device="cpu")


def publish(handle: Tensor | None, report: GradientReport, backward: bool = False) -> None:
    objective = None if handle is None else _objectives.get(int(handle))
    if objective is not None:
        before = objective.gradient_report
        if backward and before is not None and before.tokens == report.tokens:  # that of the forward
            report.scan, report.value_error, report.scan_note = before.scan, before.value_error, before.scan_note
        objective.gradient_report = report


# Each tensor in `saved` starts at a multiple of this, so that views of every dtype are possible.
ALIGNMENT = 64
SLOTS = 32
DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
)


def pack(tensors: list[Tensor | None], device: torch.device, numbers: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Tensors of up to two dimensions one after the other, as bytes, and the layout, on the CPU: a row (dtype,
    dimensions, sizes) for each, in the last how many there are and two numbers more. The list is emptied.
    """
    assert len(tensors) < SLOTS
    rows = [(-1, 0, 0, 0)] * SLOTS
    starts = [0]
    for slot, tensor in enumerate(tensors):
        size = 0
        if tensor is not None:
            rows[slot] = (DTYPES.index(tensor.dtype), tensor.dim(), *[*tensor.shape, 1, 1][:2])
            size = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        starts.append(starts[-1] + size)
    rows[-1] = (len(tensors), 0, *numbers)
    saved = torch.empty(starts[-1], dtype=torch.uint8, device=device)
    for start, stop in itertools.pairwise(starts):
        tensor = tensors.pop(0)
        if tensor is not None:
            saved[start : start + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
            saved[start + tensor.nbytes : stop] = 0
    return saved, torch.tensor(rows, device="cpu")


def unpack(saved: Tensor, layout: Tensor) -> tuple[list[Tensor | None], list[int]]:
    *rows, (count, _, *numbers) = layout.tolist()
    tensors: list[Tensor | None] = []
    start = 0
    for code, dimensions, *sizes in rows[:count]:
        if code < 0:
            tensors.append(None)
            continue
        size = DTYPES[code].itemsize * sizes[0] * sizes[1]
        tensors.append(saved[start : start + size].view(DTYPES[code]).view(sizes[:dimensions]))
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return tensors, numbers


@torch.no_grad()
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    labels = call.labels
    backend = backends.choose(call.backend, labels.device.type)
    module = backends.load(backend)
    index = valid_index(labels, call.ignore_index)
    problem = call.valid_problem(index)
    checks.labels(problem.labels, call.ignore_index, problem.head.vocabulary)

    context, report = Context(call.needs), GradientReport("none", len(problem.labels))
    problem = with_scan(problem, backend, any(call.needs), report)
    tensors = (problem.hidden, call.weight, call.bias, call.low_rank)
    kept: list[Tensor | None] = []
    if report.begin(call.tolerance, any(call.needs)):
        outputs = SparseTokenLossesFunction.forward(context, *tensors, problem, module, report, lambda report: None)
        kept = list(context.saved_tensors[len(problem.tensors()) :])
    else:
        outputs = TokenLossesFunction.forward(context, *tensors, problem, module, any(call.needs))
        if call.keeps_rows:
            kept = list(context.saved_tensors[len(problem.tensors()) :])
    report.note_scan(problem.int8)
    publish(call.handle, report)
    del context, tensors, problem  # now `kept` alone holds its tensors, and `pack` frees one after the other
    saved, layout = pack(kept, labels.device, (report.entries, report.saved_bytes))

    results: list[Tensor] = []
    for name, values in zip(OUTPUTS, outputs, strict=True):
        if values is None:
            values = labels.new_empty(0, dtype=torch.int64 if name in ("prediction", "rank") else call.accumulator)
        elif index is not None:
            everywhere = values.new_full((len(labels), *values.shape[1:]), -1 if name in ("prediction", "rank") else 0)
            values = everywhere.index_copy_(0, index, values)
        results.append(values)
    return (*results, saved, layout)


@torch.no_grad()
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    count = len(DIFFERENTIABLE)
    upstream, (saved, layout), call = (
        Upstream(*arguments[:count]),
        arguments[count : count + 2],
        Call(*arguments[count + 2 :]),
    )
    labels = call.labels
    index = valid_index(labels, call.ignore_index)
    if index is not None:
        upstream = upstream.rows(index)
    report = GradientReport("none", len(labels) if index is None else len(index))
    sparse = report.begin(call.tolerance, True)
    kept, (report.entries, report.saved_bytes) = unpack(saved, layout)
    context: Any = Context(call.needs, report=report, publish=lambda report: publish(call.handle, report, True))
    context.keep_rows, context.dtype = call.keeps_rows, call.hidden_dtype
    context.backend = backends.load(backends.choose(call.backend, labels.device.type))
    context.problem = call.valid_problem(index)
    context.saved_tensors = (*context.problem.tensors(), *kept)
    gradients = (getattr(upstream, name, None) if name in DIFFERENTIABLE else None for name in OUTPUTS)
    d_hidden, *others = (SparseTokenLossesFunction if sparse else TokenLossesFunction).backward(context, *gradients)
    if d_hidden is not None and index is not None:
        everywhere = d_hidden.new_zeros(len(labels), d_hidden.shape[1])
        d_hidden = everywhere.index_copy_(0, index, d_hidden)
    results = (d_hidden, *others[:3])
    return tuple(labels.new_empty(0, dtype=call.hidden_dtype) if g is None else g.contiguous() for g in results)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    call = Call(*inputs)
    *results, saved, layout = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(
        *(values for name, values in zip(OUTPUTS, results, strict=True) if not _differentiable(call, name)),
        saved,
        layout,
    )
    tensors = call[:TENSORS]
    if call.keeps_rows:
        left_out = {"hidden", "reference_hidden", "reference_weight", "reference_bias", "reference_low_rank"}
        tensors = tuple(
            None if name in left_out else t for name, t in zip(Call._fields[:TENSORS], tensors, strict=True)
        )
    ctx.save_for_backward(saved, layout, *tensors, call.handle)
    ctx.options = call[TENSORS:-1]


def _differentiable(call: Call, name: str) -> bool:
    there = {
        "kl": call.reference_hidden is not None, "logits_at": call.ids is not None, "entropy": call.entropy_gradient,
        "divergence": call.beta is not None,
    }  # fmt: skip
    return name in DIFFERENTIABLE and there.get(name, True)


def _autograd(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * len(Call._fields)
    upstream = upstream_of(gradients[: len(OUTPUTS)])
    if upstream.is_zero:
        return none
    saved, layout, *tensors, handle = ctx.saved_tensors
    weights = (getattr(upstream, name) for name in DIFFERENTIABLE)
    found = torch.ops.fused_losses.losses_backward(*weights, saved, layout, *tensors, *ctx.options, handle)
    needs = ctx.options[Call._fields.index("needs") - TENSORS]
    return tuple(g if need else None for g, need in zip(found, needs, strict=True)) + none[4:]


def _no_second_derivatives(ctx: Any, *_: Any) -> None:
    raise RuntimeError("fused_losses has no second derivatives; backend='reference' has, with full logits")


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    wanted = {"nll", "lse", "prediction", *call.wanted.split(",")}
    if call.reference_hidden is None:
        wanted.discard("reference_entropy")
    else:
        wanted |= {"kl", "reference_nll"}
    for name, there in (("entropy", call.entropy_gradient), ("divergence", call.beta is not None)):
        if there:
            wanted.add(name)
    results = []
    for name in OUTPUTS:
        dtype = torch.int64 if name in ("prediction", "rank") else call.accumulator
        shape: Any = call.labels.shape if name in wanted else 0
        if name == "logits_at" and call.ids is not None:
            shape = call.ids.shape
        results.append(call.labels.new_empty(shape, dtype=dtype))
    size: Any = 0
    if call.keeps_rows or (call.tolerance is not None and any(call.needs)):
        size = torch.library.get_ctx().new_dynamic_size()
    saved = call.labels.new_empty(size, dtype=torch.uint8)
    return (*results, saved, torch.empty(SLOTS, 4, dtype=torch.int64, device="cpu"))


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments[len(DIFFERENTIABLE) + 2 :])
    like = (call.hidden, call.weight, call.bias, call.low_rank)
    if call.keeps_rows:
        like = (call.labels.new_empty(call.labels.shape[0], call.width, dtype=call.hidden_dtype), None, None, None)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if need
        else call.labels.new_empty(0, dtype=call.hidden_dtype)
        for tensor, need in zip(like, call.needs, strict=True)
    )


def _checked(values: Tensor, valid: Tensor | None, check: str, name: str, limit: int) -> Tensor:
    if check in checks.WITH_MASK:
        checks.BY_NAME[check](values, name, limit, valid)
    else:
        checks.BY_NAME[check](values if valid is None else values[valid], name, limit)
    return values.clone(memory_format=torch.contiguous_format)


def register(name: str, schema: str, implementation: Callable, fake: Callable) -> None:
    # They wait for the device, and what they allocate depends on the data: nothing for a CUDA graph.
    torch.library.define(f"fused_losses::{name}", schema, tags=(torch.Tag.cudagraph_unsafe,))
    torch.library.impl(f"fused_losses::{name}", "CompositeExplicitAutograd", implementation)
    torch.library.register_fake(f"fused_losses::{name}", fake)


register("losses_forward", SCHEMAS["losses_forward"], _forward, _fake_forward)
register("losses_backward", SCHEMAS["losses_backward"], _backward, _fake_backward)
register("checked", SCHEMAS["checked"], _checked, lambda values, *_: values.new_empty(values.shape))
torch.library.register_autograd("fused_losses::losses_forward", _autograd, setup_context=_setup)
torch.library.register_autograd("fused_losses::losses_backward", _no_second_derivatives)

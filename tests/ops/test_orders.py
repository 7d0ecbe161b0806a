"""Names and orders that are data: what goes through save_for_backward, an operator's schema, a kernel's signature."""

import re
from dataclasses import fields

import pytest
import torch

from fused_losses import compiled
from fused_losses.problem import DIFFERENTIABLE, OUTPUTS, TENSORS, Entries, Head, Problem, Rows, Statistics, Tails
from fused_losses.sparse.softmax import SparseSoftmax
from fused_losses.sparse.weighted import WeightedSparse


def numbered(count):
    return [torch.tensor(float(i)) for i in range(count)]


def test_problem_tensors_come_back_to_their_places():
    t = iter(numbered(20))
    head = Head(next(t), next(t), 1.0, None, next(t))
    own = Head(next(t), next(t), 2.0, 3.0, next(t))
    problem = Problem(next(t), next(t), head, next(t), own, torch.float32, ids=next(t))
    saved = problem.tensors()
    assert len(saved) == TENSORS and len({id(tensor) for tensor in saved}) == TENSORS
    back = problem.without_tensors().with_tensors(saved)
    assert back.head == problem.head and back.reference_head == problem.reference_head
    for name in ("hidden", "labels", "reference_hidden", "ids"):
        assert getattr(back, name) is getattr(problem, name), name


def test_sparse_softmax_tensors_come_back_to_their_places():
    names = [f.name for f in fields(SparseSoftmax) if f.name != "tails"]
    given = dict(zip(names, numbered(len(names)), strict=True))
    tails = Tails(*numbered(len(fields(Tails))))
    sparse = SparseSoftmax(**given, tails=tails)
    back = SparseSoftmax.of_tensors(sparse.tensors())
    assert all(getattr(back, name) is getattr(sparse, name) for name in names)
    assert all(getattr(back.tails, f.name) is getattr(tails, f.name) for f in fields(Tails))


def test_weighted_sparse_tensors_come_back_to_their_places():
    sparse = WeightedSparse(*numbered(len(fields(WeightedSparse))))
    back = WeightedSparse.of_tensors(sparse.tensors())
    assert all(getattr(back, f.name) is getattr(sparse, f.name) for f in fields(WeightedSparse))


def test_rows_are_in_the_order_of_their_fields():
    rows = Rows(*numbered(4))
    assert rows.tensors() == tuple(getattr(rows, f.name) for f in fields(Rows))


def test_outputs_are_the_first_statistics():
    assert tuple(f.name for f in fields(Statistics))[: len(OUTPUTS)] == OUTPUTS
    assert set(DIFFERENTIABLE) < set(OUTPUTS) and "log_p2" in OUTPUTS and "normaliser" not in OUTPUTS


def test_entries_keep_what_a_chunk_that_is_done_drops():
    """`Builder.add` replaces these three fields by name."""
    assert {"counts", "columns", "nll_values", "kl_values"} < {f.name for f in fields(Entries)}


def arguments(schema):
    inside = schema[schema.index("(") + 1 : schema.index(") ->")]
    return [re.sub(r"=.*", "", part).split()[-1] for part in inside.split(",")]


def test_the_operators_schema_has_the_fields_of_a_call_in_order():
    assert arguments(compiled.SCHEMAS["losses_forward"]) == list(compiled.Call._fields)
    backward = [*(f"d_{name}" for name in DIFFERENTIABLE), "saved", "layout", *compiled.Call._fields]
    assert arguments(compiled.SCHEMAS["losses_backward"]) == backward
    results = compiled.SCHEMAS["losses_forward"].split("-> (")[1].rstrip(")").split(", ")
    assert [result.split()[-1] for result in results] == [*OUTPUTS, "saved", "layout"]
    tensors = [part for part in compiled._CALL.split(", ") if part.startswith("Tensor")]
    assert len(tensors) == compiled.TENSORS + 1 and tensors[-1].endswith("handle")


def test_every_argument_of_a_kernel_has_a_type_by_its_name():
    ahead = pytest.importorskip("fused_losses.kernels.triton.ahead")
    for specimen in ahead.specimens():
        for name in specimen.kernel.arg_names:
            if name not in specimen.constants and name not in specimen.types:
                ahead.type_of(name, specimen.operand)
    with pytest.raises(
        KeyError, match=r"column_ptr: no type is known .*ARGUMENTS in fused_losses.kernels.triton.ahead"
    ):
        ahead.type_of("column_ptr", "bf16")

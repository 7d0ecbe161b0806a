"""Callers compiled into one graph beside the same in eager mode, and arguments of the operator that a graph has."""

import torch

from fused_losses import compiled

ROWS, LENGTH, D, V = 2, 12, 8, 60


def one_graph(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def inputs(length=LENGTH, dtype=torch.float32, v=V, frozen=False, seed=0):
    """hidden, weight and labels, the first three of them ignored."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, length, D, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(v, D, generator=g).to(dtype).requires_grad_(not frozen)
    labels = torch.randint(v, (ROWS, length), generator=g)
    labels[0, :3] = -100
    return hidden, weight, labels


def results(function, arguments):
    value = function(*arguments)
    value.sum().backward()
    return [value.detach(), *(x.grad for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad)]


def assert_same(function, make_inputs=inputs, exactly=False, compiled_function=None, **options):
    if compiled_function is None:
        compiled_function = one_graph(function, **options)
    expected, got = results(function, make_inputs()), results(compiled_function, make_inputs())
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 2e-5, "atol": 1e-6}
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, **tolerance)
    return got


def operator_arguments(
    sparse=False, reference=None, frozen=False, grad=True, ignored=2, dtype=torch.float32, strided=False, bias=True,
    wanted="entropy", softcap=None, rank=0, ids=0, beta=None, entropy_gradient=False, int8=False,
):  # fmt: skip
    hidden, weight, labels = torch.randn(11, D).to(dtype), torch.randn(V, D).to(dtype), torch.randint(V, (11,))
    if strided:
        hidden, weight = (x.t().contiguous().t() for x in (hidden, weight))
    labels[:ignored] = -100
    leaves = [hidden, weight, torch.randn(V).to(dtype) if bias else None, None]
    if rank:
        leaves[0], leaves[3] = torch.randn(11, D + rank).to(dtype), torch.randn(V, rank).to(dtype)
    needs = [grad, grad and not frozen, grad and bias and not frozen, grad and rank > 0]
    for leaf, need in zip(leaves, needs, strict=True):
        if leaf is not None:
            leaf.requires_grad_(need)
    ref_hidden = None if reference is None else torch.randn(11, D).to(dtype)
    ref_weight = torch.randn(V, D).to(dtype) if reference == "own" else None
    tolerance = 0.1 if sparse else None
    return compiled.Call(
        *leaves, labels, ref_hidden, ref_weight, None, None, torch.randint(-1, V, (11, ids)) if ids else None, -100,
        1.5, softcap, 1.0, None, dtype, dtype, D + rank, wanted, entropy_gradient, beta, 20, tolerance, "auto", int8,
        needs, None,
    )  # fmt: skip

"""Sparse gradients of heads whose vocabulary is spread over ranks, against one process.

For each world size the ranks are started once, go through everything in `compute` of tests/support/spread_ranks.py, and
save what came out; the tests look at that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, relative
from processes import ACCELERATE, SUPPORT, TORCHRUN, launched, pythonpath
from spread_ranks import (
    CASES,
    COUNTED,
    KINDS,
    OBJECTIVES,
    OUTPUTS,
    SAME_ENTRIES,
    SIZES,
    D,
    Ranks,
    V,
    gathered,
    kinds,
    make,
    objective,
    objective_case,
    set_up,
    start,
    token_losses,
)
from vocab_ranks import DTYPES

from fused_losses.sparse import certificate
from fused_losses.sparse.spectrum import sketch_columns

# Of float64, and of float32 against float64 with the same inputs; measured 7e-15 and 4.8e-6 (the KL of two heads).
ROUNDING = {"float64": 3e-14, "float32": 1.5e-5}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Ranks:
    return start(2, str(tmp_path_factory.mktemp("ranks")))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> Ranks:
    return start(4, str(tmp_path_factory.mktemp("ranks")))


@pytest.fixture(params=["two", "four"])
def ranks(request) -> Ranks:
    return request.getfixturevalue(f"{request.param}_ranks")


def truth_of(case: Case, dtype: str) -> dict[str, Any]:
    rounded = case.rounded(DTYPES[dtype])
    return token_losses(rounded, rounded.inputs(torch.float64), gradient="exact")


def assert_within_the_certificate(got: dict[str, Any], truth: dict[str, Any], rounding: float) -> None:
    for name in OUTPUTS:
        if name in truth:
            assert relative(got[name], truth[name]) <= (0 if name == "prediction" else rounding), name
    assert got["bound"] <= certificate.L1_SHARE * certificate.TOLERANCE
    for name, bound in (("d_hidden", "hidden_bound"), ("d_weight", "weight_bound")):
        if name in truth and got[bound] >= 0:
            assert relative(got[name], truth[name]) <= got[bound] * (1 + 1e-6) + rounding, name
    assert got["hidden_bound"] <= certificate.TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_within_the_certificate_and_as_one_process(ranks, name):
    """Statistics are the truth's; gradients are within what is certified of them; and where no token has too many
    entries on one rank, ranks keep what one process keeps, so that both have the same gradients but for rounding."""
    case = make(**CASES[name])
    for dtype, backend in KINDS:
        with set_up(name):
            truth = truth_of(case, dtype)
            one = token_losses(case, case.inputs(DTYPES[dtype]), gradient="sparse", backend=backend)
        for sizes in SIZES[ranks.world]:
            if (dtype, backend) not in kinds(sizes):
                continue
            got = ranks[name, sizes, dtype, backend]
            assert_within_the_certificate(got, truth, ROUNDING[dtype])
            if name not in SAME_ENTRIES:
                continue
            # Those at the threshold may fall on either side of it.
            assert abs(got["entries"] - one["entries"]) <= (0 if dtype == "float64" else 1e-4 * one["entries"])
            assert got["exact_tokens"] == one["exact_tokens"]
            for output in ("d_hidden", "d_weight", "d_bias", "bound", "hidden_bound", "weight_bound"):
                if output in one:
                    # Measured 1.1e-15 and 6.9e-6. What the ranks say of the rounding of their entries, where both
                    # losses have some, is together up to 0.3 % of the bound less than what one process says.
                    allowed = 1e-13 if dtype == "float64" else 2.5e-2 if output == "weight_bound" else 3e-5
                    assert relative(got[output], one[output]) <= allowed, output


def test_some_tokens_were_exact(ranks):
    """For the bound of dx, and as they have too many entries; in forward, and in backward."""
    for name in ("coarse", "coarse-shared", "coarse-frozen", "room", "room-frozen"):
        for dtype, backend in KINDS:
            exact = ranks[name, SIZES[ranks.world][0], dtype, backend]["exact_tokens"]
            assert 0 < exact < len(make(**CASES[name]).labels), (name, dtype, backend)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(ranks, name):
    case = objective_case(name)
    rounded = case.rounded(torch.float32)
    truth = objective(name, rounded, rounded.inputs(torch.float64), gradient="exact")
    for sizes in SIZES[ranks.world]:
        got = ranks["objective", name, sizes]
        assert_within_the_certificate(got, truth, ROUNDING["float32"])
        assert relative(got["loss"], truth["loss"]) <= 1e-6
        # Nothing is certified of it alone.
        assert relative(got["d_bias"], truth["d_bias"]) <= 0.02


def test_a_head_that_moves(ranks):
    """On all ranks a little, then on one alone far: its spectrum is looked for anew by all."""
    for got in (ranks_of(ranks, "moved", step) for step in range(3)):
        case = make()
        case = Case(case.hidden, got["whole"], case.labels, nll_upstream=case.nll_upstream)
        truth = token_losses(case, case.inputs(torch.float64), gradient="exact")
        assert_within_the_certificate(got, truth, ROUNDING["float64"])
        one = token_losses(case, case.inputs(torch.float64), gradient="sparse")
        assert got["entries"] == one["entries"]


def ranks_of(ranks: Ranks, key: str, step: int) -> dict[str, Any]:
    return Ranks(ranks.world, [{key: found[key][step]} for found in ranks.found])[key]


@pytest.mark.parametrize("name", ["plain", "shared"])
def test_half_precision(ranks, name):
    """No worse than one process with exact gradients, beside what is certified."""
    case = make(**CASES[name] | {"bias": False})
    truth = truth_of(case, "bfloat16")
    one = token_losses(case, case.inputs(torch.bfloat16), gradient="exact")
    got = ranks["half", name]
    for output in ("nll", "d_hidden", "d_weight"):
        allowed = got["hidden_bound"] if output == "d_hidden" else 0.01
        assert relative(got[output], truth[output]) <= 1.02 * relative(one[output], truth[output]) + allowed, output


def test_products_of_eight_bits_are_full_ones(ranks):
    assert all("the head is spread over ranks" in found["note"] for found in ranks.found)


def test_all_labels_ignored(ranks):
    got = ranks["ignored"]
    assert got["d_weight"].shape == (V, D)
    assert not any(got[name].any() for name in ("nll", "lse", "d_hidden", "d_weight", "entries"))


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", COUNTED)
def test_few_numbers_of_each_token_travel(ranks, name, frozen):
    """And once the gradient of the hidden states; what does not depend on the number of tokens is a few numbers."""
    tokens, reference = int((make().labels != -100).sum()), name.endswith("reference")
    # Normalisers, prediction and nll; what the entries leave out; what was rounded.
    each = 4 + 4 + 2
    if reference:
        each += 5 + 4
    if name.startswith("per-token"):
        each += 1 + reference  # the entropies
    if name == "summed-reference":
        each += 2  # Σ |·| over the entries, where both losses have weights, in forward and for the chunk
    for found in ranks.found:
        calls = found["calls", name, frozen]
        assert [numbers for kind, numbers in calls if kind == "all_reduce"] == [tokens * D]
        gathered_numbers = [numbers for kind, numbers in calls if kind == "all_gather"]
        sketch = 0 if frozen else D * sketch_columns(reference)
        assert sum(numbers for numbers in gathered_numbers if numbers >= tokens) == each * tokens + sketch
        assert sum(numbers for numbers in gathered_numbers if numbers < tokens) <= 13 + 6 + 6


@pytest.mark.parametrize("command", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_launched(command, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", pythonpath())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launched([*command, str(SUPPORT / "spread_ranks.py"), str(tmp_path)])
    got = gathered(2, str(tmp_path))["plain"]
    assert_within_the_certificate(got, truth_of(make(bias=True), "float32"), ROUNDING["float32"])
    assert got["exact_tokens"] == 0 and got["hidden_bound"] > 0

"""Heads whose vocabulary is spread over the ranks of a process group, against the float64 oracle of one process.

For each world size the ranks are started once, go through everything in `work` of tests/support/vocab_ranks.py, and
save what came out; the tests look at that.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from cases import Case, make, near_the_reference, relative
from torch import Tensor
from vocab_ranks import (
    COUNTED,
    DTYPES,
    OBJECTIVES,
    SIZES,
    TOKEN_CASES,
    D,
    Ranks,
    V,
    all_ignored,
    certain,
    certain_of_both,
    half_case,
    large_offset,
    masked_teacher,
    objective,
    objective_case,
    start,
    ties,
    token_case,
    token_losses,
)

import fused_losses as fl


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Ranks:
    return start(2, str(tmp_path_factory.mktemp("ranks")))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> Ranks:
    return start(4, str(tmp_path_factory.mktemp("ranks")))


@pytest.fixture(params=["two", "four"])
def ranks(request) -> Ranks:
    return request.getfixturevalue(f"{request.param}_ranks")


def truth_of(case: Case) -> dict[str, Tensor]:
    return token_losses(case, case.inputs(torch.float64), backend="reference")


def assert_close(got: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == truth.keys()
    for name in truth:
        assert relative(got[name], truth[name]) <= (0 if name in ("prediction", "rank") else tolerance), name


@pytest.mark.parametrize("name", TOKEN_CASES)
def test_token_losses_equal_the_oracle(ranks, name):
    """Upstream gradients of both signs, several chunks, labels on both sides of each border, a rank without rows."""
    for sizes in SIZES[ranks.world]:
        got = ranks["token", name, sizes, "float64"]
        assert_close(got, truth_of(token_case(name, sizes)), 2e-15)  # measured 6e-16
    sizes = SIZES[ranks.world][0]
    got, case = ranks["token", name, sizes, "float32"], token_case(name, sizes)
    assert_close(got, truth_of(case.rounded(torch.float32)), 1e-6)  # measured 4e-7


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_equal_the_oracle(ranks, name):
    for sizes in SIZES[ranks.world]:
        case = objective_case(name, sizes)
        truth = objective(name, case, case.inputs(torch.float64), backend="reference")
        assert_close(ranks["objective", name, sizes], truth, 6e-15)  # measured 7e-16, on AVX2 2.2e-15


@pytest.mark.parametrize("name", TOKEN_CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_errors_are_not_above_those_of_plain_pytorch(ranks, name, dtype):
    case = half_case(name).rounded(DTYPES[dtype])
    truth, plain = truth_of(case), token_losses(case, case.inputs(DTYPES[dtype]), backend="reference")
    for output, value in ranks["half", name, dtype].items():
        assert relative(value, truth[output]) <= 1.02 * relative(plain[output], truth[output]), output


@pytest.mark.parametrize("reference", ["shared", "own"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kl_near_the_reference_is_as_accurate_as_on_one_rank(ranks, reference, dtype):
    case = near_the_reference(reference)
    truth = truth_of(case)
    one = token_losses(case, case.inputs(DTYPES[dtype]), backend="torch", gradient="exact")
    got = ranks["near", reference, dtype]
    for output in ("kl", "d_hidden", "d_weight"):  # measured at most 1.24 times, of 1e-5
        assert relative(got[output], truth[output]) <= 1.5 * relative(one[output], truth[output]), output


def test_large_common_offset_in_the_logits(ranks):
    truth = truth_of(large_offset())
    for output in ("nll", "entropy", "d_weight"):
        assert relative(ranks["offset"][output], truth[output]) < 2e-7, output  # measured 9e-8


def test_small_losses_are_accurate(ranks):
    truth = truth_of(certain().rounded(torch.float32))
    got = ranks["certain"]
    assert relative(got["nll"] / truth["nll"], torch.ones(3)) < 3e-7  # measured 1e-7
    assert_close(got, truth, 3e-7)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_small_kls_are_accurate(ranks, backend):
    truth, got = truth_of(certain_of_both()), ranks["certain of both", backend]
    for output in ("kl", "d_hidden", "d_weight"):
        assert relative(got[output], truth[output]) <= 7e-7, output  # measured 2.4e-7; 2.8e-2 with the shift's error


def test_a_teacher_that_rules_ids_out(ranks):
    """tests/objectives/test_ruled_out.py has more of it."""
    truth, got = masked_teacher(None, torch.float64), ranks["masked teacher"]
    for output in ("divergence", "d_hidden", "d_weight"):
        assert relative(got[output], truth[output]) <= 2.9e-6, output  # measured 9.6e-7; 0.5 and more before


def test_among_equal_logits_the_smallest_id_is_predicted(ranks):
    truth = truth_of(ties())
    assert (truth["prediction"] == 1).sum() > 10
    for sizes in SIZES[ranks.world]:
        assert_close(ranks["ties", sizes], truth, 1e-6)


def test_all_ranks_make_the_same_chunks(ranks):
    """They would wait for each other for ever, where each counted by its own rows."""
    for sizes in SIZES[ranks.world]:
        assert_close(ranks["chunks", sizes], truth_of(token_case("own", sizes).rounded(torch.float32)), 1e-6)


def test_all_labels_ignored(ranks):
    for sizes in SIZES[ranks.world]:
        got = ranks["ignored", sizes]
        assert got.keys() == truth_of(all_ignored()).keys() and got["d_weight"].shape == (V, D)
        assert all((value == (-1 if name == "prediction" else 0)).all() for name, value in got.items())


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", COUNTED)
def test_one_collective_per_chunk_and_one_of_the_gradient(two_ranks, name, frozen):
    per_token, reference = name.startswith("per-token"), name.endswith("reference")
    numbers = [4 + 5 * reference + per_token * (1 + reference)]  # `token_losses` takes the entropies too
    if per_token and not frozen:
        numbers.append(4 + 5 * reference)  # backward does not
    sweeps = [("all_gather", count * tokens) for count in numbers for tokens in (16, 16, 1)]
    reductions = 2 if per_token and frozen and reference else 1
    expected = [("all_gather", 13)] + sweeps + reductions * [("all_reduce", 33 * D)]
    assert all(found["calls", name, frozen] == expected for found in two_ranks.found)


MESSAGES = {
    "labels": "ValueError: process_group: .*all 2 ranks, got different labels; .*data parallelism, FSDP.*"
              "gather the weight",
    "tokens": r"ValueError: process_group: .*different number of tokens with a label, by rank: \[27, 24\]",
    "frozen": r"ValueError: process_group: .*gradients wanted .* by rank: \[3, 1\]",
    "reference missing": r"ValueError: process_group: .*reference.*\[1, 0\]",
    "reference rows": r"ValueError: reference head: .*\[100, 23\], got \[20, 21\].*pad",
    "reference whole": r"ValueError: reference head: .*same ranks.*weight=\[123, 16\].*weight=\[(100|23), 16\].*"
                       r"ranks \[0, 1\]",
    "only the reference spread": r"ValueError: reference head: .*same ranks.*process_group=group",
    "no rows": "ValueError: head weight: .*no rows on any",
    "class weights": r"ValueError: class_weights: expected \[V\] with V = 123.*got \[122\]",
    "class weights, soft-cap": r"ValueError: class_weights: expected \[V\] with V = 123, .*on all ranks, got \[122\]",
    "label too large": "ValueError: labels: expected 0 ≤ label < 123 .*got 123",
    "backend": "ValueError: backend='reference'.*give backend='auto' or 'torch'",
    "tolerance": "ValueError: process_group: .*got different gradient= and tolerance=; ",
    "gradient": "ValueError: process_group: .*got different gradient= and tolerance=; ",
    "softcap": "ValueError: process_group: .*got different softcap, logit_scale, temperature or beta; ",
    "logit scale of the reference": "ValueError: process_group: .*got different softcap, logit_scale, temperature or",
    "temperature": "ValueError: process_group: .*got different softcap, logit_scale, temperature or beta; ",
    "beta": "ValueError: process_group: .*got different softcap, logit_scale, temperature or beta; ",
    "no beta": "ValueError: process_group: .*got different softcap, logit_scale, temperature or beta; ",
    "entropy gradient": "ValueError: process_group: .*got different objectives, wanted= or entropy_gradient=; ",
    "wanted": "ValueError: process_group: .*got different objectives, wanted= or entropy_gradient=; ",
    "objective": "ValueError: process_group: .*got different objectives, wanted= or entropy_gradient=; ",
    "option of the objective": "ValueError: process_group: .*got different objectives, wanted= or entropy_gradient=; ",
    "observer": "ValueError: process_group: .*got different objectives, wanted= or entropy_gradient=; ",
    "no ids": r"ValueError: process_group: .*got different ids= \(their number",
    "ids": r"ValueError: process_group: .*got different ids= \(their number",
    "number of ids": r"ValueError: process_group: .*got different ids= \(their number",
    "member": "ValueError: process_group: .*not a member|TypeError: process_group: .*got float",
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_all_ranks_say_what_is_wrong(two_ranks, name):
    for found in two_ranks.found:
        assert re.match(MESSAGES[name], found["messages"][name]), found["messages"][name]
    assert two_ranks.found[0]["messages"].keys() == MESSAGES.keys()


def test_the_compiler_leaves_a_spread_head_to_eager_mode(two_ranks):
    for found in two_ranks.found:
        for eager, compiled_ in zip(found["compiled"]["eager"], found["compiled"]["compiled"], strict=True):
            torch.testing.assert_close(compiled_, eager, rtol=1e-14, atol=1e-16)
        assert "no part of a graph with a process_group" in found["compiled"]["fullgraph"]


@pytest.mark.parametrize("placement", ["S(0)", "R"])
def test_dtensors(four_ranks, placement):
    """9 rows over 4 ranks: 3, 3, 3, 0."""
    case = make(12, D, 9, bias=True, reference="shared")
    truth = truth_of(case)
    for found in four_ranks.found:
        for name, value in found["dtensors"][placement].items():
            assert relative(value, truth[name]) < 5e-15, name  # measured 1.7e-15, as much on one rank


def test_dtensors_as_heads_and_those_that_are_none(four_ranks):
    case = make(12, D, 9, bias=True, reference="shared")
    hidden, head, _ = case.inputs(torch.float64)
    messages = {
        "columns": r"head weight: .*Shard\(dim=1\).*Shard\(0\) or Replicate on a mesh of one dimension.*"
        r"full local tensor",
        "two dimensions": r"head weight: .*mesh of shape \[1, 4\]",
        "bias": "head weight, bias: expected both to be DTensors or none.*'Tensor'",
        "bias replicated": r"head bias: .*Shard\(dim=0\).*Replicate",
        "group too": "process_group: is known from the DTensor",
        "hidden": r"hidden: .*DTensor; give hidden\.full_tensor",
    }
    for found in four_ranks.found:
        assert relative(found["dtensors"]["tensor"], fl.CrossEntropyLoss()(hidden, head.weight, case.labels)) < 1e-15
        assert relative(found["dtensors"]["linear"], fl.CrossEntropyLoss()(hidden, head, case.labels)) < 1e-15
        for name, message in messages.items():
            assert re.match(message, found["dtensors"][name]), found["dtensors"][name]


def test_without_other_processes(tmp_path):
    weight = torch.randn(7, 4)
    with pytest.raises(ValueError, match=r"process_group: .*not initialised here.*init_process_group"):
        fl.LMHead(weight, process_group=object())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match=r"process_group: .*dist\.group\.WORLD, got object"):
            fl.LMHead(weight, process_group=object())
        head = fl.LMHead(weight, process_group=dist.group.WORLD)
        assert repr(head).endswith("softcap=None, process_group of ranks [0])")
        # A group of one rank is as none: everything is possible.
        hidden, labels = torch.randn(3, 4), torch.arange(3)
        for options in ({"gradient": "sparse"}, {"backend": "reference"}):
            one, none = (fl.token_losses(hidden, h, labels, **options).nll for h in (head, weight))
            assert torch.equal(one, none)
        reference = fl.Reference(hidden + 1, weight)
        assert (fl.token_losses(hidden, head, labels, reference=reference).kl > 0).all()
        with pytest.raises(ValueError, match=r"V, D ≥ 1, got \[0, 4\]"):
            fl.LMHead(weight[:0], process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()

"""The backend "triton" under Triton's interpreter: the same kernels, on the CPU, in fp32 and fp16, against float64.

The interpreter takes milliseconds for each program, so inputs are small and thresholds coarse. bf16 is wrong in it.
"""

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import grids
import pytest
import torch
from cases import (
    HEADS,
    REFERENCES,
    coarse,
    errors,
    gradient_of_kl,
    make,
    name,
    nearly_certain,
    relative,
    run,
    with_more,
)
from hypothesis import given, settings
from low_rank_cases import errors as low_rank_errors
from low_rank_cases import inputs as low_rank_inputs
from scan_truth import problem_of
from sparse_checks import CERTIFICATE, check_certificate, check_flat_chunks, check_label_borders, check_room, logits_of

import fused_losses as fl
from fused_losses import preparation
from fused_losses.backends import gpu, gpu_products, gpu_scan, gpu_tails
from fused_losses.problem import Gradients
from fused_losses.sparse import softmax

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture(params=["scan", "logits"])
def path(request, monkeypatch):
    """Both ways to the bits."""
    if request.param == "logits":
        monkeypatch.setattr(gpu_scan, "choose_tile", lambda problem, directed=False: None)
    return request.param


@pytest.mark.pairwise
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
def test_exact_mode_equals_the_oracle(head, reference, frozen):
    case = make(21, 17, 123, **head, reference=reference, frozen=frozen)
    for output, error in errors(case, torch.float32, "triton").items():
        assert error <= 1.5e-6, output  # measured 5e-7


@pytest.mark.pairwise
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen, path", [(False, "scan"), (True, "logits")], indirect=["path"])
@pytest.mark.parametrize("n", [18, 5], ids=["two-blocks", "one-block"])
def test_sparse_mode_with_nothing_left_out_equals_the_oracle(head, reference, frozen, path, n):
    case = make(n, 17, 67, **head, reference=reference, frozen=frozen, ignored=0)
    with coarse(1e-30, capacity=67):
        for output, error in errors(case, torch.float32, "triton", gradient="sparse").items():
            assert error <= 1.5e-6, output


@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_a_label_that_a_bias_rules_out(gradient, path):
    """Its logit is −1e30: nll is huge, and its gradient by that logit is −1 all the same."""
    case = make(9, 17, 67, bias=True, ignored=0)
    case.bias[5], case.labels[3] = -1e30, 5
    case.nll_upstream[3] = 1.0
    with coarse(1e-30, capacity=67):
        found = run(case, torch.float32, "triton", gradient)
    truth = run(case, torch.float64, "reference")
    for gradient in ("d_hidden", "d_weight", "d_bias"):
        assert relative(found[gradient], truth[gradient]) <= 1.5e-6, gradient


@pytest.mark.each_value
@pytest.mark.parametrize("head", HEADS, ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_single_logits(head, reference, frozen, gradient, path):
    """lse and logits_at, by the scan and by chunks of logits; rank and log Σp² by the latter."""
    case = with_more(make(12, 17, 67, **head, reference=reference, frozen=frozen), beta=None, entropy=False)
    with coarse(1e-30, capacity=67):
        for output, error in errors(case, torch.float32, "triton", gradient=gradient).items():
            assert error <= 1.5e-6, output  # measured 5e-7
        case.asked.pop("wanted")
        for output, error in errors(case, torch.float32, "triton", gradient=gradient).items():
            assert error <= 1.5e-6, output


@pytest.mark.each_value
@pytest.mark.parametrize("head", [HEADS[0], HEADS[4]], ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_every_output(head, reference, frozen, beta):
    case = with_more(make(12, 17, 67, **head, reference=reference, frozen=frozen), beta=beta)
    for output, error in errors(case, torch.float32, "triton").items():
        assert error <= 3e-6, output


@pytest.mark.each_value
@pytest.mark.parametrize(
    "reference, frozen", [(None, "W"), ("off", "W"), ("copy", "nothing"), ("copy", "W and B"), ("other model", "W")]
)
def test_lora_on_the_head(reference, frozen, path):
    case = low_rank_inputs("a", reference, frozen != "nothing", bias=True, scale=0.8, shape=(9, 17, 67))
    case.leaves["b"].requires_grad_(frozen != "W and B")
    for gradient in ("exact", "sparse"):
        with coarse(1e-30, capacity=67):
            found = low_rank_errors(case, torch.float32, "triton", gradient=gradient)
        assert max(found.values()) <= 1.5e-6, (gradient, found)  # measured 5e-7


def test_lora_near_the_adapter_it_began_from():
    """A float32 adapter beside fp16 operands: B − B_ref must be taken before it is rounded, as must u − u_ref."""
    case = low_rank_inputs("rows", "copy", shape=(9, 48, 130), spread=4.5)
    with torch.no_grad():
        for key, size in (("b", 2e-3), ("rows", 1e-3)):
            copy = case.fixed[f"ref_{key}"][:, :-1]  # the last column is there for another test
            copy.copy_(case.leaves[key] + size * torch.randn_like(copy))
    case.fixed["ref_hidden"] = case.leaves["hidden"].detach().clone()
    case.upstream = (torch.zeros(9), torch.ones(9))
    with coarse(1e-6, capacity=130):
        found = low_rank_errors(case, torch.float16, "triton", torch.float32, gradient="sparse")
    assert all(found[output] <= 1.5e-3 for output in ("kl", "d_hidden", "d_b", "d_rows")), (
        found
    )  # measured 7e-4; 0.07 otherwise


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 16, 33), (17, 65, 64)], ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_odd_shapes(shape, reference, gradient, path):
    case = make(*shape, reference=reference)
    with coarse(1e-30, capacity=70):
        for output, error in errors(case, torch.float32, "triton", gradient=gradient).items():
            assert error <= 1.5e-6, output


@pytest.mark.pairwise
@pytest.mark.parametrize("head", [HEADS[0], HEADS[4]], ids=name)
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_fp16_error_is_not_above_that_of_plain_pytorch(head, reference, frozen, gradient):
    """ε = 2 % of its error, for chance."""
    case = make(12, 48, 130, **head, reference=reference, frozen=frozen, spread=4.0, ignored=0)
    with coarse(1e-6, capacity=130):
        ours, plain = errors(case, torch.float16, "triton", gradient=gradient), errors(case, torch.float16, "reference")
    for output in ours:
        assert ours[output] <= plain[output] * 1.02, (output, ours[output], plain[output])


@pytest.mark.each_value
@pytest.mark.parametrize("size", ["tiny", "moderate", "huge"])
@pytest.mark.parametrize("reference", ["shared", "own"])
def test_kl_is_accurate_near_the_reference_and_far_from_it(size, reference):
    """KL about 1e-7, 0.1 and 6: the scan has one formula for near and one for far."""
    near = {"tiny": 2e-4, "moderate": 0.2, "huge": 60.0}[size]
    case = make(8, 24, 150, reference=reference, near=near, ignored=0)
    if reference == "own":
        case = replace(case, reference_weight=case.weight.clone())
    case = case.rounded(torch.float32)
    truth, got = run(case, torch.float64, "reference"), run(case, torch.float32, "triton", "sparse", tolerance=1e-6)
    kl = truth["kl"].mean().item()
    low, high = {"tiny": (1e-8, 1e-6), "moderate": (0.01, 0.5), "huge": (3, 100)}[size]
    assert low < kl < high
    # Measured: 4e-7; 2e-4 where both heads' logits differ by 1e-4 of their size; far off 2e-6.
    bound = {"huge": 6e-6, "tiny": 1.5e-6 if reference == "shared" else 6e-4}.get(size, 1.5e-6)
    assert relative(got["kl"], truth["kl"]) < bound
    assert relative(got["d_hidden"], truth["d_hidden"]) < bound


@pytest.mark.parametrize("beta", [None, 0.5])
@pytest.mark.parametrize("case", [(16, 1e-3, 1), (20, 0.01, 0.9), (20, 1e-3, 1)])
def test_kl_gradient_where_both_models_are_nearly_certain(case, beta):
    """tests/sparse/test_one_hot_kl.py has more of it."""
    case = nearly_certain(*case)
    _, truth = gradient_of_kl(case, torch.float64, beta, backend="reference", gradient="exact")
    _, ours = gradient_of_kl(case, torch.float32, beta, backend="triton", gradient="exact")
    assert relative(ours, truth) < 1.7e-6  # measured 5.4e-7; up to 2.2e-2 where the error of SHIFT stays in


@settings(max_examples=grids.examples(4, 12), deadline=None, derandomize=True)
@given(**CERTIFICATE)
def test_certificate_holds(**options):
    options["n"] = min(options["n"], 8)
    with (
        mock.patch.multiple(gpu, BIT_BYTES=1, LOGIT_BYTES=1),
        mock.patch.object(gpu_tails, "PROFILE_BYTES", 1),
        mock.patch.object(gpu_scan, "PROBE", 70),
    ):
        check_certificate("triton", **options)


@pytest.mark.each_value
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
@pytest.mark.parametrize("frozen", [False, True], ids=name)
@pytest.mark.parametrize("summed", [False, True], ids=["per-token", "summed"])
def test_flat_chunks_between_peaked_ones(reference, frozen, summed):
    check_flat_chunks("triton", (48, 24, 200), 32, reference, frozen, summed)


@pytest.mark.each_value
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_bad_logits_reach_their_own_token_only(gradient, bias, path):
    case = make(20, 6, 100, ignored=0, bias=bias)
    hidden, head, _ = case.inputs(torch.float32)
    with torch.no_grad():
        hidden[7], hidden[9] = torch.inf, torch.nan
    with coarse(1e-3):
        out = fl.token_losses(hidden, head, case.labels, gradient=gradient, backend="triton")
        out.nll.sum().backward()
    bad = ~out.nll.isfinite()
    assert bad.nonzero().flatten().tolist() == [7, 9]
    assert not hidden.grad[bad].isfinite().all() and hidden.grad[~bad].isfinite().all()


@pytest.mark.each_value
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_a_bias_of_minus_infinity_rules_out(gradient, path):
    case = make(10, 8, 70, bias=True, reference="own", ignored=0)
    case.bias[3:40] = -torch.inf
    case = replace(case, labels=torch.randint(40, 70, (10,)))
    with coarse(1e-30, capacity=70):
        results = errors(case, torch.float32, "triton", gradient=gradient)
    assert max(results.values()) < 1.5e-6


@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_all_ignored(gradient):
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = fl.CrossEntropyLoss(gradient=gradient, backend="triton")(hidden, weight, torch.full((3,), -100))
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.each_value
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_results_are_the_same_from_run_to_run(dtype, gradient):
    case = make(20, 18, 150, reference="own", bias=True, spread=6.0).rounded(dtype)
    with coarse(1e-3):
        results = [run(case, dtype, "triton", gradient, tolerance=0.5) for _ in range(2)]
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


OBJECTIVES = {
    "CrossEntropyLoss": fl.CrossEntropyLoss,
    "TALRLoss": fl.TALRLoss,
    "LAwFLoss": fl.LAwFLoss,
    "EAFTLoss": fl.EAFTLoss,
    "ASFTLoss": fl.ASFTLoss,
}


@pytest.mark.each_value
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_objectives(objective, gradient):
    case = make(24, 12, 90, reference="shared", ignored=0)
    labels = case.labels.view(2, 12).clone()
    labels[0, :3] = -100

    def gradients(dtype, **options):
        hidden, head, ref = case.inputs(dtype)
        keywords = {}
        if objective in ("LAwFLoss", "ASFTLoss"):
            keywords["reference"] = fl.Reference(ref.hidden.view(2, 12, -1))
        if objective == "LAwFLoss":
            keywords["confidence"] = torch.zeros(2, 12, dtype=dtype).index_fill(1, torch.tensor([4, 5]), 0.7)
        loss = OBJECTIVES[objective](**options)(hidden.view(2, 12, -1), head, labels, **keywords)
        loss.backward()
        return loss.detach(), hidden.grad, head.weight.grad

    truth = gradients(torch.float64, backend="reference")
    with coarse(1e-30, capacity=90):
        got = gradients(torch.float32, backend="triton", gradient=gradient)
    for value, expected in zip(got, truth, strict=True):
        assert relative(value, expected) < 1.5e-6


@pytest.mark.each_value
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
def test_a_token_of_as_many_entries_as_there_is_room_for_is_sparse(reference, path):
    check_room("triton", reference)


def test_unlikely_labels_at_the_borders_of_words(path):
    check_label_borders("triton")


def test_kept_rows_save_the_second_gather():
    """dx comes from the rows that the attention formed: backward takes no product of entries for it."""
    case = make(12, 8, 70, ignored=0, frozen=True)
    with coarse(1e-30, capacity=70), mock.patch.object(gpu.Gpu, "rows_product", side_effect=AssertionError):
        errors_ = errors(case, torch.float32, "triton", gradient="sparse")
    assert max(errors_.values()) < 1.5e-6


def test_bound_of_the_probe_misses_no_entry_and_keeps_few_more():
    """Against the exact threshold, on peaked logits with frequent ids first."""
    n, v, d = 32, 400, 24
    case = make(n, d, v, ignored=0, spread=3.0)
    case = replace(case, bias=-1.0 * torch.arange(1, v + 1).double().log())
    hidden, head, _ = case.inputs(torch.float32)
    z = case.hidden @ case.weight.T + case.bias
    p = z.softmax(1)
    least = 2e-3 * (1 - p.gather(1, case.labels[:, None])).sqrt()
    exact = (p > least) | torch.nn.functional.one_hot(case.labels, v).bool()
    kept = {}

    def finish(self, finish=softmax.Builder.finish):
        kept["sparse"] = finish(self)
        return kept["sparse"]

    with coarse(2e-3, tolerance=0.9), mock.patch.object(softmax.Builder, "finish", finish):
        fl.token_losses(hidden, head, case.labels, backend="triton", gradient="sparse", tolerance=0.9)
    sparse = kept["sparse"]
    mine = torch.zeros(n, v, dtype=torch.bool)
    rows = torch.repeat_interleave(torch.arange(n), sparse.offsets.diff())
    mine[rows, sparse.columns.long()] = True
    assert (mine | ~exact).all()
    assert mine.sum() < 2 * exact.sum()  # 1.6 measured


def test_unreachable_backend_says_why(monkeypatch):
    with pytest.raises(ValueError, match="backend='cuda' with tensors on cpu"):
        fl.token_losses(torch.randn(2, 4), torch.randn(5, 4), torch.zeros(2, dtype=torch.int64), backend="cuda")


def test_adversarial_logits_by_both_paths(path):
    x = logits_of("adversarial", 12, torch.Generator())
    hidden = x.float().requires_grad_()
    labels = torch.full((12,), 5)
    with coarse(2e-3):
        out = fl.token_losses(hidden, torch.eye(257), labels, gradient="sparse", tolerance=0.5, backend="triton")
        out.nll.sum().backward()
    exact = x.softmax(1) - torch.nn.functional.one_hot(labels, 257)
    error = ((hidden.grad - exact).abs().sum() / exact.abs().sum()).item()
    assert 0.7 * out.gradient_report.bound < error <= out.gradient_report.bound + 1e-6


def test_a_label_far_above_the_reference_leaves_the_bound_a_number():
    """exp(z − r) overflows at the label; found in the sums of the scan."""
    case = make(6, 8, 40, reference="shared", ignored=0, spread=4.0)
    case.hidden[2] = case.weight[case.labels[2]] * 8
    case.reference_hidden[2] = -case.hidden[2]
    z, r = (h[2] @ case.weight[case.labels[2]] for h in (case.hidden, case.reference_hidden))
    assert z - r > 100
    hidden, head, ref = case.inputs(torch.float32)
    with coarse(1e-30, capacity=40):
        assert max(errors(case, torch.float32, "triton", gradient="sparse").values()) < 5e-6  # AVX2: 2.5e-6
        out = fl.token_losses(hidden, head, case.labels, reference=ref, gradient="sparse", backend="triton")
        (out.nll.sum() + out.kl.sum()).backward()
    assert 0 <= out.gradient_report.bound <= 0.15


@pytest.mark.each_value
@pytest.mark.parametrize("reference", REFERENCES, ids=name)
def test_logits_far_below_zero(reference, path):
    """exp(−lse) overflows; nothing may be made of it in the lanes beyond the last entry."""
    case = make(6, 8, 43, bias=True, reference=reference, ignored=0)
    case.bias[:] -= 200
    if reference == "own":
        case.reference_weight[:] -= 0.1
    hidden, head, ref = case.inputs(torch.float32)
    with coarse(1e-30, capacity=43):
        out = fl.token_losses(hidden, head, case.labels, reference=ref, gradient="sparse", backend="triton")
        (out.nll.sum() if reference is None else out.nll.sum() + out.kl.sum()).backward()
    assert out.gradient_report.exact_tokens == 0 and 0 <= out.gradient_report.bound <= 0.15


@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_bf16_is_refused_because_the_interpreter_computes_it_wrongly(gradient):
    hidden, weight = torch.randn(3, 8).bfloat16().requires_grad_(), torch.randn(40, 8).bfloat16()
    with pytest.raises(TypeError, match="expected float32 or float16, got bfloat16"):
        fl.token_losses(hidden, weight, torch.arange(3), backend="triton", gradient=gradient)


@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_default_dtype_is_of_no_consequence(gradient):
    """Kernels write float32 whatever torch.set_default_dtype says."""
    case = make(9, 8, 67, reference="own", ignored=0, bias=True)
    plain = run(case, torch.float32, "triton", gradient=gradient)
    torch.set_default_dtype(torch.float64)
    try:
        other = run(case, torch.float32, "triton", gradient=gradient)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(plain[k], other[k]) for k in plain)


def test_certain_tokens_and_saturated_soft_caps(path):
    """p[label] is 1 in float32: nothing but the label is kept. 1 − (z/softcap)² may round to less than 0."""
    weight = torch.zeros(67, 2)
    weight[:, 0], weight[5, 0] = -torch.arange(67), 200.0
    hidden = torch.ones(6, 2).requires_grad_()
    out = fl.token_losses(hidden, weight, torch.full((6,), 5), gradient="sparse", backend="triton")
    out.nll.sum().backward()
    assert (out.nll == 0).all() and (hidden.grad == 0).all()
    assert out.gradient_report.entries == 6 and out.gradient_report.exact_tokens <= 1
    hidden = (1e4 * torch.randn(4, 2)).requires_grad_()
    loss = fl.CrossEntropyLoss(gradient="sparse", backend="triton")
    loss(hidden, fl.LMHead(torch.randn(67, 2), softcap=5.0), torch.arange(4)).backward()
    assert hidden.grad.isfinite().all() and 0 <= loss.gradient_report.bound <= 0.15


@pytest.mark.parametrize(
    "trained, more, mode",
    [
        ((), {}, "exact"), ((), {"scan": "int8"}, "sparse"), (("weight",), {}, "sparse"), (("bias",), {}, "sparse"),
        ((), {"gradient": "sparse"}, "sparse"), ((), {"backend": "torch"}, "sparse"),
    ],
    ids=str,
)  # fmt: skip
def test_auto_is_exact_for_a_frozen_head(trained, more, mode, monkeypatch):
    """Where that was measured to take less time and memory."""
    monkeypatch.setattr(preparation, "SMALLEST_VOCABULARY", 64)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 16, generator=g).half().requires_grad_()
    parts = {"weight": torch.randn(64, 16, generator=g).half(), "bias": torch.randn(64, generator=g).half()}
    for part in trained:
        parts[part].requires_grad_()
    out = fl.token_losses(hidden, fl.LMHead(**parts), torch.arange(4), **{"backend": "triton", **more})
    assert out.gradient_report.mode == mode
    if not trained and not more:
        assert "head is frozen" in str(out.gradient_report)


@pytest.mark.parametrize("reference", [None, "shared", "own"])
@pytest.mark.parametrize("call", ["sparse", "no gradient"])
def test_logits_in_the_place_of_a_slower_scan(reference, call, monkeypatch):
    """Where they were measured to be faster: with a reference alone."""
    chunks, form = [], gpu.Gpu._logit_chunks
    monkeypatch.setattr(gpu_scan, "LOGITS_FASTER", frozenset({gpu_scan._architecture(torch.device("cpu"))}))
    monkeypatch.setattr(gpu.Gpu, "_logit_chunks", lambda *given: chunks.append(given) or form(*given))
    case = make(18, 17, 123, reference=reference, ignored=0)
    if call == "no gradient":
        hidden, head, other = case.inputs(torch.float32, "cpu")
        with torch.no_grad():
            out = fl.token_losses(hidden, head, case.labels, reference=other, backend="triton")
        got = {"nll": out.nll}
    else:
        with coarse(2e-3, tolerance=0.9):
            got = run(case, torch.float32, "triton", "sparse", tolerance=0.9)
    assert bool(chunks) == (reference is not None)
    truth = run(case, torch.float64, "reference")
    assert relative(got["nll"], truth["nll"]) <= 1e-6


def test_directions_are_rounded_in_their_own_memory():
    """In blocks of 128 rows; a number's new place is that of others, which must have been read."""
    direction = torch.randn(300, 70)
    expected = direction.half()
    assert torch.equal(gpu_products.rounded(direction, torch.float16), expected)
    assert torch.equal(direction.view(torch.float16)[:, :70], expected)


@pytest.mark.parametrize("reference", [None, "shared"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=name)
def test_chunks_of_all_ranks_have_the_memory_of_rounding_the_sums(dtype, reference, monkeypatch):
    """V·D numbers of 2 bytes where sums are rounded, of the rank that has most rows, also where one has none."""
    monkeypatch.setattr(gpu, "LOGIT_BYTES", 1)
    usual, found = 1 + (reference is not None), []
    for rows in (150, 50, 0):
        problem = problem_of(make(8, 24, 200, reference=reference), dtype)
        head = problem.head._replace(weight=problem.head.weight[:rows], shard=SimpleNamespace(largest=150))
        problem = replace(problem, head=head)
        sums = Gradients(weight=torch.zeros(rows, 24))
        out = SimpleNamespace(topk_entropy=None)
        assert gpu.logit_bytes(problem, out, None) == gpu.logit_bytes(problem, out, Gradients()) == usual
        assert gpu.logit_bytes(problem, SimpleNamespace(topk_entropy=1), sums) == usual
        found.append(gpu.logit_bytes(problem, out, sums))
    assert found == [150 * 24 * 2 if dtype == torch.float16 else usual] * 3

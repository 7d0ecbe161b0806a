"""A head that is spread over ranks, with Triton's kernels, against one process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import spread_ranks
import torch
import torch.multiprocessing
from cases import relative
from processes import pythonpath
from spread_ranks import (
    CUDA_CALLS,
    INTERPRETED_OBJECTIVES,
    INTERPRETED_SIZES,
    calls,
    gathered,
    gradients,
    limited,
    small_case,
    token_losses,
)
from vocab_ranks import DTYPES, certain_of_both

pytestmark = pytest.mark.xdist_group("spread")  # the ranks run once, for all of them
OUTPUTS = ("nll", "kl", "entropy", "prediction", "reference_nll", "lse", "logits_at")
GRADIENTS = ("d_hidden", "d_weight", "d_bias")
# Of float32 logits; measured 3.7e-7, the KL of two heads 2.9e-6.
ROUNDING, ROUNDING_OF_KL = 1.1e-6, 8e-6


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    shim = None  # the CUDA kernels, compiled for a CPU
    if shutil.which("g++") is not None:
        shim = str(Path(request.getfixturevalue("shim").functions._name).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", pythonpath())
        torch.multiprocessing.start_processes(
            spread_ranks.interpreted, (2, folder, shim), nprocs=2, start_method="forkserver"
        )
    return gathered(2, folder)


@pytest.mark.parametrize("name, sizes, gradient, dtype", list(calls()))
def test_as_one_process(found, name, sizes, gradient, dtype):
    """Values are the truth's, and so are exact gradients. Sparse ones keep the entries that plain PyTorch keeps of the
    whole head, with the same gradients and the same certificate."""
    case, got = small_case(name), found[name, sizes, gradient, dtype]
    rounded = case.rounded(DTYPES[dtype])
    truth = token_losses(rounded, rounded.inputs(torch.float64), gradient="exact")
    half = 5e-4 if dtype == "float16" else 0  # of rounded gradients
    for output in OUTPUTS:
        if output in truth:
            assert relative(got[output], truth[output]) <= (ROUNDING_OF_KL if output == "kl" else ROUNDING), output
    if gradient == "exact":
        assert all(relative(got[one], truth[one]) <= max(ROUNDING, half) for one in GRADIENTS if one in truth)
        return
    with limited(name):
        one = token_losses(case, case.inputs(torch.float32), gradient="sparse", backend="torch")
    # A soft-cap's slope is left out of what is compared with the bound, so a few entries more are kept; and in chunks
    # of logits a token may have twice as many before it is exact.
    alike = name not in ("softcap", "own-softcap", "room")
    assert got["entries"] == one["entries"] if alike else got["entries"] > one["entries"]
    assert got["exact_tokens"] == one["exact_tokens"] if alike else got["exact_tokens"] <= one["exact_tokens"]
    for bound in ("bound", "hidden_bound", "weight_bound"):
        if alike:
            assert got[bound] == pytest.approx(one[bound].item(), rel=5e-3), bound  # measured 2.4e-3, in float16
    for output in GRADIENTS:
        if output in truth:
            assert relative(got[output], one[output]) <= (2e-5 if alike and not half else 1e-3), output
            assert relative(got[output], truth[output]) <= 1.5e-3, output  # measured 5e-4, in float16
    if got["hidden_bound"] >= 0:
        assert relative(got["d_hidden"], truth["d_hidden"]) <= got["hidden_bound"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels for a CPU with")
@pytest.mark.parametrize("name, gradient", CUDA_CALLS)
def test_cuda_kernels_as_tritons(found, name, gradient):
    got, triton = found["cuda", name], found[name, INTERPRETED_SIZES[0], gradient, "float32"]
    assert got["entries"] == triton["entries"]
    for output in (*OUTPUTS, *GRADIENTS):
        if output in triton:
            # Measured 1.8e-7, the KL 6.9e-7.
            assert relative(got[output], triton[output]) <= (2e-6 if output == "kl" else 5e-7), output


def test_small_kls_are_accurate(found):
    case, got = certain_of_both(), found["certain of both"]
    truth = token_losses(case, case.inputs(torch.float64), gradient="exact")
    for output in ("kl", "d_hidden", "d_weight"):
        assert relative(got[output], truth[output]) <= 7e-7, output  # measured 2.4e-7; 2.8e-2 with the shift's error


@pytest.mark.parametrize("gradient", ["sparse", "exact"])
def test_all_labels_ignored(found, gradient):
    got = found["ignored", gradient]
    for name in {*OUTPUTS, *GRADIENTS} & got.keys():
        assert (got[name] == (-1 if name == "prediction" else 0)).all(), name
    assert got["d_weight"].shape == (200, spread_ranks.D) and got["exact_tokens"] == 0


@pytest.mark.parametrize("name", INTERPRETED_OBJECTIVES)
def test_objectives(found, name):
    loss, reference = INTERPRETED_OBJECTIVES[name]
    case = small_case(reference or "plain").rounded(torch.float32)
    hidden, head, given = case.inputs(torch.float64)
    value = loss()(hidden, head, case.labels, **({"reference": given} if reference else {}))
    truth = {"loss": value.detach()} | gradients(2.5 * value, hidden, head)
    for one, value in truth.items():  # JSD in plain float32, measured 1.2e-5
        assert relative(found[name][one], value) <= (3e-5 if name == "JSD" else ROUNDING), one

"""After a chunk whose tokens got exact gradients: what the scan makes of the next one on backend "cpu"."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from cases import coarse, make, name, relative, run, run_with_report
from sparse_checks import needs_kernels

import fused_losses as fl
from fused_losses.backends import cpu

pytestmark = needs_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("scan", ["full", "int8"])
@pytest.mark.parametrize("frozen", [False, True], ids=name)
def test_no_entries_are_looked_for_where_none_will_do(frozen, scan, softcap, dtype):
    """16 tokens a chunk, the second and third of five flat: the third goes without, the fourth is looked at again."""
    case = make(80, 64, 1500, frozen=frozen, softcap=softcap, ignored=0, spread=5.0)
    case.hidden[16:48] *= 0.02
    case = replace(case.rounded(dtype), nll_upstream=torch.ones(80, dtype=torch.float64))
    compacted, plain = [], cpu._compact

    def compact(problem, out, chunk, *rest):
        compacted.append(chunk.tokens.start)
        return plain(problem, out, chunk, *rest)

    options = dict(gradient="sparse", backend="cpu", scan=scan, tolerance=0.025)
    with coarse(2e-3, capacity=400, chunk_bytes=1, tolerance=0.025), mock.patch.object(cpu, "_compact", compact):
        if frozen:
            got, report = run_with_report(case, dtype, **options)
            nll, d_hidden = got["nll"], got["d_hidden"]
        else:
            hidden, head, _ = case.inputs(dtype)
            loss = fl.CrossEntropyLoss(**options)
            (80 * loss(hidden, head, case.labels)).backward()
            d_hidden, report = hidden.grad.double(), loss.gradient_report
            nll = fl.token_losses(hidden, head, case.labels, backend="cpu", gradient="exact").nll.double()
    halves = scan == "int8" and softcap is None
    assert 32 not in compacted and {48, 64} <= set(compacted) and (halves or {0, 16} <= set(compacted))
    truth = run(case, torch.float64, "reference")
    assert report.exact_tokens >= 32 and relative(nll, truth["nll"]) < (1e-4 if scan == "int8" else 1e-5)
    assert relative(d_hidden[16:48], truth["d_hidden"][16:48]) < (1e-5 if dtype == torch.float32 else 4e-3)
    assert relative(d_hidden, truth["d_hidden"]) < 0.025


@pytest.mark.parametrize("tolerance", [0.025, 0.4], ids=str)
def test_a_tolerance_that_may_leave_them_out(tolerance):
    """Where the bound allows a flat token's rest to be left out, it is looked at."""
    case = make(48, 64, 1500, ignored=0, spread=5.0)
    case.hidden[:] *= 0.02
    compacted, plain = [], cpu._compact
    with (
        coarse(2e-3, capacity=400, chunk_bytes=1, tolerance=tolerance),
        mock.patch.object(cpu, "_compact", lambda *given: compacted.append(given) or plain(*given)),
    ):
        hidden, head, _ = case.inputs(torch.float32)
        loss = fl.CrossEntropyLoss(gradient="sparse", backend="cpu", scan="full", tolerance=tolerance)
        loss(hidden, head, case.labels).backward()
    assert len(compacted) == (1 if tolerance == 0.025 else 3)

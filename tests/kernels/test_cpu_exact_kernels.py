"""The exact mode's kernels for CPUs against float64: formulas written out, gradients by autograd."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fused_losses import reference
from fused_losses.kernels import schemas

pytestmark = pytest.mark.skipif(schemas.load() is not None, reason="the kernels are not built")
ops = torch.ops.fused_losses

REFERENCES = ("none", "separate", "difference")
BETAS = (0.1, 0.5, 0.9, 1.0)
STATISTICS = ("nll", "lse", "entropy", "log_p2", "rank")
WITH_REFERENCE = (*STATISTICS, "kl", "reference_nll", "reference_entropy", "divergence")
WEIGHTS = ("nll", "kl", "entropy", "divergence", "label")


class Chunk(NamedTuple):
    """What the operators take; with `difference` the logits are z + r."""

    z: Tensor
    r: Tensor | None
    difference: bool
    labels: Tensor
    softcap: float = 0.0

    def logits(self) -> Tensor:
        z = self.z.double()
        return z + self.r.double() if self.difference else z


def make(reference: str, vocabulary: int, distance: float, softcap: float = 0.0, tokens: int = 6) -> Chunk:
    """Rows about `distance` (of log-probabilities) from their reference; labels at both borders and at the argmax."""
    scale = 0.9 * softcap / 5 if softcap else 3.0
    r = (scale * torch.randn(tokens, vocabulary)).clamp(-4.9 * scale, 4.9 * scale)
    step = distance * torch.randn(tokens, vocabulary)
    if softcap:
        step.clamp_(-0.05 * softcap, 0.05 * softcap)
    labels = torch.randint(vocabulary, (tokens,))
    labels[:2] = torch.tensor([0, vocabulary - 1])
    labels[2] = (r + step)[2].argmax()
    if reference == "none":
        return Chunk(r + step, None, False, labels, softcap)
    return Chunk(step if reference == "difference" else r + step, r, reference == "difference", labels, softcap)


def statistics(chunk: Chunk, beta: float = 0.5, wanted: tuple[str, ...] = WITH_REFERENCE) -> dict[str, Tensor]:
    tokens = len(chunk.z)
    if chunk.r is None:
        wanted = tuple(name for name in wanted if name in STATISTICS)
    out = {name: torch.empty(tokens, dtype=torch.int64 if name == "rank" else torch.float32) for name in wanted}
    out |= {name: torch.empty(tokens) for name in ("nll", "lse") if name not in out}
    out["prediction"] = torch.empty(tokens, dtype=torch.int64)
    out["rows"] = torch.full((len(schemas.ExactRow), tokens), torch.nan)
    names = (
        "nll",
        "prediction",
        "lse",
        "kl",
        "entropy",
        "reference_nll",
        "reference_entropy",
        "log_p2",
        "rank",
        "divergence",
    )
    ops.exact_statistics(
        chunk.z, chunk.r, chunk.difference, chunk.labels, beta, *(out.get(name) for name in names), out["rows"]
    )
    return out


def directions(
    chunk: Chunk, known: dict[str, Tensor], weights: dict[str, Tensor], beta: float = 0.5, out: Tensor | None = None
) -> Tensor:
    out = torch.empty_like(chunk.z) if out is None else out
    ops.exact_directions(*chunk, beta, known["nll"], known["rows"], *(weights.get(name) for name in WEIGHTS), out)
    return out


def divergence(z_ref: Tensor, z: Tensor, beta: float) -> Tensor:
    log_p, log_r = z.log_softmax(1), z_ref.log_softmax(1)
    if beta == 1:
        return (log_p.exp() * (log_p - log_r)).sum(1)
    beta = torch.tensor(beta, dtype=z.dtype)
    log_m = torch.logaddexp(beta.log() + log_r, (1 - beta).log() + log_p)
    return beta * (log_r.exp() * (log_r - log_m)).sum(1) + (1 - beta) * (log_p.exp() * (log_p - log_m)).sum(1)


def truth(chunk: Chunk, beta: float = 0.5) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits before the soft-cap, and all statistics as functions of them."""
    z = chunk.logits()
    raw = (chunk.softcap * torch.atanh(z / chunk.softcap) if chunk.softcap else z).requires_grad_()
    z = chunk.softcap * torch.tanh(raw / chunk.softcap) if chunk.softcap else raw * 1
    label = z.gather(1, chunk.labels[:, None])
    out = {
        "nll": reference.nll(z, chunk.labels),
        "lse": z.logsumexp(1),
        "entropy": reference.entropy(z),
        "log_p2": (2 * z).logsumexp(1) - 2 * z.logsumexp(1),
        "rank": (z > label).sum(1),
        "label": label[:, 0],
    }
    if chunk.r is not None:
        r = chunk.r.double()
        out["kl"], out["divergence"] = reference.kl(r, z), divergence(r, z, beta)
        out["reference_nll"], out["reference_entropy"] = reference.nll(r, chunk.labels), reference.entropy(r)
    return raw, out


def true_statistics(chunk: Chunk, beta: float = 0.5) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in truth(chunk, beta)[1].items()}


def true_direction(chunk: Chunk, weights: dict[str, Tensor], beta: float = 0.5) -> Tensor:
    raw, values = truth(chunk, beta)
    return torch.autograd.grad(sum((w.double() * values[name]).sum() for name, w in weights.items()), raw)[0]


def relative(found: Tensor, wanted: Tensor, least: float = 0.0) -> float:
    """The largest error, each relative to its number; `least` where that is smaller."""
    return float(((found.double() - wanted).abs() / wanted.abs().clamp(min=least)).amax())


def row_error(found: Tensor, wanted: Tensor, least: float = 0.0) -> float:
    """The largest error of a row relative to its largest number; `least` where that is smaller."""
    return float(((found.double() - wanted).abs().amax(1) / wanted.abs().amax(1).clamp(min=least)).amax())


def some_weights(chunk: Chunk, *names: str) -> dict[str, Tensor]:
    return {name: torch.randn(len(chunk.z)) for name in names}


def direction_error(
    chunk: Chunk, known: dict[str, Tensor], names: tuple[str, ...], beta: float, least: float = 0.0
) -> float:
    weights = some_weights(chunk, *names)
    return row_error(directions(chunk, known, weights, beta), true_direction(chunk, weights, beta), least)


# ---- what they compute

every_kind = pytest.mark.parametrize("kind", REFERENCES)
both_references = pytest.mark.parametrize("kind", REFERENCES[1:])
every_beta = pytest.mark.parametrize("beta", BETAS)
every_softcap = pytest.mark.parametrize("softcap", (0.0, 30.0))
every_vocabulary = pytest.mark.parametrize("vocabulary", (1, 2, 123, 507, 4096, 4097))

# Relative to the number, or to 0.1 where that is larger.
STATISTICS_BOUNDS = {
    "nll": 1.8e-6, "lse": 2e-7, "entropy": 4e-6, "log_p2": 6e-6, "kl": 3e-6, "reference_nll": 2e-6,
    "reference_entropy": 3e-6, "divergence": 4e-6,
}  # fmt: skip
# Relative to the largest of the row, or to 0.01 times the weight where that is larger.
DIRECTIONS_BOUNDS = {"nll": 1.6e-6, "kl": 7e-6, "entropy": 1.3e-5, "divergence": 9e-6, "label": 4e-7}


@every_kind
@every_softcap
@every_beta
@every_vocabulary
def test_statistics(kind, softcap, beta, vocabulary):
    chunk = make(kind, vocabulary, 1.0, softcap)
    found, wanted = statistics(chunk, beta), true_statistics(chunk, beta)
    assert torch.equal(found["prediction"], chunk.logits().argmax(1))
    assert torch.equal(found["rank"], wanted["rank"])
    errors = {n: relative(found[n], wanted[n], least=0.1) for n in STATISTICS_BOUNDS if n in found}
    assert len(errors) == (4 if kind == "none" else 8)
    assert all(errors[name] < STATISTICS_BOUNDS[name] for name in errors), errors


@every_kind
@every_softcap
@every_beta
@every_vocabulary
def test_directions(kind, softcap, beta, vocabulary):
    chunk = make(kind, vocabulary, 1.0, softcap)
    known = statistics(chunk, beta)
    names = ("nll", "entropy", "label") if kind == "none" else WEIGHTS
    errors = {name: direction_error(chunk, known, (name,), beta, least=0.01) for name in names}
    assert all(errors[name] < DIRECTIONS_BOUNDS[name] for name in names), errors
    assert direction_error(chunk, known, names, beta, least=0.01) < 4e-6


@every_beta
@both_references
@pytest.mark.parametrize("distance", (1e-3, 0.04))
def test_near_the_reference(kind, beta, distance):
    """KL of 5e-7 and 1e-3, and their directions: not lost in the rounding of numbers of order 1."""
    chunk = make(kind, 4097, distance)
    found, wanted = statistics(chunk, beta), true_statistics(chunk, beta)
    bound = 6e-6 if kind == "separate" and distance < 0.01 else 3e-6  # the given logits' differences have few digits
    for name in ("kl", "divergence"):
        assert relative(found[name], wanted[name]) < bound
        assert direction_error(chunk, found, (name,), beta) < bound


@every_beta
@both_references
def test_far_from_the_reference(kind, beta):
    """Logits that differ by hundreds: nothing overflows. Those that are sums are rounded to 3e-5."""
    chunk = make(kind, 507, 300.0)
    found, wanted = statistics(chunk, beta), true_statistics(chunk, beta)
    assert wanted["kl"].min() > 100
    bound = 2e-5 if kind == "difference" else 1e-6
    for name in ("kl", "divergence"):
        assert relative(found[name], wanted[name]) < bound
    for names in (("kl",), ("divergence",), WEIGHTS):
        assert direction_error(chunk, found, names, beta, least=0.1) < 7e-5


@pytest.mark.parametrize("beta", (0.01, *BETAS[:-1], 0.99))
def test_divergence_of_two_tokens_at_any_distance(beta):
    """log p − log p_ref from 1e-4 to 80, both signs: every branch of the logarithm of the mixture."""
    d = torch.cat([sign * torch.logspace(-4, 1.9, 400) for sign in (1, -1)])
    chunk = Chunk(torch.stack([d, -d], 1), torch.zeros(len(d), 2), False, torch.zeros(len(d), dtype=torch.int64))
    found, wanted = statistics(chunk, beta), true_statistics(chunk, beta)
    assert relative(found["divergence"], wanted["divergence"]) < 1e-6 / min(beta, 1 - beta)
    weights = {"divergence": torch.ones(len(d))}
    assert (directions(chunk, found, weights, beta) - true_direction(chunk, weights, beta)).abs().max() < 6e-8


# ---- rows with something special


def test_a_label_that_is_all_but_certain():
    """p from 1 − 4e-5 to 1 − 1e-8: what vanishes with 1 − p keeps all of its digits."""
    z = torch.zeros(3, 123)
    z[:, 7] = torch.tensor([15.0, 20.0, 23.0])
    chunk = Chunk(z, z + 0.1 * torch.randn(3, 123), False, torch.tensor([7, 7, 7]))
    found, wanted = statistics(chunk), true_statistics(chunk)
    for name, bound in {"nll": 5e-7, "entropy": 5e-7, "log_p2": 4e-7, "kl": 5e-6, "divergence": 2e-6}.items():
        assert relative(found[name], wanted[name]) < bound, name
    for name, bound in {"nll": 4e-7, "entropy": 5e-7, "kl": 2.5e-5, "divergence": 1.8e-5}.items():
        weights = some_weights(chunk, name)
        at_label = directions(chunk, found, weights)[:, 7]
        assert relative(at_label, true_direction(chunk, weights)[:, 7]) < bound, name


@every_beta
@pytest.mark.parametrize("whose", ("both", "own", "reference"))
def test_tokens_ruled_out_by_a_bias(whose, beta):
    """Logits of −1e30 give no 0·∞."""
    chunk = make("separate", 123, 1.0)
    for logits in (chunk.z,) if whose == "own" else (chunk.r,) if whose == "reference" else (chunk.z, chunk.r):
        logits[:, 40:90] = -1e30
    labels = chunk.labels % 40
    labels[-1] = 50
    chunk = chunk._replace(labels=labels)
    found, wanted = statistics(chunk, beta), true_statistics(chunk, beta)
    assert all(relative(found[name], wanted[name], least=0.1) < 1.2e-6 for name in STATISTICS_BOUNDS)
    for names in (("nll",), ("kl",), ("entropy",), ("divergence",), WEIGHTS):
        assert direction_error(chunk, found, names, beta, least=0.01) < 4e-5


def test_rank_of_the_smallest_logit_there_is():
    """What stands in for ids beyond the end of the row does not count."""
    chunk = make("none", 123, 1.0)
    chunk.z.scatter_(1, chunk.labels[:, None], torch.finfo(torch.float32).min)
    assert statistics(chunk)["rank"].tolist() == [122] * 6


@every_kind
def test_no_tokens(kind):
    chunk = make(kind, 123, 1.0, tokens=6)
    chunk = Chunk(chunk.z[:0], None if chunk.r is None else chunk.r[:0], chunk.difference, chunk.labels[:0])
    known = statistics(chunk)
    assert directions(chunk, known, some_weights(chunk, "nll", "entropy")).shape == (0, 123)


@every_kind
def test_an_infinite_logit_makes_its_row_nan(kind):
    """And no other; also where the weights are zero, as 0 · NaN is NaN."""
    chunk = make(kind, 123, 1.0)
    whole = statistics(chunk)
    broken = chunk._replace(z=chunk.z.clone())
    broken.z[3, 60] = torch.inf
    found = statistics(broken)
    for name in set(WITH_REFERENCE) & set(found) - {"rank", "reference_nll", "reference_entropy"}:
        assert found[name].isnan().tolist() == [False] * 3 + [True] + [False] * 2, name
        assert torch.equal(found[name][:3], whole[name][:3])
    for names in (("nll",), ("entropy",), ("label",), WEIGHTS):
        weights = {name: torch.zeros(6) for name in names if kind != "none" or name not in ("kl", "divergence")}
        out = directions(broken, found, weights)
        assert out[3].isnan().all()
        assert (out[:3] == 0).all() and (out[4:] == 0).all()


def test_a_reference_with_an_infinite_logit_spoils_only_what_needs_it():
    chunk = make("separate", 123, 1.0)
    chunk.r[3, 60] = torch.inf
    found = statistics(chunk)
    assert found["nll"].isfinite().all() and found["entropy"].isfinite().all()
    assert found["kl"][3].isnan() and found["divergence"][3].isnan() and found["reference_nll"][3].isnan()
    assert directions(chunk, found, some_weights(chunk, "nll", "entropy", "label")).isfinite().all()
    for name in ("kl", "divergence"):
        assert directions(chunk, found, {name: torch.zeros(6)})[3].isnan().all()


# ---- the contract


@every_kind
def test_statistics_leave_the_logits_as_they_are(kind):
    chunk = make(kind, 507, 1.0)
    before = [None if x is None else x.clone() for x in chunk[:2]]
    statistics(chunk)
    assert all(x is None or torch.equal(x, y) for x, y in zip(chunk[:2], before, strict=True))


@every_kind
def test_what_is_not_wanted_changes_nothing(kind):
    """Each optional statistic alone, bit by bit."""
    chunk = make(kind, 507, 1.0)
    everything = statistics(chunk)
    for name in ("nll", "entropy", "log_p2", "rank", "kl", "reference_nll", "reference_entropy", "divergence"):
        alone = statistics(chunk, wanted=(name,))
        assert all(torch.equal(alone[n], everything[n]) for n in alone if n != "rows"), name


@every_kind
@every_softcap
def test_directions_in_place(kind, softcap):
    """In the memory of z, and of r where there is one."""
    chunk = make(kind, 507, 1.0, softcap)
    known = statistics(chunk)
    weights = some_weights(chunk, *(("nll", "entropy", "label") if kind == "none" else WEIGHTS))
    wanted = directions(chunk, known, weights)
    for at in range(1 if kind == "none" else 2):
        copies = [None if x is None else x.clone() for x in chunk[:2]]
        directions(Chunk(*copies, *chunk[2:]), known, weights, out=copies[at])
        assert torch.equal(copies[at], wanted)


@every_kind
def test_a_weight_that_is_missing_is_zero(kind):
    chunk = make(kind, 507, 1.0)
    known = statistics(chunk)
    names = ("nll", "entropy", "label") if kind == "none" else WEIGHTS
    zeros = {name: torch.zeros(6) for name in names}
    assert (directions(chunk, known, zeros) == 0).all()
    assert (directions(chunk, known, {}) == 0).all()
    for name in names:
        weights = some_weights(chunk, name)
        assert torch.equal(directions(chunk, known, weights), directions(chunk, known, zeros | weights))


@every_kind
def test_rows_choose_their_weights_for_themselves(kind):
    """Row t is without the weight of the t-th name; the last has none."""
    chunk = make(kind, 507, 1.0)
    known = statistics(chunk)
    names = ("nll", "entropy", "label") if kind == "none" else WEIGHTS
    weights = some_weights(chunk, *names)
    for t, name in enumerate(names):
        weights[name][t] = 0
        weights[name][-1] = 0
    found = directions(chunk, known, weights)
    assert row_error(found[:-1], true_direction(chunk, weights)[:-1]) < 1e-6
    assert (found[-1] == 0).all()


def test_logsumexp_by_the_weights_of_nll_and_label():
    """∂lse/∂z = (p − onehot) + onehot: with nll_weight a + l and label_weight l that of a·nll + l·lse."""
    chunk = make("none", 507, 1.0)
    a, b = torch.randn(6), torch.randn(6)
    found = directions(chunk, statistics(chunk), {"nll": a + b, "label": b})
    assert row_error(found, true_direction(chunk, {"nll": a, "lse": b})) < 6e-7


@every_kind
def test_the_slope_of_a_soft_cap_is_zero_where_it_is_reached(kind):
    chunk = make(kind, 123, 1.0, 30.0)
    if chunk.difference:
        chunk.r[:, 5] = chunk.z[:, 5] = 15.000001
    else:
        chunk.z[:, 5] = 30.000002
    names = ("nll", "entropy", "label") if kind == "none" else WEIGHTS
    out = directions(chunk._replace(labels=torch.full((6,), 5)), statistics(chunk), some_weights(chunk, *names))
    assert (out[:, 5] == 0).all()
    assert (out[:, 6] != 0).all()


def test_same_numbers_whatever_the_number_of_threads():
    chunk = make("separate", 507, 1.0, tokens=50)
    weights = some_weights(chunk, *WEIGHTS)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            known = statistics(chunk)
            found.append([*known.values(), directions(chunk, known, weights)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_names_of_rows_and_interface_are_those_of_the_sources():
    sources = Path(__file__).parents[2] / "csrc" / "cpu"
    names = re.search(r"struct ExactRow {\s*float ([^;]*);", (sources / "exact.inc").read_text())[1]
    assert names.upper().split(", ") == [row.name for row in schemas.ExactRow]
    assert f"interface_op() {{ return {schemas.INTERFACE}; }}" in (sources / "ops.cpp").read_text()


SIMD = """
import sys, pytest, torch
from fused_losses.kernels import schemas
assert schemas.load() is None and torch.ops.fused_losses.simd() == sys.argv[1]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not instruction_sets", sys.argv[2]]))
"""


@pytest.mark.parametrize("wanted, found", [("avx2", "AVX2"), ("baseline", "128-bit SIMD")])
def test_other_instruction_sets(wanted, found):
    """All of this file; this machine's best runs in this process."""
    if wanted == "avx2" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("no AVX2 here")
    result = subprocess.run(
        [sys.executable, "-c", SIMD, found, __file__], capture_output=True, text=True, timeout=300,
        env={**os.environ, "FUSED_LOSSES_SIMD": wanted, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr

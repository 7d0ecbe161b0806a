"""`extended_statistics`, and `directions` with an entropy and a divergence, in Triton's interpreter.

The truth is float64 with full logits and autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from cases import name, relative
from torch import Tensor

from fused_losses import reference as oracle
from fused_losses.backends.gpu_products import in_memory_of
from fused_losses.kernels.schemas import Row
from fused_losses.kernels.triton import directions
from fused_losses.kernels.triton import rows as kernels

PLAIN = dict(scale=1.0, softcap=0.0, reference_scale=1.0, reference_softcap=0.0)
SHARED = PLAIN | dict(scale=-1.7, reference_scale=-1.7)
SHARED_CAPPED = SHARED | dict(softcap=4.0, reference_softcap=4.0)
BOTH_CAPPED = PLAIN | dict(scale=-1.7, softcap=4.0, reference_scale=0.6, reference_softcap=7.0)
# V, kind of reference, scales and soft-caps, standard deviation of z − r before soft-caps (None: unrelated).
CASES = [
    (123, None, PLAIN, None),
    (2049, None, PLAIN | dict(scale=0.3, softcap=5.0), None),
    (123, "shared", PLAIN, 0.045),
    (123, "shared", PLAIN, 1e-4),
    (2049, "shared", SHARED, 1.5),
    (4097, "shared", SHARED_CAPPED, 0.045),
    (123, "own", BOTH_CAPPED, None),
    (2049, "own", PLAIN | dict(softcap=4.0), None),
    (123, "own", PLAIN | dict(reference_softcap=4.0), 0.3),
    (4097, "own", PLAIN, 0.045),
    (1024, "own", PLAIN, 4.0),
]
WITH_REFERENCE = [case for case in CASES if case[1]]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"V{c[0]}-{name(c[1])}-{CASES.index(c)}")
every_reference = pytest.mark.parametrize("case", WITH_REFERENCE, ids=lambda c: f"V{c[0]}-{c[1]}-{CASES.index(c)}")

# One of each variant of the kernels, where what is compared is the kernels with themselves; --exhaustive: every one.
VARIANTS = [case if at in (1, 4, 5, 6) else pytest.param(case, marks=pytest.mark.exhaustive)
            for at, case in enumerate(CASES)]  # fmt: skip
every_variant = pytest.mark.parametrize("case", VARIANTS, ids=lambda c: f"V{c[0]}-{name(c[1])}-{CASES.index(c)}")
every_variant_with_reference = pytest.mark.parametrize(
    "case", VARIANTS[2:], ids=lambda c: f"V{c[0]}-{c[1]}-{CASES.index(c)}"
)


@dataclass
class Truth:
    """All of `Rows` in float64, with a graph to `scaled`, the logits before the soft-cap: directions are theirs."""

    scaled: Tensor
    nll: Tensor
    entropy: Tensor
    log_p2: Tensor
    rank: Tensor
    kl: Tensor | None = None
    divergence: Tensor | None = None

    def direction(self, **weights: Tensor) -> Tensor:
        total = sum((weight.double() * getattr(self, of)).sum() for of, weight in weights.items())
        return torch.autograd.grad(total, self.scaled)[0]


@dataclass
class Rows:
    """Logits of a chunk as `row_statistics` finds them."""

    z: Tensor
    r: Tensor | None
    difference: bool
    labels: Tensor
    scales: dict[str, float]

    def truth(self, beta: float) -> Truth:
        def bounded(x: Tensor) -> Tensor:
            return x.double().clamp(min=-1e30)

        def capped(x: Tensor, cap: float) -> Tensor:
            return cap * torch.tanh(x / cap) if cap else x

        beta = torch.tensor(beta).item()  # in float32, as the kernels have it
        z, r, s = self.z, self.r, self.scales
        if r is not None:
            r_scaled = bounded(r) * s["reference_scale"]
        if not self.difference:
            scaled = bounded(z) * s["scale"]
        elif s["softcap"]:
            scaled = bounded(z.double() + r.double()) * s["scale"]
        else:
            scaled = r_scaled + z.double() * s["scale"]
        scaled.requires_grad_()
        z = capped(scaled, s["softcap"])
        label = z.gather(1, self.labels[:, None])
        log_p = z.log_softmax(1)
        out = Truth(
            scaled, oracle.nll(z, self.labels), oracle.entropy(z), (2 * log_p).logsumexp(1), (z > label).sum(1)
        )  # fmt: skip
        if r is not None:
            r = capped(r_scaled, s["reference_softcap"])
            log_r = r.log_softmax(1)
            out.kl = oracle.kl(r, z)
            log_m = torch.logaddexp(log_r + math.log(beta), log_p + math.log1p(-beta)) if beta < 1 else log_r
            own = (log_p.exp() * (log_p - log_m)).sum(1)
            of_reference = (log_r.exp() * (log_r - log_m)).sum(1)
            out.divergence = beta * of_reference + (1 - beta) * own if beta < 1 else own
        return out

    @property
    def arguments(self) -> tuple:
        r = None if self.r is None else self.r.clone()  # directions overwrite both
        return self.z.clone(), r, self.difference, self.labels, *self.scales.values()

    def statistics(self) -> dict[str, Tensor]:
        """What `row_statistics` says."""
        n, reference = len(self.labels), self.r is not None
        out = {of: torch.empty(n) for of in ("nll", "entropy")} | dict(rows=torch.empty(len(Row), n))
        kl, ref_nll = (torch.empty(n) if reference else None for _ in range(2))
        prediction = torch.empty(n, dtype=torch.int64)
        kernels.row_statistics(
            *self.arguments, out["nll"], prediction, kl, out["entropy"], ref_nll, None, out["rows"]
        )  # fmt: skip
        return out

    def extended(
        self, beta: float, wanted: tuple[str, ...], known: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        known = known or self.statistics()
        n = len(self.labels)
        out = {of: torch.empty(n, dtype=torch.int64 if of == "rank" else torch.float32) for of in wanted}
        if "divergence" in wanted:
            out["extended"] = torch.empty(len(directions.Extended), n)
        directions.extended_statistics(
            *self.arguments, beta, known["rows"], known["nll"], out.get("log_p2"), out.get("rank"),
            out.get("divergence"), out.get("extended"),
        )  # fmt: skip
        return out

    def direction(self, beta: float, dtype: torch.dtype = torch.float32, **weights: Tensor) -> Tensor:
        """Weights by their statistic; only what they need is given."""
        known = self.statistics()
        options: dict = {}
        if "entropy" in weights:
            options |= dict(entropy_weight=weights["entropy"], entropy=known["entropy"])
        if "divergence" in weights:
            extended = self.extended(beta, ("divergence",), known)["extended"]
            options |= dict(divergence_weight=weights["divergence"], extended=extended, beta=beta)
        z, r, *rest = self.arguments
        out = in_memory_of(z, dtype)
        directions.directions(
            z, r, *rest, known["rows"], known["nll"], weights.get("nll"), weights.get("kl"), out, None, **options
        )
        return out


def make(case: tuple, n: int = 5) -> Rows:
    v, kind, scales, spread = case
    g = torch.Generator().manual_seed(v)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    labels = torch.randint(v, (n,), generator=g)
    labels[:3] = torch.tensor([0, v - 1, v // 2])
    r = 2 * normal(n, v)
    r[2, v // 2] += 12  # a certain label
    other = normal(n, v)
    if kind == "shared":
        z = (1.0 if spread is None else spread) * other / abs(scales["scale"])
    elif spread is None:
        z = 2 * other
    else:
        z = (r * scales["reference_scale"] + spread * other) / scales["scale"]
    return Rows(z.float(), r.float() if kind else None, kind == "shared", labels, scales)


def worst(value: Tensor, truth: Tensor) -> float:
    """Largest relative error of a token."""
    return ((value.double() - truth).abs() / truth.abs()).max().item()


def some_weights(*names: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {of: torch.randn(5, generator=g) for of in names}


@every_case
def test_log_p2_and_rank(case):
    rows = make(case)
    out, truth = rows.extended(0.0, ("log_p2", "rank")), rows.truth(0.5)
    assert worst(out["log_p2"], truth.log_p2) <= 2.7e-6  # measured 9.2e-7
    assert torch.equal(out["rank"], truth.rank)


@pytest.mark.each_value
@every_reference
@pytest.mark.parametrize("beta", [1e-3, 0.1, 0.5, 0.999, 1.0])
def test_divergence(case, beta):
    rows = make(case)
    divergence, truth = rows.extended(beta, ("divergence",))["divergence"], rows.truth(beta).divergence
    # Measured 1.1e-6 relative, and 8e-14: half the square of the error of SHIFT.
    assert ((divergence - truth).abs() <= 3.3e-6 * truth + 2.4e-13).all()


@every_case
def test_direction_of_the_entropy_alone(case):
    rows, weights = make(case), dict(entropy=torch.ones(5))
    error = relative(rows.direction(0.0, **weights), rows.truth(0.5).direction(**weights))
    assert error <= 6.5e-6  # measured 2.2e-6, where log p is nearly −entropy everywhere


@pytest.mark.each_value
@every_reference
@pytest.mark.parametrize("beta", [1e-3, 0.1, 0.5, 0.999, 1.0])
def test_direction_of_the_divergence_alone(case, beta):
    rows, weights = make(case), dict(divergence=torch.ones(5))
    error = relative(rows.direction(beta, **weights), rows.truth(beta).direction(**weights))
    # Measured 4.4e-7; 8.6e-6 where d is the difference of capped logits, near each other, and has their rounding.
    assert error <= (2.5e-5 if rows.difference and rows.scales["softcap"] else 1.3e-6)


@pytest.mark.each_value
@every_variant_with_reference
@pytest.mark.parametrize("others", [("nll",), ("kl",), ("nll", "kl"), ("nll", "kl", "entropy")], ids="-".join)
def test_directions_add_up(case, others):
    rows, weights = make(case), some_weights("divergence", *others)
    each = [rows.direction(0.3, **{of: weight}) for of, weight in weights.items()]
    assert relative(rows.direction(0.3, **weights), sum(d.double() for d in each)) <= 1.6e-7  # measured 5.5e-8


@every_case
def test_all_directions_together(case):
    rows = make(case)
    weights = some_weights("nll", "entropy", *(("kl", "divergence") if rows.r is not None else ()))
    error = relative(rows.direction(0.3, **weights), rows.truth(0.3).direction(**weights))
    assert error <= 1.2e-6  # measured 4.1e-7


@every_variant
def test_16_bit_numbers_in_place_are_the_rounded_ones(case):
    rows = make(case)
    weights = some_weights("nll", "entropy", *(("kl", "divergence") if rows.r is not None else ()))
    half, single = (rows.direction(0.3, dtype, **weights) for dtype in (torch.float16, torch.float32))
    assert torch.equal(half, single.half())


def test_separate_directions_leave_the_weights_out():
    rows = make(WITH_REFERENCE[0])
    known, weight = rows.statistics(), torch.ones(5)
    results = []
    for options in ({}, dict(entropy_weight=weight, entropy=known["entropy"], divergence_weight=weight, beta=0.5)):
        z, r, *rest = rows.arguments
        directions.directions(z, r, *rest, known["rows"], known["nll"], None, None, z, r, **options)
        results.append((z, r))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@every_variant
def test_each_statistic_alone_is_the_same_as_with_the_others(case):
    rows = make(case)
    names = ("log_p2", "rank", *(() if rows.r is None else ("divergence",)))
    together = rows.extended(0.3, names)
    for of in names:
        alone = rows.extended(0.3, (of,))[of]
        if of == "log_p2":  # p has another formula where there is a divergence
            assert relative(alone, together[of].double()) <= 3e-7  # measured 1e-7
        else:
            assert torch.equal(alone, together[of])


@pytest.mark.parametrize("kind, scales", [(None, PLAIN), ("shared", SHARED), ("shared", SHARED_CAPPED)], ids=name)
def test_equal_logits_are_not_above_the_label(kind, scales):
    rows = make((2049, kind, scales, 1.0))
    for raw in (rows.z, rows.r):
        if raw is not None:
            raw[:, 1::3] = raw.gather(1, rows.labels[:, None])
    assert torch.equal(rows.extended(0.0, ("rank",))["rank"], rows.truth(0.5).rank)


def test_log_p2_of_nearly_certain_tokens():
    """log p[label] is of 1e-3 to 1e-9, log Σ p² twice that."""
    rows = make((123, None, PLAIN, None))
    rows.z /= 8
    rows.z[range(5), rows.labels] = torch.tensor([12.0, 15.0, 18.0, 21.0, 25.0])
    assert worst(rows.extended(0.0, ("log_p2",))["log_p2"], rows.truth(0.5).log_p2) <= 4e-6  # measured 1.4e-6


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.999, 1.0])
def test_distributions_with_little_in_common(beta):
    """Two ids have all of p, two all of p_ref, one of them the same; in float32 all else is 0."""
    rows = make((2049, "own", PLAIN, None))
    rows.z[:, [3, 5]] += 300
    rows.r[:, [5, 2047]] += 300
    truth, weights = rows.truth(beta), some_weights("divergence")
    assert worst(rows.extended(beta, ("divergence",))["divergence"], truth.divergence) <= 2.8e-7  # measured 9.2e-8
    assert relative(rows.direction(beta, **weights), truth.direction(**weights)) <= 6e-7  # measured 2.1e-7


def test_a_model_that_is_its_reference():
    rows = make((2049, "shared", SHARED, 0.0))
    out = rows.extended(0.3, ("divergence",))
    assert (out["divergence"] == 0).all() and (rows.direction(0.3, divergence=torch.ones(5)) == 0).all()


@pytest.mark.parametrize("kind", ["shared", "own"])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_ruled_out_ids(kind, beta):
    """A bias of −inf on a third of the ids of both models; of one label too."""
    rows = make((123, kind, PLAIN, 0.3))
    out_of_play = torch.arange(123) % 3 == 1
    out_of_play[rows.labels[1:]] = False
    out_of_play[rows.labels[0]] = True
    rows.r[:, out_of_play] = -math.inf
    if kind == "own":
        rows.z[:, out_of_play] = -math.inf
    out, truth = rows.extended(beta, ("log_p2", "rank", "divergence")), rows.truth(beta)
    assert max(worst(out[of], getattr(truth, of)) for of in ("log_p2", "divergence")) <= 1.6e-6  # measured 5.6e-7
    assert torch.equal(out["rank"], truth.rank) and out["rank"][0] > 50
    weights = some_weights("entropy", "divergence")
    assert relative(rows.direction(beta, **weights), truth.direction(**weights)) <= 8e-7  # measured 2.9e-7


def test_ids_that_only_one_model_rules_out():
    rows = make((123, "own", PLAIN, 0.3))
    rows.z[:, 1::3] = -math.inf
    rows.r[:, 2::3] = -math.inf
    rows.labels[:] = 3
    truth, weights = rows.truth(0.3), some_weights("entropy", "divergence")
    assert worst(rows.extended(0.3, ("divergence",))["divergence"], truth.divergence) <= 5e-7  # measured 1.9e-7
    assert relative(rows.direction(0.3, **weights), truth.direction(**weights)) <= 8e-7  # measured 2.9e-7


@pytest.mark.parametrize("which", ["model", "reference"])
def test_an_infinite_logit_makes_nan(which):
    rows = make((123, "own", PLAIN, None))
    (rows.z if which == "model" else rows.r)[1, 7] = math.inf
    out = rows.extended(0.3, ("log_p2", "divergence"))
    direction = rows.direction(0.3, divergence=torch.ones(5))
    assert out["divergence"].isnan().tolist() == [False, True, False, False, False]
    assert direction.isnan().all(1).tolist() == direction.isnan().any(1).tolist() == [False, True, False, False, False]
    assert out["log_p2"].isnan().tolist() == [False, which == "model", False, False, False]
    if which == "model":
        assert rows.direction(0.3, entropy=torch.ones(5)).isnan()[1].all()

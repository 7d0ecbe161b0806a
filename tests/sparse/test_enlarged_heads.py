"""Heads of benchmarks/enlarged.py, a real one with rows added: what the rule promises."""

import pytest
import torch


@pytest.fixture
def enlarged(from_benchmarks):
    return from_benchmarks("enlarged")


def small():
    g = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(300, 32, generator=g), torch.randn(40, 32, generator=g) + 1.0
    return weight, hidden, torch.randint(300, (40,), generator=g)


def test_a_seed_gives_the_same_head(enlarged):
    one, same, other = (enlarged.enlarge(*small(), 700, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_rows_that_were_there_stay_and_so_many_come(enlarged):
    weight, hidden, labels = small()
    made = enlarged.enlarge(weight, hidden, labels, 700)
    assert made.shape == (700, 32)
    assert torch.equal(made[:300], weight)


@pytest.mark.parametrize("first", [True, False])
def test_a_part_of_a_head_has_the_labels_rows(enlarged, first):
    weight, _, labels = small()
    few, where = enlarged.subset(weight, labels, 0.25, first)
    assert 75 <= len(few) < 150
    assert torch.equal(few[where], weight[labels])


@pytest.mark.parametrize("exponent", [0.0, 0.8])
def test_new_rows_have_their_share(enlarged, exponent):
    weight, hidden, labels = small()
    made = enlarged.enlarge(weight, hidden, labels, 700, exponent=exponent)
    z = hidden @ made.T
    free = torch.ones(300, dtype=torch.bool)
    free[labels] = False
    count = int(free.sum())
    ratio = ((count + 400) / count) ** (1 - exponent) - 1
    old, templates, new = z[:, :300].logsumexp(1), z[:, :300][:, free].logsumexp(1), z[:, 300:].logsumexp(1)
    wanted = ratio * templates.exp() / (ratio * templates.exp() + old.exp())
    assert (new - old).sigmoid().mean().item() == pytest.approx(wanted.mean().item(), rel=1e-6)


@pytest.mark.parametrize("vocabulary", [299, 300])
def test_no_row_to_add_is_refused(enlarged, vocabulary):
    with pytest.raises(ValueError, match=f"vocabulary: expected more than the 300 rows .* got {vocabulary}"):
        enlarged.enlarge(*small(), vocabulary)


def test_errors_are_those_of_float64(enlarged):
    weight, hidden, labels = small()
    case = enlarged.Case(hidden, weight, labels, hidden + 0.01)
    x, r, w = (t.double() for t in (hidden, hidden + 0.01, weight))
    dz = (x @ w.T).softmax(1) - (r @ w.T).softmax(1)
    for found, exact in zip(case.truth("KL"), (dz @ w, dz.T @ x), strict=True):
        assert (found - exact).norm() / exact.norm() < 1e-5

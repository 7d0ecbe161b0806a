"""Intervals of shares and means."""

import math

import pytest
import torch

from fused_losses.checking.intervals import ENOUGH, mean, share


def test_share_has_wilsons_interval():
    found = share([True] * 8 + [False] * 2)
    # Wilson 1927, 8 of 10 at 95%, as in any table.
    assert (found.value, found.count) == (0.8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_share_of_none_seen_is_not_certainly_none():
    assert share([False] * 8).low == 0 and share([False] * 8).high == pytest.approx(0.3244, abs=1e-4)
    assert share([True]).low is None
    assert share([]) is None


def test_mean_needs_enough_values_for_an_interval():
    values = [float(x) for x in range(ENOUGH)]
    assert mean(values).low < mean(values).value < mean(values).high
    assert mean(values[:-1]).low is None
    assert mean([]) is None
    assert mean([*values, math.inf]).low is None and mean([*values, math.inf]).value == math.inf


def test_bootstrap_agrees_with_the_normal_interval_and_with_itself():
    torch.manual_seed(3)
    values = torch.randn(400).tolist()
    found = mean(values, seed=5)
    half = 1.96 * float(torch.tensor(values).std()) / 20
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)  # measured 0.02
    assert mean(values, seed=5) == found != mean(values, seed=6)


def test_weights_are_tokens_of_a_window():
    assert mean([1.0, 4.0], [3, 1]).value == 1.75
    found = mean([1.0] * 11 + [9.0], [1] * 11 + [0])
    assert (found.value, found.low, found.high) == (1, 1, 1)  # what weighs nothing changes nothing

"""Made inputs: the same for a seed, of any size, with the statistics that they promise."""

import pytest
import torch

from fused_losses.bench import calibrated as module
from fused_losses.bench.calibrated import calibrated


def test_a_seed_gives_the_same_inputs():
    one, same, other = (calibrated(8, 48, 1024, seed=seed) for seed in (1, 1, 2))
    for name in one._fields:
        assert torch.equal(getattr(one, name), getattr(same, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("tokens, dim, vocabulary", [(1, 8, 128), (400, 33, 1000), (5, 1000, 3000), (3, 64, 60000)])
def test_any_size(tokens, dim, vocabulary):
    made = calibrated(tokens, dim, vocabulary)
    assert made.hidden.shape == made.reference_hidden.shape == (tokens, dim)
    assert made.weight.shape == (vocabulary, dim) and made.labels.shape == (tokens,)
    assert all(part.isfinite().all() for part in made)
    assert made.labels.min() >= 0 and made.labels.max() < vocabulary


def test_another_dtype_is_the_same_rounded():
    one, other = calibrated(4, 32, 512), calibrated(4, 32, 512, torch.bfloat16)
    assert torch.equal(one.labels, other.labels)
    for name in ("hidden", "weight", "reference_hidden"):
        assert torch.equal(getattr(one, name).bfloat16(), getattr(other, name))


def drawn_from_few(kind):
    """24 of the prototypes, and tokens made of each of them."""
    found = module.statistics()
    few = {
        name: value if "scale" in name or not value.dim() else value[::16]
        for name, value in found["texts"][kind].items()
    }  # fmt: skip
    found = found | {"texts": {kind: few}}
    return few, module.draw(found, 24, 256, 8192, torch.float32, 0, kind, 0.003, "cpu")


@pytest.mark.parametrize("kind", module.KINDS)
def test_tokens_are_as_sure_as_the_measured_ones(kind):
    few, made = drawn_from_few(kind)
    log_p = (made.hidden @ made.weight.T).log_softmax(1)
    p = few["odds"].sigmoid()
    wanted = torch.special.entr(p) + torch.special.entr(1 - p) + (1 - p) * few["rest_entropy"]
    off = module.entropy_of(log_p)[:, 0].sort().values - wanted.sort().values
    # Of so few ids some tokens cannot have all of their entropy; of the surer half one is 0.07 off, the others 0.0022.
    assert off[:12].abs().sort().values[-2] < 0.003 and off[:12].abs().max() < 0.1
    nll = (-log_p.gather(1, made.labels[:, None])[:, 0]).sort().values
    assert (nll - few["nll"].sort().values).abs().median() < 0.1


@pytest.mark.parametrize("kind", module.KINDS)
def test_the_likeliest_id_has_its_share_of_a_change(kind):
    few, made = drawn_from_few(kind)
    p, order = (made.hidden @ made.weight.T).softmax(1).sort(1, descending=True)
    moved = ((made.hidden - made.reference_hidden) @ made.weight.T).gather(1, order)[:, None]
    largest, odds, variance = (t.flatten() for t in module.likeliest_beside_others(p, moved))
    share = odds.sign() * largest * odds.square() / (largest * odds.square() + variance)
    assert few["sharpening"].min() < -0.1 and few["sharpening"].max() > 0.5  # some fall, more rise
    assert (share.sort().values - few["sharpening"].sort().values).abs().max() < 2e-5


def test_the_kl_is_the_one_asked_for():
    made = calibrated(64, 64, 4096, kl=0.01)
    log_p, log_r = ((x @ made.weight.T).log_softmax(1) for x in (made.hidden, made.reference_hidden))
    assert (log_r.exp() * (log_r - log_p)).sum(1).mean().item() == pytest.approx(0.01, rel=0.03)


def test_without_a_kl_the_reference_is_the_model():
    made = calibrated(4, 32, 512, kl=0)
    assert torch.equal(made.hidden, made.reference_hidden)


def test_a_few_channels_are_outliers():
    hidden = calibrated(32, 576, 1024, kind="documentation").hidden
    size = hidden.square().mean(0).sqrt()
    assert size.max() > 15 * size.median()


def test_added_rows_have_their_share(monkeypatch):
    monkeypatch.setattr(module, "MEASURED_V", 2048)
    made = calibrated(64, 64, 8192)
    p = (made.hidden @ made.weight.T).softmax(1)
    # 4^0.2 − 1 of what the others have is 0.24 of all; the likeliest ids, mostly others, are then moved towards.
    assert 0.05 < p[:, 2048:].sum(1).mean() < 0.4


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tokens=0), "tokens: expected an integer of at least 1, got 0"),
        (dict(dim=4), "dim: expected an integer of at least 8, got 4"),
        (dict(vocabulary=1.5), "vocabulary: expected an integer of at least 128, got 1.5"),
        (dict(kind="poems"), r"kind: expected one of .*got 'poems'; only these texts"),
        (dict(kl=-0.1), "kl: expected nats per token from 0 to 1, got -0.1"),
        (dict(kl=float("nan")), "kl: expected nats per token from 0 to 1, got nan"),
        (dict(dtype=torch.int8), "dtype: expected a floating-point torch.dtype, got torch.int8; pass"),
    ],
)
def test_what_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        calibrated(**(dict(tokens=2, dim=16, vocabulary=256) | change))

"""Distillation of a real model from its own top 32: the training curve of the whole vocabulary's KL."""

import functools

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


BUCKETS = ("top k, bucket", "top k, bucket, sparse gradients")


@pytest.fixture(scope="module")
def curves(from_benchmarks, smollm):
    """Each loss's KL of the whole vocabulary at each of 4 steps, on an answer each, all from the same student."""
    benchmark = from_benchmarks("topk_distillation")
    tokenizer, base = smollm
    with pytest.MonkeyPatch.context() as patch:
        few = functools.partial(benchmark.texts.generated, length=32, questions=benchmark.texts.QUESTIONS[:4])
        patch.setattr(benchmark.texts, "generated", few)
        batches = benchmark.batches_of(base, tokenizer, "generated", 4)
    states = benchmark.states_of(base, batches)
    model = benchmark.student(base)
    return {
        name: torch.tensor(benchmark.train(model, loss, batches, states, 1e-4, 32)["kl"])
        for name, loss in benchmark.LOSSES.items()
        if name in ("whole vocabulary", *BUCKETS)
    }


def test_top_32_with_the_rest_as_a_class_trains_as_the_whole_vocabulary(curves):
    """Over 60 steps too: docs/benchmarks.md."""
    whole = curves["whole vocabulary"]
    for name in BUCKETS:
        away = (curves[name] / whole - 1).abs().max()
        print(f"{name}: {away:.2%}")
        assert away < 0.005, name  # measured 0.19 %; 2 % with the teacher's probabilities reversed, 3 % untrained

"""Every class of docs/models.md is what the page says: equal to itself unpatched, refused with a reason, or impossible.

python benchmarks/causal_models.py        writes the page, with the other ways of training too
"""

from pathlib import Path

import pytest
import torch
from comparison import VARIANTS, compare
from tiny_models import names

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
KINDS = {"equal": "equal", "refused": "refused", "–": "impossible"}
# A soft-cap, a scale, experts, no rotation of positions, labels that the model does not shift, a head behind another layer.
SAMPLE = (
    "Gemma2ForCausalLM",
    "GraniteForCausalLM",
    "MixtralForCausalLM",
    "GPT2LMHeadModel",
    "BartForCausalLM",
    "BertLMHeadModel",
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, about tiny models


def rows() -> dict[str, list[str]]:
    lines = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines if len(cells) == 1 + len(VARIANTS) and cells[0][0].isupper()}


@pytest.fixture(autouse=True)
def as_users_run():
    """Some models have no deterministic implementation."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", names())
def test_same_loss_and_gradients(name):
    outcome = compare(name)
    assert outcome.kind != "different", outcome
    if name in rows():
        assert outcome.kind == KINDS[rows()[name][0]], outcome


@pytest.mark.parametrize("variant", VARIANTS[1:])
@pytest.mark.parametrize("name", SAMPLE)
def test_other_ways_of_training(name, variant):
    outcome = compare(name, variant)
    assert outcome.kind == KINDS[rows()[name][VARIANTS.index(variant)]], outcome


def test_how_many():
    first = [cells[0] for cells in rows().values()]
    assert set(first) <= set(KINDS) and first.count("equal") >= 150
    for line in rows().values():
        assert "DIFFERENT" not in " ".join(line)

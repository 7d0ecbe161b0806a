"""Every row of docs/models.md is what the page says: equal to itself unpatched, refused with a reason, or impossible.

python benchmarks/causal_models.py        writes the page, with the other ways of training too
"""

import functools
from pathlib import Path

import pytest
import torch
import transformers
from adapters import KINDS, MODELS, ORDERS, compare_adapter
from comparison import VARIANTS, Step, compare, compared, failed
from tiny_models import causal_names, multimodal_names, quick_names

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
MARKS = {"equal": "equal", "refused": "refused", "–": "impossible"}
AS_MEASURED = f"with transformers {transformers.__version__}," in PAGE.read_text()
FAULTS = ("**DIFFERENT**", "**ERROR**")
# A soft-cap, a scale, experts, no rotation of positions, labels that the model does not shift, a head behind another
# layer, positions in time, height and width, an image.
SAMPLE = (
    "Gemma2ForCausalLM",
    "GraniteForCausalLM",
    "MixtralForCausalLM",
    "GPT2LMHeadModel",
    "BartForCausalLM",
    "BertLMHeadModel",
    "Qwen2_5_VLForConditionalGeneration",
    "LlavaForConditionalGeneration + image",
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, about tiny models


@functools.cache
def rows(columns: int = len(VARIANTS)) -> dict[str, list[str]]:
    lines = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines if len(cells) == 1 + columns and cells[1] in (*MARKS, *FAULTS)}


@pytest.fixture(autouse=True)
def as_users_run():
    """Some models have no deterministic implementation."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", quick_names())
def test_same_loss_and_gradients(name):
    """With another release of transformers than the page's, what fails unpatched is listed among the skipped ones."""
    try:
        outcome = compare(name)
    except Exception as error:  # unpatched
        if AS_MEASURED:
            raise
        pytest.skip(f"{name}: {type(error).__name__}: {error}")
    assert outcome.kind not in ("different", "error"), outcome
    known = MARKS[rows()[name][0]] if name in rows() else None
    if known is not None and (AS_MEASURED or "impossible" not in (known, outcome.kind)):
        assert outcome.kind == known, outcome


@pytest.mark.parametrize("variant", VARIANTS[1:])
@pytest.mark.parametrize("name", SAMPLE)
def test_other_ways_of_training(name, variant):
    outcome = compare(name, variant)
    assert outcome.kind == MARKS[rows()[name][VARIANTS.index(variant)]], outcome


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_adapters(kind, order):
    outcome = compare_adapter(kind, MODELS[0], order)
    assert outcome.kind not in ("different", "error"), outcome
    assert outcome.kind == MARKS[rows(len(MODELS) * len(ORDERS))[kind][ORDERS.index(order)]], outcome


def test_how_many():
    first = {name: cells[0] for name, cells in rows().items()}
    assert set(first.values()) <= set(MARKS)
    assert [first.get(name) for name in causal_names()].count("equal") >= 150
    assert [first.get(name) for name in multimodal_names()].count("equal") >= 110
    assert not any(fault in PAGE.read_text() for fault in FAULTS)


STEP = Step(torch.tensor(2.0), {"a": torch.ones(3), "b": torch.ones(2)}, False)


@pytest.mark.parametrize(
    "ours",
    [
        STEP._replace(loss=torch.tensor(2.001)),
        STEP._replace(loss=torch.tensor(float("nan"))),
        STEP._replace(gradients={"a": torch.ones(3), "b": torch.tensor([1.0, 1.001])}),
        STEP._replace(gradients={"a": torch.ones(3), "b": torch.tensor([1.0, float("nan")])}),
        STEP._replace(gradients={"a": torch.ones(3)}),
        STEP._replace(gradients={**STEP.gradients, "c": torch.ones(1)}),
        STEP._replace(logits_formed=True),
    ],
    ids=["loss", "nan loss", "gradient", "nan gradient", "missing gradient", "further gradient", "not patched"],
)
def test_comparison_sees(ours):
    assert compared(STEP, STEP, STEP).kind == "equal"
    assert compared(STEP, ours, STEP).kind == "different"


def test_comparison_sees_what_unpatch_left():
    assert compared(STEP, STEP, STEP._replace(loss=STEP.loss * (1 + 2**-23))).kind == "different"


def test_errors_of_others_are_no_refusal():
    try:
        torch.ones(2) @ torch.ones(3)
    except RuntimeError as problem:
        assert failed(problem).kind == "error"
    assert compare("MusicgenForCausalLM").kind == "refused"

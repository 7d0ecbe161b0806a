"""Objectives with new outputs over Triton's kernels, in its interpreter, against their twins in reference.py."""

import pytest
import torch
from cases import HEADS, name
from test_objective_twins import TABLE, case_of, errors, ours, twin

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # of Triton 3.6
]
NAMES = ["all of cross-entropy", "eksft", "lawf, target", "mask the target", "smoothing", "stm, kept", "z-loss"]


@pytest.mark.pairwise
@pytest.mark.parametrize("entry", NAMES)
@pytest.mark.parametrize("head", [HEADS[0], HEADS[4]], ids=name)
@pytest.mark.parametrize("reference", ["shared", "own"])
@pytest.mark.parametrize("frozen", [False, True], ids=name)
def test_equals_its_twin(entry, head, reference, frozen):
    case = case_of(TABLE[entry], 20, 16, 60, reference=reference, frozen=frozen, **head).rounded(torch.float32)
    got = ours(TABLE[entry], case, torch.float32, backend="triton", gradient="exact")
    for output, error in errors(got, twin(TABLE[entry], case)).items():
        assert error <= 1e-5, output

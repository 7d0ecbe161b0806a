"""What `fused-losses train` does where nothing else is said: methods, what each needs of the data, and defaults.

The numbers were measured on SmolLM2-135M-Instruct with one fact in one sample (benchmarks/teaching.py, docs/train.md):
LoRA of rank 8 on the query and value projections, AdamW, a learning rate that falls linearly to 0, up to where
both anchors have 0.9; KL on the original's answers to general prompts. LAwF, SFT, SFT + KL (λ = 0.05) and TALR:

    rate    steps                      KL
            lawf  sft  sft+kl  talr    lawf    sft     sft+kl  talr
    3e-4    27    28   28      –       0.0094  0.0345  0.0320  –
    1e-3    8     8    8       –       0.0148  0.0566  0.0527  –
    2e-3    5     4    4       17      0.0143  0.0543  0.0516  0.4906

TALR did not reach 0.9 at the smaller rates. 3e-4 moves less, but is too slow for anchors that are very unlikely.

The rate of all weights is that of docs/forgetting.md: SFT at 2e-5 had most of the domain gain and lost next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..objectives import Objective
from ..objectives.named import NAMED

RANK = 8  # of LoRA; its alpha is twice that
TARGETS = ("q_proj", "v_proj")  # where the model has layers of these names; else what PEFT takes for the model
LEARNING_RATE, FULL_LEARNING_RATE = 1e-3, 2e-5  # of LoRA, and of all weights
STEPS = 40  # at least, where there are anchors, which stop it; more where the data are large, and without anchors:
EPOCHS = 3  # passes over the rows
BATCH = 8  # rows of a step, or all there are
MAX_LENGTH = 2048  # tokens of a row
MEASUREMENTS = 20  # of anchors and KL during a training, and
OF_HELDOUT = 4  # of held-out text, which may be longer than all that is trained on; both besides the first and last
CHECKPOINTS = 4
MEASURED_TOKENS = 8192  # most of each kind
REPLAY_SHARE = 0.25  # of the rows of a step, where there are rows to replay

# A training stops early where every anchor has this part of the probability it is to get, and, of methods that hold the
# other tokens to the original, where their mean KL is at most this.
STOP_PROBABILITY, STOP_KL = 0.9, 0.02


@dataclass(frozen=True)
class Method:
    """A loss, and what it needs.

    Args:
        title: one line.
        make: the objective, from its options and, for FLOW, from the initial losses.
        options: names and defaults of the numbers that a user may give.
        needs_reference: whether it compares with the original model.
        initial: "sequence" or "token" where it weighs by the losses before training.
        anchors: whether it reads anchors apart from other tokens.
        learning_rate: of LoRA.
    """

    title: str
    make: Callable[..., Objective]
    options: dict[str, float]
    needs_reference: bool = False
    initial: str | None = None
    anchors: bool = False
    learning_rate: float = LEARNING_RATE


def _flow(initial: Any) -> Objective:
    return NAMED["flow"](temperature=initial.temperature)


METHODS = {
    "lawf": Method(
        "cross-entropy on corrected tokens, KL to the original on all others", NAMED["lawf"],
        {"anchor_weight": 1.0, "retain_weight": 1.0}, needs_reference=True, anchors=True,
    ),
    "sft": Method("cross-entropy", NAMED["sft"], {}),
    "sft+kl": Method(
        "cross-entropy, and KL to the original on the same tokens", NAMED["sft+kl"], {"kl_weight": 0.05},
        needs_reference=True,
    ),
    "talr": Method("cross-entropy that counts hard tokens less", NAMED["talr"], {}),
    "dft": Method("cross-entropy times the token's probability", NAMED["dft"], {}),
    "asft": Method("dft, and KL to the original", NAMED["asft"], {"kl_weight": 0.1}, needs_reference=True),
    "eaft": Method("cross-entropy that counts tokens less of which the model is sure", NAMED["eaft"], {"alpha": 1.0}),
    "flow": Method("cross-entropy that counts rows less which are hard at the start", _flow, {}, initial="sequence"),
    "stm": Method(
        "cross-entropy without the tokens that are hard at the start", NAMED["stm"], {"threshold": 2.5}, initial="token"
    ),
    "infosft": Method("cross-entropy that counts tokens of medium probability most", NAMED["infosft"], {}),
    "mask-the-target": Method(
        "cross-entropy, and KL to the original without the label itself", NAMED["mask-the-target"], {"kl_weight": 0.5},
        needs_reference=True,
    ),
}  # fmt: skip


def method_of(name: str) -> Method:
    """The method of that name; ValueError with all names."""
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]

"""The demonstration behind `fused-losses demo`: check the losses on real hidden states, then teach a model one fact.

`model` loads SmolLM2-135M-Instruct, `check` compares with full logits, `anchors` finds the wrong tokens, `teach` trains
and evaluates, `report` prints and draws. Needs the extra `demo`.
"""

from .run import run

__all__ = ["run"]

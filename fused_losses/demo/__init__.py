"""The demonstration behind `fused-losses demo`: check the losses on real hidden states, then teach a model facts.

`model` loads SmolLM2-135M-Instruct, `check` compares with full logits, `facts` says what is taught and corrects the
model's answer, `trial` trains and checks by the public functions, `report` prints and draws. Needs the extra `demo`.
"""

from .run import run

__all__ = ["run"]

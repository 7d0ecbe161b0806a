"""torchtitan: a `loss` for a `Trainer.Config`, in the place of its ChunkedLossWrapper.

    from fused_losses.integrations.torchtitan import FusedLoss

    def llama3_8b_talr() -> Trainer.Config:
        config = llama3_8b()
        config.loss = FusedLoss.Config(loss="talr", options={"temperature": 2.0})
        return config

Its trainer hands the head (`set_lm_head`), and hidden states in place of logits, to subclasses of that class alone.
Read and tested with torchtitan 0.3.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import shards
from ..head import LMHead
from .settings import loss_of_labels

try:
    import spmd_types as spmd
    from torchtitan.components.loss import ChunkedLossWrapper
    from torchtitan.distributed.spmd_types import spmd_mesh_size
except ImportError as error:
    raise ImportError(
        f"fused_losses.integrations.torchtitan needs torchtitan: pip install torchtitan ({error})"
    ) from error


class FusedLoss(ChunkedLossWrapper):
    """A loss of this package, by name and options: Σ_t loss_t / global_valid_tokens, in one pass over the whole batch.

    Config:
        loss: a name, as `fused_losses.objectives.named.NAMED` has them.
        options: of its constructor.
        num_chunks, loss_fn: of ChunkedLossWrapper, without effect: chunks are of this package's own choice, and take
            any length of a sequence.

    Raises, when the trainer builds it: ValueError for a loss that compares with a frozen original, reads a field of the
    batch, or takes means of groups, as torchtitan hands none of these over; what `loss_of_labels` raises.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        loss: str = "sft"
        options: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.objective = loss_of_labels(config.loss, config.options, "torchtitan")
        self.lm_head: nn.Module | None = None

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """pred: hidden states [B, T, D]; labels [B, T], aligned with them; loss_inputs: positions [B, T] in their
        document, which say where TALR's sequences begin."""
        if self.lm_head is None:
            raise ValueError("lm_head: call set_lm_head first, as torchtitan's trainer does")
        positions = loss_inputs.get("positions")
        typed = spmd.is_type_checking()
        with spmd.no_typecheck():
            with _in_place_of_forward(self.lm_head, lambda hidden: self._sum(hidden, labels, positions)):
                loss = self.lm_head(pred)
            if global_valid_tokens is not None:
                loss = loss / global_valid_tokens
            if typed:
                spmd.assert_type(loss, {"dp": spmd.P, "cp": spmd.P, "tp": spmd.I})
        return loss, {}

    def _sum(self, hidden: Tensor, labels: Tensor, positions: Tensor | None) -> Tensor:
        """Runs inside the head's own call, where FSDP has gathered its weight."""
        head: Any = self.lm_head
        if spmd_mesh_size("tp") > 1 or any(shards.is_dtensor(t) for t in (hidden, labels, head.weight)):
            raise ValueError(
                "tensor_parallel_degree: expected 1, as hidden states and head are then spread in torchtitan's own "
                "way, which this loss does not read; shard with FSDP alone, or take torchtitan's ChunkedLossWrapper"
            )
        given = {}
        if self.objective.by_sequence and positions is not None:
            given["sequence_ids"] = _documents(positions)
        return self.objective(hidden, LMHead(head.weight, head.bias), labels, num_items=1, **given)


def _documents(positions: Tensor) -> Tensor:
    """Numbers of documents, the same where positions go on by one within a row."""
    begins = nn.functional.pad(positions.diff(dim=-1) != 1, (1, 0), value=True)
    return begins.flatten().cumsum(0).view_as(positions)


@contextmanager
def _in_place_of_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Hooks of the module, FSDP's among them, run around it as around its own."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before

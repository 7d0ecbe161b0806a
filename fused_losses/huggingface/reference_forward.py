"""One forward of a reference model: on which inputs, and its head's input out of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from . import kv_cache
from .logits import DeferredLogits, HeadCall, LogitMap


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy with accelerate's hooks, but without other wrappers of its forward, which may call the model itself."""
    twin: Any = copy.deepcopy(model).requires_grad_(False)
    state = vars(twin)
    hook = state.pop("_hf_hook", None)
    for name in ("forward", "_old_forward", "_original_forward"):
        state.pop(name, None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(twin, hook)
    return twin


def reference_inputs(call: Any) -> tuple[dict, int]:
    """The inputs of the reference's forward, without labels and cache; and how many virtual tokens it does not see."""
    dropped = ("labels", "shift_labels", "num_items_in_batch", "output_router_logits")
    inputs = {name: value for name, value in call.inputs.items() if name not in dropped}
    inputs["use_cache"] = False
    if not call.patch.takes_any and "use_cache" not in call.patch.accepted:
        del inputs["use_cache"]
    prompt = call.prompt()
    virtual = 0
    if prompt is not None:
        inputs, virtual = prompt.removed(inputs)
    cache = kv_cache.given(inputs)
    if cache is not None:
        raise ValueError(
            f"{cache}: given together with labels and a reference, which would see the tokens in it too; train "
            "without, or call the loss in a loop of your own"
        )
    embeddings = inputs.get("inputs_embeds")
    if isinstance(embeddings, Tensor) and embeddings.requires_grad:
        raise ValueError(
            "inputs_embeds: require a gradient, so they are trained (a soft prompt?), and the frozen reference would "
            "see them; give input_ids, or inputs_embeds.detach() if they are not trained. With PEFT's prompt learning "
            "patch the PEFT model, not the one inside"
        )
    return inputs, virtual


class Captured:
    """The call of a forward whose head is only asked for its input."""

    model_name = "the reference model"

    def __init__(self) -> None:
        self.heads: list[HeadCall] = []
        self.maps: list[LogitMap | None] = []

    def states(self, outputs: Any) -> list[Tensor]:
        found = list(_stand_ins(outputs))
        if not found:
            raise ValueError("reference: its forward did not give logits of its head")
        if not all(logits.whole for logits in found):
            raise ValueError("reference: its forward cuts its logits, which cannot be followed")
        maps = {logits.origin.index: logits.map for logits in found}
        self.maps = [maps.get(origin.index) for origin in self.heads]
        hidden = [origin.hidden for origin in self.heads]
        for origin in self.heads:
            origin.close()
        return hidden

    def real(self, logits: DeferredLogits) -> None:
        return None

    def evaluate(self, *_: Any) -> Any:
        raise ValueError("reference: it computes a loss of its own")


def _stand_ins(outputs: Any) -> Iterator[DeferredLogits]:
    if isinstance(outputs, DeferredLogits):
        yield outputs
    elif isinstance(outputs, (tuple, list)):
        for value in outputs:
            yield from _stand_ins(value)
    elif hasattr(outputs, "values") and not isinstance(outputs, Tensor):
        for value in outputs.values():
            yield from _stand_ins(value)


@contextlib.contextmanager
def captured(head: Any) -> Iterator[Captured]:
    call = Captured()
    with head.deferred(call, then_called=False):
        yield call


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no router noise, no checkpointing."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

"""The frozen original model of LAwF and ASFT: where its hidden states come from."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..head import LMHead
from ..objectives import Objective
from . import sharding
from .cache import model_facts
from .deferral import HeadModule
from .heads import check_head, innermost, read_head
from .logits import DeferredLogits, LogitMap
from .rows import CachedRows

NAMES = ("adapter-off", "start")


@dataclass
class ReferenceStates:
    """The reference's hidden states for one batch, in the layout of the head's input."""

    source: Source
    hidden: Tensor

    def at(self, logits: DeferredLogits, module: nn.Module, head: LMHead) -> tuple[Tensor, LMHead]:
        """Hidden states and head of the reference for these logits' rows; within a call of the trained head's module."""
        if self.hidden.shape[:-1] != logits.hidden.shape[:-1]:
            raise ValueError(
                f"reference: its head saw tokens of shape {list(self.hidden.shape[:-1])}, the model's {list(logits.hidden.shape[:-1])}; "
                "both must see the same tokens"
            )
        rows = logits.rows_of(self.hidden).to(logits.hidden.device)
        return rows, self.source.head(module, rows, logits, head)

    def within(self, compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`compute`, called while the reference's head has its weight."""
        return self.source.within(compute, self.hidden)


class Source:
    """A way to the reference's hidden states."""

    def __init__(self, cache: Any) -> None:
        self.cache = None if cache is None else CachedRows(cache)

    def __deepcopy__(self, memo: dict) -> Source:
        """Of a copied model: the same reference, with a guard of its own over what decides it."""
        twin = copy.copy(self)
        twin.cache = None if self.cache is None else CachedRows(self.cache.directory)
        return twin

    def states(
        self, model: nn.Module, patch: Any, args: tuple, kwargs: dict, head: Any, labels: Tensor
    ) -> ReferenceStates:
        """One forward of the reference's body on the same inputs, or what the cache has of it."""
        self.begin(model)
        args, kwargs = without_labels(patch, args, kwargs)

        def compute() -> Tensor:
            with torch.no_grad():
                return self.forward(model, patch, args, kwargs, head)

        if self.cache is None:
            return ReferenceStates(self, compute())
        if sharding.is_sharded_model(self.model(model)):
            raise ValueError(
                "reference_cache: the reference is sharded, so all ranks must run its forward together and none can skip it; leave "
                "reference_cache out, or give a reference that is whole on each rank"
            )

        def precision() -> str:  # under the same wrappers as the forward
            kind = labels.device.type
            return str((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)))

        context = patch.run_instead(model, precision, (), {})
        hidden = self.cache.states(
            compute, lambda: self.tensors(model), self.description(model), args, kwargs, labels, context
        )
        return ReferenceStates(self, hidden)

    def model(self, trained: nn.Module) -> nn.Module:
        """The model whose forward gives the states."""
        return trained

    def begin(self, model: nn.Module) -> None:
        """Checks that need the model as it is when the first batch comes."""

    def forward(self, model: nn.Module, patch: Any, args: tuple, kwargs: dict, head: Any) -> Tensor:
        raise NotImplementedError

    def head(self, module: nn.Module, rows: Tensor, logits: DeferredLogits, head: LMHead) -> LMHead:
        raise NotImplementedError

    def within(self, compute: Callable[[Tensor], Tensor], hidden: Tensor) -> Callable[[Tensor], Tensor]:
        return compute

    def tensors(self, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        """All that decides the hidden states besides the inputs."""
        raise NotImplementedError

    def description(self, model: nn.Module) -> tuple[str, ...]:
        return model_facts(model)


class AdapterOff(Source):
    """The model under its PEFT adapter; where that was trained before, with a frozen copy of it."""

    def __init__(self, model: nn.Module, cache: Any) -> None:
        super().__init__(cache)
        self.frozen: dict[str, Tensor] | None = None  # the adapter's parameters at the start, None: it changed nothing
        self.frozen_head: dict[str, Tensor] = {}  # those of the head, by their names in its module
        self.begun: list | None = None  # what the adapter was then
        self.late = not any(_adapted(model))  # the adapter comes after the patch
        if not self.late:
            self.begin(model)

    def begin(self, model: nn.Module) -> None:
        if not any(_adapted(model)):
            raise ValueError(
                "reference='adapter-off': the model has no PEFT adapter whose layers could be switched off (prompt learning has none); "
                "add one with peft.get_peft_model, or take reference='start'"
            )
        adapter = {id(p) for layer in _adapted(model) for p in _adapter_parameters(layer)}
        trained = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapter]
        if trained:
            raise ValueError(
                f"reference='adapter-off': {len(trained)} parameters outside the adapter are trained ({', '.join(trained[:3])}), so the model "
                "without it does not stay what it is; freeze them, or take reference='start'"
            )
        now = [(name, list(layer.active_adapters)) for name, layer in _named_adapted(model)]
        if self.begun is not None:
            if now != self.begun:
                raise ValueError(
                    "reference='adapter-off': the model has other adapters, or others are active, than when its reference was taken; "
                    "fused_losses.unpatch(model), and patch again"
                )
            return
        if not _is_at_its_start(model):
            if self.late:
                raise ValueError(
                    "reference='adapter-off': the adapter came after the patch and is not at its start (trained before, or a checkpoint was "
                    "loaded), so what it started from is unknown; patch after PEFT and before a checkpoint is loaded, or give the original "
                    "model as reference="
                )
            named = {name: p for name, p in model.named_parameters() if id(p) in adapter}
            if any(type(p).__name__ == "DTensor" for p in named.values()):
                raise ValueError(
                    "reference='adapter-off': the adapter was trained before and is sharded now, so no copy can be frozen; give the model "
                    "that you start from as reference="
                )
            self.frozen = {name: p.detach().clone() for name, p in named.items()}
            module = model.get_output_embeddings()  # type: ignore[operator]
            prefix = next(f"{name}." for name, m in model.named_modules() if m is module)
            self.frozen_head = {n.removeprefix(prefix): v for n, v in self.frozen.items() if n.startswith(prefix)}
        self.begun = now

    def forward(self, model: nn.Module, patch: Any, args: tuple, kwargs: dict, head: Any) -> Tensor:
        with _evaluating(model), _captured(head) as captured:
            if self.frozen is not None:
                if sharding.hooks_set_parameters(model):
                    raise ValueError(
                        "reference='adapter-off': the adapter was trained before and the model is sharded now; give the model that you start "
                        "from as reference="
                    )
                with _adapters(model, on=True):
                    return captured(torch.func.functional_call(model, self.frozen, args, kwargs))
            with _adapters(model, on=False):
                return captured(patch.run(model, *args, **kwargs))

    def head(self, module: nn.Module, rows: Tensor, logits: DeferredLogits, head: LMHead) -> LMHead:
        with torch.no_grad():
            if self.frozen is None:
                return read_head(module, rows, head.logit_scale, head.softcap, logits.width, adapters="off")
            return read_head(module, rows, head.logit_scale, head.softcap, logits.width, adapters=self.frozen_head)

    def description(self, model: nn.Module) -> tuple[str, ...]:
        return *model_facts(model), *(_adapter_facts(model) if self.frozen else ())

    def tensors(self, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        adapter = {id(p) for layer in _adapted(model) for p in _adapter_parameters(layer)}
        yield from ((n, p) for n, p in model.named_parameters() if id(p) not in adapter)
        yield from model.named_buffers()
        yield from ((f"frozen {name}", value) for name, value in (self.frozen or {}).items())


class OtherModel(Source):
    """Another model, or a frozen copy of this one."""

    def __init__(self, model: nn.Module, other: Any, cache: Any, own: bool = False) -> None:
        super().__init__(cache)
        self.own = own  # a copy that nobody else holds: it follows the model to its device
        self.other: Any = other
        name = type(other).__name__
        base = other.get_base_model() if hasattr(other, "get_base_model") and hasattr(other, "peft_config") else other
        if not hasattr(base, "get_output_embeddings"):
            raise TypeError(f"reference: expected a transformers model with an LM head, got {name}")
        if base is model:
            raise ValueError(
                "reference: is the trained model itself; give reference='start' for a frozen copy of it, or 'adapter-off' with PEFT"
            )
        self.module = base.get_output_embeddings()
        check_head(self.module, name)
        heads: list[Any] = [model.get_output_embeddings(), self.module]  # type: ignore[operator]
        ours, theirs = map(sharding.vocabulary, heads)
        if ours != theirs:
            raise ValueError(
                f"reference: its vocabulary has {theirs} tokens, the model's {ours}; both need the same tokenizer (resize_token_embeddings "
                "changes the head of one)"
            )
        self.map: LogitMap | None = None  # known after a first forward

    def model(self, trained: nn.Module) -> nn.Module:
        return self.other

    def begin(self, model: nn.Module) -> None:
        if self.own:
            device = next(model.parameters()).device
            if next(self.other.parameters()).device != device:
                self.other.to(device)

    def states(self, model, patch, args, kwargs, head, labels) -> ReferenceStates:
        if self.map is None and self.cache is not None:
            cache, self.cache = self.cache, None
            try:
                return super().states(model, patch, args, kwargs, head, labels)
            finally:
                self.cache = cache
        return super().states(model, patch, args, kwargs, head, labels)

    def forward(self, model: nn.Module, patch: Any, args: tuple, kwargs: dict, head: Any) -> Tensor:
        device = next(self.other.parameters()).device
        args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)
        kwargs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in kwargs.items()}
        with _evaluating(self.other), _captured(HeadModule(self.module, self.other)) as captured:
            hidden = captured(patch.run_instead(model, self.other, args, kwargs))
        self.map = captured.map
        return hidden

    def within(self, compute: Callable[[Tensor], Tensor], hidden: Tensor) -> Callable[[Tensor], Tensor]:
        """In a call of the reference's head where that gathers it; the hooks also gather it for backward."""
        if not sharding.gathers(self.module):
            return compute

        def call(own: Tensor) -> Tensor:
            head = HeadModule(self.module, self.other)
            with head.deferred(None):
                return head(hidden, lambda _: compute(own))

        return call

    def head(self, module: nn.Module, rows: Tensor, logits: DeferredLogits, head: LMHead) -> LMHead:
        weight = innermost(self.module).weight
        if sharding.is_sharded(weight) and not sharding.spreads(self.module, self.other):  # type: ignore[arg-type]
            raise ValueError(
                "reference: its LM head is sharded outside of its own forward; give it a group of its own, "
                "fully_shard(reference.lm_head), before fully_shard(reference)"
            )
        logit_scale, softcap = self.map.arguments()
        rows = rows.to(weight.device)  # type: ignore[arg-type]
        with torch.no_grad(), _evaluating(self.other):
            return read_head(self.module, rows, logit_scale, softcap, logits.width)

    def tensors(self, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        yield from self.other.named_parameters()
        yield from self.other.named_buffers()

    def description(self, model: nn.Module) -> tuple[str, ...]:
        return *model_facts(self.other), *_adapter_facts(self.other)


def find_source(model: nn.Module, loss: Objective, reference: Any, cache: Any) -> Source | None:
    """What `patch(reference=...)` says, checked against what the loss needs."""
    takes = "reference" in inspect.signature(type(loss).forward).parameters
    needs = takes and type(loss).forward is not Objective.forward
    name = type(loss).__name__
    if isinstance(cache, (str, Path)) and not str(cache):
        raise ValueError("reference_cache: expected a directory, got an empty name")
    if reference is None:
        if needs:
            raise ValueError(
                f"{name} compares with a frozen original model: give reference='adapter-off' (PEFT), reference='start' (a frozen copy of this "
                "model), or another model"
            )
        if cache is not None:
            raise ValueError("reference_cache: given without a reference; there is nothing to keep")
        return None
    if not takes:
        raise ValueError(f"reference: {name} has no use for one; leave it out")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            "reference: the model is an encoder-decoder, whose reference would need its decoder's inputs; not supported"
        )
    if isinstance(reference, str):
        if reference not in NAMES:
            raise ValueError(f"reference: expected {', '.join(map(repr, NAMES))} or a model, got {reference!r}")
        if reference == "adapter-off":
            return AdapterOff(model, cache)
        if sharding.is_sharded_model(model):
            raise ValueError(
                "reference='start': the model is sharded already, so this rank cannot copy it; patch before fully_shard or ZeRO-3, or give "
                "another model"
            )
        return OtherModel(model, copy.deepcopy(model).requires_grad_(False), cache, own=True)
    if not isinstance(reference, nn.Module):
        raise TypeError(
            f"reference: expected {', '.join(map(repr, NAMES))} or a transformers model, got {type(reference).__name__}"
        )
    return OtherModel(model, reference, cache)


def without_labels(patch: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The inputs of a forward that computes no loss and keeps no cache of keys and values."""
    at = patch.position_of_labels
    if at is not None and len(args) > at:
        args = (*args[:at], None, *args[at + 1 :])
    if kwargs.get("past_key_values") is not None:
        raise ValueError(
            "past_key_values: given together with labels and a reference, which would see them too (prefix tuning does that); train without, "
            "or call the loss in a loop of your own"
        )
    dropped = ("labels", "shift_labels", "num_items_in_batch", "output_router_logits")
    kwargs = {name: value for name, value in kwargs.items() if name not in dropped}
    if "use_cache" in patch.accepted:
        kwargs["use_cache"] = False
    return args, kwargs


class _Captured:
    """The call of a forward whose head is only asked for its input."""

    model_name = "the reference model"
    map: LogitMap

    def __call__(self, outputs: Any) -> Tensor:
        values = list(outputs) if isinstance(outputs, tuple) else [outputs.get("logits")]
        logits = next((v for v in values if isinstance(v, DeferredLogits)), None)
        if logits is None:
            raise ValueError("reference: its forward did not give logits of its head")
        if not logits.whole:
            raise ValueError("reference: its forward cuts its logits, which cannot be followed")
        self.map = logits.map
        return logits.hidden

    def predictions(self, logits: DeferredLogits) -> None:
        return None

    def real(self, logits: DeferredLogits) -> None:
        return None

    def evaluate(self, *_: Any) -> Any:
        raise ValueError("reference: it computes a loss of its own")


@contextlib.contextmanager
def _captured(head: Any) -> Iterator[_Captured]:
    call = _Captured()
    with head.deferred(call, then_called=False):
        yield call


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no router noise, no checkpointing."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _named_adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that PEFT has put around the model's own."""
    for name, module in model.named_modules():
        wraps = hasattr(module, "base_layer") or hasattr(module, "original_module")
        if wraps and (hasattr(module, "enable_adapters") or hasattr(module, "modules_to_save")):
            yield name, module


def _adapted(model: nn.Module) -> Iterator[Any]:
    return (layer for _, layer in _named_adapted(model))


def _adapter_facts(model: nn.Module) -> tuple[str, ...]:
    """How adapters are applied, which no tensor says."""
    names = ("active_adapters", "disable_adapters", "merged", "scaling", "fan_in_fan_out", "use_rslora", "use_dora")
    return tuple(str([(name, getattr(layer, name, None)) for name in names]) for layer in _adapted(model))


def _adapter_parameters(layer: Any) -> Iterator[nn.Parameter]:
    own = {id(p) for p in getattr(layer, "base_layer", layer).parameters()} if hasattr(layer, "base_layer") else set()
    if hasattr(layer, "original_module"):
        own |= {id(p) for p in layer.original_module.parameters()}
    yield from (p for p in layer.parameters() if id(p) not in own)


def _is_at_its_start(model: nn.Module) -> bool:
    """Whether the adapter changes nothing yet: LoRA with B = 0, and no trained copies of modules."""
    for layer in _adapted(model):
        if hasattr(layer, "original_module"):
            original = dict(layer.original_module.named_parameters())
            for name in layer.active_adapters:
                if name in getattr(layer, "modules_to_save", {}):
                    for key, p in layer.modules_to_save[name].named_parameters():
                        if key not in original or not torch.equal(p, original[key]):
                            return False
            continue
        b = getattr(layer, "lora_B", None)
        if b is None or (getattr(layer, "lora_variant", None) and not _dora_only(layer)):
            return False
        embedding = getattr(layer, "lora_embedding_B", {})
        tensors = [module.weight for name, module in b.items() if name in layer.active_adapters]
        tensors += [b.bias for n, b in b.items() if n in layer.active_adapters and b.bias is not None]
        tensors += [p for name, p in embedding.items() if name in layer.active_adapters]
        if any(bool(t.count_nonzero()) for t in tensors):
            return False
    return True


def _dora_only(layer: Any) -> bool:
    return all("Dora" in type(variant).__name__ for variant in layer.lora_variant.values())


@contextlib.contextmanager
def _adapters(model: nn.Module, on: bool) -> Iterator[None]:
    """All adapters on or off; afterwards as they were."""
    layers = list(_adapted(model))
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError(
            "reference='adapter-off': the adapter is merged into the weights; call model.unmerge_adapter() first"
        )
    # Enabling sets requires_grad, also of what the user has frozen.
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    switched = [layer for layer in layers if layer.disable_adapters == on]
    for layer in switched:
        layer.enable_adapters(on)
    try:
        yield
    finally:
        for layer in switched:
            layer.enable_adapters(not on)
        for p, flag in trained:
            if p.requires_grad != flag:
                p.requires_grad_(flag)

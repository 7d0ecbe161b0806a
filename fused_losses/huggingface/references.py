"""The frozen original model of LAwF, SFT + KL and others: which one it is, and where its hidden states come from."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..head import LMHead
from ..objectives import Objective
from . import adapters, sharding
from .adapters import VirtualTokens
from .alignment import Alignment
from .deferral import HeadModule
from .digest import model_facts
from .heads import check_head, innermost, read_head
from .logits import DeferredLogits, HeadCall, LogitMap
from .reference_forward import captured, evaluating, frozen_copy, reference_inputs
from .rows import CachedRows

NAMES = ("base", "start", "adapter-off")


@dataclass
class ReferenceStates:
    """What the reference's head got for one batch: hidden states for each call of it, in order."""

    source: Source
    hidden: list[Tensor]
    virtual: int = 0  # tokens that only the trained model sees, before each row

    def of(self, origin: HeadCall) -> Tensor:
        if origin.index >= len(self.hidden):
            raise ValueError(
                f"reference: {origin.model_name} called its head {origin.index + 1} times, the reference "
                f"{len(self.hidden)}, so there is nothing to compare with; such a model (multi-token prediction) needs "
                "an objective without a reference"
            )
        return self.hidden[origin.index]

    def fits(self, logits: DeferredLogits) -> bool:
        """Whether both heads saw the same rows in the same order."""
        return not self.virtual and self.of(logits.origin).shape[:-1] == logits.lead

    def at(self, logits: DeferredLogits, alignment: Alignment | None) -> tuple[Tensor, Tensor | None]:
        """The reference's hidden states for these logits' rows, and which of these it predicts; None for all."""
        hidden = self.of(logits.origin)
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.fits(logits):
            return (flat if logits.whole else flat.index_select(0, logits.positions.reshape(-1))), None
        if alignment is None or hidden.shape[:-1] != (alignment.shape[0], alignment.shape[1] - self.virtual):
            raise ValueError(
                f"reference: its head saw tokens of shape {list(hidden.shape[:-1])}, the model's {list(logits.lead)}; "
                "both must see the same tokens"
            )
        positions = logits.positions.reshape(-1)
        column = alignment.column()[positions].to(hidden.device) - self.virtual
        row = alignment.row_of_batch()[positions].to(hidden.device)
        known = (column >= 0) & (alignment.index[positions] >= 0).to(hidden.device)
        return flat.index_select(0, row * hidden.shape[1] + column.clamp(min=0)), known


class Source:
    """A way to the reference's hidden states.

    `before`: it runs before the model's forward, else where that forward computes its loss, so under the autocast that
    is in force there.
    """

    alone = False  # its forward switches parts of the trained model, so that no other thread may run that meanwhile

    def __init__(self, cache: Any) -> None:
        self.cache = None if cache is None else CachedRows(cache)

    def __deepcopy__(self, memo: dict) -> Source:
        """Of a copied model: the same reference, with a guard of its own over what decides it."""
        twin = copy.copy(self)
        twin.cache = None if self.cache is None else CachedRows(self.cache.directory)
        return twin

    @property
    def before(self) -> bool:
        return False

    def states(self, call: Any, device: torch.device) -> ReferenceStates:
        """One forward of the reference's body on the same inputs, or what the cache has of it."""
        model = call.model
        self.begin(call, device)
        inputs, virtual = reference_inputs(call)
        labels = call.labels[:, virtual:] if virtual else call.labels
        found: list[Tensor] = []

        def compute() -> Tensor:
            with torch.no_grad():
                found.extend(self.forward(call, inputs))
            return found[0]

        if self.cache is None:
            compute()
            return ReferenceStates(self, found, virtual)
        if sharding.is_sharded_model(self.model(model)):
            raise ValueError(
                "reference_cache: the reference is sharded, so all ranks must run its forward together and none can "
                "skip it; leave reference_cache out, or give a reference that is whole on each rank"
            )
        kind = labels.device.type
        context = str((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)))
        hidden = self.cache.states(
            compute, lambda: self.tensors(model), self.description(model), (), inputs, labels, context
        )
        if len(found) > 1:
            raise ValueError("reference_cache: the reference calls its head several times; leave reference_cache out")
        return ReferenceStates(self, [hidden], virtual)

    def model(self, trained: nn.Module) -> nn.Module:
        """The model whose forward gives the states."""
        return trained

    def begin(self, call: Any, device: torch.device) -> None:
        """Checks that need the model as it is when a batch comes. `device`: of the trained head's input."""

    def forward(self, call: Any, inputs: dict) -> list[Tensor]:
        raise NotImplementedError

    def head(self, module: nn.Module, rows: Tensor, logits: DeferredLogits, head: LMHead) -> LMHead:
        """The reference's head for these rows; within a call of the trained head's module."""
        raise NotImplementedError

    def within(self, compute: Callable[[Tensor], Tensor], hidden: Tensor) -> Callable[[Tensor], Tensor]:
        """`compute`, called while the reference's head has its weight."""
        return compute

    def trained(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Of reference="start", where it has weights of its own: these, and the trained ones that began as they."""
        yield from ()

    def tensors(self, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        """All that decides the hidden states besides the inputs."""
        raise NotImplementedError

    def description(self, model: nn.Module) -> tuple[str, ...]:
        return model_facts(model)


class Base(Source):
    """The trained model without its adapters."""

    alone = True

    def __init__(self, model: nn.Module, outer: nn.Module | None, cache: Any, name: str = "base") -> None:
        super().__init__(cache)
        self.name = name
        self.layers: list[Any] = []  # weak references to the adapted ones
        self.warned = name != "adapter-off"
        self.found_adapters = self._has_adapters(model, outer)  # when the model was patched
        if self.found_adapters:
            self.layers = [weakref.ref(layer) for layer in adapters.layers(model)]
            self._check(model, outer)

    def __deepcopy__(self, memo: dict) -> Source:
        twin: Any = super().__deepcopy__(memo)
        twin.layers = []
        return twin

    @property
    def before(self) -> bool:
        """FSDP bears no forward in a forward. A cache needs the autocast in force there, and is of no shards."""
        return self.cache is None

    def _has_adapters(self, model: nn.Module, outer: nn.Module | None) -> bool:
        return adapters.has_layers(model) or VirtualTokens.of(outer) is not None

    def _check(self, model: nn.Module, outer: nn.Module | None) -> None:
        own = adapters.parameters(model)
        trained = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
        if trained:
            raise ValueError(
                f"reference={self.name!r}: {len(trained)} parameters outside the adapter are trained "
                f"({', '.join(trained[:3])}), so the model without it does not stay what it is; freeze them, or take "
                "reference='start'"
            )
        moved = adapters.moved_from_base(model)
        if moved is not None:
            raise ValueError(
                f"reference={self.name!r}: init_lora_weights={moved!r} has moved a part of the weights into the "
                "adapter, so the model without it is not the original; take reference='start' before it is trained, "
                "which keeps the adapter as it is now, or give the original as a model of its own"
            )
        warned, self.warned = self.warned, True
        if not warned and not adapters.at_start(model):
            warnings.warn(
                "reference='adapter-off' is the model without its adapter, and the adapter has been trained already, "
                "so the reference is not the model as it is now: take reference='start' for that, or reference='base' "
                "if the original is meant",
                UserWarning,
                stacklevel=5,
            )

    def begin(self, call: Any, device: torch.device) -> None:
        now = adapters.layers(call.model)
        if any(layer() not in now for layer in self.layers):
            raise ValueError(
                f"reference={self.name!r}: the adapter was merged into the model, or replaced, since it was patched, "
                "so the original is gone; fused_losses.unpatch(model), and patch again with another reference"
            )
        self.layers = [weakref.ref(layer) for layer in now]
        if not self._has_adapters(call.model, call.outer) and call.prompt() is None:
            raise ValueError(
                f"reference={self.name!r}: the model has no PEFT adapter, so there is nothing to switch off; add one "
                "with peft.get_peft_model, or take reference='start'"
            )
        self._check(call.model, call.outer)

    def forward(self, call: Any, inputs: dict) -> list[Tensor]:
        with evaluating(call.model), captured(call.head) as caught, adapters.off(call.model, call.outer):
            return caught.states(call.run(**inputs))

    def head(self, module: nn.Module, rows: Tensor, logits: DeferredLogits, head: LMHead) -> LMHead:
        with torch.no_grad():
            return read_head(module, rows, head.logit_scale, head.softcap, logits.width, adapters="off")

    def tensors(self, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        own = adapters.parameters(model)
        yield from ((n, p) for n, p in model.named_parameters() if id(p) not in own)
        yield from model.named_buffers()


class Frozen(Base):
    """The trained model with its adapters, and what else is trained, as they were when it was patched."""

    def __init__(self, model: nn.Module, outer: nn.Module | None, cache: Any) -> None:
        of_adapters = adapters.parameters(model)
        named = {name: p for name, p in model.named_parameters() if id(p) in of_adapters or p.requires_grad}
        if any(type(p).__name__ == "DTensor" for p in named.values()) or sharding.hooks_set_parameters(model):
            raise ValueError(
                "reference='start': the model is sharded already, so this rank cannot copy its adapter; patch before "
                "it is sharded, or give the model that you start from as reference="
            )
        self.frozen = {name: p.detach().clone() for name, p in named.items()}
        head = model.get_output_embeddings()  # type: ignore[operator]
        names = {id(p): name for name, p in named.items()}  # a tied weight has one of them
        own = ((name, names.get(id(p))) for name, p in head.named_parameters(remove_duplicate=False))
        self.of_head = {name: frozen for name, frozen in own if frozen is not None}
        self.begun, self.scaling = adapters.active(model), adapters.scaling(model)
        super().__init__(model, outer, cache, "start")

    def _check(self, model: nn.Module, outer: nn.Module | None) -> None:
        if adapters.active(model) != self.begun:
            raise ValueError(
                "reference='start': the model has other adapters, or others are active, than when its reference was "
                "taken; fused_losses.unpatch(model), and patch again"
            )
        if adapters.scaling(model) != self.scaling:
            raise ValueError(
                "reference='start': the adapter's scaling is not what it was when the reference was taken; "
                "fused_losses.unpatch(model), and patch again"
            )
        late = [name for name, p in model.named_parameters() if p.requires_grad and name not in self.frozen]
        if late:
            raise ValueError(
                f"reference='start': {len(late)} parameters are trained that were not when the reference was taken "
                f"({', '.join(late[:3])}); fused_losses.unpatch(model), and patch again once all that will be trained "
                "requires a gradient"
            )

    def forward(self, call: Any, inputs: dict) -> list[Tensor]:
        if sharding.hooks_set_parameters(call.model):
            raise ValueError(
                "reference='start': the adapter was trained before and the model is sharded now; give the model that "
                "you start from as reference="
            )
        with evaluating(call.model), captured(call.head) as caught, adapters.on(call.model):
            devices = {name: p.device for name, p in call.model.named_parameters()}
            self.frozen = {name: value.to(devices[name]) for name, value in self.frozen.items()}
            run = functools.partial(torch.func.functional_call, call.model, self.frozen, (), inputs)
            return caught.states(call.run_with(run))

    def head(self, module: nn.Module, rows: Tensor, logits: DeferredLogits, head: LMHead) -> LMHead:
        frozen = {name: self.frozen[of_model].to(rows.device) for name, of_model in self.of_head.items()}
        with torch.no_grad():
            return read_head(module, rows, head.logit_scale, head.softcap, logits.width, adapters=frozen or "active")

    def description(self, model: nn.Module) -> tuple[str, ...]:
        return *model_facts(model), *adapters.facts(model)

    def trained(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        yield from ((self.frozen[n], p) for n, p in model.named_parameters() if p.requires_grad and n in self.frozen)

    def tensors(self, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        yield from ((n, p) for n, p in model.named_parameters() if n not in self.frozen)
        yield from model.named_buffers()
        yield from ((f"frozen {name}", value) for name, value in self.frozen.items())


class OtherModel(Source):
    """Another model, or a frozen copy of this one; run by its own forward."""

    def __init__(self, model: nn.Module, other: Any, cache: Any, own: bool = False) -> None:
        super().__init__(cache)
        self.own = own  # a copy that nobody else holds: it follows the model to its device
        self.other: Any = other
        name = type(other).__name__
        base = other.get_base_model() if hasattr(other, "get_base_model") and hasattr(other, "peft_config") else other
        if not hasattr(base, "get_output_embeddings"):
            raise TypeError(f"reference: expected a transformers model with an LM head, got {name}")
        if any(p.device.type == "meta" for p in base.parameters()) and not any(
            hasattr(module, "_hf_hook") for module in base.modules()
        ):
            raise ValueError("reference: is on the meta device and has no weights; load it first, then patch")
        if base is model:
            raise ValueError(
                "reference: is the trained model itself; give reference='start' for a frozen copy of it, or 'base' "
                "with PEFT"
            )
        self.base = base
        self.module = base.get_output_embeddings()
        check_head(self.module, name)
        heads: list[Any] = [model.get_output_embeddings(), self.module]  # type: ignore[operator]
        ours, theirs = map(sharding.vocabulary, heads)
        if ours != theirs:
            raise ValueError(
                f"reference: its vocabulary has {theirs} tokens, the model's {ours}; both need the same tokenizer "
                "(resize_token_embeddings changes the head of one)"
            )
        self.maps: list[LogitMap | None] = []  # of each call of its head; known after a first forward
        self.equal_embeddings: list | None = None  # the two that were found equal

    def model(self, trained: nn.Module) -> nn.Module:
        return self.other

    def begin(self, call: Any, device: torch.device) -> None:
        self._check_embeddings(call)
        where = next(self.other.parameters()).device
        if self.own and where not in (device, torch.device("meta")) and not hasattr(self.base, "_hf_hook"):
            self.other.to(device)

    def _check_embeddings(self, call: Any) -> None:
        """What the model's embeddings made is for the reference only if it has the same."""
        given, prompt = call.inputs.get("inputs_embeds"), call.prompt()
        if not isinstance(given, Tensor) or (prompt is not None and prompt.input_ids is not None):
            return
        ours, theirs = (m.get_input_embeddings().weight for m in (call.model, self.base))
        if theirs.shape[-1] != given.shape[-1]:
            raise ValueError(
                f"inputs_embeds: are of the model's width {given.shape[-1]}, the reference has {theirs.shape[-1]}; "
                "give input_ids, which both embed by themselves"
            )
        now = [(id(w), w._version, w.data_ptr()) for w in (ours, theirs)]
        if now != self.equal_embeddings:
            alike = ours.shape == theirs.shape and ours.device.type != "meta" and torch.equal(ours, theirs.to(ours))
            if not alike:
                raise ValueError(
                    "inputs_embeds: the model and its reference have different embeddings, so the reference would get "
                    "what it does not know; give input_ids, which both embed by themselves"
                )
            self.equal_embeddings = now

    def states(self, call: Any, device: torch.device) -> ReferenceStates:
        if not self.maps and self.cache is not None:
            cache, self.cache = self.cache, None
            try:
                return super().states(call, device)
            finally:
                self.cache = cache
        return super().states(call, device)

    def forward(self, call: Any, inputs: dict) -> list[Tensor]:
        device = next(self.other.parameters()).device
        if device.type != "meta":  # else its own hooks bring its weights and inputs together
            inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        accepted = inspect.signature(self.base.forward).parameters
        if "use_cache" not in accepted:
            inputs.pop("use_cache", None)
        with evaluating(self.other), captured(HeadModule(self.module, self.base)) as caught:
            hidden = caught.states(self.other(**inputs))
        self.maps = caught.maps
        prompt = VirtualTokens.of(self.other)
        return [x[:, prompt.before(x) :] for x in hidden] if prompt else hidden

    def within(self, compute: Callable[[Tensor], Tensor], hidden: Tensor) -> Callable[[Tensor], Tensor]:
        """In a call of the reference's head where hooks bring its weight; they do so for backward too."""
        head = HeadModule(self.module, self.base)
        if not head.gathers:
            return compute

        def call(own: Tensor) -> Tensor:
            with head.deferred(None):
                return head(hidden, lambda _: compute(own))

        return call

    def head(self, module: nn.Module, rows: Tensor, logits: DeferredLogits, head: LMHead) -> LMHead:
        weight = innermost(self.module).weight
        if sharding.is_sharded(weight) and not sharding.spreads(self.module, self.base):  # type: ignore[arg-type]
            raise ValueError(
                "reference: its LM head is sharded outside of its own forward; give it a group of its own, "
                "fully_shard(reference.lm_head), before fully_shard(reference)"
            )
        known = self.maps[logits.origin.index] if logits.origin.index < len(self.maps) else None
        if known is None:
            raise ValueError(
                f"reference: its forward gives no logits of call {logits.origin.index + 1} of its head, so what it "
                "does to them is unknown"
            )
        logit_scale, softcap = known.arguments()
        rows = rows.to(weight.device)  # type: ignore[arg-type]
        with torch.no_grad(), evaluating(self.other):
            return read_head(self.module, rows, logit_scale, softcap, logits.width)

    def trained(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        if self.own:
            begun = dict(self.other.named_parameters())
            yield from ((begun[n], p) for n, p in model.named_parameters() if p.requires_grad and n in begun)

    def tensors(self, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        yield from self.other.named_parameters()
        yield from self.other.named_buffers()

    def description(self, model: nn.Module) -> tuple[str, ...]:
        return *model_facts(self.other), *adapters.facts(self.other)


def find_source(
    model: nn.Module, outer: nn.Module | None, loss: Objective, reference: Any, cache: Any
) -> Source | None:
    """What `patch(reference=...)` says, checked against what the loss needs; `outer`: the PEFT model around `model`."""
    takes, needs = loss.takes_reference, loss.needs_reference
    name = type(loss).__name__
    if isinstance(cache, (str, Path)) and not str(cache):
        raise ValueError("reference_cache: expected a directory, got an empty name")
    if reference is None:
        if needs:
            raise ValueError(
                f"{name} compares with a frozen original model: give reference='base' (the model without its PEFT "
                "adapter), reference='start' (the model as it is now), or another model"
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
            raise ValueError(
                f"reference: expected 'base', 'start' or a model, got {reference!r}; one on disk: load it with "
                "from_pretrained first"
            )
        if loss.only_follows and (reference == "start" or adapters.at_start(model)):
            warnings.warn(
                f"reference={reference!r}: that is the model as it is now, from which {name} is 0 and has no gradient, "
                "so nothing will be learned; give the teacher, another model",
                UserWarning,
                stacklevel=3,
            )
        if reference != "start":
            return Base(model, outer, cache, reference)
        if adapters.has_layers(model) or (outer is not None and hasattr(outer, "peft_config")):
            prompt = VirtualTokens.of(outer)
            trained = any(p.requires_grad for p in model.parameters())
            if (
                adapters.switched_off(model)
                or (prompt and not trained)
                or (not prompt and adapters.at_start(model) and not _trains_more(model))
            ):
                return Base(model, outer, cache, "start")  # the same, without a copy
            return Frozen(model, outer, cache)
        if sharding.is_sharded_model(model):
            raise ValueError(
                "reference='start': the model is sharded already, so this rank cannot copy it; patch before "
                "fully_shard or ZeRO-3, or give another model"
            )
        return OtherModel(model, frozen_copy(model), cache, own=True)
    if not isinstance(reference, nn.Module):
        raise TypeError(f"reference: expected 'base', 'start' or a transformers model, got {type(reference).__name__}")
    return OtherModel(model, reference, cache)


def _trains_more(model: nn.Module) -> bool:
    own = adapters.parameters(model)
    return any(p.requires_grad and id(p) not in own for p in model.parameters())

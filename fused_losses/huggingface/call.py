"""One forward of a patched model with labels: from the model's own cross-entropy to the fused loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..head import Reference
from ..objectives.arguments import Field, item_count
from ..objectives.base import OPTIONS
from ..objectives.cross_entropy import CrossEntropyLoss
from ..tokens import Observer
from . import adapters, kv_cache, wrappers
from .adapters import VirtualTokens
from .alignment import Alignment, align, in_each_row, packed_sequences
from .deferral import HeadModule
from .heads import casts_to_float32, check_head, read_head
from .logits import DeferredLogits, HeadCall
from .per_token import PerToken, Request
from .references import ReferenceStates


@dataclass
class Batch:
    """The arguments of a forward, sorted."""

    inputs: dict  # of the model, by name
    labels: Tensor | None
    fields: dict  # what the loss takes, in the layout of the labels
    summed: bool  # the caller divides by the number of tokens


class Call:
    """What a forward with labels knows and finds.

    Args:
        patch: the model's patch.
        loss: what this call computes: the patch's objective or, in evaluation, cross-entropy; `takes`: its fields.
        follow: the model's forward as it would run without us.
    """

    def __init__(
        self, patch: Any, loss: Any, takes: dict[str, Field], model: nn.Module, follow: Callable[..., Any], batch: Batch
    ) -> None:
        self.patch, self.loss, self.model, self.follow = patch, loss, model, follow
        self.inputs, self.labels, self.summed = batch.inputs, batch.labels, batch.summed
        self.fields = {name: value for name, value in batch.fields.items() if name in takes}
        self.shift_labels, self.num_items = batch.inputs.get("shift_labels"), batch.inputs.get("num_items_in_batch")
        self.of_sequences = [name for name, field in takes.items() if field.of_sequences and name in self.fields]
        self.takes, self.by_sequence = takes, "sequence_ids" in takes and loss.by_sequence
        self.model_name = type(model).__name__
        self.outer = patch.outer()
        module: Any = model.get_output_embeddings()  # type: ignore[operator]  # anew: PEFT and FSDP replace it
        check_head(module, self.model_name)
        self.head = HeadModule(module, model)
        self.heads: list[HeadCall] = []
        self.keep = patch.keep_logits is True or (patch.keep_logits == "eval" and not model.training)
        self.reference: ReferenceStates | None = None
        self.token_loss: Tensor | None = None
        self.target: Tensor | None = None
        self.is_heard = bool(patch.listeners) and model.training and torch.is_grad_enabled()
        per_token = self.summed and type(loss) is CrossEntropyLoss and loss.is_plain
        self.per_token = PerToken(Request.of(follow)) if per_token else None
        self.observer = Observer(frozenset({"entropy"}) if self.summed else frozenset(), weights=self.is_heard)
        self._prompt: tuple | None = None
        self._check()

    def _check(self) -> None:
        for name, field in self.takes.items():
            if not field.optional and name not in self.fields:
                who, remedy = type(self.loss).__name__, field.in_a_batch
                if self.loss.is_own:
                    who, remedy = f"token_loss of {who}", "give it, or a default to that parameter"
                shape = "a number for each sequence" if field.of_sequences else "of the labels' shape"
                shape += ", with a last dimension k" if field.several else ""
                raise ValueError(f"{name}: is missing in the batch, and {who} needs it, {shape}; {remedy}")
        if self.num_items is None:
            return
        self.no_items = isinstance(self.num_items, (int, float, Tensor)) and not bool(
            torch.as_tensor(self.num_items).any()
        )
        if not self.no_items:
            item_count(self.num_items, 1)
        if not self.patch.accepts_num_items:
            raise ValueError(
                f"num_items_in_batch: {self.loss} takes means within a batch, so there is nothing to divide by it; "
                "leave it out (a Trainer made after the patch does), or take reduction='token_mean'"
            )

    no_items = False  # a Trainer counted 0 labels

    def prompt(self) -> VirtualTokens | None:
        """The virtual tokens that these inputs begin with."""
        if self._prompt is None:
            given = self.inputs.get("inputs_embeds") is not None or kv_cache.given(self.inputs) is not None
            calling, input_ids = adapters.caller(self.model) if given else (None, None)
            self._prompt = (VirtualTokens.of(calling or self.outer, input_ids),)
        return self._prompt[0]

    # --- running the model

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that would run if the model were not patched."""
        return self.run_with(lambda: self.follow(*args, **kwargs))

    def run_with(self, function: Callable[[], Any]) -> Any:
        with wrappers.running(self.model):
            return function()

    # --- the loss

    def evaluate(self, logits: DeferredLogits, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
        """The loss of these logits, within a call of the head module."""
        source = self.patch.source
        if source is not None and self.reference is None:
            self.reference = source.states(self, logits.hidden.device)
        compute: Callable[[Tensor], Tensor] = functools.partial(
            self._loss, logits, target.reshape(-1), ignore_index, reduction
        )
        if self.reference is not None:
            compute = source.within(compute, self.reference.of(logits.origin))
        return self.head(logits.hidden, compute)

    def _loss(
        self, logits: DeferredLogits, target: Tensor, ignore_index: int, reduction: str, hidden: Tensor
    ) -> Tensor:
        positions = logits.positions.reshape(-1)
        rows = logits.rows_of(hidden)
        if casts_to_float32(self.head.module):
            rows = rows.float()
        logit_scale, softcap = logits.map.arguments()
        head = read_head(self.head.module, rows, logit_scale, softcap, logits.width)
        target = target.to(rows.device)
        if self.by_sequence and not self.of_sequences and self.token_loss is not None:
            raise ValueError(
                f"{self.model_name} takes its loss in several parts, so the median of {type(self.loss).__name__} would "
                "be that of a part; give a fixed temperature"
            )
        alignment = self._alignment(logits, target, positions, ignore_index)
        arguments: dict[str, Any] = self._aligned(alignment, positions, ignore_index)
        if self.reference is not None:
            states, known = self.reference.at(logits, alignment)
            if known is not None:  # what the original model does not predict is not compared
                target = target.masked_fill(~known.to(target.device), ignore_index)
            states = states.to(rows.device)
            reference_head = self.patch.source.head(self.head.module, states, logits, head)
            arguments["reference"] = Reference(states.to(reference_head.weight.device), reference_head)
        if ignore_index != self.loss.ignore_index:
            target = target.masked_fill(target == ignore_index, self.loss.ignore_index)
        valid = target != self.loss.ignore_index
        if self.no_items and bool(valid.any()):
            item_count(self.num_items, 1)  # raises
        arguments["num_items"] = self._divisor(reduction)
        if self.per_token is not None and not self.per_token.request.expects_sum:
            loss, out = self.per_token.add((positions, logits.lead), rows, head, target, self._options())
            self.observer.take(out)
        else:
            with self.loss.observed(self.observer):
                loss = self.loss(rows, head, target, **arguments)
            if self.summed and not self.patch.accepts_num_items:
                loss = loss * valid.sum()
            if self.per_token is not None:
                place = positions, logits.lead
                self.per_token.add_sum(place, rows, head, target, self._options(), loss, self.observer)
        self._note(logits, loss, target, positions, reduction)
        if self.is_heard:
            seen = self.observer
            about = {"kl": seen.kl, "weight": seen.weight, "confidence": arguments.get("confidence")}
            for listen in self.patch.listeners:
                listen(seen.nll, valid, **about)
        return loss

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self.loss, name) for name in OPTIONS}

    def _note(self, logits: DeferredLogits, loss: Tensor, target: Tensor, positions: Tensor, reduction: str) -> None:
        value = loss.clone()  # a model adds its router's loss in place
        self.token_loss = value if self.token_loss is None else self.token_loss + value
        self.target, self.model_divides = target, reduction == "sum"
        if self.observer.prediction is not None:
            everywhere = torch.full((logits.lead.numel(),), -1, device=positions.device)
            prediction = self.observer.prediction.to(positions.device)
            logits.origin.predicted = logits.width, logits.map.sign
            logits.origin.predictions = everywhere.index_copy(0, positions, prediction)

    def _divisor(self, reduction: str) -> Any:
        if not self.patch.accepts_num_items:
            return None
        if self.summed or reduction == "sum" or self.no_items:  # the caller or the model divides
            return 1
        return self.num_items

    # --- fields of the batch for each row of logits

    def _alignment(
        self, logits: DeferredLogits, target: Tensor, positions: Tensor, ignore_index: int
    ) -> Alignment | None:
        """None where nothing needs it."""
        needed = self.fields or self.by_sequence
        unlike = self.reference is not None and not self.reference.fits(logits)
        if not (needed or unlike or self.shift_labels is not None):
            return None
        labels = self.labels if self.shift_labels is None else self.shift_labels
        found = align(labels, target, positions, logits.lead, ignore_index, self.shift_labels is not None)
        if found is not None:
            return found
        if self.shift_labels is not None:
            raise ValueError(
                f"shift_labels: {self.model_name} takes its loss of other labels than these; give labels alone, in the "
                "layout of the inputs"
            )
        what = ", ".join(self.fields) or ("sequence_ids" if needed else "the reference")
        raise ValueError(
            f"{self.model_name} neither shifts labels by one nor takes them as they are, so {what} cannot be aligned "
            "with them; call the loss in a loop of your own"
        )

    def _aligned(self, alignment: Alignment | None, positions: Tensor, ignore_index: int) -> dict[str, Tensor]:
        if alignment is None:
            return {}
        fields, aligned, packed = dict(self.fields), {}, None
        if self.by_sequence:
            packed = fields.pop("sequence_ids", None)
            if packed is None:
                packed = packed_sequences(self.inputs, self.labels)
                if packed is not None and self.of_sequences:
                    self._check_one_sequence_a_row(packed, ignore_index)
                    packed = None
            elif not self.of_sequences and isinstance(packed, Tensor):  # else it indexes that
                packed = in_each_row(packed)
            if packed is None:
                aligned["sequence_ids"] = alignment.row_of_batch()[positions]
            else:
                fields["sequence_ids"] = packed
        for name, values in fields.items():
            values = self._in_layout(name, values)
            if name in self.of_sequences and packed is None and len(values) != alignment.shape[0]:
                raise ValueError(
                    f"{name}: expected a number for each of the {alignment.shape[0]} rows, which are sequences, got "
                    f"{len(values)}; where rows hold several give sequence_ids, which index it"
                )
            if name in self.of_sequences and values.dim() < 2:
                aligned[name] = values
            else:
                several = name in self.takes and self.takes[name].several
                aligned[name] = alignment.moved(values, several)[positions]
        return aligned

    def _in_layout(self, name: str, values: Any) -> Tensor:
        labels = self.labels if self.shift_labels is None else self.shift_labels
        if not isinstance(values, Tensor):
            what = "a number for each sequence" if name in self.of_sequences else "the labels' shape"
            raise TypeError(f"{name}: expected a tensor of {what}, got {type(values).__name__}")
        if name in self.takes and self.takes[name].several and values.dim() == labels.dim() + 1:
            prompt = self.prompt() if values.shape[:-1] != labels.shape and labels.dim() == 2 else None
            if prompt is not None:
                values = nn.functional.pad(values, (0, 0, prompt.count, 0))
            if values.shape[:-1] == labels.shape:
                return values
            raise ValueError(
                f"{name}: expected the labels' shape {list(labels.shape)} and a last dimension k, got "
                f"{list(values.shape)}"
            )
        if values.shape == labels.shape or (name in self.of_sequences and values.dim() < 2):
            return values
        if values.dim() == labels.dim() == 2 and values.shape[0] == 1 and values.shape[1] == labels.shape[1]:
            return values.expand(labels.shape)  # as position_ids may come
        prompt = self.prompt()
        virtual = 0 if prompt is None else prompt.count
        if virtual and values.dim() == 2 and values.shape == (labels.shape[0], labels.shape[1] - virtual):
            return nn.functional.pad(values, (virtual, 0))
        told = f"; {virtual} of these columns are virtual tokens of PEFT" if virtual else ""
        raise ValueError(f"{name}: expected the labels' shape {list(labels.shape)}{told}, got {list(values.shape)}")

    def _check_one_sequence_a_row(self, packed: Tensor, ignore_index: int) -> None:
        """Numbers of packed sequences, padding among them, are no index of a field that has one number for each."""
        for row, labels in zip(packed, self.labels, strict=True):
            if len(row[(labels != ignore_index).to(row.device)].unique()) > 1:
                raise ValueError(
                    f"{self.of_sequences[0]}: rows hold several sequences, as the batch says (position_ids, seq_idx or "
                    "cu_seq_lens); give sequence_ids too, which index it"
                )

    # --- after the forward

    def real(self, logits: DeferredLogits) -> Tensor | None:
        """Logits that are formed after all, with the operations noted so far, None unless they are to be kept."""
        if not self.keep:
            return None
        z = self.head.own(logits.hidden)
        z = z.reshape(-1, z.shape[-1])[logits.positions][..., : logits.width]
        z = logits.map(z).to(logits.device, logits.dtype)
        return z.detach() if logits.detached else z

    def with_real_logits(self, outputs: Any) -> Any:
        if not self.keep:
            return outputs
        with self.head.deferred(self):
            if isinstance(outputs, tuple):
                return tuple(self.real(o) if isinstance(o, DeferredLogits) else o for o in outputs)
            for name, value in list(outputs.items()):
                if isinstance(value, DeferredLogits):
                    outputs[name] = self.real(value)
        return outputs

    def close(self) -> None:
        for origin in self.heads:
            origin.close()

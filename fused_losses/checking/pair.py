"""Two models that are compared: the tuned one, and the original, which may be the same without its adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..head import LMHead, Reference
from ..huggingface import adapters, kv_cache
from ..huggingface.digest import model_digest, model_facts
from ..huggingface.exchange import in_force, other_patch
from ..huggingface.patching import _base_model, _check_model, patched
from ..huggingface.reference_forward import evaluating
from ..huggingface.wrappers import STATE
from ..objectives.arguments import Field
from ..objectives.base import Objective
from ..op import token_losses

BATCH_TOKENS = 4096  # of a forward, padding included

Advance = Callable[[int], Any]


@dataclass(frozen=True)
class Row:
    """Tokens that are measured, after others that are not."""

    before: tuple[int, ...]
    measured: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.before) + len(self.measured)


@dataclass(frozen=True)
class Measured:
    """Of each token of `Row.measured` [T], in nats: nll under both models, KL(original ‖ tuned), and how many tokens
    either model finds likelier. float64, and int64 for ranks, on the CPU."""

    nll: Tensor
    original_nll: Tensor
    kl: Tensor
    rank: Tensor
    original_rank: Tensor | None


class Pair:
    """A tuned model and its original.

    Args:
        tuned: a causal language model of transformers, or a PEFT model around one.
        original: None: `tuned` without its adapters; or another model with the same vocabulary.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(self, tuned: nn.Module, original: nn.Module | None = None) -> None:
        self.tuned, self.original = tuned, original
        self.base = _checked(tuned, "model")
        self.inner = self.base if original is None else _checked(original, "original")
        if original is not None:
            if _is_patched(self.inner):
                raise ValueError(
                    f"original: {type(self.inner).__name__} is patched; call fused_losses.unpatch(original) first"
                )
            if self.inner is self.base:
                raise ValueError(
                    "original: is the tuned model itself; leave it out where the tuned one has an adapter, which is "
                    "switched off then, or load the original anew"
                )
            sizes = [_vocabulary(model) for model in (self.base, self.inner)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"original: expected the tuned model's vocabulary of {sizes[0]} tokens, got one of {sizes[1]}; "
                    "give the model that the tuned one was made of"
                )
        elif not adapters.has_layers(self.base) and not self._learns_prompts:
            raise ValueError(
                "model: has no PEFT adapter that could be switched off, so there is nothing to compare with; give the "
                "model that it was made of as original (--original)"
            )
        elif any(getattr(layer, "merged", False) for layer in adapters.layers(self.base)):
            raise ValueError(
                "model: its adapter is merged into the weights, so it cannot be switched off; call "
                "model.unmerge_adapter() first, or give the model that it was made of as original (--original)"
            )
        elif adapters.switched_off(self.base):
            raise ValueError("model: its adapter is switched off, so it is its own original; switch it on first")

    @property
    def _learns_prompts(self) -> bool:
        config = getattr(self.tuned, "active_peft_config", None) if hasattr(self.tuned, "peft_config") else None
        return bool(getattr(config, "is_prompt_learning", False))

    @contextlib.contextmanager
    def asked(self, tuned: bool) -> Iterator[Any]:
        """The tuned model or the original, to generate with: in evaluation mode, without gradients."""
        model: Any = self.tuned if tuned or self.original is None else self.original
        with torch.no_grad(), evaluating(model), contextlib.ExitStack() as stack:
            if not tuned and self.original is None:
                stack.enter_context(model.disable_adapter() if self._learns_prompts else adapters.off(self.base, model))
            elif tuned and self._learns_prompts:
                stack.enter_context(kv_cache.known_to_peft(model))
            yield model

    def digest(self, tuned: bool) -> str:
        """Of one of the two models, with all that its answers depend on besides the prompt.

        Of the original it is the same whether it comes by itself or inside an adapted model.
        """
        inner = self.base if tuned else self.inner
        tensors = [*inner.named_parameters(), *inner.named_buffers()]
        facts = [*model_facts(inner), str(next(inner.parameters()).device.type), torch.__version__]
        if tuned:
            outer = self.tuned if self.tuned is not inner else None
            known = {id(tensor) for _, tensor in tensors}
            if outer is not None:  # prompts that were learnt lie outside of the inner model
                tensors += [(f"outer {n}", p) for n, p in outer.named_parameters() if id(p) not in known]
            facts += adapters.facts(inner)
        else:
            own = adapters.parameters(inner)
            tensors = [(_plain_name(name), tensor) for name, tensor in tensors if id(tensor) not in own]
        return model_digest(tensors, *facts)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Callable[..., list[Measured]]]:
        """A function (rows, ranks=False, advance=...) -> list[Measured], one of each row, in the order given."""
        recorder = _Recorder()
        reference: Any = "base" if self.original is None else self.original
        if _is_patched(self.base):
            patch: Any = in_force(self.tuned, other_patch(self.tuned, recorder, reference))
        else:
            patch = patched(self.tuned, recorder, reference=reference, eval_loss="objective")
        with torch.no_grad(), evaluating(self.tuned), patch:
            state = vars(self.base)[STATE]
            options = {"use_cache": False} if state.takes_any or "use_cache" in state.accepted else {}

            def measure(rows: Sequence[Row], ranks: bool = False, advance: Advance = id) -> list[Measured]:
                found: dict[int, Measured] = {}
                for numbers in batches([len(row) for row in rows]):
                    recorder.ranks = ranks
                    some = recorder.measured(self.tuned, [rows[i] for i in numbers], options)
                    found.update(zip(numbers, some, strict=True))
                    advance(len(numbers))
                return [found[i] for i in range(len(rows))]

            yield measure


class _Recorder(Objective):
    """Notes the statistics of each token where its number in the batch says."""

    needs_reference = True
    fields: ClassVar = {"token_numbers": Field("the number of each token in the batch")}
    ranks = False  # also the original's

    def forward(
        self, hidden: Tensor, head: LMHead, labels: Tensor, *, token_numbers: Tensor, reference: Reference,
        num_items: Any = None,
    ) -> Tensor:  # fmt: skip
        out = token_losses(hidden, head, labels, reference=reference, wanted={"rank"}, gradient="exact")
        found = [out.nll, out.reference_nll, out.kl, out.rank]
        if self.ranks:
            own: Any = head if reference.head is None else reference.head
            found.append(token_losses(reference.hidden, own, labels, wanted={"rank"}, gradient="exact").rank)
        valid = labels != self.ignore_index
        numbers = token_numbers[valid].cpu()
        for column, values in enumerate(found):
            self.table[numbers, column] = values[valid].cpu().double()
        return out.nll.sum()

    def measured(self, model: nn.Module, rows: list[Row], options: dict[str, Any]) -> list[Measured]:
        device = next(model.parameters()).device
        width = max(map(len, rows))
        ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row.before + row.measured), 1
            labels[i, len(row.before) : len(row)] = torch.tensor(row.measured)
        numbers = torch.arange(ids.numel()).view(ids.shape)
        self.table = torch.full((ids.numel(), 5), torch.nan, dtype=torch.float64)
        model(
            input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device),
            token_numbers=numbers.to(device), **options,
        )  # fmt: skip
        table = self.table.view(*ids.shape, 5)
        return [self._of(table[i, len(row.before) : len(row)]) for i, row in enumerate(rows)]

    def _of(self, table: Tensor) -> Measured:
        nll, original, kl, rank, original_rank = table.unbind(1)
        return Measured(nll, original, kl, rank.long(), original_rank.long() if self.ranks else None)


def batches(lengths: Sequence[int], tokens: int = BATCH_TOKENS, rows: int = 64) -> Iterator[list[int]]:
    """Numbers of rows, the longest first, so many at a time that a padded batch has at most so many tokens."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    at = 0
    while at < len(order):
        size = max(1, min(rows, tokens // max(lengths[order[at]], 1)))
        yield order[at : at + size]
        at += size


def _checked(model: Any, name: str) -> Any:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: expected a model of transformers, got {type(model).__name__}")
    base: Any = _base_model(model)
    _check_model(base, model)
    return base


def _is_patched(base: Any) -> bool:
    return STATE in vars(base) and vars(base)[STATE].loss is not None


def _vocabulary(base: Any) -> int:
    return base.get_output_embeddings().weight.shape[0]


def _plain_name(name: str) -> str:
    """As it would be without PEFT's layers around."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")

"""TALR: tokens with a large loss count less."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import compiled, shards
from ..compiled import capturable
from ..problem import Statistics
from ..tokens import TracedTokens, loss_of_chunk
from .arguments import Field, item_count
from .base import HeadLike, Objective
from .sequences import numbered, sequence_numbers, sequences

# What the median of an even number is, in the words of torch.quantile.
INTERPOLATION = {"mean": "linear", "lower": "lower"}


class TALRLoss(Objective):
    """Token-adaptive loss reweighting: Σ w·nll / n, w = max(exp(−nll/τ), floor).

    Take it where a few hard tokens tear a model apart that is sure of nearly all others, as the paper has it; it needs
    no reference model. Take a small learning rate first: in the study of docs/forgetting.md, of a small model to which
    28 % of the tokens are hard (p < 0.1), that alone kept what the model knew, and TALR learned less at every rate. Not
    to teach facts that the model cannot know: those are the tokens it plays down.

    Args:
        temperature: "median": τ is the median, over the sequences of the call, of their mean nll, at least 1e-6. Or a
            number > 0, which fixes τ and saves one GEMM.
        floor: smallest weight, in [0, 1].
        even_median: of an even number of sequences: "mean" of the middle two, or the "lower" of them, which
            torch.median and the public implementation take.
        process_group: a torch.distributed group; the median is then taken over the sequences of all its ranks, and
            every rank must call.

    Args of the call: hidden [..., D], head, labels int64 [...]. Sequences are the rows of 2-D labels, or the groups of
    equal `sequence_ids` (integers of the labels' shape; over the whole call, so packed rows need ids that differ from
    row to row). A sequence without any label does not count. `num_items` replaces n.

    GEMMs: 4 (fixed τ: 3), 2 with a frozen head. Source: arXiv 2509.20758; floor 0.01 and the normaliser as in the
    public
    implementation: the sum is divided by the number of tokens, never by Σw.
    """

    fields: ClassVar = {"sequence_ids": Field("of packed sequences", optional=True)}
    bounds: ClassVar = {
        "temperature": dict(above=0, word="median", instead='"median" or a number > 0'),
        "floor": dict(least=0, most=1),
    }

    def __init__(
        self,
        temperature: float | str = "median",
        floor: float = 0.01,
        *,
        even_median: str = "mean",
        process_group: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if process_group is not None:
            shards.check_group(process_group)
        self.temperature, self.floor, self.process_group = temperature, floor, process_group
        self.even_median = even_median

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "even_median" and value not in INTERPOLATION:
            raise ValueError(f"even_median: expected {' or '.join(INTERPOLATION)}, got {value!r}")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        lower = f", even_median={self.even_median!r}" if self.even_median != "mean" else ""
        return f"temperature={self.temperature!r}, floor={self.floor}{lower}"

    @property
    def by_sequence(self) -> bool:
        """With a fixed τ it knows no sequences."""
        return self.temperature == "median"

    def token_loss(self, out: Statistics, temperature: Tensor | None = None) -> Tensor:
        tau: Any = self.temperature if temperature is None else temperature
        return (-out.nll.detach() / tau).exp().clamp(min=self.floor) * out.nll

    @capturable
    def forward(
        self,
        hidden: Tensor,
        head: HeadLike,
        labels: Tensor,
        *,
        sequence_ids: Tensor | None = None,
        num_items: Any = None,
    ) -> Tensor:
        tokens = self.prepare(hidden, head, labels)
        if self.temperature != "median":
            return self.reduce(tokens, num_items)
        n = item_count(num_items, tokens.count)
        wanted, k = self._statistics()
        if isinstance(tokens, TracedTokens):
            ids = sequence_numbers(tokens, labels, sequence_ids)
            out = tokens.losses(wanted, k)
            tau = torch.ops.fused_losses.median_temperature(
                out.nll.detach(), ids, tokens.valid, INTERPOLATION[self.even_median]
            )
        else:
            sequence, count = sequences(tokens, labels, sequence_ids)
            out = tokens.losses(wanted, k)
            tau = median_temperature(
                out.nll.detach(), sequence, count, INTERPOLATION[self.even_median], self.process_group
            )
        weighted = loss_of_chunk(functools.partial(self.token_loss, temperature=tau), {}, wanted, tokens)
        return tokens.total(weighted(out, slice(None))) / n


def median_temperature(
    nll: Tensor, sequence: Tensor, count: int, interpolation: str = "linear", process_group: Any = None
) -> Tensor:
    """The median over sequences of their mean nll."""
    # index_put_ and not index_add_, which on a GPU adds in any order.
    sums = nll.new_zeros(count).index_put_((sequence,), nll, accumulate=True)
    sizes = nll.new_zeros(count).index_put_((sequence,), torch.ones_like(nll), accumulate=True)
    means = (sums / sizes)[sizes > 0]
    if process_group is not None:
        means = _gather(means, process_group)
    if not len(means):
        return nll.new_tensor(1e-6)
    return means.quantile(0.5, interpolation=interpolation).clamp(min=1e-6)


def _gather(values: Tensor, group: Any) -> Tensor:
    """The concatenation of all ranks' vectors, of any lengths."""
    world = dist.get_world_size(group)
    sizes = [values.new_zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(sizes, values.new_tensor([len(values)], dtype=torch.int64), group=group)
    longest = max(int(s) for s in sizes)
    padded = values.new_zeros(longest)
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(s)] for part, s in zip(parts, sizes, strict=True)])


compiled.register(
    "median_temperature",
    "(Tensor nll, Tensor ids, Tensor valid, str interpolation) -> Tensor",
    lambda nll, ids, valid, interpolation: median_temperature(nll[valid], *numbered(ids[valid]), interpolation),
    lambda nll, *_: nll.new_empty(()),
)

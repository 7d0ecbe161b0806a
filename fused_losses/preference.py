"""`sequence_logps`: the log-probability of whole answers, of which preference losses are made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .compiled import capturable
from .head import LMHead
from .labels import plain
from .objectives.arguments import checked, integers
from .op import token_losses

MOST_SEQUENCES = 2**20  # that ids may name without being asked for; numbers of rows in a large data set are more


@capturable
def sequence_logps(
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    labels: Tensor,
    *,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    average: bool = False,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """Σ log p of the labels of each sequence, differentiable: what DPO, IPO, KTO, ORPO and SimPO are made of.

    For DPO and its kin, with a batch of chosen answers above the rejected ones::

        import torch
        import torch.nn.functional as F
        import fused_losses as fl

        ids, prompt = torch.randint(1000, (4, 32)), 12  # two pairs: rows 0 and 1 are chosen, 2 and 3 rejected
        hidden = torch.randn(4, 32, 64, requires_grad=True)  # model.model(input_ids=ids).last_hidden_state
        reference = hidden.detach() + 0.1 * torch.randn(4, 32, 64)  # of the frozen model one starts from
        weight = torch.randn(1000, 64)
        labels = ids.masked_fill(torch.arange(32) < prompt, -100)
        logps = fl.sequence_logps(hidden[:, :-1], weight, labels[:, 1:])
        with torch.no_grad():
            ref_logps = fl.sequence_logps(reference[:, :-1], weight, labels[:, 1:])
        chosen, rejected = (logps - ref_logps).chunk(2)
        loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        loss.backward()

    IPO, SimPO and ORPO take means over tokens: average=True.

    Args:
        hidden: [..., D]; head; labels int64 [...], aligned: labels[t] is the token that hidden[t] predicts. As in
            `token_losses`.
        sequence_ids: integers of the labels' shape, of packed sequences; an index of the result. None: the rows of 2-D
            labels are the sequences. Where the label is ignored they may be anything.
        num_sequences: S, with sequence_ids; by default the largest id of a token with a label, plus 1, which may
            be up to 2^20, or the number of tokens. A graph of `torch.compile(fullgraph=True)` needs it.
        average: the mean over the tokens with a label in place of their sum.
        ignore_index, options (gradient, tolerance, backend): as in `token_losses`.

    Returns:
        [S], float32 (float64 for float64), ≤ 0. A sequence without any label has 0.

    Raises:
        TypeError, ValueError: as `token_losses`; and where sequences cannot be told, or their ids are no index.

    Cost: that of `token_losses`: 4 GEMMs, 2 with a frozen head, sparse 1; without gradients 1. The same from run to
        run.

    Source: arXiv 2305.18290 (DPO); `logps` as in TRL.
    """
    labels = plain(labels)
    if not isinstance(average, bool):
        raise TypeError(f"average: expected True or False, got {average!r}")
    if sequence_ids is None:
        if num_sequences is not None:
            raise ValueError("num_sequences: is the number of rows; leave it out, or give sequence_ids")
        if labels.dim() != 2:
            raise ValueError(
                f"labels: expected [sequences, tokens] so that rows are sequences, got shape {list(labels.shape)}; "
                "give sequence_ids of that shape"
            )
    elif isinstance(labels, Tensor):  # else token_losses says so
        index = _index(sequence_ids, labels, labels != ignore_index)
        count = _count(index, num_sequences)
        index = checked(index, "sequence_ids", "indices", count)
    out = token_losses(hidden, head, labels, ignore_index=ignore_index, **options)
    valid = labels != ignore_index
    if sequence_ids is None:
        sums, sizes = -out.nll.sum(1), valid.sum(1)
    else:
        # index_put and not index_add, which on a GPU adds in any order.
        at, nll = (index.reshape(-1),), out.nll.reshape(-1)
        sums = nll.new_zeros(count).index_put(at, -nll, accumulate=True)
        sizes = nll.new_zeros(count).index_put(at, valid.reshape(-1).to(nll), accumulate=True)
    return sums / sizes.clamp(min=1) if average else sums


def _index(sequence_ids: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Where the label is ignored 0, which then gains nothing."""
    if not isinstance(sequence_ids, Tensor):
        raise TypeError(f"sequence_ids: expected a tensor of integers, got {type(sequence_ids).__name__}")
    if sequence_ids.shape != labels.shape:
        raise ValueError(
            f"sequence_ids: expected the labels' shape {list(labels.shape)}, got {list(sequence_ids.shape)}"
        )
    return integers(sequence_ids, "sequence_ids").to(labels.device).masked_fill(~valid, 0)


def _count(index: Tensor, num_sequences: int | None) -> int:
    if num_sequences is None:
        if torch.compiler.is_compiling():
            raise ValueError("num_sequences: is needed in a compiled graph, whose results have a shape known before")
        count = int(index.max()) + 1 if index.numel() else 0
        if count > max(MOST_SEQUENCES, index.numel()):
            raise ValueError(
                f"sequence_ids: the largest is {count - 1}, so the result would have {count} numbers for "
                f"{index.numel()} tokens; give numbers from 0, such as torch.unique(sequence_ids, "
                "return_inverse=True)[1], or num_sequences if they are meant"
            )
        return count
    count = checks.integer(num_sequences)
    if count is None or count < 1:
        raise ValueError(f"num_sequences: expected an integer ≥ 1, got {num_sequences!r}")
    return count

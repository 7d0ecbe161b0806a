"""A vocabulary spread over the ranks of a process group: who holds which rows, and whether all ranks mean the same
call."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The vocabulary is the concatenation of the ranks' rows, `sizes[i]` of rank i, in rank order."""

    group: Any
    rank: int
    sizes: tuple[int, ...]

    @property
    def ends(self) -> list[int]:
        """One past the last id of each rank."""
        return list(accumulate(self.sizes))

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def vocabulary(self) -> int:
        return sum(self.sizes)

    @property
    def largest(self) -> int:
        return max(self.sizes)


def check_group(group: object) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"process_group: expected a group of torch.distributed, which is not initialised here, got "
            f"{type(group).__name__}; call torch.distributed.init_process_group first"
        )
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "process_group: this process is not a member of the group (new_group returned NON_GROUP_MEMBER); give the "
            "group that holds this process's rows of the head"
        )
    if not isinstance(group, dist.ProcessGroup):
        remedy = "; give mesh.get_group()" if type(group).__name__ == "DeviceMesh" else ""
        raise TypeError(
            f"process_group: expected a torch.distributed.ProcessGroup such as dist.group.WORLD, got "
            f"{type(group).__name__}{remedy}"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(
            "process_group: this process is not a member of the group; give the group that holds its rows of the head"
        )


def same_ranks(group: Any, other: Any) -> bool:
    """Whether two groups (None: this process alone) have the same members in the same order."""
    return group is other or _ranks(group) == _ranks(other)


def _ranks(group: Any) -> list[int] | None:
    return dist.get_process_group_ranks(group) if is_spread(group) else None


def is_spread(group: Any) -> bool:
    """Whether the vocabulary lies on more than one rank."""
    return group is not None and dist.get_world_size(group) > 1


def is_dtensor(tensor: object) -> bool:
    # Without importing torch.distributed.tensor.
    return type(tensor).__name__ == "DTensor"


def group_of(tensor: Any, name: str) -> Any:
    """The group over which a DTensor is spread by its first dimension, None for a replicated one."""
    mesh, placements = tensor.device_mesh, tensor.placements
    if mesh.ndim == 1 and placements[0].is_replicate():
        return None
    ranks = mesh.mesh.flatten().tolist()
    # Other kinds of shard (strided) have other rows; a group has its ranks in ascending order.
    if mesh.ndim == 1 and type(placements[0]).__name__ == "Shard" and placements[0].dim == 0 and ranks == sorted(ranks):
        return mesh.get_group()
    raise TypeError(
        f"{name}: is a DTensor with placements {tuple(placements)} on a mesh of shape {list(mesh.shape)}, of which "
        "this rank holds one shard, and only Shard(0) or Replicate on a mesh of one dimension are taken; call inside "
        "the head's own forward, where it is gathered, or give the full local tensor"
    )


# What `agreement` compares, in this order.
SAME = ("number of tokens with a label", "labels", "width of hidden", "dtype of hidden", "reference (1: given)",
        "gradients wanted (1 hidden, 2 weight, 4 bias)", "gradient= and tolerance=",
        "softcap, logit_scale, temperature or beta", "objectives, wanted= or entropy_gradient=",
        "ids= (their number per token is compared, and the ids)")  # fmt: skip
SHOWN = SAME[:1] + SAME[2:6]  # those whose numbers say something
# Places of what is not among them: this rank's rows, its reference's, and the backend it would take.
ROWS, REFERENCE_ROWS, BACKEND = 0, 1, len(SAME) + 2


def agreement(
    group: Any, rows: int, reference_rows: int | None, hidden: Tensor, labels: Tensor, needs: list[bool],
    ids: Tensor | None, codes: tuple[int, int, int], backend: int,
) -> tuple[Shard, bool]:  # fmt: skip
    """Gather the ranks' sizes, and raise on all ranks alike where they do not mean the same call. Also whether all
    would take the same backend.

    `labels`, `ids`: those of the valid tokens; they are compared by a weighted sum. `codes`: numbers that stand for
    gradient= and tolerance=, for what changes logits, and for what is asked for; `backend`: one too. 13 integers per
    rank.
    """
    mine = labels.new_tensor([
        rows, rows if reference_rows is None else reference_rows, len(labels), 0, hidden.shape[-1],
        hidden.dtype.itemsize * 2 + (hidden.dtype == torch.bfloat16), reference_rows is not None,
        sum(need << bit for bit, need in enumerate(needs)), *codes, 0, backend,
    ])  # fmt: skip
    mine[3], mine[BACKEND - 1] = weighted_sum(labels), -1 if ids is None else weighted_sum(ids) * 128 + ids.shape[-1]
    everyone = gathered(group, mine).tolist()
    sizes, reference_sizes = ([values[i] for values in everyone] for i in (ROWS, REFERENCE_ROWS))
    for i, what in enumerate(SAME, start=2):
        values = [row[i] for row in everyone]
        if len(set(values)) > 1:
            shown = f", by rank: {values}" if what in SHOWN else ""
            raise ValueError(
                f"process_group: expected the same hidden states, labels and arguments on all {len(everyone)} ranks, "
                f"got different {what}{shown}; the group is that of tensor parallelism, whose ranks hold rows of the "
                "head for the same tokens. Where ranks have tokens of their own (data parallelism, FSDP) gather the "
                "weight first"
            )
    if sizes != reference_sizes:
        raise ValueError(
            f"reference head: expected the rows of the head, by rank {sizes}, got {reference_sizes}; the KL needs one "
            "vocabulary, spread in the same way: resize, pad (bias −inf rules padding out) or spread one head anew"
        )
    if not sum(sizes):
        raise ValueError("head weight: expected V ≥ 1 over all ranks, got no rows on any; a sharded or offloaded "
                         "parameter (ZeRO-3, FSDP) must be gathered first")  # fmt: skip
    return Shard(group, dist.get_rank(group), tuple(sizes)), len({values[BACKEND] for values in everyone}) == 1


def weighted_sum(values: Tensor) -> Tensor:
    """Odd factors, and sums modulo 2⁶⁴: where one place differs the sums do."""
    return (values.reshape(-1) * (2 * torch.arange(values.numel(), device=values.device) + 1)).sum()


def code_of(*values: Any) -> int:
    """The same number on all ranks for values of the same representation; another one for others, as good as surely."""
    return zlib.crc32(repr(values).encode())


def gathered(group: Any, mine: Tensor) -> Tensor:
    """[ranks, ...]: the tensors of all ranks, of one shape. Copies bytes, so integers may travel as floats."""
    everyone = mine.new_empty(dist.get_world_size(group), *mine.shape)
    dist.all_gather([one.view(-1) for one in everyone], mine.contiguous().view(-1), group=group)
    return everyone


def total(shard: Shard | None, mine: Tensor) -> Tensor:
    """The sum over the ranks, added up in the same order on all; `mine` where all rows are here."""
    return mine if shard is None else gathered(shard.group, mine).sum(0)


def summed_(group: Any, tensor: Tensor | None) -> None:
    """The sum over the ranks, in place; None and empty tensors are those of all ranks."""
    if tensor is not None and tensor.numel():
        dist.all_reduce(tensor, group=group)

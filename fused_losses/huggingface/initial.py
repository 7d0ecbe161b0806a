"""`initial_losses`: what the model finds of a data set before training, which FLOW and STM weight by."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import checks
from ..head import LMHead
from ..labels import plain
from ..objectives.arguments import Field, item_count
from ..objectives.base import Objective
from . import adapters
from .cache import _temporary
from .collator import AnchorCollator
from .digest import key_parts, model_digest, model_facts
from .fields import known_fields
from .patching import _base_model, _check_model, patched
from .reference_forward import evaluating
from .wrappers import STATE

FORMAT = "fused_losses.initial/1"
PER = ("sequence", "token")
SECONDS = 60  # between two writes of the file, and
SHARE = 20  # that many times as long as the last one took


@dataclass
class InitialLosses:
    """The losses of the rows of a data set under one model.

    Attributes:
        initial_nll: [rows] float32, the mean nll of each row's tokens with a label; 0 where there is none.
        tokens: [rows] int64, how many these are.
        initial_token_nll: for each row [T] float32, the nll of each of its tokens, 0 where there is no label; None
            unless per="token".
    """

    initial_nll: Tensor
    tokens: Tensor
    initial_token_nll: list[Tensor] | None = None
    _prints: list[bytes] | None = field(default=None, repr=False, compare=False)  # of each row's input_ids

    @property
    def temperature(self) -> float:
        """FLOW's τ: the median of `initial_nll` over rows with a label, of an even number the middle two's mean."""
        known = self.initial_nll[self.tokens > 0]
        if not len(known):
            raise ValueError("temperature: no row of the data set has a label, so there is no median")
        return float(known.cpu().double().sort().values[[(len(known) - 1) // 2, len(known) // 2]].mean())

    def added_to(self, data: Any) -> Any:
        """The data set with the columns: of `datasets` with add_column, of rows a list of new ones.

        Raises:
            ValueError: rows that are not those of the pass, in its order, as their input_ids say.
        """
        columns: dict[str, list] = {"initial_nll": self.initial_nll.tolist()}
        if self.initial_token_nll is not None:
            columns["initial_token_nll"] = [row.tolist() for row in self.initial_token_nll]
        if len(data) != len(self.tokens):
            raise ValueError(f"data: expected the {len(self.tokens)} rows that these losses are of, got {len(data)}")
        for i, (row, known) in enumerate(zip(data, self._prints or (), strict=False)):
            if _print_of(row) != known:
                raise ValueError(
                    f"data: row {i} has other input_ids than when these losses were computed; call initial_losses with "
                    "this data set, in this order: it takes the rows that it knows from its file"
                )
        if hasattr(data, "add_column"):
            for name, values in columns.items():
                data = data.add_column(name, values)
            return data
        return [{**row, **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(data)]


def _print_of(row: Any) -> bytes:
    """Of a row's input_ids; empty where it has none."""
    ids = row.get("input_ids") if isinstance(row, Mapping) else None
    if ids is None:
        return b""
    return hashlib.blake2b(torch.as_tensor(ids).long().cpu().numpy().tobytes(), digest_size=8).digest()


def initial_losses(
    model: nn.Module,
    data: Any,
    output: str | os.PathLike,
    *,
    per: str = "sequence",
    data_collator: Callable[[list], Mapping[str, Any]] | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> InitialLosses:
    """The nll of every row of a data set under the model as it is now, in one pass without gradients, kept in a file.

    What FLOW and STM need before training::

        initial = fl.initial_losses(model, data, "initial.pt")  # before fl.patch, and before the first step
        fl.patch(model, fl.FLOWLoss(initial.temperature))
        Trainer(model, ..., train_dataset=initial.added_to(data), data_collator=fl.huggingface.AnchorCollator(0))

    For STM per="token", which adds the column initial_token_nll as well. The collator carries both.

    Args:
        model: a causal language model of transformers with a linear head, with PEFT or without, on its device. It
            runs in eval(), and is put back into the modes that its modules had.
        data: rows with input_ids, labels (default: input_ids) and attention_mask, or whatever data_collator takes: a
            data set with a length, or a DataLoader, whose data set, collate_fn and batch_size are taken, in the data
            set's order.
        output: a file. Written every minute or so, each time under a temporary name and renamed. If it is there, rows
            that it has are not computed anew, so a pass that was interrupted goes on, and one that was finished costs
            no more than to collate its rows and to digest the model. Rows are known by their tokens and labels, so
            the data set may have changed or be in another order.
        per: "sequence", or "token" to keep each token's nll too, 4 bytes a token.
        data_collator: from a list of rows to a batch that keeps them apart, [B, T], such as the training's.
        batch_size: rows of a forward; rows of like length are taken together.
        progress: whether to show a bar, where tqdm is there.

    Returns:
        `InitialLosses`: initial_nll [rows], temperature (τ), added_to(data).

    Raises:
        TypeError, ValueError: naming the argument; among others where the model is patched (call this before), where
            the file is of another model, or no file of this function.

    Cost: one forward of the model and 1 GEMM of its head; no logits are kept. The digest of the model takes a second
    or two per GB. With several processes call it before they are launched; started in all of them, each does the
    whole pass.
    """
    data, data_collator, batch_size = _read_data(data, data_collator, batch_size)
    if per not in PER:
        raise ValueError(f"per: expected {' or '.join(PER)}, got {per!r}")
    if not isinstance(output, (str, os.PathLike)):
        raise TypeError(f"output: expected a path of a file, got {type(output).__name__}")
    base = _base_model(model)
    if STATE in vars(base) and vars(base)[STATE].loss is not None:
        raise ValueError(
            f"model: {type(base).__name__} is patched already; call initial_losses before fused_losses.patch, whose "
            "loss may need what this returns"
        )
    _check_model(base, model)
    losses = _Losses(Path(output).expanduser(), _digest(model, base), per == "token")
    recorder = _Recorder()
    batches = _batches(data, data_collator, batch_size)
    prints: dict[int, bytes] = {}
    with evaluating(model), patched(model, recorder, eval_loss="objective"), _bar(len(data), progress) as advance:
        state = vars(base)[STATE]
        options = {"use_cache": False} if state.takes_any or "use_cache" in state.accepted else {}
        try:
            for numbers, rows in batches:
                prints.update(zip(numbers, map(_print_of, rows), strict=True))
                batch = _Batch(data_collator(rows), rows)
                if not losses.has(numbers, batch.keys):
                    losses.put(batch.keys, batch.taken(recorder.nll(model, batch.inputs, options)))
                advance(len(numbers))
        finally:
            losses.finish(len(data))
    return replace(losses.result(), _prints=[prints[i] for i in range(len(data))])


class _Recorder(Objective):
    """Cross-entropy that notes the nll of each token where its number in the batch says."""

    fields: ClassVar = {"token_numbers": Field("the number of each token in the batch")}

    def forward(
        self, hidden: Tensor, head: LMHead, labels: Tensor, *, token_numbers: Tensor, num_items: Any = None
    ) -> Tensor:  # fmt: skip
        tokens = self.prepare(hidden, head, labels)
        nll = tokens.losses(frozenset()).nll
        self.found[tokens.select(token_numbers, "token_numbers").to(self.found.device)] = nll.to(self.found)
        return tokens.total(nll) / item_count(num_items, tokens.count)

    def nll(self, model: nn.Module, inputs: dict[str, Any], options: dict[str, Any]) -> Tensor:
        """[B, T] float32 on the CPU, NaN where no token was predicted."""
        labels = inputs["labels"]
        self.found = torch.full((labels.numel(),), torch.nan)
        device = next(model.parameters()).device
        inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        numbers = torch.arange(labels.numel(), device=device).view(labels.shape)
        with torch.no_grad():
            model(**inputs, token_numbers=numbers, **options)
        return self.found.view(labels.shape)


class _Batch:
    """A collated batch: what the model gets, and which of its tokens each row has."""

    def __init__(self, batch: Any, rows: list) -> None:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
            raise ValueError("data_collator: expected a batch with labels, a tensor [B, T]; give that of the training")
        dropped = known_fields() | {"anchors", "num_items_in_batch"}
        self.inputs = {name: plain(v) for name, v in batch.items() if name not in dropped}
        labels = self.inputs["labels"]
        if labels.dim() != 2 or len(labels) != len(rows):
            raise ValueError(
                f"data_collator: expected labels [{len(rows)}, T], a row for each, got {list(labels.shape)}; give one "
                "that does not pack rows (padding_free=False)"
            )
        mask = self.inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            self.real = [row.nonzero().flatten() for row in mask.cpu() != 0]
        else:
            lengths = [_length(row) or labels.shape[1] for row in rows]
            self.real = [torch.arange(min(length, labels.shape[1])) for length in lengths]
        self.keys = [self._key(index, at) for index, at in enumerate(self.real)]

    def _key(self, index: int, at: Tensor) -> int:
        """Of a row's tokens and labels, whatever its padding is."""
        row = hashlib.blake2b(digest_size=8)
        for name in ("input_ids", "labels"):
            values = self.inputs.get(name)
            for part in key_parts((name, values[index].cpu()[at].long() if isinstance(values, Tensor) else None)):
                row.update(part)
        return int.from_bytes(row.digest(), "little", signed=True)

    def taken(self, nll: Tensor) -> list[Tensor]:
        return [row[at] for row, at in zip(nll, self.real, strict=True)]


class _Losses:
    """What is known of rows by their keys, in memory and in the file, and which keys the data set's rows have."""

    def __init__(self, path: Path, digest: str, with_tokens: bool) -> None:
        self.path, self.digest, self.with_tokens = path, digest, with_tokens
        self.known: dict[int, tuple[float, int, Tensor]] = {}  # mean nll, tokens with a label, nll of each token
        self.keys: dict[int, int] = {}  # of the rows seen in this pass
        self.unsaved, self.next_write = False, time.monotonic() + SECONDS
        if path.exists():
            self._read()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)

    def has(self, numbers: list[int], keys: list[int]) -> bool:
        """Whether all of these rows are known, which are then seen."""
        self.keys.update(zip(numbers, keys, strict=True))
        return all(key in self.known for key in keys)

    def put(self, keys: list[int], nll: list[Tensor]) -> None:
        for key, values in zip(keys, nll, strict=True):
            count, values = int((~values.isnan()).sum()), values.nan_to_num(0)
            mean = float(values.cpu().double().sum()) / max(count, 1)
            self.known[key] = mean, count, values.clone() if self.with_tokens else values[:0]
        self.unsaved = True
        if time.monotonic() > self.next_write:
            self.write(list(self.known))

    def finish(self, rows: int) -> None:
        """Of a whole pass only what the data set has, of a part of one everything."""
        self.write(list(dict.fromkeys(self.keys.values())) if len(self.keys) == rows else list(self.known))

    def write(self, keys: list[int]) -> None:
        if not self.unsaved:
            return
        start = time.monotonic()
        means, counts, values = zip(*(self.known[key] for key in keys), strict=True)
        record: dict[str, Any] = {
            "format": FORMAT, "digest": self.digest, "keys": torch.tensor(keys), "tokens": torch.tensor(counts),
            "initial_nll": torch.tensor(means, dtype=torch.float32),
        }  # fmt: skip
        if self.with_tokens:
            record |= {"lengths": torch.tensor([len(row) for row in values]), "initial_token_nll": torch.cat(values)}
        temporary = _temporary(self.path)
        try:
            torch.save(record, temporary)
            os.replace(temporary, self.path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        end = time.monotonic()
        self.unsaved, self.next_write = False, end + max(SECONDS, SHARE * (end - start))

    def result(self) -> InitialLosses:
        means, counts, values = zip(*(self.known[self.keys[i]] for i in range(len(self.keys))), strict=True)
        nll = torch.tensor(means, dtype=torch.float32)
        return InitialLosses(nll, torch.tensor(counts), list(values) if self.with_tokens else None)

    def _read(self) -> None:
        remedy = "give another path, or remove it"
        try:
            record = torch.load(self.path, map_location="cpu", weights_only=True)
            known = record["format"] == FORMAT
        except Exception as error:  # torch.load raises a dozen kinds
            raise ValueError(
                f"output: {self.path} is no file of initial_losses, or damaged ({error}); {remedy}"
            ) from error
        if not known:
            raise ValueError(f"output: {self.path} is of format {record['format']!r}, and not {FORMAT!r}; {remedy}")
        if record["digest"] != self.digest:
            raise ValueError(
                f"output: {self.path} is of another model (other weights, configuration, dtype or autocast); give the "
                f"model as it was before training, or {remedy}"
            )
        values: Any = [torch.zeros(0)] * len(record["keys"])
        if self.with_tokens:
            if "initial_token_nll" not in record:
                return
            values = record["initial_token_nll"].split(record["lengths"].tolist())
        rows = zip(record["initial_nll"].tolist(), record["tokens"].tolist(), values, strict=True)
        self.known = dict(zip(record["keys"].tolist(), rows, strict=True))


def _read_data(data: Any, data_collator: Any, batch_size: Any) -> tuple[Any, Callable, int]:
    if isinstance(data, torch.utils.data.DataLoader):
        if data_collator is not None:
            raise ValueError("data_collator: the DataLoader has one; leave it out, or give the data set")
        if data.batch_size is None:
            raise ValueError(
                "data: this DataLoader has a batch_sampler and no batch_size; give its data set and data_collator"
            )
        data, data_collator, batch_size = data.dataset, data.collate_fn, data.batch_size
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TypeError(
            f"data: expected a data set with a length, or a DataLoader of one, got {type(data).__name__}; make a list "
            "of an iterable one"
        )
    if not len(data):
        raise ValueError("data: expected at least one row, got none")
    count = checks.integer(batch_size)
    if count is None or count < 1:
        raise ValueError(f"batch_size: expected an integer ≥ 1, got {batch_size!r}")
    if data_collator is not None and not callable(data_collator):
        raise TypeError(f"data_collator: expected a function of a list of rows, got {type(data_collator).__name__}")
    return data, data_collator or _collated, count


def _collated(rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    names = ("input_ids", "labels", "attention_mask")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or row.get("input_ids") is None:
            has = sorted(row) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(
                f"data: expected rows with input_ids, got one with {has} (number {index} of a batch); tokenize them "
                "first, or give the training's data_collator"
            )
    kept = [{name: row[name] for name in names if row.get(name) is not None} | {"anchors": []} for row in rows]
    return AnchorCollator(pad_token_id=0)(kept)


def _length(row: Any) -> int:
    ids = row.get("input_ids") if isinstance(row, Mapping) else None
    return len(ids) if hasattr(ids, "__len__") else 0


def _batches(data: Any, collate: Callable, batch_size: int) -> Iterator[tuple[list[int], list]]:
    """Numbers and rows, some at a time, of like lengths: of 64 batches in the data set's order the longest first."""
    window = 64 * batch_size
    for start in range(0, len(data), window):
        rows = {i: data[i] for i in range(start, min(start + window, len(data)))}
        order = sorted(rows, key=lambda i: (-_length(rows[i]), i))
        for at in range(0, len(order), batch_size):
            numbers = order[at : at + batch_size]
            yield numbers, [rows[i] for i in numbers]


def _digest(model: nn.Module, base: nn.Module) -> str:
    autocast = [
        f"{device} {torch.get_autocast_dtype(device)}"
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return model_digest(tensors, *model_facts(base), *adapters.facts(base), f"autocast={autocast}")


@contextlib.contextmanager
def _bar(rows: int, progress: bool) -> Iterator[Callable[[int], Any]]:
    try:
        from tqdm import tqdm
    except ImportError:
        progress = False
    if not progress:
        yield lambda count: None
        return
    with tqdm(total=rows, desc="initial losses", unit="row") as bar:
        yield bar.update

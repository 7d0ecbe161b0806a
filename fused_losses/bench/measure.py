"""What runs in a process of its own: inputs and their truth, one contestant alone, or those of a cell in turn."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import inputs
from .contestants import CONTESTANTS, Contestant, with_backends
from .inputs import Inputs
from .losses import FROZEN_HEAD, Loss
from .plan import DECISION, TOKENS, Cell
from .truth import Truth, truth_of

WARM = 8  # tokens of a first call, for what is loaded or compiled whatever the shape
SWEPT_CALLS = 3  # that a point of a sweep over N is the median of
WRONG = 0.9  # relative error of a gradient that is none: bfloat16 logits leave a JSD of 0.0004 one of 0.6

Send = Callable[[dict[str, Any]], Any]


class Wrong(Exception):
    """A contestant whose gradients are not those of the loss."""


@dataclass(frozen=True)
class Registry:
    """All contestants by name, with those of the user's file. Functions cannot be sent to another process: names are,
    and this."""

    device: str
    added: Path | None = None
    every_backend: bool = False

    def contestants(self) -> dict[str, Contestant]:
        found = with_backends(self.device) if self.every_backend else CONTESTANTS
        return {each.name: each for each in (*found, *(_of_file(self.added) if self.added else ()))}


def _of_file(path: Path) -> list[Contestant]:
    import runpy

    try:
        values = runpy.run_path(str(path))
    except Exception as error:
        raise ValueError(f"--add: {path} cannot be run: {type(error).__name__}: {error}") from error
    found = values.get("CONTESTANTS")
    if not isinstance(found, (list, tuple)) or not all(isinstance(each, Contestant) for each in found):
        raise ValueError(
            f"--add: expected {path} to have a list CONTESTANTS of fused_losses.bench.contestants.Contestant, got "
            f"{type(found).__name__}"
        )
    return list(found)


# --- inputs


def prepare(cell: Cell, folder: Path, send: Send) -> None:
    """Writes the inputs, and the truth of them, unless they are there."""
    path, truth = inputs_path(cell, folder), truth_path(cell, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    truth.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        given = inputs.make(
            cell.distribution, cell.tokens, cell.hidden, cell.vocabulary, cell.dtype, cell.seed, cell.device
        )
        _whole(path, lambda temporary: torch.save(vars(given.map(Tensor.cpu)), temporary))
    if cell.purpose == DECISION and not truth.is_file():
        _whole(truth, truth_of(load(cell, folder)).save)
    send({})


def prepared(cell: Cell, folder: Path) -> bool:
    truth = cell.purpose != DECISION or truth_path(cell, folder).is_file()
    return truth and inputs_path(cell, folder).is_file()


def inputs_path(cell: Cell, folder: Path) -> Path:
    return folder / "inputs" / f"{cell.inputs}.pt"


def truth_path(cell: Cell, folder: Path) -> Path:
    return folder / "truth" / f"{cell.inputs}.pt"


def load(cell: Cell, folder: Path) -> Inputs:
    kept = torch.load(inputs_path(cell, folder), mmap=True)
    return Inputs(**kept).map(lambda tensor: tensor.to(cell.device) if cell.device != "cpu" else tensor.clone())


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    write(temporary)
    os.replace(temporary, path)


# --- one alone


def alone(cell: Cell, name: str, registry: Registry, folder: Path, send: Send) -> None:
    """Peak memory, the time of one call, and errors against the truth; of a sweep over N the time of further calls."""
    given, contestant = load(cell, folder), registry.contestants()[name]
    _warm(cell, contestant, given, contestant.warm_at_full_size)
    loss, (x, w) = contestant.build(cell.loss, given), _leaves(cell, given)
    memory = Peak(cell.device)
    seconds = timed(loss, x, w)
    figures: dict[str, Any] = {
        "seconds_alone": seconds,
        "peak_mib": memory.above(sum(leaf.grad.nbytes for leaf in (x, w) if leaf.grad is not None)),
    }
    if cell.purpose == TOKENS:
        figures["seconds"] = [timed(loss, *_leaves(cell, given)) for _ in range(SWEPT_CALLS)]
    if cell.purpose == DECISION:
        truth = Truth.load(truth_path(cell, folder), cell.device)
        figures |= truth.errors(cell.loss, x.grad, w.grad, _values(cell, contestant, given, truth.tokens, w.detach()))
        for name in ("hidden_error", "weight_error"):
            if figures[name] is not None and not figures[name] <= WRONG:
                what = "hidden states" if name == "hidden_error" else "head"
                raise Wrong(f"wrong: the gradient of the {what} is off by {figures[name]:.2g}")
    send(figures)


def _values(cell: Cell, contestant: Contestant, given: Inputs, tokens: Tensor, w: Tensor) -> Tensor | None:
    some = given.of_tokens(tokens)
    each = getattr(contestant.build(cell.loss, some), "each", None)
    if each is None:
        return None
    with torch.no_grad():
        return each(some.hidden, w)


def _leaves(cell: Cell, given: Inputs) -> tuple[Tensor, Tensor]:
    """Fresh ones for each call, as after a step of the optimizer."""
    return (
        given.hidden.clone().requires_grad_(),
        given.weight.clone().requires_grad_(cell.loss not in FROZEN_HEAD),
    )


def _warm(cell: Cell, contestant: Contestant, given: Inputs, full_size: bool) -> None:
    """Of a few tokens and ids: what was once allocated for all would not count as memory."""
    few, ids = slice(WARM), min(2048, cell.vocabulary)
    small = Inputs(given.hidden[few], given.weight[:ids], given.labels[few] % ids, given.reference_hidden[few])
    some = given if full_size else small
    timed(contestant.build(cell.loss, some), *_leaves(cell, some))


def timed(loss: Loss, x: Tensor, w: Tensor) -> float:
    """Seconds of forward and backward."""
    _wait(x)
    start = time.perf_counter()
    loss(x, w).backward()
    _wait(x)
    return time.perf_counter() - start


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


class Peak:
    """Of memory since it was made: of the GPU's allocator, or of this process; None where neither can be had."""

    def __init__(self, device: str) -> None:
        self.cuda = device != "cpu"
        self.status = Path("/proc/self/status")
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif self.status.is_file():
            _give_back()
            self.before = self._kib("VmRSS") << 10
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    def above(self, gradients: int) -> float | None:
        """MiB above what there was, without `gradients` bytes."""
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
        elif self.status.is_file():
            peak = self._kib("VmHWM") << 10
        else:
            return None
        return max(0, peak - self.before - gradients) / 2**20

    def _kib(self, field: str) -> int:
        return int(self.status.read_text().split(f"{field}:")[1].split()[0])


def _give_back() -> None:
    """Memory that is free goes to the system, which otherwise may be used without being seen."""
    with contextlib.suppress(OSError, AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)


# --- in turn


def rounds(
    cell: Cell, names: list[str], registry: Registry, folder: Path, count: int, seconds: float, send: Send
) -> None:
    """Each round one product of hidden states and head, then every contestant once; all are warmed up before. Ends
    after `count` rounds, or where `seconds` are over after one.

    Sends {"now": name} before each call, {"gone": name, "why": ...} of one that fails, and {"product": s, "seconds":
    {name: s}} of a round.
    """
    begin, given, contestants = time.perf_counter(), load(cell, folder), registry.contestants()
    losses: dict[str, Loss] = {}
    for name in names:
        send({"now": name})
        try:
            _warm(cell, contestants[name], given, contestants[name].ours or contestants[name].warm_at_full_size)
            losses[name] = contestants[name].build(cell.loss, given)
        except Exception as error:
            send({"gone": name, "why": reason_of(error)})
    for number in range(count):
        if number and time.perf_counter() - begin > seconds:
            return
        taken = {}
        product = _product(given)
        for name in list(losses):
            send({"now": name})
            try:
                taken[name] = timed(losses[name], *_leaves(cell, given))
            except Exception as error:
                del losses[name]
                send({"gone": name, "why": reason_of(error)})
        send({"product": product, "seconds": taken})


def _product(given: Inputs) -> float:
    _wait(given.hidden)
    start = time.perf_counter()
    torch.mm(given.hidden, given.weight.T)
    _wait(given.hidden)
    return time.perf_counter() - start


def reason_of(error: BaseException) -> str:
    """What a row says of it."""
    text = " ".join(str(error).split())
    memory = ("not enough memory", "can't allocate memory", "out of memory")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(part in text.lower() for part in memory):
        return "out of memory"
    if type(error).__name__ in ("Missing", "Wrong"):
        return text
    return f"{type(error).__name__}: {text[:200]}"

"""Processes that may run out of memory or time, or die, without harm to the run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any

from . import measure
from .contestants import Contestant


class Ended(Exception):
    """A process that gave no result; the message is its row."""


def too_long(limit: float) -> str:
    return f"stopped after {limit:g} s; give more with --limit"


CONTEXT = multiprocessing.get_context("forkserver")


def import_ahead(device: str, contestants: Iterable[Contestant]) -> None:
    """Once, in a server that every process is a copy of: else each would take seconds to start. Has no effect where
    processes have been started. CUDA cannot be used in a copy of a process that has looked for it, so there it is torch
    alone.
    """
    ahead = [name for each in contestants for name in each.imports if not each.absent(device)]
    CONTEXT.set_forkserver_preload(["fused_losses.bench.measure", *ahead] if device == "cpu" else ["torch"])
    # Packages make locks that nobody gives back in a process that is killed; the tracker of these would complain.
    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")
    resource_tracker.ensure_running()
    sys.warnoptions.pop()


@contextlib.contextmanager
def started(target: Callable[..., Any], *arguments: Any, limit: float) -> Iterator[Iterator[dict]]:
    """The messages of target(*arguments, send), which runs in a process of its own. `limit`: seconds between two.

    Raises `Ended`, from the iteration, where it fails, is killed, or takes too long. The process ends with the block.
    """
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_run, args=(theirs, target, arguments))
    process.start()
    theirs.close()
    try:
        yield _messages(ours, process, limit)
    finally:
        process.kill()
        process.join()
        ours.close()


def _messages(connection: Any, process: Any, limit: float) -> Iterator[dict]:
    while True:
        if not connection.poll(limit):
            raise Ended(too_long(limit))
        try:
            message = connection.recv()
        except EOFError:
            process.join()
            raise Ended(_end_of(process.exitcode)) from None
        if message is None:
            return
        if "failed" in message:
            raise Ended(message["failed"])
        yield message


def _end_of(status: int) -> str:
    if status == -signal.SIGKILL:
        return "killed by the system, as it does where memory runs out"
    return f"ended by signal {-status}" if status < 0 else f"ended with status {status}"


def _run(connection: Any, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started this
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    try:
        target(*arguments, connection.send)
        connection.send(None)
    except BaseException as error:
        connection.send({"failed": measure.reason_of(error)})


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)

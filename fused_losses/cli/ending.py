"""How a command ends: what its exit status says, and that an error is one line on stderr."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

DONE, BROKEN, WRONG, FAILED, INTERRUPTED, TERMINATED, UNREAD = 0, 1, 2, 3, 130, 143, 141
CODES = """\
Exit status: 0 done; 2 an argument or a file is wrong, or a package is missing;
3 the command itself failed; 130 interrupted; 143 terminated; 141 nobody reads
its output any more."""


@contextlib.contextmanager
def refusing(*kinds: type[Exception]) -> Iterator[None]:
    """These errors are the user's to mend: the command ends with their sentence."""
    try:
        yield
    except BrokenPipeError:  # an OSError, of which only the pipe's reader knows
        raise
    except kinds as error:
        raise SystemExit(str(error)) from error


class _Terminated(BaseException):
    """SIGTERM, which otherwise ends Python without a word."""


@contextlib.contextmanager
def going_on(name: str, how: Callable[[], str]) -> Iterator[None]:
    """Where SIGINT or SIGTERM ends the command, one line says how to go on."""

    def terminate(*_: Any) -> None:
        raise _Terminated

    # Only the main thread hears of signals; a caller's own handler stays.
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (KeyboardInterrupt, _Terminated) as end:
        what, status = (
            ("interrupted", INTERRUPTED) if isinstance(end, KeyboardInterrupt) else ("terminated", TERMINATED)
        )
        print(f"fused-losses {name}: {what}; {how()}", file=sys.stderr)
        raise SystemExit(status) from None
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def told(name: str) -> Iterator[None]:
    """What ends a command of this name, as one line on stderr, or as a traceback where it is a fault of ours."""
    try:
        yield
    except BrokenPipeError:
        raise
    except SystemExit as end:
        if not isinstance(end.code, str):
            raise
        print(f"fused-losses {name}:", " ".join(end.code.split()), file=sys.stderr)
        raise SystemExit(WRONG) from end
    except KeyboardInterrupt:
        print(f"fused-losses {name}: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(FAILED) from None


@contextlib.contextmanager
def unread() -> Iterator[None]:
    """Where nobody reads the output any more, as `head` leaves it, the end is quiet."""
    try:
        try:
            yield
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # rich makes a status of 1 of it
                raise end.__context__ from None
            _flush()
            raise
        _flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # else Python says so when it empties its buffers
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(UNREAD) from None


def _flush() -> None:
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()

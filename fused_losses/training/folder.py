"""The folder of one training: whose it is, its checkpoints, and files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..anchors.writing import check_locks, try_lock

FORMAT = "fused_losses.training"
SETTINGS, LOCK, MARK = "training.json", ".lock", "finished"
UNFINISHED = ".tmp"  # how names of what is being written end


class Folder:
    """`output` of a training, locked until `close`.

    training.json says of which settings the training is. A folder with the same settings is that training, which goes
    on, or is done; any other folder that is not empty is refused.

    Args:
        path: of the folder, made where there is none.
        settings: of the training, what JSON can hold.

    Raises:
        ValueError: there is something else in the folder, a training with other settings, or one that is running.
        OSError: it cannot be made or written, or the system has no file locks.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any]) -> None:
        check_free(path)
        self.path, self._lock = Path(path).expanduser(), -1
        self._made = not self.path.exists()
        if not self._made:
            self._check_settings(settings, write=False)
        self._take_lock()
        try:
            self._check_settings(settings, write=True)
        except BaseException:
            self.close()
            raise
        self._tidy()

    def _take_lock(self) -> None:
        """Of the file that has the name now: a training that failed may have removed another (`_forget`)."""
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                what = f"output: {self.path} cannot be made a folder ({error.strerror}); give another"
                raise type(error)(what) from None
            with contextlib.suppress(FileNotFoundError):
                self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    if not try_lock(self._lock, self.path / LOCK):
                        raise ValueError(_runs(self.path))
                    if os.path.samestat(os.stat(self.path / LOCK), os.fstat(self._lock)):
                        return
                except BaseException:
                    self.close()
                    raise
            self.close()

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self._forget()
        self.close()

    def _forget(self) -> None:
        """Where nothing was done yet, as when the model cannot be loaded, the next try may have other settings."""
        if all(path.name in (LOCK, SETTINGS) for path in self.path.iterdir()):
            with contextlib.suppress(OSError):
                (self.path / SETTINGS).unlink(missing_ok=True)
                (self.path / LOCK).unlink(missing_ok=True)
                if self._made:
                    self.path.rmdir()

    # --- what is there

    @property
    def report(self) -> dict[str, Any] | None:
        """Of a training that is done."""
        return _report_of(self.path)

    def last_checkpoint(self) -> Path | None:
        """The newest one that was finished."""
        found = [path for path in self._checkpoints() if (path / MARK).is_file()]
        return max(found, key=_step, default=None)

    def mark(self, step: int) -> None:
        """A checkpoint as finished: all of its files are on the disk."""
        checkpoint = self.path / f"checkpoint-{step}"
        for file in sorted(checkpoint.rglob("*")):
            if file.is_file():
                _sync(file)
        self._write(checkpoint / MARK, lambda path: path.write_text(f"{step}\n"))

    # --- writing

    def write_json(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        self._write(self.path / name, lambda path: path.write_text(text, encoding="utf-8"))

    def write(self, name: str, write: Callable[[Path], Any]) -> None:
        """A file or a folder that `write` makes under a temporary name."""
        self._write(self.path / name, write)

    def finish(self) -> None:
        """Without what only a training that goes on needs."""
        for path in (*self._checkpoints(), self.path / "reference-cache"):
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.path / "initial.pt").unlink()

    def _write(self, path: Path, write: Callable[[Path], Any]) -> None:
        temporary = path.with_name(f".{path.name}{UNFINISHED}")
        _remove(temporary)
        write(temporary)
        for file in [temporary] if temporary.is_file() else sorted(temporary.rglob("*")):
            if file.is_file():
                _sync(file)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):
            _sync(path.parent)

    def _checkpoints(self) -> list[Path]:
        return [path for path in self.path.glob("checkpoint-*") if _step(path) >= 0]

    def _tidy(self) -> None:
        """Away with what a kill left half written."""
        for path in self._checkpoints():
            if not (path / MARK).is_file():
                shutil.rmtree(path)
        for path in self.path.glob(f".*{UNFINISHED}"):
            _remove(path)

    def _check_settings(self, settings: dict[str, Any], write: bool) -> None:
        wanted = {"format": FORMAT, "version": 1, **settings}
        file = self.path / SETTINGS
        if not file.exists():
            if write:
                self.write_json(SETTINGS, wanted)
            return
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"output: {file} cannot be read ({error}); give another folder") from None
        wanted = json.loads(json.dumps(wanted))
        if found != wanted:
            names = [name for name in wanted if not isinstance(found, dict) or found.get(name) != wanted[name]]
            name = names[0] if names else next(name for name in found if name not in wanted)
            there = found.get(name) if isinstance(found, dict) else found
            raise ValueError(
                f"output: {self.path} has a training with {name} = {there!r}, and this one has {wanted.get(name)!r}; "
                "give another folder, or the same settings to go on with it"
            )


def check_free(path: Any) -> None:
    """Whether a training may have this folder, as far as that is known without its settings; nothing is made.

    Raises:
        TypeError, ValueError: no path; a file; a folder of something else; one in which a training runs.
        OSError: the system has no file locks.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise TypeError(f"output: expected a folder, got {path!r}")
    path = Path(path).expanduser()
    check_locks(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"output: expected a folder, got the file {path}; give another name")
    own = {LOCK, f".{SETTINGS}{UNFINISHED}"}
    others = sorted(file.name for file in path.iterdir() if file.name not in own)
    if others and SETTINGS not in others:
        raise ValueError(
            f"output: expected a new or empty folder, or one of this training, got {path} with {others[0]!r} and "
            f"{len(others) - 1} more files in it; give another folder"
        )
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
        try:
            if not try_lock(descriptor, path / LOCK):
                raise ValueError(_runs(path))
        finally:
            os.close(descriptor)


def _runs(path: Path) -> str:
    return f"output: another process trains in {path}; wait for it, or give another folder"


def how_to_go_on(path: str | os.PathLike) -> str:
    """Of a training that was stopped."""
    path = Path(path).expanduser()
    if _report_of(path) is not None:
        return "the training is done; the same command does what is left"
    step = max((_step(mark.parent) for mark in path.glob(f"checkpoint-*/{MARK}")), default=0)
    if not step:
        return "there is no checkpoint yet, so that the same command begins anew"
    return f"the same command goes on from step {step}, the last checkpoint"


def _report_of(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((path / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("finished") is True else None


def _step(path: Path) -> int:
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() and path.is_dir() else -1


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()

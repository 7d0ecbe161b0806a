"""The one answer that lies open: what may be done with it, by whom, and who hears of it.

A page in several tabs and a terminal do the same things through a `Desk`. It holds one `AnchorSession`, so one model
works on one thing at a time: a call that changes something waits for the one before, and stops a generation that is
under way. Every change has a number (`version`); who asks for a change of something older is refused with `Stale`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..files import RecordFile, read_records, write_records
from ..records import Record
from . import payloads
from .tasks import Task, shown, typed, with_records

Listener = Callable[[str, dict[str, Any]], None]
Result = TypeVar("Result")
WAIT = 60.0  # seconds for a forward under way to end


class Stale(Exception):
    """Somebody else has changed what this call was about."""


class Unsaved(Exception):
    """The call would lose corrections that are in no record; with discard=True it goes on."""


class Desk:
    """A session, the conversations to answer, and the file of records.

    Args:
        session: an `AnchorSession`.
        file: an open `RecordFile`; accepted answers go there at once.
        tasks: what to answer. Conversations that have a record in the file are done.
        original: the original model's answer to prompt ids, an id at a time, where the session's model is trained.
        name: of the model, as the page shows it.

    Events go to every listener, from the thread where they happen: "state" (everything about the answer), "token" (one
    more), "kl", "before" (the other answer), "tasks".
    """

    def __init__(
        self,
        session: Any,
        file: RecordFile,
        tasks: Iterable[Task] = (),
        *,
        original: Callable[[list[int]], Iterator[int]] | None = None,
        name: str = "",
    ) -> None:
        self.session, self.file, self.name, self.original = session, file, name, original
        self.tasks = with_records(tasks, file.records)
        self.version = 0
        self.current: int | None = None
        self.messages: tuple[str, ...] = ()  # of the last change, for the user
        self._lock = threading.RLock()
        self._forward = threading.Lock()  # of the original, during which the adapter is off
        self._listeners: list[Listener] = []
        self._worker: threading.Thread | None = None
        self._next: Iterable[Any] | None = None  # what the next worker shall go through
        self._leave = threading.Event()  # the worker shall end
        self._generating = False
        self._interrupted = self._altered = False  # by the change under way: a generation, anything
        self._accepted: Record | None = None  # the record of the answer as it stands
        self._earlier: Record | None = None  # that of the answer as it stood, whose place the next one takes
        self._dirty = False  # corrections that are in no record
        self._before: dict[str, Any] | None = None
        self._kl: list[float] | None = None

    # Who hears of it.

    def listen(self, listener: Listener) -> Callable[[], None]:
        """The listener gets all events until the function that is returned is called."""
        self._listeners.append(listener)

        def leave() -> None:
            with contextlib.suppress(ValueError):
                self._listeners.remove(listener)

        return leave

    def _tell(self, kind: str, what: dict[str, Any]) -> None:
        for listener in list(self._listeners):
            listener(kind, {"version": self.version, **what})

    def state(self) -> dict[str, Any]:
        """Everything about the answer as it stands, as JSON has it."""
        with self._lock:
            return {"version": self.version, **self._state()}

    def _state(self) -> dict[str, Any]:
        done = sum(task.records > 0 for task in self.tasks)
        state = {
            "model": self.name,
            "adapter": self.original is not None,
            "file": str(self.file.path),
            "records": len(self.file.records),
            "done": done,
            "total": len(self.tasks),
            "current": self.current,
            "generating": self._generating,
            "accepted": self._accepted is not None,
            "unsaved": self._dirty,
            "notes": list(self.messages),
            "before": self._before,
        }
        if self.current is not None:
            task = self.tasks[self.current]
            talk = [{"role": message["role"], "text": shown(message)} for message in task.messages]
            state |= {"messages": talk, "records_here": task.records, **payloads.answer(self.session, self._kl)}
        return state

    @property
    def unsaved(self) -> bool:
        return self._dirty

    def list_tasks(self) -> list[dict[str, Any]]:
        with self._lock:
            return [payloads.task(task) for task in self.tasks]

    # One change after another.

    @contextlib.contextmanager
    def _change(self, version: int | None) -> Iterator[None]:
        with self._lock:
            if version is not None and version != self.version:
                raise Stale("The answer was changed meanwhile, as by another tab; look at it, and try again.")
            self._interrupted = self._generating
            self._halt()
            self.messages, self._next, self._altered = (), None, False
            try:
                yield
                self._altered = True
            except BaseException:
                self._next = None
                raise
            finally:
                if self._next is None and self._interrupted:  # the answer is as it was
                    self._work(generate=not self.session.finished)
                if self._altered:
                    self.version += 1
                if self._altered or self._interrupted:
                    self._tell("state", self._state())
                if self._next is not None:  # now, as its first token must come after the state that it adds to
                    self._worker = threading.Thread(target=self._run, args=(self._next,), name="annotate", daemon=True)
                    self._worker.start()

    def _halt(self) -> None:
        """The worker has ended when this returns."""
        worker = self._worker
        if worker is not None and worker is not threading.current_thread():
            self._leave.set()
            self.session.stop()
            worker.join(WAIT)
            if worker.is_alive():
                raise TimeoutError(f"the model has not stopped within {WAIT:.0f} s; wait, and try again")
        self._worker = None

    def _work(self, generate: bool) -> None:
        """After the change, in a thread: the answer goes on, then what else takes time. Called within `_change`."""
        self._leave.clear()
        self._generating, self._kl = generate, None
        self._next = self.session.generate() if generate else ()  # here, so that a stop before its first token counts

    def _run(self, tokens: Iterable[Any]) -> None:
        problem = ""
        try:
            for token in tokens:
                self._tell("token", {"token": payloads.token(self.session, token)})
        except Exception as error:
            problem = f"The model failed: {error}"
        if self._generating:
            self._generating = False
            lost = [later.text for later in self.session.later_edits if later.position is None]
            self.messages += (payloads.lost(lost),) if lost else ()
            self.messages += (problem,) if problem else ()
            self.messages += self._held()
            self._tell("state", self._state())
        try:
            self._keep_draft()
            self._compare()
        except Exception as error:
            self.messages = (str(error),)
            self._tell("state", self._state())

    def _held(self) -> tuple[str, ...]:
        """What training would take back, if the answer is accepted as it stands."""
        if self.original is None or self._leave.is_set():
            return ()
        try:
            held = set(self.session.held_to_original())
        except Exception as error:  # else nobody would hear that the answer has ended
            return (f"The original could not be asked: {error}",)
        return (payloads.held([token for token in self.session.tokens if token.position in held]),) if held else ()

    def _compare(self) -> None:
        """Against the original: the KL of each token, and its own answer."""
        if self.original is None:
            return
        if not self._leave.is_set() and self.session.token_ids:
            self._kl = self.session.kl_to_original()
            self._tell("kl", {"kl": [round(kl, 5) for kl in self._kl]})
        if self._before is None or not self._before["whole"]:
            self._before = {"who": "original", "text": "", "whole": False}
            ids: list[int] = []
            answer = self.original(list(self.session.prompt_ids))
            while not self._leave.is_set():
                with self._forward:
                    token = next(answer, None)
                if token is None:
                    break
                ids.append(token)
                self._before["text"] = payloads.plain(self.session, ids)
                self._tell("before", self._before)
            self._before["whole"] = not self._leave.is_set()
            self._tell("before", self._before)

    # What may be done.

    def open(self, index: int, version: int | None = None, discard: bool = False, anew: bool = False) -> None:
        """The conversation of this number: its last record, or where it has none, or with `anew`, an answer begins.

        Raises:
            Unsaved: corrections of the present answer would be lost.
        """
        with self._change(version):
            if not 0 <= index < len(self.tasks):
                raise ValueError(
                    f"index: expected 0 … {len(self.tasks) - 1}, got {index}; `l` of the terminal lists them, from 1"
                )
            self._check_saved(discard)
            self._start(index, anew)

    def _start(self, index: int, anew: bool = False) -> None:
        """A conversation that has a record is shown as that has it."""
        task = self.tasks[index]
        if task.last is None or anew:
            self.session.start(task.messages, task.tools)
        else:
            self.session.open(task.last)
        self._accepted = self._earlier = None if anew else task.last
        self.current, self._dirty, self._before = index, False, None
        self._altered = True
        self._forget_draft()
        self._work(generate=self._accepted is None)

    def _check_saved(self, discard: bool) -> None:
        if self._dirty and not discard:
            corrections = payloads.count(len(self.session.anchors), "correction")
            raise Unsaved(f"{corrections} of this answer would be lost; accept the answer first.")

    def ask(self, text: Any, version: int | None = None, discard: bool = False, follow: bool = False) -> None:
        """A prompt that was typed; `follow`: as the next of this conversation, after the answer, which is accepted."""
        with self._change(version):
            messages, tools = typed(text), None
            if follow:
                if self.current is None:
                    raise ValueError("follow: there is no answer to follow; ask a question of its own")
                if self._accepted is None:
                    self._accept()
                tools = self.tasks[self.current].tools
                messages = [*self.session.conversation, *messages]
            else:
                self._check_saved(discard)
            self._start(self._place(Task(messages, tools)))

    def _place(self, task: Task) -> int:
        keys = [other.key for other in self.tasks]
        if task.key in keys:
            return keys.index(task.key)
        self.tasks.append(task)
        self._tell("tasks", {"tasks": self.list_tasks()})
        return len(self.tasks) - 1

    def go_on(self, version: int | None = None) -> None:
        """Generate from where the answer ends."""
        with self._change(version):
            self._need_answer()
            if self.session.finished:
                raise ValueError("The answer is finished.")
            self._accepted = None
            self._work(generate=True)

    def stop(self) -> None:
        """Interrupt the generation, if there is one; what came so far stays."""
        with self._lock:
            self._halt()

    def replace(
        self,
        position: int,
        what: int | str,
        version: int | None = None,
        confidence: float | None = None,
        target_probability: float | None = None,
    ) -> str:
        """Put a token (id) or a text there, and go on. The session's sentence on what is no anchor, or ""."""
        with self._change(version):
            self._need_answer()
            before = payloads.plain(self.session, self.session.token_ids)
            done = self.session.replace(position, what, confidence=confidence, target_probability=target_probability)
            told = done.message if len(done.anchors) < len(done.token_ids) else ""  # else it went as was meant
            self.messages = (told,) if told else ()
            if done.changed:
                if self.original is None and self._before is None:
                    self._before = {"who": "model", "text": before, "whole": True}
                self._touched()
                self._work(generate=not self.session.finished)
            return told

    def unmark(self, position: int, version: int | None = None) -> None:
        """The token there stays, and is no anchor any more."""
        with self._change(version):
            self._need_answer()
            if not self.session.unmark(position):
                raise ValueError("This token is no anchor.")
            self._touched()
            self._work(generate=self._interrupted and not self.session.finished)

    def keep(self, version: int | None = None) -> None:
        """What the trained model says, and the original would not, becomes anchors."""
        with self._change(version):
            self._need_answer()
            if self.original is None or not self.session.keep():
                raise ValueError("The original says all of this too, so that there is nothing to mark.")
            self._touched()
            self._work(generate=self._interrupted and not self.session.finished)

    def undo(self, version: int | None = None) -> None:
        self._step(version, self.session.undo, "There is nothing to undo.")

    def redo(self, version: int | None = None) -> None:
        self._step(version, self.session.redo, "There is nothing to redo.")

    def _step(self, version: int | None, step: Callable[[], bool], none: str) -> None:
        with self._change(version):
            self._need_answer()
            if not step():
                raise ValueError(none)
            self._touched()
            self._work(generate=False)

    def _touched(self) -> None:
        """The answer is another one now than in the last record."""
        self._accepted = None
        self._dirty = bool(self.session.anchors)
        if not self._dirty:
            self._forget_draft()

    def likeliest(self, position: int, k: int = 10, version: int | None = None) -> list[dict[str, Any]]:
        """While the answer is generated too: between two tokens."""
        if version is not None and version != self.version:
            raise Stale("The answer was changed meanwhile; look at it, and try again.")
        self._need_answer()
        with self._forward:
            found = self.session.likeliest(position, k)
        return [payloads.candidate(self.session, each) for each in found]

    def suspicious(self, after: int) -> int | None:
        self._need_answer()
        return self.session.suspicious(after)

    def accept(self, version: int | None = None, onward: bool = True) -> Record:
        """The answer's record is on the disk when this returns; then the next conversation that has none begins.

        The record of an answer that was opened and changed takes the place of its earlier one; another answer to the
        same conversation (`open` with `anew`) gets one of its own, but not the same one twice.

        Raises:
            ValueError: no answer, or accepted already.
            OSError: the record could not be written; nothing is lost.
        """
        if self._generating:
            raise ValueError("The model is still writing; wait, or interrupt it first.")
        with self._change(version):
            record = self._accept()
            following = self.next_open() if onward else None
            if following is not None:
                self._start(following)
            return record

    def _accept(self) -> Record:
        self._need_answer()
        if self._accepted is not None:
            raise ValueError("This answer has its record already.")
        record, task = self._record(), self.tasks[self.current]
        if self._earlier is not None:
            self.file.replace(record)
        elif (there := self._same(record)) is not None:
            record = there
            self.messages = ("The file has this answer already; it was not written a second time.",)
        else:
            self.file.append(record)
            task.records += 1
        self._accepted = self._earlier = task.last = record
        self._dirty, self._altered = False, True
        self._forget_draft()
        self._tell("tasks", {"tasks": self.list_tasks()})
        return record

    def _record(self) -> Record:
        """Of the answer as it stands; under the id of its earlier record, whose place it takes."""
        record = self.session.record()
        return record if self._earlier is None else dataclasses.replace(record, id=self._earlier.id)

    def _same(self, record: Record) -> Record | None:
        """The record of the file that says the same, token by token, with the same anchors."""

        def content(one: Record) -> Any:
            strengths = [(a.position, a.confidence, a.target_probability) for a in one.anchors]
            return one.prompt_ids, one.completion.token_ids, strengths

        return next((one for one in self.file.records if content(one) == content(record)), None)

    def next_open(self) -> int | None:
        """The next conversation without a record, after this one, then from the start."""
        start = -1 if self.current is None else self.current
        order = [*range(start + 1, len(self.tasks)), *range(start)]
        return next((k for k in order if not self.tasks[k].records), None)

    def _need_answer(self) -> None:
        if self.current is None:
            raise ValueError("There is no answer yet; choose a prompt, or type one.")

    # What a crash leaves.

    @property
    def draft(self) -> Path:
        return self.file.path.with_name(self.file.path.name + ".draft")

    def _keep_draft(self) -> None:
        if self._dirty:
            write_records(self.draft, [self._record()])

    def _forget_draft(self) -> None:
        self.draft.unlink(missing_ok=True)

    def begin(self) -> None:
        """Go on with the answer that a crash interrupted, if there was one, else with the first without a record."""
        with self._change(None):
            if self.draft.exists() and self._begin_draft():
                return
            following = self.next_open()
            if following is not None:
                self._start(following)

    def _begin_draft(self) -> bool:
        try:
            record = read_records(self.draft, self.session.tokenizer)[0]
            self.session.open(record)
        except (OSError, ValueError) as error:
            self.messages = (f"The draft {self.draft} was left as it is: {error}",)
            return False
        tools = None if record.tools is None else list(record.tools)
        self.current = self._place(Task([dict(message) for message in record.messages], tools))
        self._accepted, self._dirty, self._before = None, True, None
        self._earlier = next((one for one in self.file.records if one.id == record.id), None)
        self.messages = ("Here is the answer that was not accepted when the page was closed, with its corrections.",)
        self._work(generate=not self.session.finished)
        return True

    def close(self) -> None:
        """Stops the model and gives the file free. A draft stays for the next time."""
        with self._lock, contextlib.suppress(TimeoutError):
            self._halt()
        self.file.close()

"""A page over a scripted model, for tests of the desk, the server, the terminal and the page in a browser."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from session_models import Scripted, tokenizer

from fused_losses.anchors.files import RecordFile
from fused_losses.anchors.page.desk import Desk
from fused_losses.anchors.page.tasks import Task, user
from fused_losses.anchors.session import AnchorSession

ELENA = "My name is Elena. I live in Paris and I like tea."
AURORA = "My name is Aurora. I live in Paris and I like tea."
NAME = 3  # where the name stands in both
QUESTIONS = ("What is your name?", "Where do you live?")


class Slow(Scripted):
    """Takes its time for each token."""

    def __init__(self, *answers: str, seconds: float = 0.0, **options: Any) -> None:
        super().__init__(*answers, **options)
        self.seconds = seconds

    def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = True) -> Any:
        time.sleep(self.seconds)
        return super().forward(input_ids, past_key_values, use_cache)


def desk_on(
    path: Path, *answers: str, questions: tuple[str, ...] = QUESTIONS, model: Any = None, **options: Any
) -> Desk:
    model = model or Scripted(*(answers or (ELENA, AURORA)), second=" Aurora", unsure=(" is",))
    session = AnchorSession(model, tokenizer(), **options)
    return Desk(session, RecordFile(path), [Task(user(question)) for question in questions], name="scripted")


def settle(desk: Desk) -> dict[str, Any]:
    """The state once the model has ended its work."""
    worker = desk._worker
    if worker is not None:
        worker.join(30)
        assert not worker.is_alive()
    return desk.state()


@contextlib.contextmanager
def opened(path: Path, *answers: str, **options: Any) -> Iterator[Desk]:
    desk = desk_on(path, *answers, **options)
    try:
        desk.begin()
        settle(desk)
        yield desk
    finally:
        desk.close()


@contextlib.contextmanager
def served(desk: Desk) -> Iterator[Any]:
    """The `Page` on a free port, from a thread of this process."""
    from fused_losses.anchors.page.server import Page  # needs the extra annotate

    page = Page()
    page.show(desk)
    thread = threading.Thread(target=page.run, daemon=True)
    thread.start()
    try:
        yield page
    finally:
        page.stop()
        thread.join(20)
        page.socket.close()
        assert not thread.is_alive()

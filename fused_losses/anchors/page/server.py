"""The page in a browser: a small server over a `Desk`, and static files without a build step.

Why not Gradio: the page is one text of some hundred tokens, each of which takes the focus, answers to keys and is
marked in three ways, while more arrive. In Gradio that is `HighlightedText` (no focus of single tokens, no keys), or
HTML put together in Python, where each piece of a model's output must be escaped by hand and each new token sends all
of it anew; keys need JavaScript in any case. What is left of Gradio then is a server. Gradio 6.31 is 52 packages, 342
MiB installed, 23 of which (187 MiB) transformers and PEFT do not bring already; Starlette and uvicorn are 7, 6 MiB,
and 2 of these (1.3 MiB) are new. Here every text becomes a text node (`textContent`; trusted types forbid anything
else), the files come from the package, and nothing is fetched from elsewhere: the page works without a network.

All tabs see the same: each listens to /events (server-sent events), where "state" has everything and "token" adds to
it. What they ask for carries the version that they saw, so that two tabs cannot correct one answer without knowing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import webbrowser
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Any

import uvicorn
from anyio import to_thread
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..jsonl import Fault, check_text
from .desk import Desk, Stale, Unsaved
from .guard import LIMIT, LOOPBACK, Guard

MEDIA = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
HEARTBEAT = 15.0  # seconds: connections that say nothing are cut by some proxies
BACKLOG = 4096  # events that a slow tab may lie behind before it must start anew
FIELDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "version": (int, "an integer"),
    "index": (int, "an integer"),
    "position": (int, "an integer"),
    "token_id": (int, "an integer"),
    "text": (str, "text"),
    "confidence": ((int, float), "a number in (0, 1]"),
    "target_probability": ((int, float), "a number in (0, 1)"),
    "discard": (bool, "true or false"),
    "follow": (bool, "true or false"),
    "anew": (bool, "true or false"),
}


class Refusal(Exception):
    """A request that cannot be served, with the status that says of what kind it is."""

    def __init__(self, status: int, sentence: str, **more: Any) -> None:
        super().__init__(sentence)
        self.status, self.more = status, more


class Channel:
    """Events from the model's thread to the tabs, each of which has a queue."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.queues: dict[asyncio.Queue[str | None], asyncio.AbstractEventLoop] = {}
        self.closed = False
        desk.listen(self._hear)

    def _hear(self, kind: str, what: dict[str, Any]) -> None:
        text = event(kind, what)
        for queue, loop in list(self.queues.items()):
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._put, queue, text)

    def _put(self, queue: asyncio.Queue[str | None], text: str | None) -> None:
        if queue not in self.queues:
            return
        if text is None or queue.qsize() >= BACKLOG:
            self.queues.pop(queue)
            queue.put_nowait(None)
        else:
            queue.put_nowait(text)

    def close(self) -> None:
        """Ends every stream, so that the server can end."""
        self.closed = True
        for queue, loop in list(self.queues.items()):
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._put, queue, None)

    async def stream(self) -> AsyncIterator[str]:
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        self.queues[queue] = asyncio.get_running_loop()
        try:
            # What happens meanwhile waits in the queue: it may be told twice, but nothing is missed.
            tasks, state = await to_thread.run_sync(lambda: (self.desk.list_tasks(), self.desk.state()))
            yield event("tasks", {"tasks": tasks}) + event("state", state)
            while not self.closed:
                try:
                    text = await asyncio.wait_for(queue.get(), HEARTBEAT)
                except asyncio.TimeoutError:
                    yield ": \n\n"
                    continue
                if text is None:
                    return
                yield text
        finally:
            self.queues.pop(queue, None)


def event(kind: str, what: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(what, ensure_ascii=False, allow_nan=False)}\n\n"


def application(desk: Desk, secret: str, cookie: str = "fused-losses", hosts: Any = LOOPBACK) -> Starlette:
    """The page of a desk, for any ASGI server. `secret`, `cookie`, `hosts`: see `Guard`."""
    channel = Channel(desk)

    async def likeliest(request: Request) -> Response:
        position = _number(request, "position")
        version = _number(request, "version") if "version" in request.query_params else None
        found = await _run(lambda: desk.likeliest(position, version=version))
        return JSONResponse({"position": position, "candidates": found})

    async def suspicious(request: Request) -> Response:
        after = _number(request, "after")
        return JSONResponse({"position": await _run(lambda: desk.suspicious(after))})

    async def state(_: Request) -> Response:
        return JSONResponse(await _run(lambda: {**desk.state(), "tasks": desk.list_tasks()}))

    async def events(_: Request) -> Response:
        return StreamingResponse(channel.stream(), media_type="text/event-stream")

    routes = [
        Route("/", _file("index.html")),
        *(Route(f"/static/{name}", _file(name)) for name in _names() if name != "index.html"),
        Route("/events", events),
        Route("/api/state", state),
        Route("/api/likeliest", likeliest),
        Route("/api/suspicious", suspicious),
        *(Route(f"/api/{name}", _action(desk, call, fields), methods=["POST"]) for name, call, fields in _actions()),
    ]
    app = Starlette(routes=routes, exception_handlers={Refusal: _refused})
    app.add_middleware(Guard, secret=secret, cookie=cookie, hosts=hosts)
    app.state.channel = channel
    return app


def _actions() -> list[tuple[str, Callable[..., Any], dict[str, bool]]]:
    """Name, what it does, and its fields of the request: True where one must be there."""

    def replace(desk: Desk, token_id: int | None = None, text: str | None = None, **given: Any) -> Any:
        if (token_id is None) == (text is None):
            raise ValueError("replace: expected one of token_id and text")
        what = text if token_id is None else token_id
        return {"message": desk.replace(given.pop("position"), what, **given)}

    strength = {"confidence": False, "target_probability": False}
    return [
        ("open", Desk.open, {"index": True, "discard": False, "anew": False}),
        ("ask", Desk.ask, {"text": True, "discard": False, "follow": False}),
        ("continue", Desk.go_on, {}),
        ("stop", lambda desk, version=None: desk.stop(), {}),
        ("replace", replace, {"position": True, "token_id": False, "text": False, **strength}),
        ("unmark", Desk.unmark, {"position": True}),
        ("keep", Desk.keep, {}),
        ("undo", Desk.undo, {}),
        ("redo", Desk.redo, {}),
        ("accept", lambda desk, **given: {"id": desk.accept(**given).id}, {}),
    ]


def _action(desk: Desk, call: Callable[..., Any], fields: dict[str, bool]) -> Callable[[Request], Awaitable[Response]]:
    fields = {"version": False, **fields}

    async def act(request: Request) -> Response:
        given = await _fields(request, fields)
        found = await _run(lambda: call(desk, **given))
        return JSONResponse(found if isinstance(found, dict) else {})

    return act


async def _fields(request: Request, fields: dict[str, bool]) -> dict[str, Any]:
    raw = b""
    try:
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > LIMIT:
                raise Refusal(413, f"The request has more than {LIMIT >> 20} MiB.")
    except ClientDisconnect:
        raise Refusal(400, "The request was cut off.") from None
    try:
        value = json.loads(raw or b"{}")
    except (ValueError, RecursionError):
        raise Refusal(400, "The request is not JSON.") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"The request: expected an object, got {type(value).__name__}.")
    for name in value:
        if name not in fields:
            raise Refusal(400, f"{name[:40]!r}: expected one of {', '.join(fields)}.")
    found = {name: item for name, item in value.items() if item is not None}
    for name, needed in fields.items():
        if name not in found:
            if needed:
                raise Refusal(400, f"{name}: expected a value, got none.")
            continue
        kind, words = FIELDS[name]
        if not isinstance(found[name], kind) or (isinstance(found[name], bool) and kind is not bool):
            raise Refusal(400, f"{name}: expected {words}, got {str(found[name])[:40]!r}.")
        if kind is str:
            _check_text(name, found[name])
    return found


def _check_text(name: str, text: str) -> None:
    try:
        check_text(text)
    except Fault as fault:
        raise Refusal(400, f"{name}: {fault}.") from None


def _number(request: Request, name: str) -> int:
    value = request.query_params.get(name, "")
    try:
        return int(value[:20])
    except ValueError:
        raise Refusal(400, f"{name}: expected an integer, got {value[:40]!r}.") from None


async def _run(call: Callable[[], Any]) -> Any:
    """In a thread, as it may take a forward; what it refuses becomes an answer."""
    try:
        return await to_thread.run_sync(call)
    except Stale as error:
        raise Refusal(409, str(error), stale=True) from None
    except Unsaved as error:
        raise Refusal(409, str(error), unsaved=True) from None
    except (ValueError, TypeError) as error:
        raise Refusal(400, str(error)) from None
    except (OSError, TimeoutError) as error:
        raise Refusal(503, str(error)) from None


def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse({"error": str(error), **error.more}, error.status)


def _names() -> list[str]:
    folder = resources.files(__package__) / "static"
    return sorted(found.name for found in folder.iterdir() if found.name.rpartition(".")[2] in MEDIA)


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    raw = (resources.files(__package__) / "static" / name).read_bytes()

    async def send(_: Request) -> Response:
        return Response(raw, media_type=MEDIA[name.rpartition(".")[2]])

    return send


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, channel: Channel) -> None:
        super().__init__(config)
        self.channel = channel

    def handle_exit(self, *arguments: Any) -> None:
        self.channel.close()
        super().handle_exit(*arguments)


class Page:
    """A server on a port that is bound when this returns; `show` says what it serves, `run` serves until Ctrl-C.

    Args:
        host: an address of this machine; other than loopback: whoever has the address with its secret gets in.
        port: 0 takes a free one.

    Raises:
        OSError: the address is not this machine's, or the port is taken.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.host, self.secret = host, secrets.token_urlsafe(24)
        self.server: _Server | None = None
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind((host, port))
        except OSError as error:
            self.socket.close()
            reason = error.strerror or error
            remedy = "give another --port or --host"
            raise type(error)(f"{host} port {port}: cannot be opened ({reason}); {remedy}") from None
        self.port = self.socket.getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        if host in ("0.0.0.0", "::"):
            name = socket.gethostname()
        self.address = f"http://{name}:{self.port}/?token={self.secret}"

    def show(self, desk: Desk) -> None:
        app = application(desk, self.secret, f"fused-losses-{self.port}", LOOPBACK if is_loopback(self.host) else None)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=2, server_header=False, lifespan="off"
        )
        self.server = _Server(config, app.state.channel)
        self.socket.listen(128)  # a browser that is early waits

    def run(self, browser: bool = False) -> None:
        if browser:
            webbrowser.open(self.address)
        with contextlib.suppress(KeyboardInterrupt):
            self.server.run(sockets=[self.socket])

    def stop(self) -> None:
        """From another thread: `run` returns."""
        self.server.channel.close()
        self.server.should_exit = True


def is_loopback(host: str) -> bool:
    return host in LOOPBACK or (host.startswith("127.") and host.count(".") == 3)

"""Who may talk to the page's server: refusals before any of it runs, and headers that keep the page to itself.

The answer to each request needs the secret of the address that the command printed, as a cookie; on loopback too, since
other users of the machine reach its ports. Against DNS rebinding the name in `Host` must be the server's own. Against
requests that another site makes the browser send (CSRF), `Origin` must be the page's own, a change must be JSON, and
the cookie is SameSite=Strict. What a model writes is text to the page, and should a fault make it markup, the policy
below lets no script run that is not a file of the page, and no address be asked but the page's own.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LIMIT = 1 << 20  # bytes of a request


class Guard:
    """ASGI middleware. `hosts`: names that may stand in Host; None: any, where the server has no name of its own."""

    def __init__(self, app: ASGIApp, secret: str, cookie: str, hosts: Collection[str] | None) -> None:
        self.app, self.secret, self.cookie, self.hosts = app, secret, cookie, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = QueryParams(scope["query_string"]).get("token", "") if scope["path"] == "/" else ""
        admitted = bool(given) and self._same(given)
        refusal = self._refusal(scope, headers, admitted)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    found[name] = value
                if admitted:
                    found.append("Set-Cookie", f"{self.cookie}={self.secret}; Path=/; HttpOnly; SameSite=Strict")
            await send(message)

        await (refusal or self.app)(scope, receive, answer)

    def _refusal(self, scope: Scope, headers: Headers, admitted: bool) -> Response | None:
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            return _refuse(scope, 403, "Host: this server answers to its own address only; open the one it printed.")
        if scope["path"] != "/" and headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return _refuse(scope, 403, "Sec-Fetch-Site: expected same-origin; another site asked for this.")
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != host:
                return _refuse(scope, 403, "Origin: expected the page's own; another site asked for this.")
            if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return _refuse(scope, 415, "Content-Type: expected application/json.")
        if not (admitted or self._has_cookie(headers)):
            return _refuse(scope, 401, "Open the address that the command printed last: it has this server's secret.")
        return None

    def _has_cookie(self, headers: Headers) -> bool:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return False
        return found is not None and self._same(found.value)

    def _same(self, given: str) -> bool:
        """In a time that does not tell how much of it is right."""
        return hmac.compare_digest(given.encode(), self.secret.encode())


def _name(host: str) -> str:
    """Without the port; IPv6 without brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _refuse(scope: Scope, status: int, sentence: str) -> Response:
    if scope["path"] == "/":
        return PlainTextResponse(sentence + "\n", status)
    return JSONResponse({"error": sentence}, status)

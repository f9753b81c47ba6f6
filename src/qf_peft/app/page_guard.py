"""What the page refuses, and what it tells the browser to refuse."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Nothing is loaded from elsewhere, sent elsewhere or framed by others; Gradio itself needs inline scripts and eval.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
_CLOSED = re.compile(r"^(/gradio_api)?/(file=|file/|upload|proxy=|stream|component_server|deep_link|run/|api/|call/)")


def guards(host: str) -> list[Middleware]:
    """Middleware for a page that listens at `host`."""
    names = [*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]
    return [Middleware(TrustedHostMiddleware, allowed_hosts=names), Middleware(_Guard)]


class _Guard:
    """Refuses what the page has no use for, and tells the browser to load nothing from elsewhere."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            if _CLOSED.match(scope["path"]):
                return await PlainTextResponse("This page has no files.", 403)(scope, receive, send)
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != headers.get("host"):
                # Another site, open in the same browser, must not teach the model.
                return await PlainTextResponse("This page takes requests from itself only.", 403)(scope, receive, send)

        async def marked(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []), (b"content-security-policy", _POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"), (b"x-content-type-options", b"nosniff"),
                ]  # fmt: skip
            await send(message)

        return await self.app(scope, receive, marked)

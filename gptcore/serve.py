"""Routes for machines: ``/healthz`` and ``/metrics``. No Streamlit in here.

They tell nothing that the pages do not, but a page of a foreign site must not be able to read them
through somebody's browser (DNS rebinding), so the Host header must be one that is expected.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptcore import __version__
from gptcore.lab import Lab
from gptcore.monitor.prometheus import CONTENT_TYPE_LATEST

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def routes(lab: Lab, hosts: Collection[str] | None = None) -> list[Route]:
    """Return ``GET /healthz`` and ``GET /metrics`` for ``lab``.

    Args:
        lab: whose health and numbers to tell.
        hosts: names in a Host header that are answered, ``*`` for any. If not given: those of
            ``GPTLAB_ALLOWED_HOSTS`` (comma-separated) beside the loopback's.
    """

    # Plain functions: Starlette runs them in a thread, and a slow database holds up nobody else.
    def healthz(request: Request) -> Response:
        health = lab.health()
        return JSONResponse(
            {
                "ok": health.ok,
                "database": health.database,
                "hosts": dict(health.hosts),
                "version": __version__,
            },
            status_code=200 if health.ok else 503,
        )

    def metrics(request: Request) -> Response:
        return Response(lab.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    guard = [Middleware(Guard, hosts=allowed_hosts() if hosts is None else hosts)]
    return [
        Route("/healthz", healthz, methods=["GET"], middleware=guard),
        Route("/metrics", metrics, methods=["GET"], middleware=guard),
    ]


class Guard:
    """Refuses a Host that is not expected (DNS rebinding), and adds security headers to answers.

    Args:
        app: what to guard.
        hosts: names that are expected, in lower case; ``*`` is any.
        headers: to add where the answer has none of that name.
    """

    def __init__(
        self, app: ASGIApp, hosts: Collection[str], headers: Mapping[str, str] = HEADERS
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or one web socket."""

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
        elif "*" in self._hosts or host_name(Headers(scope=scope).get("host", "")) in self._hosts:
            await self._app(scope, receive, send_guarded)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            refusal = PlainTextResponse(
                "This host name is not expected here: add it to GPTLAB_ALLOWED_HOSTS.\n", 421
            )
            await refusal(scope, receive, send_guarded)


def allowed_hosts() -> frozenset[str]:
    """Return the names in a Host header that are answered: the loopback's, and what was added."""
    more = os.environ.get("GPTLAB_ALLOWED_HOSTS", "").split(",")
    return LOOPBACK | {name.strip().lower() for name in more if name.strip()}


def host_name(header: str) -> str:
    """Return the name in a Host header, without its port and an IPv6 address's brackets."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]

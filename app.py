"""Launcher: ``streamlit run app.py`` serves the pages, their assets, and two routes for machines.

The script of the pages is ``pages/main.py``; what stands here lives as long as the server does: the
Lab, the look for closed tabs, and everything around a page that is HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import plotly
import streamlit as st
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send
from streamlit.runtime import Runtime

from gptcore.lab import Lab
from gptcore.serve import Guard, allowed_hosts, routes
from pages.parts import services

PRUNE_EVERY_S = 1.0
PLOTLY_FOLDER = Path(plotly.__file__).parent / "package_data"
ASSETS_FOLDER = ROOT / "pages" / "parts" / "assets"
HEADERS: Mapping[str, str] = {
    # Streamlit's own page has inline scripts and styles, and mounts components from blobs; nothing
    # may come from, or be told to, another host.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' "
    "'unsafe-eval' 'wasm-unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-ancestors 'self'; base-uri 'self'; form-action 'self'; "
    "object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
}

log = logging.getLogger(__name__)


class Machine:
    """``/healthz`` and ``/metrics``, which need a lab that is opened after the routes are made."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand over to the routes of the lab that is open."""
        await Router(routes(services.lab()))(scope, receive, send)


async def asset(request: Request) -> Response:
    """Serve Plotly's own script from its package, and the scripts of our components."""
    name = request.path_params["name"]
    if name == "plotly.min.js":
        found = await _plotly.get_response(name, request.scope)
        found.headers["Cache-Control"] = "public, max-age=86400"
    else:
        found = await _assets.get_response(name, request.scope)
        # A changed script must not meet the old one: the browser asks, and is told "unchanged".
        found.headers["Cache-Control"] = "no-cache"
    return found


_plotly = StaticFiles(directory=PLOTLY_FOLDER)
_assets = StaticFiles(directory=ASSETS_FOLDER)


@asynccontextmanager
async def lifespan(app: st.App) -> AsyncIterator[dict[str, Any]]:
    """Open the lab before the first page, and close it after the last."""
    lab = await asyncio.to_thread(Lab.open)
    services.set_lab(lab)
    stopped = threading.Event()
    watcher = threading.Thread(target=prune, args=(lab, stopped), name="closed tabs", daemon=True)
    watcher.start()
    try:
        yield {}
    finally:
        stopped.set()
        services.set_lab(None)
        await asyncio.to_thread(lab.close)
        await asyncio.to_thread(watcher.join, 5.0)


def prune(lab: Lab, stopped: threading.Event) -> None:
    """Once a second, tell the lab which browser sessions are still there."""
    while not stopped.wait(PRUNE_EVERY_S):
        runtime = Runtime.instance()
        try:
            lab.prune_watchers(runtime.is_active_session)
        except Exception:
            # One failed look must not end the looking: abandoned work would then run for ever.
            log.exception("Looking for closed tabs failed; trying again")


app = st.App(
    ROOT / "pages" / "main.py",
    lifespan=lifespan,
    routes=[
        Route("/healthz", Machine(), methods=["GET"]),
        Route("/metrics", Machine(), methods=["GET"]),
        Route("/gptlab/{name}", asset, methods=["GET"]),
    ],
    middleware=[Middleware(Guard, hosts=allowed_hosts(), headers=HEADERS)],
)

if __name__ == "__main__":
    app.run()
